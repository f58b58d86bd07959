"""A random model in `transformers` on the GPU that this process sees: prefill, and greedy decoding. Writes JSON.

python multi_gpu_transformers.py CONFIG PROMPTS PROMPT_TOKENS NEW_TOKENS OUT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

BATCH = 32  # prompts of a prefill
SHORT = 16  # tokens of a prompt whose decoding counts
WARM_UP = 2  # new tokens


def main() -> None:
    """Measure both phases after a short one that does not count."""
    config, out = Path(sys.argv[1]), Path(sys.argv[5])
    prompts, length, new = map(int, sys.argv[2:5])
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = build(json.loads(config.read_text()))
    vocab, device = model.config.vocab_size, model.device
    long = torch.randint(vocab, (prompts, length), device=device)
    short = torch.randint(vocab, (prompts, SHORT), device=device)
    with torch.inference_mode():
        prefill(model, long[:BATCH])
        generate(model, short, WARM_UP)
        results = {
            "prefill": {"tokens": long.numel(), "seconds": timed(lambda: prefill(model, long))},
            "decode": {"tokens": prompts * new, "seconds": timed(lambda: generate(model, short, new))},
            "experts": getattr(model.config, "_experts_implementation", None),
        }
    out.write_text(json.dumps(results))


def build(config: dict[str, Any]) -> Qwen3MoeForCausalLM:
    """Made on the device: values don't matter, but routes are the gate's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        made = Qwen3MoeConfig(**{key: value for key, value in config.items() if key != "architectures"})
        made._experts_implementation = "grouped_mm" if device == "cuda" else "eager"
        return Qwen3MoeForCausalLM(made).eval()


def prefill(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> None:
    """The scores behind every prompt."""
    for batch in tokens.split(BATCH):
        model(batch, use_cache=True, logits_to_keep=1)


def generate(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, new_tokens: int) -> None:
    """Exactly so many greedy tokens for every row."""
    model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False, use_cache=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def timed(work: Callable[[], None]) -> float:
    """Seconds of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
