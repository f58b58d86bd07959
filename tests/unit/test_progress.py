"""How far a job is, in a bar and in lines, on a false clock; and the files of messages."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moempi import progress
from moempi.cli import logs
from moempi.errors import JobError
from moempi.files.completions import Completion
from moempi.progress import CLEAR, Progress, State, Terminal, bar, busiest_share, duration, line
from moempi.router.messages import Assignment
from moempi.router.router import Router


def state(**changes: float | None) -> State:
    table = {"finished": 23, "total": 68, "tokens": 1204, "expected": 3264, "seconds": 4.0, "busiest": 0.217}
    return State(**{**table, **changes})  # type: ignore[arg-type]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[mK]", "", text)


# ---------------------------------------------------------------- words


def test_a_line_by_hand() -> None:
    assert line(state()) == (
        "23 of 68 sequences, 1,204 new tokens, 301 tokens/s, about 7 s left, busiest expert 22% of its layer"
    )
    assert line(state(tokens=0, busiest=None)) == "23 of 68 sequences, 0 new tokens, 0 tokens/s"


def test_nothing_is_left_when_more_came_than_was_expected() -> None:
    assert state(tokens=4000).left == 0


@pytest.mark.parametrize("columns", [20, 30, 50, 80, 200])
def test_a_bar_is_narrower_than_the_terminal_and_loses_its_end_first(columns: int) -> None:
    text = plain(bar(state(tokens=123_456_789, expected=10**9), columns))
    assert len(text) < max(columns, 22)
    assert ("seqs" in text) >= ("tokens" in text) >= ("left" in text) >= ("busiest" in text)
    assert columns < 100 or text.endswith("busiest 22%")


def test_a_bar_is_as_long_as_the_work_that_is_done() -> None:
    lengths = [plain(bar(state(tokens=tokens, expected=100), 22)).count("━") for tokens in (0, 50, 100)]
    assert lengths[2] == 20 and lengths[0] in (19, 20)
    assert bar(state(tokens=0, expected=100), 22) != bar(state(tokens=50, expected=100), 22)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (100, "1:40 min"), (3599, "59:59 min"), (6000, "1:40 h"), (7500, "2:05 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_busiest_expert_of_any_layer() -> None:
    assert busiest_share(np.array([[0, 0], [1, 3], [5, 5]])) == 0.75
    assert busiest_share(np.zeros((2, 2), dtype=np.int64)) is None and busiest_share(None) is None


# ---------------------------------------------------------------- when it is shown


@dataclass
class Counts:
    finished: int = 1
    total: int = 4
    new_tokens: int = 10
    expected: int = 40


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_so_often(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    shown = Progress(10.0, now=clock)
    caplog.set_level(logging.INFO, "moempi")
    for clock.now in (105.0, 109.9, 110.0, 112.0, 119.0, 121.0):
        shown.show(Counts(), lambda: 20)
    assert [record.message for record in caplog.records] == [
        "1 of 4 sequences, 20 new tokens, 2 tokens/s, about 10 s left",
        "1 of 4 sequences, 20 new tokens, 1 tokens/s, about 21 s left",
    ]


def test_a_bar_is_redrawn_in_its_line_and_wiped_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    clock, screen = Clock(), io.StringIO()
    caplog.set_level(logging.INFO, "moempi")
    shown = Progress(10.0, Terminal(screen, 80), now=clock)
    shown.clear()
    for clock.now in (100.1, 100.3, 100.4, 101.0):
        shown.show(Counts(), lambda: 0)
    shown.clear()
    shown.clear()
    text = screen.getvalue()
    assert text.count(CLEAR) == 3 and text.endswith(CLEAR) and "\n" not in text and "10 tokens" in text
    assert not caplog.records


def test_a_terminal_that_is_gone_does_not_end_the_job() -> None:
    clock, screen = Clock(), io.StringIO()
    shown = Progress(10.0, Terminal(screen, 80), now=clock)
    screen.close()
    clock.now = 101.0
    shown.show(Counts(), lambda: 0)
    shown.clear()


# ---------------------------------------------------------------- which terminal


def test_ranks_use_the_launchers_terminal_on_its_own_host_only(tmp_path: Path) -> None:
    device = tmp_path / "tty"
    device.touch()
    here = progress.platform.node()
    for told, found in (
        ("", False),
        (f"{here} 90 {device}", True),
        (f"elsewhere 90 {device}", False),
        (f"{here} 90 {tmp_path}/no", False),
        (f"{here} wide {device}", False),
    ):
        terminal = progress.open_terminal({progress.TERMINAL: told})
        assert (terminal is not None) == found, told
        if terminal:
            assert terminal.columns == 90
            terminal.stream.close()


def test_a_pipe_is_no_terminal() -> None:
    assert progress.own_terminal(io.StringIO(), {"TERM": "xterm"}) is None
    assert progress.terminal_for_ranks(io.StringIO(), {"TERM": "xterm"}) == ""


# ---------------------------------------------------------------- what is expected to come


def test_the_router_expects_fewer_tokens_when_a_sequence_ends_early() -> None:
    work = {0: Assignment(0, [1, 2], 2, 10, []), 1: Assignment(1, [1, 2, 3], 2, 10, [0.5])}
    router = Router(work, 1, [0], 2, keep=lambda _: None, commit=lambda: None)
    router.start()
    assert router.expected == 10 + 9
    router.handle(0, done(0, 4, "eos"))
    assert router.expected == 4 + 9
    router.handle(0, done(1, 10, "length"))
    assert router.expected == router.new_tokens == 4 + 9


def done(row: int, n: int, reason: str) -> object:
    from moempi.router.messages import Done

    return Done([Completion(row, np.ones(n, np.int32), np.zeros(n, np.float32), reason)])


# ---------------------------------------------------------------- files of messages


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger without handlers, as in a fresh process."""
    logger, ours = logging.getLogger(), logging.getLogger("moempi")
    before = logger.handlers[:], logger.level, ours.level
    logger.handlers[:] = []
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], level, our_level = before
    logger.setLevel(level)
    ours.setLevel(our_level)


@pytest.mark.parametrize(("rank", "quiet", "shown"), [(0, False, ["a", "b"]), (0, True, ["b"]), (3, False, ["b"])])
def test_who_reads_what(
    root: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int, quiet: bool, shown: list[str]
) -> None:
    logs.set_up(rank, quiet=quiet, folder=tmp_path / "new" / "logs", in_terminal=False)
    log = logging.getLogger("moempi.test")
    log.debug("d")
    log.info("a")
    log.warning("b")
    logs.END.error("why it ended")
    screen = capsys.readouterr().err.splitlines()
    assert screen == [f"rank {rank}: {one}" if rank else one for one in shown]
    lines = (tmp_path / "new" / "logs" / f"rank-{rank:05d}.log").read_text().splitlines()
    words = [("DEBUG", "d"), ("INFO", "a"), ("WARNING", "b"), ("ERROR", "why it ended")]
    assert [one.split(f" rank {rank} ")[1] for one in lines] == [f"{level} {text}" for level, text in words]

    # A resumed run keeps what the run before has said.
    logs.set_up(rank, quiet=quiet, folder=tmp_path / "new" / "logs", in_terminal=False, append=True)
    log.info("again")
    kept = (tmp_path / "new" / "logs" / f"rank-{rank:05d}.log").read_text().splitlines()
    assert kept[:-1] == lines and kept[-1].endswith("INFO again")


def test_a_folder_that_cannot_be_made_is_named(root: logging.Logger, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"--log-dir .*file: rank-00002\.log cannot be made"):
        logs.set_up(2, quiet=False, folder=tmp_path / "file", in_terminal=False)
