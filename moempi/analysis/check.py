"""Does the trace add up? Counts that different ranks, or different parts of the program, made of the same things."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moempi.analysis.time import tokens_per_stage
from moempi.analysis.trace import Trace
from moempi.analysis.traffic import received_matrix, traffic_matrix
from moempi.files.completions import PARTIAL, Outputs
from moempi.stages import EXPERT, FIRST_LEAF, HEAD, KINDS, STAGES


def disagreements(trace: Trace, outputs: Outputs | None = None) -> list[str]:
    """What does not agree exactly, a sentence each; [] where all does.

    Of a trace that is unfinished only the time is checked: messages were under way at its last flush.

    Args:
        outputs: the completions of the same run.
    """
    found = [*_time(trace), *(_spans(trace) if trace.level in ("full", "routes") else ())]
    if trace.unfinished:
        return found
    found += [*_links(trace), *_rows(trace)]
    if trace.level == "routes":
        found += _routes(trace)
    if outputs is not None:
        found += _outputs(trace, outputs)
    return found


def _time(trace: Trace) -> Iterator[str]:
    """Leaf stages against wall time."""
    leaves = np.zeros(trace.n_ranks, dtype=np.int64)
    chosen = trace.sums["stage"] >= FIRST_LEAF
    np.add.at(leaves, trace.sums["rank"][chosen], trace.sums["time"][chosen])
    wall = np.zeros(trace.n_ranks, dtype=np.int64)
    wall[trace.wall["rank"]] = trace.wall["time"]
    for rank in np.flatnonzero(leaves != wall):
        yield f"rank {rank}: its leaf stages took {leaves[rank]} ns, its work took {wall[rank]} ns"


def _spans(trace: Trace) -> Iterator[str]:
    """Leaf spans one after the other, from the begin of the work to its end; as many as the sums have."""
    spans = trace.spans
    for rank, begin, end in zip(*(trace.wall[name] for name in ("rank", "begin", "end")), strict=True):
        mine = np.flatnonzero((spans["rank"] == rank) & (spans["stage"] >= FIRST_LEAF))
        ends = np.concatenate([[begin], spans["end"][mine]])
        begins = np.concatenate([spans["begin"][mine], [end]])
        for gap in np.flatnonzero(ends != begins)[:1]:
            yield f"rank {rank}: a leaf stage ends at {ends[gap]} ns, the next begins at {begins[gap]} ns"
    counted = np.bincount(spans["stage"], minlength=len(STAGES))
    summed = np.bincount(trace.sums["stage"], weights=trace.sums["count"], minlength=len(STAGES)).astype(np.int64)
    for stage in np.flatnonzero(counted != summed):
        yield f"{STAGES[stage]}: {counted[stage]} spans, {summed[stage]} in the sums"


def _links(trace: Trace) -> Iterator[str]:
    """Sent against received, and dispatched against answered."""
    away = ~np.eye(trace.n_ranks, dtype=bool)
    for layer in range(trace.n_layers):
        for column in ("rows", "bytes", "messages"):
            for kind in KINDS:
                sent = traffic_matrix(trace, kind, column, layer) * away
                got = received_matrix(trace, kind, column, layer)
                yield from _pairs(sent, got, f"layer {layer}: {column} of {kind}", "sent", "received")
        dispatched, answered = (traffic_matrix(trace, kind, "rows", layer) for kind in ("dispatch", "answer"))
        yield from _pairs(dispatched, answered.T, f"layer {layer}: rows", "dispatched", "answered")


def _pairs(one: np.ndarray, other: np.ndarray, what: str, first: str, second: str) -> Iterator[str]:
    for a, b in np.argwhere(one != other)[:1]:
        yield f"{what} from rank {a} to rank {b}: {one[a, b]} {first}, {other[a, b]} {second}"


def _rows(trace: Trace) -> Iterator[str]:
    """The gates' choices against rows dispatched, and those against rows computed."""
    cut = set(trace.run.get("cut_layers", ()))
    for layer in range(trace.n_layers):
        dispatched = traffic_matrix(trace, "dispatch", "rows", layer).sum(axis=0)
        chosen, rows = int(trace.load[layer].sum()), int(dispatched.sum())
        # A cut expert has a row for each of its pieces.
        if rows < chosen if layer in cut else rows != chosen:
            yield f"layer {layer}: {chosen} tokens went to experts, {rows} rows were dispatched"
        computed = _computed(trace, layer)
        for rank in np.flatnonzero(dispatched != computed)[:1]:
            yield f"layer {layer}: rank {rank} got {dispatched[rank]} rows and computed {computed[rank]}"


def _computed(trace: Trace, layer: int) -> np.ndarray:
    sums = trace.sums
    chosen = (sums["stage"] == EXPERT) & (sums["layer"] == layer)
    rows = np.zeros(trace.n_ranks, dtype=np.int64)
    np.add.at(rows, sums["rank"][chosen], sums["tokens"][chosen])
    return rows


def _routes(trace: Trace) -> Iterator[str]:
    """The tokens' routes against the load, and that each token passed each MoE layer once."""
    routes = trace.routes
    load = np.zeros((trace.n_layers, trace.n_experts), dtype=np.int64)
    np.add.at(load, (routes["layer"][:, None], routes["experts"]), 1)
    for layer in np.flatnonzero((load != trace.load).any(axis=1)):
        yield f"layer {layer}: the routes' experts are not those of the load"
    tokens = np.stack([routes["layer"], routes["sequence"], routes["position"]])
    places, times = np.unique(tokens, axis=1, return_counts=True)
    for one in np.flatnonzero(times > 1)[:1]:
        layer, sequence, position = places[:, one]
        yield f"sequence {sequence}: position {position} passed layer {layer} {times[one]} times"


def _outputs(trace: Trace, outputs: Outputs) -> Iterator[str]:
    """Completions against what passed the layers and the head; where the run did all of them from their begin."""
    new, prompt = np.diff(outputs.offsets), np.diff(outputs.prompt_offsets)
    run = trace.run
    # What a resumed run says it finished includes what the runs before it did; its trace does not.
    alone = not run.get("earlier_finished") and not run.get("earlier_new_tokens")
    finished = run.get("finished") == run.get("sequences") == len(outputs)
    if alone and finished and (outputs.finish_reason != PARTIAL).all():
        # The last token of a sequence is never taken through the layers.
        passed = int((prompt + new - 1).sum())
        for layer in np.flatnonzero(trace.load.sum(axis=1)):
            tokens = int(trace.load[layer].sum()) / trace.top_k
            if tokens != passed:
                yield f"layer {layer}: {tokens:g} tokens passed it, the completions need {passed}"
        chosen = int(tokens_per_stage(trace)[:, HEAD].sum())
        if chosen != run.get("new_tokens"):
            yield f"{chosen} tokens were chosen, the run counts {run.get('new_tokens')}"
    if trace.level == "routes":
        yield from _sequences(trace, prompt + new - 1, outputs.finish_reason != PARTIAL)


def _sequences(trace: Trace, lengths: np.ndarray, finished: np.ndarray) -> Iterator[str]:
    """Tokens of every sequence that the run finished, against its completion."""
    layer = trace.routes["layer"].min(initial=trace.n_layers)
    passed = np.bincount(trace.routes["sequence"][trace.routes["layer"] == layer], minlength=len(lengths))
    for row in np.flatnonzero((passed > lengths) | (finished & (passed > 0) & (passed != lengths)))[:1]:
        yield f"sequence {row}: {passed[row]} tokens passed layer {layer}, its completion needs {lengths[row]}"
