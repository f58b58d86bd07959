"""Small sound files of every kind that a stranger may send; what is damaged in the cases are copies of them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
from safetensors.torch import save_file

from moempi.files import schema
from moempi.files.completions import Completion
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs
from moempi.files.links import MeasuredLinks, write_links
from moempi.files.output_writer import OutputWriter
from moempi.files.placement import write_placement
from moempi.files.trace import Clocks, merge_trace, write_part
from moempi.files.weights import open_weights
from moempi.job import PlacementOptions
from moempi.model.config import ModelConfig
from moempi.model.huggingface import pieces
from moempi.planning.placement import place
from moempi.recorder import Recorder
from moempi.stages import PREFILL

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "hidden_size": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 23,
    "intermediate_size": 14,
    "moe_intermediate_size": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}
RANKS = 4
JOB = """[model]
weights = "weights.h5"
leaves = 2
[input]
file = "inputs.h5"
[output]
file = "out/o.h5"
[generate]
max_new_tokens = 8
[placement]
strategy = "file"
file = "placement.h5"
[exchange]
ranks_per_node = [2, 2]
[memory]
limit = "1 GiB"
"""
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
PART = "o.h5.parts/part-00000001.h5"
TRACE_PART = "t.h5.parts/rank-00001-000001.h5"


def make_samples(folder: Path) -> None:
    """Write one sound file of every kind into an empty folder."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    init_weights(folder / "config.json", folder / "weights.h5", dtype="float32")
    with h5py.File(folder / "weights.h5", "r+") as file:
        schema.write_text(file.require_group("checkpoint"), "tokenizer.json", json.dumps(TOKENIZER))
        schema.write_text(file["checkpoint"], "generation_config.json", '{"eos_token_id": [7, 9]}')
    write_inputs(folder / "inputs.h5", _prompts(), {})
    with open_weights(folder / "weights.h5") as weights:
        _write_checkpoint(folder)
        write_placement(folder / "placement.h5", _placement(weights.config))
    write_links(folder / "links.h5", _links())
    _write_outputs(folder)
    _write_traces(folder)
    (folder / "job.toml").write_text(JOB)


def _prompts() -> Prompts:
    tokens = [np.array(row, np.int32) for row in ([1, 2, 3], [4], [5] * 20)]
    return Prompts(["a", "b", "c"], tokens, ["x", "yé", "z"], np.array([0, 4, 0], np.int32))


def _placement(config: ModelConfig) -> object:
    return place(config, RANKS, PlacementOptions(), 2, None, None)


def _write_checkpoint(folder: Path) -> None:
    into = folder / "checkpoint"
    into.mkdir()
    (into / "config.json").write_text(json.dumps(CONFIG))
    with open_weights(folder / "weights.h5") as weights:
        tensors = {
            piece.tensor: weights.box(name, piece.start, (1,) * (len(piece.start) - len(piece.shape)) + piece.shape)
            .reshape(piece.shape)
            .contiguous()
            for name, shape in weights.shapes.items()
            for piece in pieces(name, shape, False)
        }
    save_file(tensors, into / "model.safetensors", {"format": "pt"})


def _links() -> MeasuredLinks:
    source, destination = (np.array(one, np.int32) for one in ([0, 0, 1], [1, 2, 2]))
    time = np.full((3, 2), 1e-5)
    node = np.array([0, 0, 1], np.int32)
    sizes, latency, bandwidth = np.array([8, 1024]), np.full(3, 1e-5), np.full(3, 1e9)
    hosts, devices = ["h0", "h0", "h1"], ["cpu"] * 3
    return MeasuredLinks(sizes, source, destination, time, latency, bandwidth, node, hosts, devices, np.ones(len(node)))


def _write_outputs(folder: Path) -> None:
    options = {
        "job_json": json.dumps({"input": {"file": str(folder / "inputs.h5")}}),
        "identity": {"model": "aa", "inputs": "bb", "mode": "exact"},
        "sources": {"inputs": schema.file_digest(folder / "inputs.h5")},
        "n_sequences": 3,
        "commit_every": 3600.0,
    }
    for name, ends in (("outputs.h5", True), ("o.h5", False)):
        with OutputWriter.start(folder / name, **options) as writer:  # type: ignore[arg-type]
            for index in range(3):
                tokens = np.arange(index + 1, dtype=np.int32)
                writer.put(Completion(index, tokens, -tokens.astype(np.float32), "length"))
            if ends:
                writer.finish(_prompts(), {"mode": "exact", "decode": str})
            else:
                writer.commit()


def _write_traces(folder: Path) -> None:
    n, layers, experts, top_k = 2, 3, 5, 2
    zeros = np.zeros(n, np.int64)
    clocks = Clocks(1000, zeros, zeros, zeros, np.zeros(n))
    for name in ("trace.h5", "t.h5"):
        for rank in range(n):
            notes = Recorder("routes", rank, n, layers, experts, top_k)
            notes.start()
            for stage in range(12):
                notes.span(stage, stage % layers, (0, 1, PREFILL), 2000 + stage, 2100 + stage, 5, 640, 1)
            notes.sent(0, 2, 1 - rank, 8, 512)
            notes.routed(2, np.array([1, 0, 3, 0, 0]))
            rows = np.arange(3, dtype=np.int32)
            notes.routes(2, 0, 1, rows.astype(np.int64), rows, np.ones((3, 2), np.int16), np.ones((3, 2), np.float32))
            about = {**notes.describe(), "mode": "exact", "job": "{}", "start": 1000, "offset": 0, "error": 0, "at": 0}
            write_part(folder / name, rank, 1, notes.take(), about)
    meta = {**notes.describe(), "mode": "exact"}
    merge_trace(folder / "trace.h5", "{}", {}, clocks, [{"node": "n0"}, {"node": "n1"}], meta)
