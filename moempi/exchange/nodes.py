"""Which ranks share a node: pure integers, whether MPI found the nodes or a job pretends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from moempi.errors import FitError


@dataclass(frozen=True)
class Nodes:
    """The node of every rank.

    Args:
        of: node of rank r, numbered from 0 by their first ranks; ranks of a node need not be neighbours.
    """

    of: tuple[int, ...]

    @cached_property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of every node, ascending; a rank's place among them is its local rank."""
        found: list[list[int]] = [[] for _ in set(self.of)]
        for rank, node in enumerate(self.of):
            found[node].append(rank)
        return tuple(tuple(ranks) for ranks in found)

    @property
    def n_nodes(self) -> int:
        """How many nodes there are."""
        return len(self.ranks)

    @property
    def n_ranks(self) -> int:
        """N."""
        return len(self.of)

    def local(self, rank: int) -> int:
        """Local rank: the place of a rank among those of its node."""
        return self.ranks[self.of[rank]].index(rank)

    def leader(self, node: int) -> int:
        """The first rank of a node."""
        return self.ranks[node][0]

    def describe(self) -> str:
        """For people: "4 nodes of 2 ranks", "nodes of 3, 1 and 4 ranks"."""
        sizes = [len(ranks) for ranks in self.ranks]
        if self.n_nodes == 1:
            return "one node"
        if len(set(sizes)) == 1:
            return f"{self.n_nodes} nodes of {sizes[0]} rank{'s' if sizes[0] > 1 else ''}"
        return f"nodes of {', '.join(map(str, sizes[:-1]))} and {sizes[-1]} ranks"


def one_node(n_ranks: int) -> Nodes:
    """All ranks together."""
    return Nodes((0,) * n_ranks)


def pretended(ranks_per_node: int | Sequence[int], n_ranks: int) -> Nodes:
    """Nodes of neighbouring ranks, as `exchange.ranks_per_node` has them: so many each, or one count for every node.

    Raises:
        FitError: they do not add up to the ranks of the job.
    """
    if isinstance(ranks_per_node, int):
        if n_ranks % ranks_per_node:
            raise FitError(
                f"exchange.ranks_per_node = {ranks_per_node} does not divide the {n_ranks} ranks of the job; "
                "choose another number of ranks, or list the ranks of every node"
            )
        ranks_per_node = [ranks_per_node] * (n_ranks // ranks_per_node)
    if sum(ranks_per_node) != n_ranks:
        raise FitError(
            f"exchange.ranks_per_node = {list(ranks_per_node)} adds up to {sum(ranks_per_node)} ranks, "
            f"the job has {n_ranks}"
        )
    ends = list(accumulate(ranks_per_node))
    return Nodes(tuple(sum(rank >= end for end in ends) for rank in range(n_ranks)))


def numbered(firsts: Sequence[int]) -> Nodes:
    """Nodes from the first rank of every rank's node."""
    number = {first: node for node, first in enumerate(sorted(set(firsts)))}
    return Nodes(tuple(number[first] for first in firsts))
