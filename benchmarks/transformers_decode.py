"""One measurement of `transformers`: greedy generation of a batch of prompts, left padded. Prints one JSON object.

Started by tinymoe_decode.py, once for every figure, so that nothing of an earlier measurement is left in the process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import Qwen3MoeForCausalLM
from transformers.utils import logging

from moempi.files.inputs import read_inputs

WARM_UP = 4  # new tokens that are generated before the clock starts


def main() -> None:
    given = _arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    begin = time.perf_counter()
    model = Qwen3MoeForCausalLM.from_pretrained(
        given.checkpoint, dtype=getattr(torch, given.dtype), experts_implementation=given.experts, local_files_only=True
    ).eval()
    loaded = time.perf_counter()
    tokens, mask = pad_left([torch.from_numpy(row).long() for row in read_inputs(given.prompts).tokens])
    if given.warm_up:
        generate(model, tokens, mask, given.warm_up)
    ready = time.perf_counter()
    generate(model, tokens, mask, given.new_tokens)
    seconds = time.perf_counter() - ready
    new_tokens = len(tokens) * given.new_tokens
    print(
        json.dumps(
            {
                "seconds": seconds,
                "new_tokens": new_tokens,
                "tokens_per_second": new_tokens / seconds,
                "load_seconds": loaded - begin,
                "warm_up_seconds": ready - loaded,
                "padded_tokens": tokens.numel(),
            }
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--experts", required=True, help="its experts_implementation")
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="new tokens before the clock starts")
    return parser.parse_args()


def pad_left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask [S, longest]."""
    longest = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest)
    for s, row in enumerate(rows):
        tokens[s, longest - len(row) :], mask[s, longest - len(row) :] = row, 1
    return tokens, mask.long()


def generate(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> None:
    """Exactly `new_tokens` greedy tokens for every row."""
    with torch.inference_mode():
        found = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert found.shape[1] == tokens.shape[1] + new_tokens


if __name__ == "__main__":
    main()
