"""Logits of a run on the GPU against those of `transformers` there: float32 closely, bfloat16 as near as it is itself.

In bfloat16 both are compared with transformers in float32 on the same rounded weights: a run may not be further off
than transformers' own bfloat16 is. Medians and ninth deciles over tokens: another expert is now and then taken where
two gates nearly tie, by either.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "mpi"))

from models import write_prompts
from qwen import TOLERANCE, Model, base_seed, comparable, make_model, relative_difference

from moempi import build_cuda, mpi
from moempi.batch import Step
from moempi.build import Rank
from moempi.job import job_from_table
from moempi.layer_cuda import CudaForward, CudaStep
from moempi.model.huggingface import parse_config
from moempi.run import run

SEQUENCES = 12


@dataclass(frozen=True)
class Watched(CudaForward):
    """Keeps the logits of every row of every step."""

    kept: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    async def choose(self, x: torch.Tensor, step: Step) -> tuple[list[int], list[float]]:
        assert isinstance(step, CudaStep)
        (logits,) = await self.engine.fetch(self.network.logits(x))
        places = zip(step.owners.tolist(), step.host.positions[: step.n_tokens].tolist(), strict=True)
        self.kept.update(zip(places, logits, strict=True))
        return await super().choose(x, step)


def run_watched(model: Model, folder: Path, dtype: str) -> list[torch.Tensor]:
    """Logits [T, V] of every prompt, by a run in chunks and two microbatches on one rank."""
    watched: list[Watched] = []

    def build(*args: Any, **options: Any) -> Rank:
        rank = kind(*args, **options)
        held = {each.name: getattr(rank.forward, each.name) for each in fields(CudaForward)}
        watched.append(Watched(**held))
        return replace(rank, forward=watched[0])

    kind = build_cuda.build_rank
    sequences = model.sequences[:SEQUENCES]
    write_prompts(folder / "prompts.h5", [np.array(s, dtype=np.int32) for s in sequences], 1)
    table = {
        "model": {"weights": str(model.weights), "dtype": dtype}, "input": {"file": str(folder / "prompts.h5")},
        "output": {"file": str(folder / f"{dtype}.h5")}, "trace": {"level": "off"},
        "run": {"device": "cuda", "prefill_tokens": 50, "microbatches": 2},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_cuda, "build_rank", build)
        run(mpi.start(), job_from_table(table, folder / "job.toml"))
    kept = watched[0].kept
    return [torch.from_numpy(np.stack([kept[row, p] for p in range(len(s))])) for row, s in enumerate(sequences)]


def transformers_model(model: Model, dtype: torch.dtype) -> Any:
    from transformers import Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"dtype": dtype, "experts_implementation": "eager", "local_files_only": True}
    return Qwen3MoeForCausalLM.from_pretrained(model.checkpoint, **options).eval().cuda()


@torch.inference_mode()
def passed(theirs: Any, tokens: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [T, V] and gate logits, float32 on the host."""
    found = theirs(torch.tensor([tokens], device="cuda"), output_router_logits=True, use_cache=False)
    return found.logits[0].float().cpu(), [gate.reshape(len(tokens), -1).float().cpu() for gate in found.router_logits]


def off(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Norm of the difference of every row [T, V] relative to that of the expected one."""
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("number", range(3))
def test_float32(tmp_path: Path, number: int) -> None:
    model = make_model(tmp_path / "model", base_seed() + number)
    print(model)
    config = parse_config((tmp_path / "model" / "config.json").read_bytes(), "config.json")
    theirs, kept = transformers_model(model, torch.float32), 0
    for tokens, found in zip(model.sequences, run_watched(model, tmp_path, "float32"), strict=False):
        expected, gates = passed(theirs, tokens)
        keep = comparable(dict(zip(config.moe_layers, gates, strict=True)), config.top_k, config.n_layers)
        assert relative_difference(found[keep], expected[keep]) <= TOLERANCE
        kept += int(keep.sum())
    # One near tie early in the longest sequence spoils a third of all.
    assert kept > 0.5 * sum(map(len, model.sequences[:SEQUENCES]))


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_bfloat16(tmp_path: Path, seed: int) -> None:
    model = make_model(tmp_path / "model", seed)
    rounded = transformers_model(model, torch.bfloat16)
    theirs, ours, wide = [], [], transformers_model(model, torch.bfloat16).float()
    for tokens, found in zip(model.sequences, run_watched(model, tmp_path, "bfloat16"), strict=False):
        expected, _ = passed(wide, tokens)
        theirs.append(off(passed(rounded, tokens)[0], expected))
        ours.append(off(found, expected))
    for share in (0.5, 0.9):
        mine, other = (float(torch.cat(each).quantile(share)) for each in (ours, theirs))
        print(f"quantile {share}: {mine:.4f}, transformers {other:.4f}")
        assert mine <= 1.5 * other, f"quantile {share}: {mine}, transformers {other}"
