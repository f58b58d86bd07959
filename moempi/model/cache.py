"""The KV cache of one home rank: pages of 64 positions, which are also the blocks that attention reads.

Keys are stored transposed, so that a page is the right-hand side of a product as it lies.
"""

from __future__ import annotations

import torch

from moempi.errors import FitError
from moempi.model.config import PAGE, padded_head


def pages_for(tokens: int) -> int:
    """Pages that `tokens` positions take."""
    return -(-tokens // PAGE)


class KVCache:
    """Pages of all layers, handed out to sequences whole and taken back whole.

    Args:
        n_layers, n_kv_heads, head_dim: of the model.
        tokens: positions that the cache holds; rounded up to pages.
        dtype: of the stored keys and values.
        device: where they are stored.
        spare_pages: further pages, behind the others, that no sequence gets.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        spare_pages: int = 0,
    ):
        self.n_pages = pages_for(tokens)
        n, width = self.n_pages + spare_pages, padded_head(head_dim)
        self.keys = torch.zeros(n_layers, n, n_kv_heads, width, PAGE, dtype=dtype, device=device)
        self.values = torch.zeros(n_layers, n, n_kv_heads, PAGE, width, dtype=dtype, device=device)
        self._free = list(range(self.n_pages - 1, -1, -1))

    def has_room(self, tokens: int) -> bool:
        """Whether a sequence that will grow to `tokens` positions can be taken in now."""
        return pages_for(tokens) <= len(self._free)

    def take(self, tokens: int) -> list[int]:
        """Pages for a sequence that will grow to `tokens` positions.

        Raises:
            FitError: more than are free; ask `has_room` first.
        """
        pages = pages_for(tokens)
        if pages > len(self._free):
            raise FitError(f"a sequence of {tokens} positions needs {pages} KV pages; {len(self._free)} are free")
        return [self._free.pop() for _ in range(pages)]

    def give_back(self, pages: list[int]) -> None:
        """Return a sequence's pages; what they hold is overwritten by their next owner before it is read."""
        self._free.extend(pages)
