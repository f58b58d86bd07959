"""What a command or a run does with each kind of file, to its end: opening, checking, and reading every number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import samples

from moempi import analysis
from moempi.files.export_weights import export_checkpoint
from moempi.files.import_weights import import_checkpoint
from moempi.files.inputs import check_prompts, read_inputs
from moempi.files.links import read_links
from moempi.files.output_parts import latest_of, read_parts, restore_partial
from moempi.files.outputs import merge_outputs, read_outputs
from moempi.files.placement import fits, read_placement
from moempi.files.weights import info, open_weights
from moempi.job import load_job
from moempi.model.huggingface import parse_config

CONFIG = parse_config(json.dumps(samples.CONFIG), "config")


def inputs(path: Path) -> None:
    """As rank 0 does."""
    check_prompts(read_inputs(path), path, CONFIG, 8)


def weights(path: Path) -> None:
    """As ranks, `moempi weights info`, `--verify` and the export do."""
    info(path)
    with open_weights(path) as opened:
        for name in opened.shapes:
            opened.tensor(name)
        config = opened.config
        for layer in config.moe_layers:
            opened.expert(layer, 0, 0, config.expert_hidden // 2 or 1)
        opened.tokenizer()
        opened.verify()
    export_checkpoint(path, path.parent / "exported")


def placement(path: Path) -> None:
    """As rank 0 does."""
    fits(read_placement(path), CONFIG, samples.RANKS, 2, path)


def links(path: Path) -> None:
    """As rank 0 does, and what it asks of them."""
    _ = read_links(path).between


def outputs(path: Path) -> None:
    """As `moempi outputs show` and `merge` do."""
    found = read_outputs(path)
    for row in range(len(found)):
        json.dumps(found.sequence(row), allow_nan=False)
    merge_outputs(path.parent / "merged.h5", [path], mixed=True, incomplete=True)


def outputs_part(path: Path) -> None:
    """As a resume does, then as `moempi outputs show` does with an unfinished run."""
    target = path.parent.with_name("o.h5")
    parts = read_parts(target)
    restore_partial(parts, latest_of(parts, parts[0].origin.n_sequences if parts else 0))
    outputs(target)


def trace(path: Path) -> None:
    """As `moempi trace summary` and `placement.load` do, and every column."""
    found = analysis.load(path)
    json.dumps(analysis.summarize(found), allow_nan=False)
    analysis.load_per_expert(found)
    for group in (found.wall, found.sums, found.traffic, found.received, found.sizes, found.waits, found.spans):
        for name in group:
            group[name]
    _ = found.ranks, found.job, dict(found.clocks), found.load_by_rank


def trace_part(path: Path) -> None:
    """As for a run that did not end."""
    trace(path.parent.with_name("t.h5"))


def checkpoint(path: Path) -> None:
    """As `moempi weights import` does."""
    import_checkpoint(path.parent, path.parent.with_name("imported.h5"))


def job(path: Path) -> None:
    """As every command does."""
    load_job(path)


READERS: dict[str, Callable[[Path], None]] = {
    "inputs.h5": inputs,
    "weights.h5": weights,
    "placement.h5": placement,
    "links.h5": links,
    "outputs.h5": outputs,
    samples.PART: outputs_part,
    "trace.h5": trace,
    samples.TRACE_PART: trace_part,
    "checkpoint/model.safetensors": checkpoint,
    "checkpoint/config.json": checkpoint,
    "job.toml": job,
}
