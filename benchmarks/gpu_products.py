"""How fast the tiles of the exact products and of attention are on a GPU, each beside the others and cuBLAS.

    python benchmarks/gpu_products.py --out FILE        # a minute on one GPU

What `moempi.device.product_tiles` and `moempi.device.tile_plan` choose is chosen by these figures: us of a product, of
an expert call with the rows of two homes, and of attention; medians, with a cold cache of level 2. Launches are not in
it, but for cuBLAS slot by slot: the host takes longer for its many than the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from moempi.device import cuda_experts
from moempi.device.cuda_attention import attend
from moempi.device.cuda_experts import Scratch, Stack
from moempi.device.cuda_memory import Rows
from moempi.device.cuda_products import product
from moempi.device.cuda_transfer import all_to_device, words_of
from moempi.device.product_tiles import TILES, Tile, tile_for, with_room
from moempi.device.tile_plan import TILE, WIDE_TILE, TilePlan, plan_tiles
from moempi.exchange.arrivals import Arrival
from moempi.model.attention import Span

DTYPE = torch.bfloat16
PRODUCTS = (5120, 2048), (2048, 4096), (4096, 7168), (7168, 2048)  # outputs, inputs
ROWS = 16, 128, 512, 2048, 8192
# Slots, dimension, hidden: rows of a slot and home.
EXPERTS = {
    (32, 2048, 768): (8, 16, 32, 64, 96, 128, 192, 256, 512),
    (8, 7168, 2048): (64, 256, 1024),
    (1, 7168, 2048): (64, 512, 4096),
}
# Heads, heads of keys, sequences, positions, the first that is new.
PREFILL = (32, 4, 16, 256, 0), (32, 4, 2, 2048, 0), (128, 128, 2, 2048, 0), (128, 8, 2, 2048, 0)
DECODE = ((32, 4, 128, 330, 329),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    with torch.cuda.stream(torch.cuda.Stream()):  # nothing is recorded on the default one
        for part in (products, experts, attention):
            results[part.__name__] = part(flush)
            given.out.write_text(json.dumps(results, indent=1) + "\n")
    for part in ("products", "experts", "attention"):
        print(part, *(json.dumps(one) for one in results[part]), sep="\n", flush=True)


def timed(flush: torch.Tensor, work: Callable[[], Any], rounds: int = 9) -> float:
    """Median us on the GPU, the launch not counted."""
    for _ in range(3):
        work()
    found = []
    for _ in range(rounds):
        flush.zero_()
        torch.cuda._sleep(600_000)  # while the host launches what is timed
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * begin.elapsed_time(end))
    return statistics.median(found)


def name_of(tile: Tile) -> str:
    """For the results: rows, outputs and stages."""
    return f"{tile.rows}x{tile.outputs}/{tile.stages}"


def products(flush: torch.Tensor) -> list[dict[str, Any]]:
    """Of one weight."""
    told = []
    for outputs, inputs in PRODUCTS:
        weight = torch.randn(outputs, inputs, device="cuda").to(DTYPE)
        for rows in ROWS:
            x = torch.randn(rows, inputs, device="cuda").to(DTYPE)
            us = {name_of(tile): timed(flush, lambda x=x, w=weight, t=tile: product(x, w, t)) for tile in TILES[DTYPE]}
            us["cuBLAS"] = timed(flush, lambda x=x, w=weight: F.linear(x, w))
            chosen = name_of(tile_for(DTYPE, rows, outputs))
            told.append({"outputs": outputs, "inputs": inputs, "rows": rows, "us": us, "chosen": chosen})
    return told


def experts(flush: torch.Tensor) -> list[dict[str, Any]]:
    """Of an expert call, with as many rows of two homes for every slot; cuBLAS slot by slot and home by home."""
    told = []
    for (slots, d, hidden), each in EXPERTS.items():
        gate_up = torch.randn(slots, 2 * hidden, d, device="cuda").to(DTYPE) / 50
        down = torch.randn(slots, d, hidden, device="cuda").to(DTYPE) / 50
        for rows in each:
            n = slots * rows
            flat = torch.randn(4 * n * d, device="cuda").to(DTYPE)
            batches = [
                Arrival(home, 0, 0, 0, *(Rows(flat, (i + home) * n * d, n, d) for i in (0, 2)), (rows,) * slots, n)
                for home in range(2)
            ]
            us = {}
            cuda_experts.with_room = lambda tile, _: tile
            for tile in TILES[DTYPE]:
                cuda_experts.tile_for = lambda *_, tile=tile: tile
                stack = Stack(gate_up, down, exact=True, scratch=Scratch())
                us[name_of(tile)] = timed(flush, lambda s=stack, b=batches, m=flat: s(b, m))
            cuda_experts.tile_for, cuda_experts.with_room = tile_for, with_room
            worth, cuda_experts.WORTH_CALLS = cuda_experts.WORTH_CALLS, 0.0
            stack = Stack(gate_up, down, exact=False, scratch=Scratch())
            us["cuBLAS"] = timed(flush, lambda s=stack, b=batches, m=flat: s(b, m))
            cuda_experts.WORTH_CALLS = worth
            shape = {"slots": slots, "d_model": d, "hidden": hidden, "rows_of_a_slot_and_home": rows}
            told.append({**shape, "us": us, "chosen": name_of(tile_for(DTYPE, 2 * rows, d, slots))})
    return told


def attention(flush: torch.Tensor) -> list[dict[str, Any]]:
    """Of a batch, by rows of a tile."""
    told = []
    for heads, kv_heads, sequences, end, begin in PREFILL + DECODE:
        pages = -(-end // 64)
        spans = [Span(begin, end, list(range(i * pages, (i + 1) * pages))) for i in range(sequences)]
        keys = torch.randn(sequences * pages, kv_heads, 128, 64, device="cuda").to(DTYPE)
        values = torch.randn(sequences * pages, kv_heads, 64, 128, device="cuda").to(DTYPE)
        queries = torch.randn(sequences * (end - begin), heads, 128, device="cuda").to(DTYPE)
        us = {}
        for rows in (TILE, WIDE_TILE, 2 * WIDE_TILE):
            plan = there(plan_tiles(spans, heads // kv_heads, rows))
            us[str(rows)] = timed(flush, lambda q=queries, k=keys, v=values, p=plan: attend(q, k, v, p))
        shape = {"heads": heads, "kv_heads": kv_heads, "sequences": sequences, "positions": end, "new": end - begin}
        told.append({**shape, "us": us})
    return told


def there(plan: TilePlan) -> TilePlan:
    """A plan on the GPU."""
    tensors = plan.tensors()
    return replace(plan, **all_to_device(tensors, torch.empty(words_of(tensors), dtype=torch.int64, device="cuda")))


if __name__ == "__main__":
    main()
