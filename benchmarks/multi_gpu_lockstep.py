"""The stack of `moempi bench layer` on GPUs, and the same layers in lockstep through NCCL."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moempi.bench.layers_cuda import CudaLayers
from moempi.device import cuda_rows
from moempi.device.cuda_memory import Rows
from moempi.exchange.arrivals import Arrival


class WithLockstep(CudaLayers):
    """Also measures `lockstep`."""

    measured = ("stack", "pure", "ceiling", "lockstep")

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._exchanges = [self._exchange(m) for m in range(len(self.x))]
        most = max(sum(got) for _, got, _ in self._exchanges)
        self._got, self._back = self.apart.new_empty(2 * most, self.shape.d_model), torch.empty_like(self.packed)

    def _exchange(self, m: int) -> tuple[list[int], list[int], list[tuple[int, ...]]]:
        """Rows to every rank, rows from every rank, and what of these is for which slot.

        Layers are alike but for the turns of replicas, of which these layouts have none.
        """
        table = next(iter(self.tables.values())).table
        mine = self._sorted(table.layer, m)[1].cpu().numpy()  # by cover, which is a slot
        every = np.stack(self.world.allgather(mine))  # [N, S]
        begin = table.rank_begin
        sent = [int(mine[begin[r] : begin[r + 1]].sum()) for r in range(self.world.size)]
        here = every[:, begin[self.world.rank] : begin[self.world.rank + 1]]  # [N, slots of this rank]
        return sent, here.sum(1).tolist(), [tuple(rows.tolist()) for rows in here]

    def lockstep(self) -> None:
        """The usual way, on one stream."""
        with torch.cuda.stream(self.engine.low):  # small calls are recorded, which the default stream does not allow
            for layer, m in self._calls():
                sent, got, slots = self._exchanges[m]
                n = sum(got)
                places, _ = self._sorted(layer, m)
                cuda_rows.scatter(self.x[m], places, self.packed.data_ptr())
                rows, answers = self._got[:n], self._got[n : 2 * n]
                dist.all_to_all_single(rows, self.packed, got, sent)
                self._compute_slots(layer, got, slots)
                dist.all_to_all_single(self._back, answers, sent, got)
                cuda_rows.combine(self.x[m], self._back, places, self.routes[m].weights)

    def _compute_slots(self, layer: int, got: list[int], slots: list[tuple[int, ...]]) -> None:
        """Rows of all ranks are the first of what lies apart, answers the next as many."""
        flat, d, total, lo, batches = self._got.view(-1), self.shape.d_model, sum(got), 0, []
        for source, (n, per_slot) in enumerate(zip(got, slots, strict=True)):
            if n:
                places = Rows(flat, lo * d, n, d), Rows(flat, (total + lo) * d, n, d)
                batches.append(Arrival(source, 0, layer, 0, *places, per_slot, n))
            lo += n
        if batches:
            self.layers[layer](batches, flat)

    def free(self) -> None:
        """Give the communicators and the GPU's memory back. Collective."""
        del self._got, self._back
        super().free()
