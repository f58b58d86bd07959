"""One measurement of llama.cpp (`xllamacpp`): all prompts at once, continuous batching, greedy. Prints one JSON object.

python llama_cpp_decode.py CHECKPOINT PROMPTS --dtype bfloat16 --new-tokens 33 --threads 2

The checkpoint (Qwen3-MoE, safetensors) is written as GGUF beside it, in the same dtype, where that has not been done.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import safe_open

from moempi.files.inputs import read_inputs

WARM_UP = 4  # new tokens
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",  # in float32 as well
}
PRODUCTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--dtype", required=True, choices=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    model = gguf_of(given.checkpoint, given.dtype)
    if not model.exists():
        write_gguf(given.checkpoint, model, given.dtype)
    prompts = [row.tolist() for row in read_inputs(given.prompts).tokens]
    begin = time.perf_counter()
    server = start(model, prompts, given.new_tokens, given.threads)
    loaded = time.perf_counter()
    generate(server, prompts, WARM_UP)
    ready = time.perf_counter()
    generate(server, prompts, given.new_tokens)
    seconds = time.perf_counter() - ready
    told = {"seconds": seconds, "load_seconds": loaded - begin, "warm_up_seconds": ready - loaded}
    print(json.dumps({**told, "new_tokens": len(prompts) * given.new_tokens}))


def gguf_of(checkpoint: Path, dtype: str) -> Path:
    """Where a checkpoint lies as GGUF."""
    return checkpoint.with_name(f"{checkpoint.name}-{dtype}.gguf")


def start(model: Path, prompts: list[list[int]], new_tokens: int, threads: int) -> Any:
    """A server in this process, with a slot for every prompt."""
    import xllamacpp

    longest = max(map(len, prompts)) + new_tokens + 8
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel = len(prompts)
    params.n_ctx = len(prompts) * -(-longest // 256) * 256
    params.n_batch = params.n_ubatch = 2048
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.kv_unified = False
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


def generate(server: Any, prompts: list[list[int]], new_tokens: int) -> None:
    """Exactly so many greedy tokens for every prompt."""

    def one(prompt: list[int]) -> int:
        request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0.0, "ignore_eos": True,
                   "cache_prompt": False}  # fmt: skip
        answer = server.handle_completions(request)
        if "timings" not in answer and "usage" not in answer:
            raise SystemExit(str(answer)[:500])
        return int(answer["usage"]["completion_tokens"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        made = list(pool.map(one, prompts))
    assert made == [new_tokens] * len(prompts), made


def write_gguf(checkpoint: Path, out: Path, dtype: str) -> None:
    """The weights of a Qwen3-MoE in llama.cpp's format; matrices in `dtype`, norms and gates in float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = GGUFWriter(str(out), "qwen3moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    # Words are never asked for: tokens go in, and what comes out is counted.
    vocab = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)

    read = reader(checkpoint)

    def add(name: str, tensor: torch.Tensor, kind: str = dtype) -> None:
        data = tensor.to(getattr(torch, kind)).contiguous()
        if kind == "float32":
            writer.add_tensor(name, data.numpy())
        else:
            writer.add_tensor(name, data.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)

    add("token_embd.weight", read("model.embed_tokens.weight"))
    add("output_norm.weight", read("model.norm.weight"), "float32")
    if not config["tie_word_embeddings"]:
        add("output.weight", read("lm_head.weight"))
    for layer in range(config["num_hidden_layers"]):
        begin, to = f"model.layers.{layer}.", f"blk.{layer}."
        for names, kind in ((NORMS, "float32"), (PRODUCTS, dtype)):
            for theirs, name in names.items():
                add(f"{to}{name}.weight", read(f"{begin}{theirs}.weight"), kind)
        for theirs, name in EXPERTS.items():
            all_of_them = [read(f"{begin}mlp.experts.{e}.{theirs}.weight") for e in range(config["num_experts"])]
            add(f"{to}{name}.weight", torch.stack(all_of_them))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reader(checkpoint: Path) -> Any:
    """A function from a tensor's name to the tensor."""
    files = [safe_open(path, "pt") for path in sorted(checkpoint.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    return lambda name: where[name].get_tensor(name)


if __name__ == "__main__":
    main()
