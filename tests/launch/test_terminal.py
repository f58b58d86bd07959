"""What a run shows in a terminal and in a pipe, and what Ctrl-C says at once. Two ranks, each case with an mpirun."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ranks import run

from moempi.files.committed import committed
from moempi.files.inputs import Prompts, write_inputs
from moempi.launch import session_members
from moempi.progress import CLEAR

TINYMOE = Path(__file__).parents[2] / "inputs" / "tinymoe.h5"


def write_job(folder: Path, new_tokens: int) -> Path:
    """Eight prompts of three tokens, a line of progress ten times a second."""
    tokens = [np.array([5 + i, 17, 40], dtype=np.int32) for i in range(8)]
    write_inputs(folder / "p.h5", Prompts([f"p{i}" for i in range(8)], tokens, None, np.zeros(8, np.int32)), {})
    (folder / "job.toml").write_text(
        f'model.weights = "{TINYMOE}"\ninput.file = "p.h5"\noutput.file = "out.h5"\nprogress.every = 0.1\n'
        f"generate = {{ max_new_tokens = {new_tokens}, stop_at_eos = false }}\nrun.threads = 1\n"
    )
    return folder / "job.toml"


def moempi(job: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "moempi", "run", str(job), *options]


class Screen:
    """A program in a terminal of its own, 100 columns wide; at the end of the block what is left of it is killed."""

    def __init__(self, command: list[str]) -> None:
        self._handle, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment
        )
        os.close(theirs)
        self._seen: list[bytes] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self._handle, 65536):
                self._seen.append(data)
        except OSError:
            return  # the last process that had the terminal open is gone

    @property
    def text(self) -> str:
        return b"".join(self._seen).decode(errors="replace").replace("\r\n", "\n")

    def wait_for(self, pattern: str, timeout: float = 90) -> str:
        end = time.monotonic() + timeout
        while not re.search(pattern, self.text):
            ended = self.process.poll() is not None
            time.sleep(0.02)
            late = time.monotonic() > end or (ended and not re.search(pattern, self.text))
            assert not late, f"{pattern!r} did not come:\n{self.text}"
        return self.text

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in session_members(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(tmp_path: Path) -> None:
    job = write_job(tmp_path, 600)
    with Screen(moempi(job, "-n", "2")) as screen:
        first = screen.wait_for("starting 2 ranks for ")
        assert "rank 0" not in first, "said before the ranks are there"
        live = screen.wait_for(r"/8 seqs  [\d,]+ tokens")
        assert "output:" not in live, "the bar is drawn while the job runs"
        assert screen.process.wait(90) == 0, screen.text
        text = screen.wait_for("trace: ")
    bars, summary = text.rsplit(CLEAR, 1)
    assert bars.count(CLEAR) >= 2 and re.search(r"\d s left", bars) and "busiest" in bars
    assert re.search(r"^8 of 8 sequences finished, 4,800 new tokens in ", summary)
    assert re.search(r"^total:  [\d.]+ s", summary, re.MULTILINE) and "out.h5" in summary


def test_ctrl_c_says_at_once_how_to_go_on(tmp_path: Path) -> None:
    job = write_job(tmp_path, 1000)
    with Screen(moempi(job, "-n", "2")) as screen:
        screen.wait_for(r"/8 seqs  [\d,]*[1-9]\d* tokens")
        screen.process.send_signal(signal.SIGINT)
        screen.wait_for("stopping: what is done gets committed .* --resume goes on from there", timeout=20)
        assert screen.process.wait(60) == 130, screen.text
        screen.wait_for("stopped early and committed; go on with --resume")


def test_one_process_alone_says_so_too(tmp_path: Path) -> None:
    job = write_job(tmp_path, 1000)
    with Screen(moempi(job)) as screen:
        screen.wait_for("/8 seqs")
        screen.process.send_signal(signal.SIGINT)
        screen.wait_for("stopping: what is done gets committed, and --resume goes on from there", timeout=20)
        assert screen.process.wait(60) == 130, screen.text


def test_one_process_alone_commits_when_its_terminal_closes(tmp_path: Path) -> None:
    job = write_job(tmp_path, 1000)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        moempi(job), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whoever runs the tests may be under nohup
    )  # fmt: skip
    os.close(theirs)
    try:
        seen = b""
        while b"/8 seqs" not in seen:
            seen += os.read(ours, 65536)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.wait()
    found = committed(tmp_path / "out.h5")
    assert found.partial and found.new_tokens and not (tmp_path / "out.h5.lock").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipe")


def test_a_pipe_gets_lines_and_a_folder_a_file_per_rank(folder: Path) -> None:
    job = write_job(folder, 150)
    ended = run(moempi(job, "-n", "2", "--log-dir", str(folder / "logs")), timeout=90)
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.err + ended.out
    progress = (
        r"^\d of 8 sequences, [\d,]+ new tokens, [\d,]+ tokens/s, about \d+ s left, busiest expert \d+% of its layer$"
    )
    assert re.search(progress, ended.err, re.MULTILINE), ended.err
    assert [path.name for path in sorted((folder / "logs").iterdir())] == ["rank-00000.log", "rank-00001.log"]
    other = (folder / "logs" / "rank-00001.log").read_text()
    assert "rank 1 INFO rank 1 of 2 is ready" in other and "rank 0" not in other


def test_quiet_is_quiet(folder: Path) -> None:
    job = write_job(folder, 4)
    ended = run(moempi(job, "-n", "2", "--quiet", "--overwrite"), timeout=90)
    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_why_a_rank_ended_is_in_its_file(folder: Path) -> None:
    job = write_job(folder, 4)
    ended = run(moempi(job, "-n", "2", "--log-dir", str(folder / "end")), timeout=90)
    assert ended.code == 2 and ended.err.count("exists already") == 1, ended.err
    for rank in range(2):
        assert "ERROR" in (folder / "end" / f"rank-{rank:05d}.log").read_text()
