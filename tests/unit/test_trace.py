"""Trace: what a recorder notes, parts and their merge, traces of runs that did not end, and the questions to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from moempi import analysis
from moempi import recorder as recorders
from moempi.cli.trace import trace as command
from moempi.cli.trace_words import conclusion
from moempi.errors import DataError
from moempi.files import schema, trace_columns, trace_counters, trace_writer
from moempi.files.parts import parts_folder
from moempi.files.trace import Clocks, complete, make_way, merge_trace, set_aside, write_part
from moempi.files.trace_writer import TraceWriter
from moempi.recorder import LEVELS, Recorder
from moempi.stages import ATTEND, DECODE, EXPERT, KINDS, NO_STEP, PREFILL, STAGES, STEP

N, L, E, K = 3, 4, 5, 2


@pytest.fixture(autouse=True)
def _no_torch_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the environment holds is no matter here, and importing torch takes seconds.
    monkeypatch.setattr(schema, "environment", lambda: {"machine": "a test"})
    # A clock that stands still: laps count, and take no time.
    monkeypatch.setattr(recorders, "perf_counter_ns", lambda: 2000)


def recorder(level: str, rank: int = 0) -> Recorder:
    made = Recorder(level, rank, N, L, E, K)
    made.start()
    return made


def clocks() -> Clocks:
    return Clocks(1000, np.array([0, 50, -7]), np.array([0, 3, 9]), np.zeros(N, np.int64), np.zeros(N))


def about(rank: int, level: str) -> dict[str, int | str]:
    clock = {"start": 1000, "offset": int(clocks().offset[rank]), "error": int(clocks().error[rank])}
    return {**recorder(level, rank).describe(), "mode": "exact", "job": '{"run": 1}', **clock}


def note(notes: Recorder, dice: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Record n random things of each kind; returns their totals."""
    load = np.zeros((L, E), dtype=np.int64)
    time = np.zeros((len(STAGES), L + 1), dtype=np.int64)
    traffic = np.zeros((3, 2, L, N), dtype=np.int64)
    for _ in range(n):
        stage, layer, begin, length = (int(dice.integers(*ends)) for ends in ((0, 16), (-1, L), (2000, 9000), (0, 99)))
        notes.span(stage, layer, (1, 7, int(dice.integers(3))), begin, begin + length, 5, 640, 2)
        time[stage, layer + 1] += length
        kind, where, peer, rows = (int(dice.integers(end)) for end in (2, L, N, 50))
        notes.sent(kind, where, peer, rows, rows * 64)
        traffic[:, kind, where, peer] += (rows, rows * 64, peer != notes.rank)
        counts = dice.integers(0, 9, E)
        notes.routed(where, counts)
        load[where] += counts
        sequence, position = np.arange(rows), np.arange(rows, dtype=np.int32) + 3
        notes.routes(where, 0, 7, sequence, position, dice.integers(0, E, (rows, K)), dice.random((rows, K)))
    return {"load": load, "time": time, "traffic": traffic}


def write_ranks(path: Path, level: str, parts: int = 2, n: int = 40) -> list[dict[str, np.ndarray]]:
    totals = []
    for rank in range(N):
        notes, dice = recorder(level, rank), np.random.default_rng(rank)
        of_rank = []
        for number in range(1, parts + 1):
            of_rank.append(note(notes, dice, n))
            write_part(path, rank, number, notes.take(), about(rank, level))
        totals.append({name: sum(one[name] for one in of_rank) for name in ("load", "time", "traffic")})
    return totals


def merge(path: Path, level: str, **changes: Any) -> None:
    meta = {**recorder(level).describe(), "mode": "exact", "tokens_per_second": 3.5}
    ranks = [{"node": f"n{rank // 2}", "threads": rank} for rank in range(N)]
    options = {"clocks": clocks(), "ranks": ranks, "meta": meta}
    merge_trace(path, '{"run": 1}', {"input": "00"}, **{**options, **changes})


# ---------------------------------------------------------------- the recorder


def test_a_recorder_hands_over_what_is_new_and_nothing_twice() -> None:
    notes = recorder("routes")
    notes.span(EXPERT, 2, NO_STEP, 100, 130, 8, 512, 1)
    notes.span(STEP, -1, (0, 1, DECODE), 90, 140, 8, 0, -1)
    notes.span(EXPERT, 2, NO_STEP, 200, 205, 8, 512, 1)
    notes.sent(0, 2, 1, 8, 512)
    notes.sent(0, 2, 1, 4, 256)
    notes.sent(0, 2, 0, 3, 192)
    notes.routed(2, np.array([1, 0, 3, 0, 0]))
    experts = np.array([[1, 0], [3, 2]], dtype=np.int16)
    notes.routes(2, 0, 1, np.array([4, 5]), np.array([0, 9], np.int32), experts, np.ones((2, 2), np.float32))
    experts[:] = 0  # the caller uses its arrays again
    assert notes.size() > 0
    taken = notes.take()
    assert taken["spans/begin"].tolist()[:3] == [100, 90, 200] and taken["spans/layer"].tolist()[:3] == [2, -1, 2]
    names = ("phase", "stage", "layer", "count", "time", "tokens")
    sums = list(zip(*(taken[f"sums/{name}"].tolist() for name in names), strict=True))
    assert {(0, EXPERT, 2, 2, 35, 16), (DECODE, STEP, -1, 1, 50, 8)} < set(sums)
    traffic = [taken[f"traffic/{name}"].tolist() for name in ("layer", "destination", "rows", "bytes", "messages")]
    assert traffic == [[2, 2], [0, 1], [3, 12], [192, 768], [0, 2]]
    assert taken["load"][2].tolist() == [1, 0, 3, 0, 0] and taken["load"].sum() == 4
    assert taken["routes/experts"].tolist() == [[1, 0], [3, 2]] and taken["routes/sequence"].tolist() == [4, 5]
    assert notes.size() == 0
    assert all(len(data) == 0 for name, data in notes.take().items() if name != "load" and "wall" not in name)
    assert notes.take()["load"].sum() == 0


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_keeps_what_it_says(level: str) -> None:
    notes = recorder(level)
    note(notes, np.random.default_rng(0), 5)
    groups = {name.split("/")[0] for name in notes.take()}
    more = {"off": set(), "summary": {"load", "wall", "sums", "traffic", "received", "sizes", "waits"}}
    more["full"] = more["summary"] | {"spans"}
    more["routes"] = more["full"] | {"routes"}
    assert groups == more[level]


def test_summary_and_full_add_up_to_the_same_sums() -> None:
    taken = []
    for level in ("summary", "full"):
        notes = recorder(level)
        note(notes, np.random.default_rng(3), 200)
        taken.append(notes.take())
    for name in taken[0]:
        assert np.array_equal(taken[0][name], taken[1][name]), name


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_merged_trace_adds_up(tmp_path: Path, level: str) -> None:
    path = tmp_path / "new" / "t.trace.h5"
    totals = write_ranks(path, level)
    merge(path, level, parts=[2] * N)
    assert not parts_folder(path).exists()
    trace = analysis.load(path)
    assert (trace.level, trace.mode, trace.n_ranks, trace.top_k, trace.unfinished) == (level, "exact", N, K, False)
    assert np.array_equal(analysis.load_per_expert(trace), sum(one["load"] for one in totals))
    assert trace.load_by_rank is not None
    assert np.array_equal(trace.load_by_rank, [one["load"] for one in totals])
    time = np.array([one["time"].sum(axis=1) for one in totals])
    assert np.allclose(analysis.time_per_stage(trace) * 1e9, time)
    messages = sum(analysis.traffic_matrix(trace, kind, "messages").sum() for kind in analysis.KINDS)
    assert analysis.spans_per_stage(trace).sum() == N * 2 * 40 + messages  # each message was a lap of its own
    for place, column in enumerate(("rows", "bytes", "messages")):
        for kind, name in enumerate(("dispatch", "answer")):
            wanted = np.array([one["traffic"][place, kind].sum(axis=0) for one in totals])
            assert np.array_equal(analysis.traffic_matrix(trace, name, column), wanted)
            layer_1 = np.array([one["traffic"][place, kind, 1] for one in totals])
            assert np.array_equal(analysis.traffic_matrix(trace, name, column, layer=1), layer_1)
    assert trace.ranks == [{"rank": rank, "node": f"n{rank // 2}", "threads": rank} for rank in range(N)]
    assert trace.job == {"run": 1} and trace.run == {"tokens_per_second": 3.5}
    assert analysis.clock_error(trace) == 9


def test_spans_and_routes_keep_their_order_and_spans_are_on_rank_0s_clock(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    for rank in (2, 0):
        notes = recorder("routes", rank)
        for number in (1, 2):
            notes.span(ATTEND, 1, (0, number, PREFILL), 5000 + number, 6000, 1, 2, -1)
            notes.routes(1, 0, number, np.array([number]), np.array([0]), np.ones((1, K)), np.full((1, K), 0.5))
            write_part(path, rank, number, notes.take(), about(rank, "routes"))
    merge(path, "routes", parts=[2, 0, 2])
    trace = analysis.load(path)
    assert trace.spans["rank"].tolist() == [0, 0, 2, 2]
    assert trace.spans["begin"].tolist() == [4001, 4002, 4008, 4009]
    assert trace.spans["end"].tolist() == [5000, 5000, 5007, 5007]
    assert trace.routes["rank"].tolist() == [0, 0, 2, 2] and trace.routes["sequence"].tolist() == [1, 2, 1, 2]
    assert trace.routes["experts"].shape == (4, K) and trace.routes["weights"].dtype == np.float32


def test_the_file_explains_itself(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    write_ranks(path, "routes")
    merge(path, "routes")
    with schema.open_file(path, "trace") as file:
        assert schema.text_attribute(file["spans/stage"], "legend").split(",") == list(STAGES)
        assert schema.text_attribute(file["traffic/kind"], "legend").split(",") == list(KINDS)
        assert schema.text_attribute(file["spans/begin"], "units") == "ns"
        for group, columns in trace_columns.COLUMNS.items():
            assert set(file[group]) == set(columns)
            assert all(schema.text_attribute(file[group][name], "long_name") for name in columns)
            assert len({len(file[group][name]) for name in columns}) == 1
        assert "job" in file and "environment" in file and "sources" in file


@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_run_without_anything_in_it(tmp_path: Path, level: str) -> None:
    path = tmp_path / "t.h5"
    for rank in range(N):
        write_part(path, rank, 1, recorder(level, rank).take(), about(rank, level))
    merge(path, level)
    trace = analysis.load(path)
    assert trace.load.shape == (L, E) and trace.load.sum() == 0 and len(trace.sums["time"]) == 0
    assert analysis.busiest(trace) is None and np.isnan(analysis.max_over_mean(trace)).all()
    assert np.isnan(analysis.message_sizes(trace, "answer")).all()
    assert "level" in shown(path)
    # Not even parts: nobody wrote any.
    merge(tmp_path / "none.h5", level, ranks=[])
    assert analysis.load(tmp_path / "none.h5").ranks == [{"rank": rank} for rank in range(N)]


def test_a_load_too_large_by_rank_is_kept_in_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_counters, "LARGEST_LOAD_BY_RANK", N * L * E - 1)
    totals = write_ranks(tmp_path / "t.h5", "summary")
    merge(tmp_path / "t.h5", "summary")
    trace = analysis.load(tmp_path / "t.h5")
    assert trace.load_by_rank is None
    assert np.array_equal(trace.load, sum(one["load"] for one in totals))


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("begin", [np.zeros((1, 2), int), np.zeros(2, int), np.zeros(1), np.zeros(0, int)])
def test_odd_times_in_a_part_are_named(tmp_path: Path, begin: np.ndarray) -> None:
    path, notes = tmp_path / "t.h5", recorder("summary", 0)
    notes.start()
    write_part(path, 0, 1, {**notes.take(), "wall/begin": np.asarray(begin)}, about(0, "summary"))
    with pytest.raises(DataError, match=r"rank-00000-000001\.h5: damaged trace-part file: /wall has"):
        merge(path, "summary")


def test_missing_and_damaged_parts_are_named_and_nothing_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    write_ranks(path, "full")
    part = parts_folder(path) / "rank-00001-000002.h5"
    whole = part.read_bytes()
    part.write_bytes(whole[:-200])
    with pytest.raises(DataError, match="rank-00001-000002"):
        merge(path, "full")
    part.write_bytes(whole)
    with h5py.File(part, "r+") as file:
        file["traffic/destination"][0] = N
    with pytest.raises(DataError, match="rank-00001-000002"):
        merge(path, "full")
    part.unlink()
    with pytest.raises(DataError, match="1 parts of rank 1, expected 2"):
        merge(path, "full", parts=[2] * N)
    assert not path.exists() and len(list(parts_folder(path).iterdir())) == 2 * N - 1
    with pytest.raises(DataError, match="2 parts of rank 2, expected 0"):
        merge(path, "full", parts=[2, 1])


def test_questions_that_the_level_cannot_answer_say_which_can(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    write_ranks(path, "summary")
    merge(path, "summary")
    trace = analysis.load(path)
    with pytest.raises(DataError, match=r"level = 'summary', which has no spans.*'full'"):
        trace.spans["begin"]
    with pytest.raises(DataError, match="'routes'"):
        trace.routes["experts"]
    with pytest.raises(KeyError, match="no column 'nothing'; it has"):
        trace.sums["nothing"]


def test_no_trace_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file, and no parts"):
        analysis.load(tmp_path / "t.h5")
    (tmp_path / "t.h5").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be opened as HDF5"):
        analysis.load(tmp_path / "t.h5")


def test_the_writer_writes_from_its_thread_and_tells_of_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    notes = recorder("full", 1)
    writer = TraceWriter(path, 1, about(1, "full"))
    for _ in range(3):
        notes.span(STEP, -1, NO_STEP, 1, 2, 3, 4, 5)
        writer.put(notes.take())
    writer.put({})
    assert writer.close() == 3
    assert len(analysis.load(path).spans["begin"]) == 3
    (tmp_path / "file").touch()
    writer = TraceWriter(tmp_path / "file" / "t.h5", 0, about(0, "full"))
    writer.put(notes.take())
    with pytest.raises(DataError, match="could not be written"):
        writer.close()


@pytest.mark.parametrize("fails", [False, True])
def test_the_writer_holds_few_parts_however_slow_the_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    disk, written, put = threading.Event(), [], []

    def slow(path: Path, rank: int, number: int, *_: object) -> None:
        disk.wait(60)
        if fails:
            raise DataError("disk full")
        written.append(number)

    monkeypatch.setattr(trace_writer, "write_part", slow)
    writer = TraceWriter(tmp_path / "t.h5", 0, {})

    def notes() -> None:
        with contextlib.suppress(DataError):
            for number in range(6):
                writer.put({"load": np.zeros(1)})
                put.append(number)

    rank = threading.Thread(target=notes, daemon=True)
    rank.start()
    rank.join(0.3)
    assert len(put) <= recorders.PARTS_HELD - 1
    disk.set()
    rank.join(60)
    assert not rank.is_alive()
    if fails:
        with pytest.raises(DataError, match="could not be written: disk full"):
            writer.close()
    else:
        assert writer.close() == 6 and written == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------- runs that did not end

_CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tests.unit.test_trace import about, note, recorder
from moempi.files.trace import write_part
notes, dice = recorder("full", 1), np.random.default_rng(1)
for number in range(1, 100):
    note(notes, dice, 10)
    write_part(Path(sys.argv[1]), 1, number, notes.take(), about(1, "full"))
    print(number, flush=True)
"""


def test_after_kill_9_the_parts_are_readable_and_say_the_same_as_merged(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    arguments = [sys.executable, "-c", _CHILD, str(path)]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    trace = analysis.load(path)
    assert trace.unfinished and trace.job == {"run": 1} and len(trace.spans["begin"]) >= 30
    assert trace.clocks["error"].tolist() == [-1, 3, -1] and analysis.clock_error(trace) is None
    assert "unfinished" in shown(path)
    merge(path, "full")
    merged = analysis.load(path)
    for name in merged.spans:
        assert np.array_equal(merged.spans[name], trace.spans[name]), name
    assert np.array_equal(merged.load, trace.load)


def test_traces_of_earlier_attempts_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.trace.h5"
    assert set_aside(path) is None
    write_ranks(path, "full")
    load = analysis.load(path).load
    assert set_aside(path) == tmp_path / "a.trace.1.h5"
    assert not parts_folder(path).exists()
    assert np.array_equal(analysis.load(tmp_path / "a.trace.1.h5").load, load)
    write_ranks(path, "summary")
    merge(path, "summary")
    assert set_aside(path) == tmp_path / "a.trace.2.h5"
    assert not path.exists() and analysis.load(tmp_path / "a.trace.2.h5").level == "summary"
    assert set_aside(path) is None


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_with_level_off_an_earlier_trace_stays_as_it_is(tmp_path: Path, how: str) -> None:
    path, kept = tmp_path / "a.trace.h5", tmp_path / "a.trace.1.h5"
    for one in (path, kept):
        one.write_text("an hour's work")
    write_ranks(path, "full", parts=1)
    before = sorted(tmp_path.rglob("*"))
    flags = {"resume": False, "overwrite": False, how: True}
    make_way(path, "off", **flags)
    assert sorted(tmp_path.rglob("*")) == before
    make_way(path, "full", **flags)
    left = [path.with_name("a.trace.1.h5"), path.with_name("a.trace.2.h5")] if how == "resume" else []
    assert sorted(tmp_path.rglob("*")) == left


def test_parts_that_a_killed_run_left_beside_a_complete_output_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "a.trace.h5"
    complete(path)
    assert not list(tmp_path.iterdir())
    write_ranks(path, "full")
    load = analysis.load(path).load
    complete(path)
    assert list(tmp_path.iterdir()) == [path] and np.array_equal(analysis.load(path).load, load)
    # Killed after the merge and before the parts were removed.
    before = path.read_bytes()
    write_ranks(path, "summary")
    complete(path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_half_written_copy_of_an_earlier_trace_is_removed(tmp_path: Path, how: str) -> None:
    (tmp_path / ".a.trace.1.h5.77.tmp").write_text("half")
    make_way(tmp_path / "a.trace.h5", "full", **{"resume": False, "overwrite": False, how: True})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- questions, by hand


def by_hand(path: Path) -> analysis.Trace:
    for rank in range(N):
        notes = recorder("summary", rank)
        if rank == 1:
            notes.routed(1, np.array([6, 0, 2, 0, 2]))
            notes.routed(3, np.array([1, 1, 1, 1, 1]))
            notes.sent(0, 1, 2, 10, 1000)
            notes.sent(0, 3, 2, 2, 200)
            notes.sent(1, 1, 1, 7, 700)
            notes.span(ATTEND, 1, (0, 0, DECODE), 100, 1_000_000_100, 1, 0, -1)
        write_part(path, rank, 1, notes.take(), about(rank, "summary"))
    merge(path, "summary")
    return analysis.load(path)


def test_balance_by_hand(tmp_path: Path) -> None:
    trace = by_hand(tmp_path / "t.h5")
    assert analysis.busiest_per_layer(trace) == [
        analysis.Busiest(layer=1, expert=0, tokens=6, share=0.6),
        analysis.Busiest(layer=3, expert=0, tokens=1, share=0.2),
    ]
    assert analysis.busiest(trace) == analysis.Busiest(1, 0, 6, 0.6)
    assert np.array_equal(analysis.max_over_mean(trace), [np.nan, 3.0, np.nan, 1.0], equal_nan=True)


def test_traffic_and_time_by_hand(tmp_path: Path) -> None:
    trace = by_hand(tmp_path / "t.h5")
    assert analysis.traffic_matrix(trace, "dispatch", "rows").tolist() == [[0, 0, 0], [0, 0, 12], [0, 0, 0]]
    assert analysis.traffic_matrix(trace, "answer", "rows").tolist() == [[0, 0, 0], [0, 7, 0], [0, 0, 0]]
    assert analysis.traffic_matrix(trace, "answer", "messages").sum() == 0
    assert analysis.message_sizes(trace, "dispatch")[1, 2] == 600.0
    time = analysis.time_per_stage(trace)
    assert time[1, ATTEND] == 1.0 and time.sum() == 1.0


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(command, ["summary", *(str(one) for one in arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_summary_prints_tables_and_json(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    by_hand(path)
    found = json.loads(shown(path, "--json"))
    attend = {"rank": 1, "stage": "attend", "container": False, "seconds": 1.0, "spans": 1}
    posts = {"rank": 1, "stage": "dispatch", "container": False, "seconds": 0.0, "spans": 2}
    assert found["time"] == [attend, posts]
    first = found["load"][0]
    assert (first["busiest_expert"], first["busiest_expert_share"], first["max_over_mean"]) == (0, 0.6, 3.0)
    assert first["tokens_per_expert"] == [6, 0, 2, 0, 2]
    assert found["traffic"] == [
        {"kind": "dispatch", "source": 1, "destination": 2, "rows": 12, "bytes": 1200, "messages": 2},
        {"kind": "answer", "source": 1, "destination": 1, "rows": 7, "bytes": 700, "messages": 0},
    ]
    text = shown(path)
    for word in ("attend", "0.333", "60.0%", "3.00", "dispatch", "within 0.0 us", "mode exact"):
        assert word in text


def test_the_words_above_a_traces_tables() -> None:
    """Shares of all ranks by their wall time, and what stands out; nothing is said of what is not known."""
    rank = {"experts_computed": 0.5, "experts_had_rows": 0.75, "exposed_share": 0.2, "idle_share": 0.0,
            "barrier_share": 0.1, "wall_seconds": 1.0}  # fmt: skip
    other = {**rank, "experts_computed": 0.1, "exposed_share": 0.0, "barrier_share": 0.0, "wall_seconds": 3.0}
    waits = [{"rank": 0, "peer": 0, "exposed_seconds": 0.1}, {"rank": 0, "peer": 1, "exposed_seconds": 0.3}]
    load = [{"layer": n, "busiest_expert": n + 4, "max_over_mean": n + 0.5, "tokens": 9} for n in range(3)]
    found = {"ranks": [rank, other], "waits": waits, "load": [*load, {"layer": 3, "tokens": 0}], "run": {}}
    assert conclusion(found) == [
        "Experts computed in 20% of the ranks' time, and had rows in 75%.",
        "8% went by with nothing to do but wait: 5% for answers, 2% for all ranks to meet; rank 1 was waited for most.",
        "The busiest expert, 6 of layer 2, got 2.5 times the mean of its layer.",
    ]
    nothing = dict.fromkeys(rank) | {"wall_seconds": 0.0}
    assert conclusion({"ranks": [nothing], "waits": [], "load": [], "run": {}}) == []
    # The stages of a GPU are its host's.
    assert conclusion(found | {"run": {"device": "cuda (a GPU)"}, "load": []}) == [
        "Experts had rows, or were computing, in 75% of the ranks' time."
    ]
