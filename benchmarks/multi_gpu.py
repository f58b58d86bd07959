"""Everything that several GPUs of one host are asked for, in one call of under ten minutes.

    python benchmarks/multi_gpu.py                       # on all GPUs there are; 2, 4 and 8 are what it is made for
    python benchmarks/multi_gpu.py --sections links stack --seconds 120

- links: latency and bandwidth of every pair of GPUs (`moempi bench links`).
- stack: MoE layers of dimension 7168 and hidden 2048 in bfloat16, one expert per GPU (top-2, top-4) and 64 packed
  (top-8), 512 to 8192 tokens per rank, beside the experts alone, the ceiling, and NCCL's `all_to_all_single` in
  lockstep (multi_gpu_stack.py).
- crowded: the same layers with several ranks on a GPU: 16 on 8 GPUs, 8 and 16 on fewer.
- job: a random model of `--gb` per GPU as a whole job on 1, 2, 4, 8 GPUs (`moempi bench job`).
- transformers: the same model there, one copy per GPU, each with its share of the prompts (multi_gpu_transformers.py).

Each section has its share of the time and is stopped at its end; what was measured by then is in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moempi.launch import this_program

HERE = Path(__file__).parent
D, HIDDEN, LAYERS = 7168, 2048, 6
TOKENS = (512, 2048, 4096, 8192)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 256, 256, 64
# Shares of the time.
SECTIONS = {"links": 0.1, "stack": 0.35, "crowded": 0.15, "job": 0.3, "transformers": 0.1}


@dataclass(frozen=True)
class Setting:
    """What is measured with, and where it goes."""

    gpus: int
    gb: float
    folder: Path
    small: bool  # a trial of the script itself, on the CPU

    def shape(self) -> list[str]:
        """Options of the layers."""
        d, hidden = (64, 32) if self.small else (D, HIDDEN)
        return [f"--d-model={d}", f"--hidden={hidden}", f"--layers={LAYERS}", "--mode=exact" if self.small else
                "--mode=fast", f"--device={'cpu' if self.small else 'cuda'}"]  # fmt: skip


def main() -> None:
    """Every section in a process of its own, one after the other."""
    given = _arguments()
    end, gpus = time.monotonic() + given.seconds, given.gpus or count_gpus()
    if not gpus:
        raise SystemExit("no GPU is listed by nvidia-smi; --gpus 2 --small tries the script on the CPU")
    out = given.out or HERE / "results" / f"multi_gpu_{gpus}.json"
    folder = out.resolve().parent / f"{out.stem}.parts"
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(gpus, given.gb, folder, given.small)
    results: dict[str, Any] = {"gpus": gpus, "devices": devices(), "sections": {}}
    for name in given.sections:
        began, left = time.monotonic(), end - time.monotonic()
        share = left * SECTIONS[name] / sum(SECTIONS[n] for n in given.sections[given.sections.index(name) :])
        try:
            found: Any = RUNS[name](setting, began + share)
        except Exception as error:  # one section less, and the others go on
            found = {"error": f"{type(error).__name__}: {error}"}
        results["sections"][name] = {"seconds": time.monotonic() - began, "found": found}
        out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(report(results)), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="how many; all by default")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--gb", type=float, default=5.0, help="of the model's weights per GPU, in GB")
    parser.add_argument("--out", type=Path, help="where the figures go; by default results/multi_gpu_N.json")
    parser.add_argument("--small", action="store_true", help="a trial of this script on the CPU, in small")
    return parser.parse_args()


def devices() -> list[str]:
    """The GPUs, as the driver lists them; nothing where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    except OSError:
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def count_gpus() -> int:
    """GPUs of this machine."""
    return len(devices())


# ---------------------------------------------------------------- sections


def links(setting: Setting, deadline: float) -> Any:
    """Every pair of GPUs, every size."""
    largest = "1 MiB" if setting.small else "256 MiB"
    device = "cpu" if setting.small else "cuda"
    line = this_program("bench", "links", str(setting.folder / "links.h5"), "-n", str(setting.gpus), "--overwrite",
                        "--json", f"--device={device}", f"--largest={largest}", "--limit=0.3")  # fmt: skip
    return json.loads(_run(line, deadline))


def stack(setting: Setting, deadline: float) -> Any:
    """One expert per GPU, then many; all sizes."""
    out, n = setting.folder / "stack.json", setting.gpus
    shapes = [(n, k) for k in (2, 4) if k <= n] + [(64, 8)]
    out.unlink(missing_ok=True)
    tokens = (8, 16) if setting.small else TOKENS
    line = [*_mpi(n), str(HERE / "multi_gpu_stack.py"), str(out), *setting.shape(), "--seconds",
            f"{deadline - time.monotonic() - 5:.0f}", "--shapes", *(f"{e}x{k}" for e, k in shapes)]  # fmt: skip
    error = _tried([*line, "--tokens", *map(str, tokens)], deadline)
    return {"results": json.loads(out.read_text()) if out.exists() else [], **error}


def crowded(setting: Setting, deadline: float) -> Any:
    """More ranks than GPUs."""
    found = []
    for ranks in (16,) if setting.gpus == 8 else (4,) if setting.small else (8, 16):
        out = setting.folder / f"crowded-{ranks}.json"
        out.unlink(missing_ok=True)
        line = this_program("bench", "layer", str(out), "-n", str(ranks), *setting.shape(), f"--experts={ranks}",
                            "--top-k=2", "--tokens=512", "--rounds=3", "--passes=1", "--overwrite",
                            "--gpu-aware=on")  # fmt: skip
        error = _tried(line, deadline)
        found.append({"ranks": ranks, **(json.loads(out.read_text()) if out.exists() else {}), **error})
    return found


def job(setting: Setting, deadline: float) -> Any:
    """The whole job on 1, 2, 4, ... GPUs."""
    out, config = setting.folder / "job.json", write_config(setting)
    out.unlink(missing_ok=True)
    counts = [n for n in (1, 2, 4, 8) if n <= setting.gpus]
    small = {"--prompts": 8, "--prompt-tokens": 16, "--new-tokens": 4, "--device": "cpu"}
    large = {"--prompts": PROMPTS, "--prompt-tokens": PROMPT_TOKENS, "--new-tokens": NEW_TOKENS, "--device": "cuda"}
    options = [f"{name}={value}" for name, value in (small if setting.small else large).items()]
    # All ranks are here, and messages were tried by the links: no trial for each of the jobs.
    sets = [] if setting.small else ["model.mode=fast", "exchange.gpu_aware=on", "run.prefill_tokens=4096"]
    line = this_program("bench", "job", str(out), "-n", str(setting.gpus), f"--config={config}", *options)
    line += [*(f"--counts={n}" for n in counts), *(f"--set={one}" for one in sets)]
    error = _tried(line, deadline)
    return {"config": json.loads(config.read_text()), **(json.loads(out.read_text()) if out.exists() else {}), **error}


def transformers(setting: Setting, deadline: float) -> Any:
    """One copy of the model per GPU, all at once."""
    config, each = write_config(setting), -(-(8 if setting.small else PROMPTS) // setting.gpus)
    sizes = (each, 16, 4) if setting.small else (each, PROMPT_TOKENS, NEW_TOKENS)
    outs = [setting.folder / f"transformers-{i}.json" for i in range(setting.gpus)]
    lines = [[sys.executable, str(HERE / "multi_gpu_transformers.py"), str(config), *map(str, sizes), str(out)]
             for out in outs]  # fmt: skip
    running = []
    for i, (line, out) in enumerate(zip(lines, outs, strict=True)):
        out.unlink(missing_ok=True)
        running.append(_start(line, {**os.environ, "CUDA_VISIBLE_DEVICES": "" if setting.small else str(i)}))
    texts = [_finish(one, line, deadline) for one, line in zip(running, lines, strict=True)]
    del texts
    found = [json.loads(out.read_text()) for out in outs]
    phases = {}
    for phase in ("prefill", "decode"):
        tokens, slowest = sum(one[phase]["tokens"] for one in found), max(one[phase]["seconds"] for one in found)
        phases[phase] = tokens / slowest
    return {"tokens_per_second": phases, "copies": found}


RUNS: dict[str, Callable[[Setting, float], Any]] = {
    "links": links,
    "stack": stack,
    "crowded": crowded,
    "job": job,
    "transformers": transformers,
}


def write_config(setting: Setting) -> Path:
    """A Qwen3-MoE of so many layers that its weights take what is asked for: 64 experts of 3 x 2048 x 768."""
    small = setting.small
    d, hidden, experts = (64, 32, 8) if small else (2048, 768, 64)
    layers = 2 if small else max(2, round(setting.gb * setting.gpus * 1e9 / (2 * 3 * d * hidden * experts)))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": d,
        "num_hidden_layers": layers, "num_attention_heads": 4 if small else 32, "num_key_value_heads": 4,
        "head_dim": 16 if small else 128, "vocab_size": 256 if small else 32768, "intermediate_size": hidden,
        "moe_intermediate_size": hidden, "num_experts": experts, "num_experts_per_tok": 2 if small else 8,
        "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True, "tie_word_embeddings": True,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024, "hidden_act": "silu",
        "eos_token_id": None,
    }  # fmt: skip
    path = setting.folder / "config.json"
    path.write_text(json.dumps(config, indent=1))
    return path


# ---------------------------------------------------------------- processes


def _mpi(ranks: int) -> list[str]:
    return [sys.executable, "-m", "moempi.launch", "-n", str(ranks), "--", sys.executable]


def _tried(line: list[str], deadline: float) -> dict[str, str]:
    """Run a command; what went wrong, to stand beside what it has written by then."""
    try:
        _run(line, deadline)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    return {}


def _run(line: list[str], deadline: float) -> str:
    return _finish(_start(line, dict(os.environ)), line, deadline)


def _start(line: list[str], environ: dict[str, str]) -> subprocess.Popen[str]:
    environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [environ.get("PYTHONPATH")])])
    return subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str], line: list[str], deadline: float) -> str:
    """What it printed; at the deadline it is ended, as Ctrl-C would."""
    try:
        out, said = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=8)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(line[-6:])} ended with {process.returncode}: {(said or out)[-800:]}")
    return out


# ---------------------------------------------------------------- for people


def report(results: dict[str, Any]) -> list[str]:
    """A few lines for every section."""
    lines = [f"{results['gpus']} GPUs: {results['devices'][:1]}"]
    for name, section in results["sections"].items():
        found = section["found"]
        error = found.get("error", "") if isinstance(found, dict) else ""
        lines.append(f"{name}: {section['seconds']:.0f} s {error[-600:]}")
        lines += SHOWN[name](found) if not (error and name in ("links", "transformers")) else []
    return lines


def _show_links(found: Any) -> list[str]:
    return [f"  {p['source']}-{p['destination']}: {1e6 * p['latency']:.1f} us, {p['bandwidth'] / 1e9:.0f} GB/s"
            for p in found["pairs"]]  # fmt: skip


def _show_stack(found: Any) -> list[str]:
    rows = found["results"] if isinstance(found, dict) else found
    lines = []
    for one in rows:
        for row in one.get("results", []):
            figures = ", ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
            shares = ", ".join(f"of {key[3:]} {row[key]:.3f}" for key in row if key.startswith("of_"))
            s = one["stack"]
            lines.append(f"  E {s['experts']} K {s['top_k']} {s['mode']} T {row['tokens']}: {figures}; {shares}")
        lines += [f"  {one['error'][-300:]}"] if "error" in one else []
    return lines


def _show_job(found: Any) -> list[str]:
    return [f"  {one['ranks']} ranks: prefill {one['prefill']:.0f}, decode {one['decode']:.0f} tokens/s"
            for one in found.get("rates", [])]  # fmt: skip


def _show_transformers(found: Any) -> list[str]:
    return [f"  {phase}: {rate:.0f} tokens/s" for phase, rate in found["tokens_per_second"].items()]


SHOWN: dict[str, Callable[[Any], list[str]]] = {
    "links": _show_links,
    "stack": _show_stack,
    "crowded": _show_stack,
    "job": _show_job,
    "transformers": _show_transformers,
}


if __name__ == "__main__":
    main()
