"""Outputs: commits that survive a kill, resume and its refusals, the lock, full disks, damage, merging."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from moempi.cli.outputs import outputs as command
from moempi.cli.outputs import printable
from moempi.errors import DataError, JobError
from moempi.files import lock as locks
from moempi.files import output_parts, schema
from moempi.files.completions import FINISH_REASONS, Completion, Origin, OutputsFile, ragged_ranges, read_head
from moempi.files.inputs import Prompts, write_inputs
from moempi.files.lock import Lock, lock_file
from moempi.files.output_writer import OutputWriter
from moempi.files.outputs import merge_outputs, open_shard, read_outputs
from moempi.files.parts import parts_folder

IDENTITY = {"model": "aa", "inputs": "bb", "mode": "exact"}


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the environment holds is no matter here, and importing torch takes seconds.
    monkeypatch.setattr(schema, "environment", lambda: {"machine": "a test"})


def prompts_of(n: int, prefix: str = "p", texts: bool = True) -> Prompts:
    tokens = [np.arange(i % 3 + 1, dtype=np.int32) for i in range(n)]
    text = [f"prompt {i} é" for i in range(n)] if texts else None
    return Prompts([f"{prefix}{i}" for i in range(n)], tokens, text, np.zeros(n, dtype=np.int32))


def completion(index: int, length: int = 3, reason: str = "length") -> Completion:
    tokens = np.arange(length, dtype=np.int32) + 1000 * index
    return Completion(index, tokens, -tokens.astype(np.float32) / 7, reason)


def start(path: Path, n: int, **changes: object) -> OutputWriter:
    options: dict = {
        "job_json": "{}",
        "identity": IDENTITY,
        "sources": {"input": "00" * 32},
        "n_sequences": n,
        "commit_every": 3600.0,
    }
    return OutputWriter.start(path, **{**options, **changes})


def decode(tokens: list[int]) -> str:
    return "".join(f"<{token}>" for token in tokens)


def write_whole(path: Path, n: int, prefix: str = "p", **changes: object) -> None:
    with start(path, n, **changes) as writer:
        for index in range(n):
            writer.put(completion(index, index % 5))
        writer.finish(prompts_of(n, prefix), {"mode": "exact", "decode": decode, "tokens_per_second": 1.5})


def begun(writer: OutputWriter) -> list[int]:
    return np.flatnonzero(writer.latest.part >= 0).tolist()


def same(found: Completion, wanted: Completion) -> bool:
    return (
        np.array_equal(found.tokens, wanted.tokens)
        and np.array_equal(found.logprobs, wanted.logprobs)
        and found.finish_reason == wanted.finish_reason
    )


# ---------------------------------------------------------------- a whole run


def test_final_file_is_in_input_order_and_parts_and_lock_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "out[1].h5"
    order = random.Random(1).sample(range(23), 23)
    with start(path, 23) as writer:
        for count, index in enumerate(order):
            writer.put(completion(index, index % 5, "eos" if index % 2 else "length"))
            if count % 4 == 0:
                writer.commit()
        assert len(list(parts_folder(path).iterdir())) == 6
        writer.finish(prompts_of(23), {"mode": "exact", "decode": decode, "seconds": 1.0})
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    found = read_outputs(path)
    assert found.ids == prompts_of(23).ids and found.prompts == prompts_of(23).text
    for row in range(23):
        sequence = found.sequence(row)
        wanted = completion(row, row % 5)
        assert sequence["tokens"] == wanted.tokens.tolist()
        assert sequence["logprobs"] == wanted.logprobs.tolist()
        assert sequence["completion"] == decode(sequence["tokens"])
        assert sequence["finish_reason"] == ("eos" if row % 2 else "length")
    assert found.prompt_offsets.tolist() == np.cumsum([0, *(i % 3 + 1 for i in range(23))]).tolist()
    with schema.open_file(path, "outputs") as file:
        assert schema.text_attribute(file, "mode") == "exact"
        assert schema.text_attribute(file["finish_reason"], "legend") == "length,eos,partial"
        assert json.loads(schema.read_text(file, "identity")) == IDENTITY
        assert json.loads(schema.read_text(file, "run")) == {"seconds": 1.0}
        assert "environment" in file and "job" in file


@pytest.mark.parametrize("window", [1, 4, 7, 10**6])
def test_assembled_and_read_in_windows_the_columns_are_the_same(tmp_path: Path, window: int) -> None:
    path, n = tmp_path / "out.h5", 30
    lengths = [0, 9, 1, 1, 0] * 6
    with start(path, n) as writer:
        for index in reversed(range(n)):
            writer.put(completion(index, lengths[index]))
            if index % 7 == 0:
                writer.commit()
        origin = writer._origin
        output_parts.assemble(path, origin, prompts_of(n), {"mode": "exact"}, lambda: None, window)
    whole = np.concatenate([completion(i, lengths[i]).tokens for i in range(n)])
    found = read_outputs(path)
    assert np.array_equal(found.tokens, whole) and found.completions is None
    shard = open_shard(path)
    blocks = [shard.read(a, b) for a, b in ragged_ranges(shard.head.lengths, window)]
    assert np.array_equal(np.concatenate([block.tokens for block in blocks]), whole)
    assert [one for block in blocks for one in block.ids] == found.ids
    assert [one for block in blocks for one in block.prompts or []] == found.prompts


def test_ragged_ranges_by_hand() -> None:
    assert ragged_ranges(np.array([3, 3, 3]), 6) == [(0, 2), (2, 3)]
    assert ragged_ranges(np.array([9, 1, 1]), 2) == [(0, 1), (1, 3)]
    assert ragged_ranges(np.array([0, 0, 0, 0]), 2) == [(0, 2), (2, 4)]
    assert ragged_ranges(np.empty(0, dtype=np.int64), 5) == []


def test_an_input_without_sequences(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    write_whole(path, 0)
    found = read_outputs(path)
    assert len(found) == 0 and found.ids == [] and found.tokens.dtype == np.int32
    with start(path, 0, resume=True) as writer:
        assert writer.complete


def test_finish_refuses_partial_and_missing_sequences_and_keeps_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with start(path, 3) as writer:
        writer.put(completion(0))
        writer.put(completion(1, reason="partial"))
        with pytest.raises(DataError, match="2 of 3 sequences are not finished, first 'p1'"):
            writer.finish(prompts_of(3), {"mode": "exact"})
    assert not path.exists() and list(parts_folder(path).iterdir())


def test_commits_happen_by_themselves_after_commit_every(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with start(path, 2, commit_every=0.05) as writer:
        time.sleep(0.1)  # the thread is now asleep
        writer.put(completion(1))
        end = time.monotonic() + 10
        while not list(parts_folder(path).glob("part-*.h5")) and time.monotonic() < end:
            time.sleep(0.01)
        assert len(read_outputs(path)) == 1
        assert lock_file(path).exists()


# ---------------------------------------------------------------- what is there already


def test_an_existing_output_is_refused_and_both_ways_out_are_named(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with start(path, 2) as writer:
        writer.put(completion(0))
    with pytest.raises(JobError, match=r"(?s)not finished \(1 commits.*--resume.*--overwrite"):
        start(path, 2)
    write_whole(path, 2, overwrite=True)
    with pytest.raises(JobError, match="exists already; give --overwrite"):
        start(path, 2)
    with pytest.raises(JobError, match="exclude each other"):
        start(path, 2, resume=True, overwrite=True)
    assert not lock_file(path).exists()


@pytest.mark.parametrize("left", ["out.trace.h5", "out.trace.h5.parts/rank-00000-00000.h5"])
def test_an_existing_trace_is_refused_as_an_output_is(tmp_path: Path, left: str) -> None:
    path, trace = tmp_path / "out.h5", tmp_path / "out.trace.h5"
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("an hour's work")
    with pytest.raises(JobError, match=r"(?s)out\.trace\.h5: .*--overwrite to replace output and trace, move"):
        start(path, 2, trace=trace)
    assert (tmp_path / left).read_text() == "an hour's work" and not lock_file(path).exists()
    for how in ({"resume": True}, {"overwrite": True}, {"trace": None}):
        start(path, 2, **{"trace": trace, **how}).close()


def test_overwrite_keeps_a_finished_output_until_there_is_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    write_whole(path, 4)
    kept, whole = path.with_name("out.h5.old"), path.read_bytes()
    for _ in range(2):  # ended before it is complete, twice
        with start(path, 4, overwrite=True) as writer:
            writer.put(completion(2))
        assert kept.read_bytes() == whole and not path.exists()
    write_whole(path, 4, overwrite=True)
    assert path.exists() and not kept.exists()


def test_overwrite_removes_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    write_whole(path, 4)
    with start(path, 3, overwrite=True, identity={"model": "another"}) as writer:
        assert not path.exists() and not begun(writer) and not writer.complete
        writer.put(completion(2))
    with start(path, 3, overwrite=True) as writer:
        assert not begun(writer)


def test_resume_restores_the_highest_commit_of_each_sequence(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with start(path, 5, resume=True) as writer:  # nothing there: a fresh start
        assert not begun(writer) and not writer.complete
        writer.put(completion(3, 2, "partial"))
        writer.put(completion(1, 4, "eos"))
        writer.commit()
        writer.put(completion(3, 1, "partial"))
        writer.put(completion(3, 6, "partial"))
    with start(path, 5, resume=True) as writer:
        assert begun(writer) == [1, 3] and writer.latest.length.tolist() == [0, 4, 0, 6, 0]
        assert [FINISH_REASONS[writer.latest.finish_reason[row]] for row in (1, 3)] == ["eos", "partial"]
        assert list(writer.partial) == [3] and same(writer.partial[3], completion(3, 6, "partial"))
        writer.put(completion(3, 7))
    names = sorted(one.name for one in parts_folder(path).iterdir())
    assert names == ["part-00000001.h5", "part-00000002.h5", "part-00000003.h5"]
    with start(path, 5, resume=True) as writer:
        assert not writer.partial and writer.latest.length[3] == 7
        for index in (0, 2, 4):
            writer.put(completion(index, 0))
        writer.finish(prompts_of(5), {"mode": "exact"})
    assert read_head(path).lengths.tolist() == [0, 4, 0, 7, 0]
    with start(path, 5, resume=True) as writer:
        assert writer.complete and not begun(writer)


def test_a_resume_keeps_only_unfinished_sequences_in_memory_and_nothing_of_their_parts(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with start(path, 9) as writer:
        for index in range(8):
            writer.put(completion(index, 1000))
        writer.put(completion(8, 5, "partial"))
    with start(path, 9, resume=True) as writer:
        assert list(writer.partial) == [8] and same(writer.partial[8], completion(8, 5, "partial"))
        assert writer.partial[8].tokens.base is None and writer.partial[8].logprobs.base is None
        assert writer.latest.length.tolist() == [1000] * 8 + [5]


def test_resume_with_another_identity_names_every_key_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with start(path, 2) as writer:
        writer.put(completion(0))
    changed = {"model": "cc", "inputs": "bb", "leaves": "2"}
    with pytest.raises(JobError) as refused:
        start(path, 3, resume=True, identity=changed)
    text = str(refused.value)
    assert "model: was 'aa', is now 'cc'" in text
    assert "leaves: was 'not set', is now '2'" in text
    assert "mode: was 'exact', is now 'not set'" in text
    assert "sequences: was '2', is now '3'" in text
    assert "input" not in text and "--overwrite" in text
    write_whole(path, 2, overwrite=True)
    with pytest.raises(JobError, match="model: was 'aa', is now 'cc'"):
        start(path, 2, resume=True, identity=changed)


def test_a_merge_that_was_interrupted_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with start(path, 2) as writer:
        writer.put(completion(0))
        writer.put(completion(1))
        writer.commit()
        # Killed after the rename and before the parts are removed.
        output_parts.assemble(path, writer._origin, prompts_of(2), {"mode": "exact"}, lambda: None)
    assert parts_folder(path).exists()
    with start(path, 2, resume=True) as writer:
        assert writer.complete
    assert not parts_folder(path).exists() and len(read_outputs(path)) == 2


def test_temporaries_of_a_killed_run_are_ignored_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "out.h5"
    with start(path, 2) as writer:
        writer.put(completion(0))
    trace = tmp_path / "out.trace.h5"
    parts_folder(trace).mkdir()
    left = [parts_folder(path) / ".part-00000002.h5.77.tmp", tmp_path / ".out.h5.77.tmp"]
    left += [parts_folder(trace) / ".rank-00000-000001.h5.77.tmp", tmp_path / ".out.trace.h5.77.tmp"]
    for one in left:
        one.write_bytes(b"\x89HDF half")
    assert read_outputs(path).ids == ["0"]
    with start(path, 2, resume=True, trace=trace) as writer:
        assert begun(writer) == [0]
    assert not any(one.exists() for one in left) and caplog.text.count("half written") == 4


def test_a_damaged_part_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with start(path, 200) as writer:
        for index in range(200):
            writer.put(completion(index))
    part = parts_folder(path) / "part-00000001.h5"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    for attempt in (lambda: start(path, 200, resume=True), lambda: read_outputs(path)):
        with pytest.raises(DataError, match=r"(?s)part-00000001.h5.*move it away and use --resume"):
            attempt()
    assert not lock_file(path).exists()
    part.write_bytes(whole)
    with h5py.File(part, "r+") as file:
        file["index"][5] = 200
    with pytest.raises(DataError, match="input of 200 sequences"):
        start(path, 200, resume=True)


def test_damaged_columns_of_the_final_file_are_refused(tmp_path: Path) -> None:
    for dataset, value, message in (
        ("finish_reason", 9, "values outside 0..2"),
        ("offsets", 10**9, "must rise from 0"),
        ("ids_offsets", -1, "must rise from 0"),
    ):
        path = tmp_path / f"{dataset}.h5"
        write_whole(path, 4)
        with h5py.File(path, "r+") as file:
            file[dataset][2] = value
        with pytest.raises(DataError, match=message):
            read_outputs(path)


# ---------------------------------------------------------------- kill -9 at any moment

_CHILD = """
import sys, numpy as np
from pathlib import Path
from tests.unit.test_outputs import begun, completion, start
path, n = Path(sys.argv[1]), int(sys.argv[2])
writer = start(path, n, resume=True)
first = max(begun(writer), default=-1) + 1
for index in range(first, n):
    writer.put(completion(index, 50))
    if index % 3 == 2:
        writer.commit()
        print(index, flush=True)
"""


def test_after_kill_9_every_committed_sequence_is_readable(tmp_path: Path) -> None:
    path, n, dice = tmp_path / "out.h5", 20_000, random.Random(7)
    told = -1
    for _ in range(4):
        arguments = [sys.executable, "-c", _CHILD, str(path), str(n)]
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert child.stdout is not None
        told = max(told, int(child.stdout.readline()))
        time.sleep(dice.uniform(0.0, 0.2))
        child.send_signal(signal.SIGKILL)
        told = max([told, *(int(line) for line in child.stdout.read().split("\n")[:-1] if line)])
        child.wait()
        child.stdout.close()
        found = read_outputs(path)
        assert [int(one) for one in found.ids] == list(range(len(found))) and len(found) > told
        for row in {0, told // 2, told}:
            assert np.array_equal(found.tokens[50 * row : 50 * row + 50], completion(row, 50).tokens)
            assert np.array_equal(found.logprobs[50 * row : 50 * row + 50], completion(row, 50).logprobs)
    # The lock of the killed process on this host does not stand in the way.
    with start(path, n, resume=True) as writer:
        assert len(begun(writer)) == len(found)


# ---------------------------------------------------------------- the lock


def held_by(path: Path, **changes: object) -> None:
    held = {"host": "elsewhere", "pid": 7, "job": "x", "token": "t", "heartbeat": time.time()}
    lock_file(path).write_text(json.dumps({**held, **changes}))


@pytest.fixture
def soon_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.02)
    monkeypatch.setattr(locks, "STALE", 0.3)
    monkeypatch.setattr(locks, "LOOK", 0.02)


@pytest.mark.usefixtures("soon_stale")
@pytest.mark.parametrize("ahead", [-3600, 0, 3600])
def test_a_living_lock_is_refused_with_host_and_pid_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    path = tmp_path / "out.h5"
    held_by(path, heartbeat=time.time() + ahead)
    pauses = []

    def beat(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            held_by(path, heartbeat=time.time() + ahead + 5)

    monkeypatch.setattr(locks.time, "sleep", beat)
    with pytest.raises(JobError, match=r"another run is writing it \(host elsewhere, pid 7\)"):
        start(path, 1, overwrite=True)
    assert lock_file(path).exists() and len(pauses) == 3


@pytest.mark.usefixtures("soon_stale")
def test_the_same_process_cannot_open_an_output_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.h5"
    monkeypatch.setattr(locks, "STALE", 30.0)  # a busy machine may be slow to beat
    with start(path, 1), pytest.raises(JobError, match=f"pid {os.getpid()}"):
        start(path, 1, resume=True)
    start(path, 1, resume=True).close()


def test_the_lock_of_a_process_that_died_here_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    child = subprocess.Popen(["true"])
    child.wait()
    held_by(path, host=socket.gethostname(), pid=child.pid)
    begin = time.monotonic()
    with start(path, 1):
        assert json.loads(lock_file(path).read_text())["pid"] == os.getpid()
    assert time.monotonic() - begin < locks.STALE / 2
    assert not list(tmp_path.glob("*.lock*"))


@pytest.mark.usefixtures("soon_stale")
@pytest.mark.parametrize("kind", ["past", "future", "empty", "no JSON"])
def test_a_lock_that_does_not_change_is_watched_then_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = tmp_path / "out.h5"
    if kind in ("past", "future"):
        held_by(path, heartbeat=time.time() + (3600 if kind == "future" else -3600))
    else:
        lock_file(path).write_text("" if kind == "empty" else "[nonsense")
    begin = time.monotonic()
    with start(path, 1):
        assert time.monotonic() - begin >= locks.STALE
        assert json.loads(lock_file(path).read_text())["pid"] == os.getpid()
    assert "waiting for a sign of life" in caplog.text
    assert not list(tmp_path.glob("*.lock*"))


def test_a_writer_whose_lock_changed_hands_stops_and_keeps_what_it_committed(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    writer = start(path, 3)
    writer.put(completion(0))
    writer.commit()
    lock_file(path).unlink()
    held_by(path)
    writer.put(completion(1))
    with pytest.raises(DataError, match="host elsewhere, pid 7"):
        writer.commit()
    with pytest.raises(DataError, match="host elsewhere"):
        writer.put(completion(2))
    writer.close()
    assert json.loads(lock_file(path).read_text())["host"] == "elsewhere"
    assert read_outputs(path).ids == ["0"]


def beats(path: Path) -> bool:
    """Whether the heartbeat of a lock is refreshed within 10 s."""
    first, end = lock_file(path).read_bytes(), time.monotonic() + 10
    while lock_file(path).read_bytes() == first and time.monotonic() < end:
        time.sleep(0.01)
    return lock_file(path).read_bytes() != first


@pytest.mark.usefixtures("soon_stale")
@pytest.mark.parametrize("busy", ["read_parts", "write_part"])
def test_the_heart_beats_while_a_start_reads_and_while_a_commit_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: str
) -> None:
    path, seen = tmp_path / "out.h5", []
    slow = getattr(output_parts, busy)

    def watched(*arguments: object) -> object:
        seen.append(beats(path))
        return slow(*arguments)

    monkeypatch.setattr(f"moempi.files.output_writer.{busy}", watched)
    with start(path, 1) as writer:
        writer.put(completion(0))
        writer.commit()
    assert seen == [True]


def test_after_a_take_over_the_first_owner_touches_nothing_of_the_second(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    first = Lock.acquire(path, "job")
    lock_file(path).unlink()  # as whoever found it stale does
    second = Lock.acquire(path, "job")
    first._refresh()
    second.check()
    with pytest.raises(DataError, match="taken away"):
        first.check()
    first.release()
    second.check()
    second.release()
    with pytest.raises(DataError, match="held by nobody"):
        second.check()


@pytest.mark.usefixtures("soon_stale")
@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_find_a_stale_lock_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    path, read, quicker = tmp_path / "out.h5", locks._read, []
    if not links:
        no_links(monkeypatch)
    held_by(path)
    stale = lock_file(path).read_bytes()

    def slow(file: Path) -> bytes | None:
        if not quicker and time.monotonic() > end:
            # The last look before the lock is taken away; the other one is through with that already.
            lock_file(path).unlink()
            quicker.append(Lock.acquire(path, "job"))
            monkeypatch.setattr(locks, "STALE", 30.0)  # a busy machine may be slow to beat
            return stale
        return read(file)

    pause = locks.STALE
    end = time.monotonic() + pause / 2
    monkeypatch.setattr(locks, "_read", slow)
    # Nothing may be seen to change before that time is over, so that the first look behind it is the last.
    monkeypatch.setattr(locks.time, "sleep", lambda seconds, sleep=time.sleep: sleep(pause + seconds))
    with pytest.raises(JobError, match=f"pid {os.getpid()}"):
        Lock.acquire(path, "job")
    quicker[0].check()
    quicker[0].release()
    assert not list(tmp_path.iterdir())


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("soon_stale")
def test_a_lock_that_cannot_be_read_for_a_moment_is_still_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, failures, read = Lock.acquire(tmp_path / "out.h5", "job"), [3], Path.read_bytes

    def flaky(path: Path) -> bytes:
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    lock.check()
    failures[0] = 10**6
    with pytest.raises(DataError, match=r"out\.h5\.lock: cannot be read: Stale file handle"):
        lock.check()
    failures[0] = 0
    lock.release()


@pytest.mark.parametrize("links", [True, False])
def test_a_commit_that_another_run_made_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        no_links(monkeypatch)
    path = tmp_path / "out.h5"
    with pytest.raises(DataError, match=r"part-00000001.h5: is there already; another run"), start(path, 2) as writer:
        other = parts_folder(path) / "part-00000001.h5"
        # The lock was taken over, and the other run's first commit is there, between this one's check and its move.
        monkeypatch.setattr(writer._lock, "check", lambda: other.write_text("the other run's"))
        writer.put(completion(0))
    assert other.read_text() == "the other run's" and list(parts_folder(path).iterdir()) == [other]


def test_the_lock_is_checked_when_all_bytes_of_a_commit_are_on_the_disk(tmp_path: Path) -> None:
    parts_folder(tmp_path / "out.h5").mkdir()
    origin, seen = Origin("{}", IDENTITY, {}, 1), []

    def check() -> None:
        (temporary,) = parts_folder(tmp_path / "out.h5").iterdir()
        with h5py.File(temporary) as file:
            seen.extend(file["index"][...])

    output_parts.write_part(tmp_path / "out.h5", 1, [completion(0)], origin, check)
    assert seen == [0]


# ---------------------------------------------------------------- a disk that takes nothing


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file"):
        start(tmp_path / "file" / "out.h5", 1)


def test_an_error_of_the_thread_surfaces_and_close_does_not_repeat_it(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    writer = start(path, 3)
    parts_folder(path).rmdir()
    parts_folder(path).touch()
    writer.put(completion(0))
    with pytest.raises(DataError, match=r"could not be committed.*cannot be written: Not a directory"):
        writer.commit()
    with pytest.raises(DataError, match="could not be committed"):
        writer.finish(prompts_of(3), {"mode": "exact"})
    writer.close()
    parts_folder(path).unlink()
    # Nobody asked between put and close: then close is the one that tells.
    writer = start(path, 3)
    parts_folder(path).rmdir()
    parts_folder(path).touch()
    writer.put(completion(0))
    with pytest.raises(DataError, match="could not be committed"):
        writer.close()


_FULL = """
import resource, sys
from pathlib import Path
from moempi.errors import DataError
from moempi.files import schema
from tests.unit.test_outputs import completion, prompts_of, start
schema.environment = lambda: {}
path = Path(sys.argv[1])
writer = start(path, 2)
writer.put(completion(0))
writer.commit()
size = next(path.with_name("out.h5.parts").iterdir()).stat().st_size
def limit(bytes): resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))
if sys.argv[2] == "commit":
    limit(size + 50_000)
    writer.put(completion(1, 100_000))
    attempt = writer.commit
else:
    writer.put(completion(1, 3))
    writer.commit()
    limit(2000)
    attempt = lambda: writer.finish(prompts_of(2), {"mode": "exact"})
try:
    attempt()
except DataError as error:
    print(error)
else:
    sys.exit("no error")
writer.close()
"""


@pytest.mark.parametrize("when", ["commit", "finish"])
def test_a_full_disk_is_one_clear_error_and_loses_nothing_committed(tmp_path: Path, when: str) -> None:
    path = tmp_path / "out.h5"
    arguments = [sys.executable, "-c", _FULL, str(path), when]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    # HDF5 writing to a full disk by itself crashes at exit (-11).
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be written: File too large" in done.stdout
    assert read_outputs(path).ids == (["0"] if when == "commit" else ["0", "1"])
    assert not path.exists() and not list(tmp_path.rglob(".*.tmp"))


# ---------------------------------------------------------------- showing and merging


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(command, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_show_json_has_one_object_per_sequence(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    write_whole(path, 12)
    lines = [json.loads(line) for line in shown("show", path, "--json").splitlines()]
    assert [line["id"] for line in lines] == [f"p{i}" for i in range(12)]
    assert list(lines[0]) == ["id", "prompt", "completion", "tokens", "logprobs", "finish_reason"]
    assert len(shown("show", path, "--json", "-n", 5).splitlines()) == 5
    text = shown("show", path)
    assert "12 sequences" in text and "p9 " in text and "p10 " not in text and "... and 2 more" in text


def test_show_writes_no_nan_into_json_and_no_control_characters_to_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with start(path, 1) as writer:
        writer.put(Completion(0, np.array([5], np.int32), np.array([np.nan], np.float32), "eos"))
        writer.finish(prompts_of(1), {"mode": "exact", "decode": lambda tokens: "a\x1b[2Jb"})
    line = shown("show", path, "--json")
    assert json.loads(line)["logprobs"] == [None] and "NaN" not in line
    assert "\x1b[2J" not in shown("show", path)
    assert printable("a\x1b\r\nb\tc") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\nb\tc"


def unfinished(folder: Path, prefix: str) -> Path:
    write_inputs(folder / f"{prefix}.h5", prompts_of(5, prefix), {})
    digest = schema.file_digest(folder / f"{prefix}.h5")
    job = json.dumps({"input": {"file": str(folder / f"{prefix}.h5")}, "model": {"weights": "/nowhere.h5"}})
    path = folder / f"out-{prefix}.h5"
    with start(path, 5, job_json=job, sources={"input": digest}) as writer:
        writer.put(completion(4, 2))
        writer.put(completion(1, 3, "partial"))
    return path


def test_show_of_an_unfinished_run_has_ids_and_prompts_from_the_input(tmp_path: Path) -> None:
    path = unfinished(tmp_path, "u")
    lines = [json.loads(line) for line in shown("show", path, "--json").splitlines()]
    assert [(line["id"], line["finish_reason"]) for line in lines] == [("u1", "partial"), ("u4", "length")]
    assert lines[0]["prompt"] == "prompt 1 é" and lines[0]["completion"] is None
    assert "1 of 5 sequences finished, 1 partly" in shown("show", path)
    # Another input in its place is noticed.
    write_inputs(tmp_path / "u.h5", prompts_of(5, "other"), {})
    assert "rows instead of ids" in shown("show", path)
    assert json.loads(shown("show", path, "--json").splitlines()[0])["id"] == "1"


def test_merge_joins_shards_finished_or_not_in_the_order_given(tmp_path: Path) -> None:
    write_whole(tmp_path / "b.h5", 3, "b")
    write_whole(tmp_path / "a.h5", 2, "a", identity={**IDENTITY, "inputs": "dd"})
    path = unfinished(tmp_path, "u")
    out = tmp_path / "all.h5"
    report = json.loads(shown("merge", out, tmp_path / "b.h5", tmp_path / "a.h5", path, "--json"))
    assert report["sequences"] == 7
    found, head = read_outputs(out), read_head(out)
    assert found.ids == ["b0", "b1", "b2", "a0", "a1", "u1", "u4"]
    assert head.lengths.tolist() == [0, 1, 2, 0, 1, 3, 2]
    assert found.sequence(5)["finish_reason"] == "partial" and found.sequence(5)["completion"] == ""
    assert found.sequence(2)["completion"] == decode(completion(2, 2).tokens.tolist())
    assert head.origin.n_sequences == 10 and head.mode == "exact"
    assert head.origin.identity["model"] == "aa" and "differs" in head.origin.identity["inputs"]
    assert head.origin.sources[str(tmp_path / "a.h5")] == schema.file_digest(tmp_path / "a.h5")
    with pytest.raises(JobError, match="merged from an unfinished run"):
        start(out, 10, resume=True, identity=head.origin.identity)


def test_merge_in_small_windows_gives_the_same_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.h5", 20, "a")
    merge_outputs(tmp_path / "all.h5", [tmp_path / "a.h5"], window=3)
    once, twice = read_outputs(tmp_path / "a.h5"), read_outputs(tmp_path / "all.h5")
    assert [once.sequence(row) for row in range(20)] == [twice.sequence(row) for row in range(20)]


def test_merge_refuses_duplicates_modes_and_existing_files(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.h5", tmp_path / "b.h5", tmp_path / "out.h5"
    write_whole(a, 3, "a")
    write_whole(b, 2, "a")
    with pytest.raises(DataError, match=r"2 ids occur more than once, first 'a0' in .*a.h5 and .*b.h5"):
        merge_outputs(out, [a, b])
    with pytest.raises(DataError, match="more than once"):
        merge_outputs(out, [a, a])
    with pytest.raises(JobError, match="exists already"):
        merge_outputs(b, [a])
    with pytest.raises(JobError, match="one of those to read"):
        merge_outputs(a, [a], overwrite=True)
    with schema.create(b, "outputs") as file:
        OutputsFile(file, read_head(a).origin, "fast", prompts=False, completions=False)
    with pytest.raises(DataError, match=r"different modes.*is exact.*is fast"):
        merge_outputs(out, [a, b])
    with pytest.raises(DataError, match="no such file, and no commits"):
        merge_outputs(out, [tmp_path / "none.h5"])
    assert not out.exists()


# ---------------------------------------------------------------- compared


def test_compare_finds_the_first_difference_of_every_sequence(tmp_path: Path) -> None:
    from dataclasses import replace

    from moempi.files.compare_outputs import Difference, compare

    write_whole(tmp_path / "a.h5", 4)
    a = read_outputs(tmp_path / "a.h5")
    assert compare(a, a) == ([], [])
    begin = a.offsets[:-1].tolist()
    tokens, logprobs = a.tokens.copy(), a.logprobs.copy()
    tokens[begin[1]] += 1
    logprobs[begin[2]] = np.nextafter(logprobs[begin[2]], np.float32(9))  # the smallest step
    b = replace(a, tokens=tokens, logprobs=logprobs)
    assert compare(a, b) == ([Difference("p1", 0, "token"), Difference("p2", 0, "logprob")], [])
    shorter = replace(a, ids=["p0", "x", "p2", "p3"])
    assert compare(a, shorter) == ([], ["p1", "x"])


def test_the_command_compares_and_ends_with_1_where_anything_differs(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from moempi.cli.outputs import outputs

    write_whole(tmp_path / "a.h5", 3)
    write_whole(tmp_path / "b.h5", 4)
    said = {}
    for name in ("a", "b"):
        done = CliRunner().invoke(
            outputs, ["compare", str(tmp_path / "a.h5"), str(tmp_path / f"{name}.h5")], standalone_mode=False
        )
        said[name] = (done.return_value, done.output)
    assert said["a"][0] == 0 and said["a"][1].startswith("the same, bit for bit: 3 sequences, ")
    assert said["b"] == (1, "only in one of the two: p3\n")
