"""The memory of a GPU: a limit holds, the plan is what is taken, and sequences that wait for room lose nothing.

One rank alone, and the GPU's other users (this process, too) counted before it starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "mpi"))

from models import Model, difference, write_model

from moempi.files.outputs import read_outputs
from moempi.job import to_toml
from moempi.prepare import look

PROGRAM = Path(__file__).parent / "programs" / "run_jobs.py"
PROMPTS, LENGTH, NEW, AT_ONCE = 64, 4000, 4, 4
PAGES = 63 * 64  # positions of a sequence, in whole pages of 64
# Few weights and a large cache: 128 KiB a position.
CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 512, "intermediate_size": 256,
    "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [],
    "norm_topk_prob": True, "tie_word_embeddings": True, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096, "eos_token_id": 0,
}  # fmt: skip
OPTIONS = {"model.dtype": "bfloat16", "run.device": "cuda", "run.prefill_tokens": 512, "generate.stop_at_eos": False}


def test_a_limit_holds_and_sequences_wait(tmp_path: Path) -> None:
    model = write_model(tmp_path, CONFIG, 1, [LENGTH] * PROMPTS, NEW, OPTIONS)
    others = torch.cuda.mem_get_info()
    at_once = {"run.capacity": PROMPTS, "memory.kv_tokens": AT_ONCE * PAGES}
    limit = look(model.job(tmp_path / "plan.h5", at_once), 1).shape.layout.memory[0].total
    free, _ = run_alone(tmp_path / "free", model, {"run.capacity": 8})
    held, said = run_alone(tmp_path / "held", model, {"run.capacity": PROMPTS, "memory.limit": limit})
    assert f"positions is full: {AT_ONCE} sequences at work" in said
    expected = read_outputs(tmp_path / "free" / "out.h5")
    assert len(expected) == PROMPTS and not difference(expected, tmp_path / "held" / "out.h5")
    for outcome in (free, held):
        peak = outcome["memory_peak"][0] - (others[1] - others[0])
        planned = outcome["memory_planned"][0]
        print(f"peak {peak / 2**20:.0f} MiB, planned {planned / 2**20:.0f} MiB, limit {limit / 2**20:.0f} MiB")
        assert abs(planned - peak) < 0.05 * peak
    assert peak <= limit


def run_alone(folder: Path, model: Model, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What a job came to in a process of its own, and what it said."""
    folder.mkdir()
    (folder / "job.toml").write_text(to_toml(model.job(folder / "out.h5", options)))
    (folder / "list.json").write_text(json.dumps([str(folder / "job.toml")]))
    command = [sys.executable, str(PROGRAM), str(folder / "list.json"), "plain"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (outcome,) = json.loads((folder / "list.outcomes.json").read_text())
    print(done.stdout)
    return outcome, done.stderr
