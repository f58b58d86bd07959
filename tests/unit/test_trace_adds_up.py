"""The trace adds up: laps cover all time, all levels count alike, clocks are corrected, what disagrees is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from moempi import analysis
from moempi import recorder as recorders
from moempi.cli.trace import trace as command
from moempi.errors import DataError
from moempi.files import schema
from moempi.files.completions import Outputs
from moempi.files.trace import between, merge_trace, write_part
from moempi.recorder import LEVELS, Recorder
from moempi.stages import (
    ANSWER,
    ANSWER_KIND,
    DECODE,
    DISPATCH,
    DISPATCH_KIND,
    EXPERT,
    EXPOSED,
    FIRST_LEAF,
    HEAD,
    IDLE,
    LOADED,
    POLL,
    PREFILL,
    RECEIVE,
    STEP,
    WAIT,
)

N, L, E, K = 2, 2, 4, 2
DECODING = (0, 1, DECODE)


class Ticking:
    """A clock that a test sets; every look at it takes a nanosecond."""

    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    made = Ticking()
    monkeypatch.setattr(recorders, "perf_counter_ns", made)
    monkeypatch.setattr(schema, "environment", lambda: {"machine": "a test"})
    return made


def started(level: str, rank: int = 0) -> Recorder:
    notes = Recorder(level, rank, N, L, E, K)
    notes.start()
    return notes


def leaves(taken: dict[str, np.ndarray]) -> Iterator[tuple[int, int, int]]:
    for stage, count, time in zip(
        *(taken[f"sums/{name}"].tolist() for name in ("stage", "count", "time")), strict=True
    ):
        if stage >= FIRST_LEAF:
            yield stage, count, time


# ---------------------------------------------------------------- laps


def live(notes: Recorder, clock: Ticking) -> None:
    """A bit of everything, by hand; lengths in the comments are without the ticks."""
    clock.now += 100
    notes.lap(POLL)  # 100
    clock.now += 30
    notes.rest(IDLE)  # 30, and
    clock.now += 40
    notes.rest(IDLE)  # 40 more of the same
    clock.now += 7
    notes.rest(EXPOSED, 1)  # 7
    clock.now += 5
    notes.lap(RECEIVE)  # 5
    notes.dispatching = DECODING
    clock.now += 11
    notes.sent(DISPATCH_KIND, 1, 1, 3, 96)  # 11
    begin = notes.since
    clock.now += 20
    notes.lap(EXPERT, 1, tokens=3)  # 20
    notes.span(LOADED, -1, recorders.NO_STEP, begin, notes.since, 0, 0, -1)
    notes.sent(ANSWER_KIND, 1, 0, 3, 96)  # to itself: no lap
    notes.received(ANSWER_KIND, 1, 1, 3, 96)
    notes.answered(1, begin)
    notes.waited(1, DECODING, begin, begin + 15, 3, 1)
    clock.now += 9
    notes.lap(HEAD, key=DECODING, tokens=2, end=clock.now - 2)  # 7, and 2 of the rest
    notes.rest(EXPOSED, 1)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_leaf_stages_add_up_to_the_time_between_begin_and_end(level: str, clock: Ticking) -> None:
    notes = started(level)
    begin = notes.since
    live(notes, clock)
    taken = notes.take()
    assert (taken["wall/begin"], taken["wall/end"], taken["wall/time"]) == (begin, notes.since, notes.since - begin)
    assert sum(time for _, _, time in leaves(taken)) == notes.since - begin
    counts = {stage: count for stage, count, _ in leaves(taken)}
    assert counts == {POLL: 1, IDLE: 1, EXPOSED: 2, RECEIVE: 1, DISPATCH: 1, EXPERT: 1, HEAD: 1}
    assert 70 <= next(time for stage, _, time in leaves(taken) if stage == IDLE) <= 73


def test_parts_follow_each_other_without_a_gap(clock: Ticking) -> None:
    notes = started("full")
    begin = notes.since
    live(notes, clock)
    first = notes.take()
    clock.now += 50
    notes.rest(EXPOSED, 1)  # goes on over the flush, as a span of its own
    second = notes.take()
    assert second["wall/begin"] == first["wall/end"] and second["wall/end"] == notes.since
    assert second["spans/begin"].tolist() == first["wall/end"].tolist()
    assert first["wall/time"] + second["wall/time"] == notes.since - begin


def test_every_level_counts_alike(clock: Ticking) -> None:
    taken = []
    for level in LEVELS[1:]:
        clock.now = 1000
        notes = started(level)
        live(notes, clock)
        taken.append(notes.take())
    for name in taken[0]:
        for other in taken[1:]:
            assert np.array_equal(taken[0][name], other[name]), name


def test_messages_have_bytes_and_peer_and_waits_their_rank(clock: Ticking) -> None:
    notes = started("full")
    live(notes, clock)
    taken = notes.take()
    stage = taken["spans/stage"].tolist()
    at = stage.index(DISPATCH)
    assert [int(taken[f"spans/{name}"][at]) for name in ("peer", "bytes", "tokens", "step")] == [1, 96, 3, 1]
    assert taken["spans/phase"][at] == DECODE and ANSWER not in stage
    assert taken["spans/peer"][stage.index(WAIT)] == 1 and taken["spans/peer"][stage.index(EXPOSED)] == 1
    waits = {name: taken[f"waits/{name}"].tolist() for name in ("peer", "answers", "waits", "wait_time")}
    assert waits == {"peer": [1], "answers": [1], "waits": [1], "wait_time": [15]}
    assert 7 <= taken["waits/exposed_time"][0] <= 12
    assert taken["sizes/size_class"].tolist() == [7] and taken["sizes/messages"].tolist() == [1]  # 64 to 127 bytes


def test_off_notes_nothing(clock: Ticking) -> None:
    notes = started("off")
    live(notes, clock)
    assert notes.take() == {} and notes.size() == 0


# ---------------------------------------------------------------- clocks


def test_a_clock_that_drifts_is_interpolated() -> None:
    # Rank 1 is 500 ns ahead at its 10,000, and 700 at its 20,000.
    begin, end = np.array([[0, 0, 9000], [500, 40, 10_000]]), np.array([[0, 0, 19_000], [700, 90, 20_000]])
    clocks = between(2000, begin, end)
    assert clocks.since_start(0, np.array([2000, 5000])).tolist() == [0, 3000]
    assert clocks.since_start(1, np.array([10_000, 15_000, 20_000])).tolist() == [7500, 12_400, 17_300]
    assert clocks.error.tolist() == [0, 90]


# ---------------------------------------------------------------- what disagrees

Write = dict[str, Any]


@dataclass
class Run:
    """A trace of two ranks and its completions: sequences of 3 + 2 and 1 + 3 tokens, each at home on one rank."""

    path: Path
    outputs: Outputs

    def disagreements(self) -> list[str]:
        return analysis.disagreements(analysis.load(self.path), self.outputs)


def outputs_of(prompts: list[int], new: list[int]) -> Outputs:
    ends, prompt_ends = np.cumsum([0, *new]), np.cumsum([0, *prompts])
    nothing = np.zeros(int(ends[-1]), np.int32)
    reason = np.zeros(len(new), np.int8)
    prompt = np.zeros(int(prompt_ends[-1]), np.int32)
    return Outputs(["a", "b"], nothing, nothing.astype(np.float32), ends, reason, prompt, prompt_ends, None, None)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Of a job that was not resumed."""
    return Run(write_trace(tmp_path, [4, 3]), outputs_of([3, 1], [2, 3]))


def write_trace(folder: Path, lengths: list[int], **measured: int) -> Path:
    """Layer 1 is the MoE layer; each token goes to experts 0 (rank 0) and 3 (rank 1).

    Args:
        lengths: tokens of each rank's sequence that pass the layer; 2 of rank 0 and 3 of rank 1 at most are chosen.
        measured: what the run says of itself, beside its 2 sequences with 5 new tokens.
    """
    path = folder / "t.h5"
    for rank, other in ((0, 1), (1, 0)):
        notes, n = started("routes", rank), lengths[rank]
        for step in range(n):
            key = (0, step + 1, PREFILL if step == 0 else DECODE)
            notes.routed(1, np.array([1, 0, 0, 1]))
            where, chosen = np.array([rank]), np.array([[0, 3]])
            notes.routes(1, 0, step, where, np.array([step]), chosen, np.ones((1, K)))
            notes.dispatching = key
            notes.sent(DISPATCH_KIND, 1, rank, 1, 0)
            notes.sent(DISPATCH_KIND, 1, other, 1, 32)
            notes.received(ANSWER_KIND, 1, other, 1, 32)
            notes.sent(ANSWER_KIND, 1, rank, 1, 0)
        for _ in range(lengths[other]):
            notes.received(DISPATCH_KIND, 1, other, 1, 32)
            notes.sent(ANSWER_KIND, 1, other, 1, 32)
        notes.lap(EXPERT, 1, tokens=sum(lengths))
        notes.lap(HEAD, tokens=min(n, (2, 3)[rank]))
        about = {**notes.describe(), "mode": "exact", "start": 0, "offset": 0, "error": 0}
        write_part(path, rank, 1, notes.take(), about)
    clocks = between(0, np.zeros((N, 3), np.int64), np.zeros((N, 3), np.int64))
    meta = {**notes.describe(), "finished": 2, "sequences": 2, "new_tokens": 5, "cut_layers": [], **measured}
    merge_trace(path, "{}", {}, clocks, [{"node": 0}, {"node": 1}], meta)
    return path


def test_a_trace_that_adds_up(run: Run) -> None:
    assert run.disagreements() == []
    result = CliRunner().invoke(command, ["summary", str(run.path), "--check"])
    assert result.exit_code == 0 and "all counts agree" in result.output
    trace = analysis.load(run.path)
    assert analysis.coverage(trace).tolist() == [1.0, 1.0]
    rows = analysis.node_matrix(trace, "dispatch", "rows")
    assert rows is not None and rows.tolist() == [[4, 4], [3, 3]]


CHANGES = {
    "leaf stages took": ("sums/time", 0),
    "2 spans, 3 in the sums": ("sums/count", 0),
    "the next begins": ("spans/end", 0),
    "bytes of dispatch from rank 0 to rank 1": ("traffic/bytes", 1),
    "rows of answer from rank": ("received/rows", -1),
    "rows were dispatched": ("load", (1, 0)),
    "not those of the load": ("routes/experts", (0, 0)),
    "position 1 passed layer 1 2 times": ("routes/position", 0),
}


@pytest.mark.parametrize("text", CHANGES)
def test_one_changed_number_is_named(run: Run, text: str) -> None:
    name, place = CHANGES[text]
    with h5py.File(run.path, "r+") as file:
        file[name][place] += 1
    found = run.disagreements()
    assert any(text in one for one in found), found
    with pytest.raises(DataError, match=r"counts do not agree:\n  "):
        CliRunner().invoke(command, ["summary", str(run.path), "--check"], catch_exceptions=False)


def test_completions_of_another_length_are_named(run: Run) -> None:
    run.outputs = outputs_of([3, 1], [2, 4])
    assert run.disagreements() == [
        "layer 1: 7 tokens passed it, the completions need 8",
        "sequence 1: 3 tokens passed layer 1, its completion needs 4",
    ]


def test_a_resumed_run_that_finished_is_compared_with_what_it_did_itself(tmp_path: Path) -> None:
    # An earlier run finished the first sequence: no token of it passed a layer in this one.
    path = write_trace(tmp_path, [0, 3], earlier_finished=1, earlier_new_tokens=2)
    resumed = Run(path, outputs_of([3, 1], [2, 3]))
    assert resumed.disagreements() == []
    resumed.outputs = outputs_of([3, 1], [2, 4])
    assert resumed.disagreements() == ["sequence 1: 3 tokens passed layer 1, its completion needs 4"]


def test_rows_that_no_expert_computed_are_named(run: Run) -> None:
    with h5py.File(run.path, "r+") as file:
        at = np.flatnonzero(file["sums/stage"][...] == EXPERT)[1]
        file["sums/tokens"][at] -= 2
    assert run.disagreements() == ["layer 1: rank 1 got 7 rows and computed 5"]


@pytest.mark.parametrize("column", ["ranks/rank", "clocks/rank", "clocks/offset", "clocks/drift", "clocks/error"])
def test_a_trace_without_a_column_is_refused(run: Run, column: str) -> None:
    with h5py.File(run.path, "r+") as file:
        del file[column]
    with pytest.raises(DataError, match=f"/{column} is missing"):
        analysis.load(run.path)


def test_a_trace_whose_numbers_stand_for_other_words_is_refused(run: Run) -> None:
    with h5py.File(run.path, "r+") as file:
        schema.set_text_attribute(file["sums/stage"], "legend", "step,sing,wait")
    with pytest.raises(DataError, match=r"/sums/stage stands for step,sing,wait; this version knows step,wait"):
        analysis.load(run.path)


def test_prefill_and_decode_are_apart(tmp_path: Path, clock: Ticking) -> None:
    path = tmp_path / "t.h5"
    notes = started("summary")
    for phase, tokens, length in ((PREFILL, 9, 400), (DECODE, 2, 100), (DECODE, 3, 100)):
        begin = notes.since
        clock.now += length - 1
        notes.lap(HEAD, key=(0, 1, phase), tokens=tokens)
        notes.span(STEP, -1, (0, 1, phase), begin, notes.since, tokens, 0, -1)
    write_part(path, 0, 1, notes.take(), {**notes.describe(), "mode": "exact"})
    trace = analysis.load(path)
    assert analysis.steps_per_phase(trace) == {"prefill": (1, 9, 4e-7), "decode": (2, 5, 2e-7)}
    assert trace.unfinished and analysis.disagreements(trace) == []
    assert analysis.wall_time(trace).tolist() == [6e-7, 0.0]
