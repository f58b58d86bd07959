"""What the trace of a stack has to add up to, on whatever device it ran."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from moempi import analysis
from moempi.bench.stack import Stack
from moempi.stages import EXPERT, STAGES


def check_trace(path: Path, stack: Stack, ranks: int, tokens: int, passes: int) -> None:
    """One round: every microbatch of every rank goes through all layers `passes` times."""
    trace = analysis.load(path)
    assert trace.job == {"bench layer": {**asdict(stack), "tokens": tokens, "passes": passes}}
    rows = ranks * stack.microbatches * tokens * stack.top_k * passes
    assert analysis.load_per_expert(trace).sum(1).tolist() == [rows] * stack.layers
    spans = trace.spans
    by_stage = Counter(STAGES[stage] for stage in spans["stage"].tolist())
    assert by_stage["step"] == ranks * stack.microbatches * passes
    assert by_stage["wait"] == by_stage["combine"] == by_stage["step"] * stack.layers
    assert spans["tokens"][spans["stage"] == EXPERT].sum() == rows * stack.layers
