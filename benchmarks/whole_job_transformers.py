"""A random model in `transformers`, every way of generating, on the GPU that this process sees. Writes JSON.

    python whole_job_transformers.py FOLDER NEW_TOKENS OUT INDEX COUNT    # prompts INDEX, INDEX + COUNT, ...
    python whole_job_transformers.py ... --ways=0,5                       # only these, by their places in WAYS
    python whole_job_transformers.py ... --save                           # only write the model, for --tp
    torchrun ... whole_job_transformers.py ... --tp                       # one model over the GPUs of all processes

Each way runs once for a few tokens, then counts. Results are written after each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from multi_gpu_transformers import timed
from torch import Tensor
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

BATCH = 32  # prompts of a prefill
WARM_UP = 4  # new tokens
LIMIT = 110  # seconds for a way, with its warm-up

Prompts = list[list[int]]


def main() -> None:
    folder, new, out, index, count = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:6])
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, too_long)
    prompts: Prompts = json.loads((folder / "prompts.json").read_text())[index::count]
    if "--save" in sys.argv:
        build(folder).save_pretrained(folder / "model")
        return
    tp = "--tp" in sys.argv
    model = load(folder) if tp else build(folder)
    found: dict[str, Any] = {}
    ways = TP if tp else WAYS
    for option in sys.argv[6:]:
        if option.startswith("--ways="):
            places = map(int, option.removeprefix("--ways=").split(","))
            ways = dict(list(ways.items())[place] for place in places)
    for name, way in ways.items():
        signal.alarm(LIMIT)
        try:
            # Continuous batching writes out of another thread, which inference mode would not let it.
            with torch.inference_mode("generate_batch" not in name), torch.no_grad():
                found[name] = way(model, prompts, new)
        except Exception as error:  # whatever stops it, it is what this way came to
            found[name] = {"error": f"{type(error).__name__}: {error}"[:600]}
        signal.alarm(0)
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if int(os.environ.get("RANK", "0")) == 0:
            keep(out, found)


def keep(out: Path, found: dict[str, Any]) -> None:
    """Write what there is; whoever ends this process leaves a whole file."""
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.replace(out)


def too_long(*_: Any) -> None:
    """Ends a way."""
    raise TimeoutError(f"not done in {LIMIT} s")


def build(folder: Path) -> Qwen3MoeForCausalLM:
    """Made on the device: values don't matter, but routes are the gate's."""
    config = json.loads((folder / "config.json").read_text())
    made = Qwen3MoeConfig(**{key: value for key, value in config.items() if key != "architectures"})
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return Qwen3MoeForCausalLM(made).eval()
    finally:
        torch.set_default_dtype(torch.float32)  # continuous batching makes tensors of the default dtype


def load(folder: Path) -> Qwen3MoeForCausalLM:
    """The saved model, over the GPUs of all processes."""
    return Qwen3MoeForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, tp_plan="auto").eval()


# ---------------------------------------------------------------- ways


def prefill(experts: str) -> Callable[..., dict[str, float]]:
    """The scores behind every prompt, in left-padded batches of prompts of about the same length."""

    def way(model: Qwen3MoeForCausalLM, prompts: Prompts, _: int) -> dict[str, float]:
        model.set_experts_implementation(experts)
        model.set_attn_implementation("sdpa")
        ordered = sorted(prompts, key=len)
        batches = [padded(ordered[i : i + BATCH], model.device) for i in range(0, len(ordered), BATCH)]

        def work() -> None:
            for tokens, mask in batches:
                model(tokens, attention_mask=mask, use_cache=True, logits_to_keep=1)

        work()
        return {"tokens": sum(map(len, prompts)), "seconds": timed(work)}

    return way


def generate(experts: str, attention: str = "sdpa", **options: Any) -> Callable[..., dict[str, float]]:
    """One left-padded batch."""

    def way(model: Qwen3MoeForCausalLM, prompts: Prompts, new: int) -> dict[str, float]:
        model.set_experts_implementation(experts)
        model.set_attn_implementation(attention)
        tokens, mask = padded(prompts, model.device)

        def work(n: int) -> None:
            model.generate(
                tokens, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, use_cache=True,
                eos_token_id=None, pad_token_id=0, **options,
            )  # fmt: skip

        # A static cache is as long as its generation: what is compiled for another length does not count.
        work(new if options else WARM_UP)
        return {"tokens": len(prompts) * new, "seconds": timed(lambda: work(new))}

    return way


def batching(experts: str) -> Callable[..., dict[str, float]]:
    """Continuous batching."""

    def way(model: Qwen3MoeForCausalLM, prompts: Prompts, new: int) -> dict[str, float]:
        model.set_experts_implementation(experts)
        model.set_attn_implementation("sdpa")

        def work(n: int) -> int:
            config = GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1, pad_token_id=0)
            with contextlib.redirect_stdout(sys.stderr):
                ended = model.generate_batch(inputs=prompts, generation_config=config)
            return sum(len(one.generated_tokens) for one in ended.values())

        with errors_of("ContinuousBatchingLogger") as errors:
            work(WARM_UP)
            made: list[int] = []
            seconds = timed(lambda: made.append(work(new)))
        if made[0] != len(prompts) * new:
            raise RuntimeError(f"{made[0]} new tokens, expected {len(prompts) * new}; {'; '.join(errors)[:500]}")
        return {"tokens": made[0], "seconds": seconds}

    return way


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[list[str]]:
    """What a logger is told of errors, with the exceptions behind them."""
    told: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            told.append(record.getMessage()[:200] + (f" ({type(error).__name__}: {error})" if error else ""))

    handler = Keep(logging.ERROR)
    logging.getLogger(name).addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger(name).removeHandler(handler)


WAYS: dict[str, Callable[..., dict[str, float]]] = {
    "prefill, grouped_mm": prefill("grouped_mm"),
    "generate, grouped_mm": generate("grouped_mm"),
    "prefill, eager": prefill("eager"),
    "generate, eager": generate("eager"),
    "generate, grouped_mm, flash_attention_2": generate("grouped_mm", "flash_attention_2"),
    "generate, grouped_mm, flex_attention": generate("grouped_mm", "flex_attention"),
    "generate, batched_mm": generate("batched_mm"),
    "generate_batch, grouped_mm": batching("grouped_mm"),
    "generate, grouped_mm, static cache, compiled": generate("grouped_mm", cache_implementation="static"),
}
TP: dict[str, Callable[..., dict[str, float]]] = {
    "tp, prefill, grouped_mm": prefill("grouped_mm"),
    "tp, generate, grouped_mm": generate("grouped_mm"),
}


def padded(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, longest], padded on the left."""
    longest = max(map(len, prompts))
    tokens, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)


if __name__ == "__main__":
    main()
