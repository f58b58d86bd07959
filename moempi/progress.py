"""How far the job is: a bar in a terminal, a plain line every now and then elsewhere."""

from __future__ import annotations

import io
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("moempi")

# `moempi run -n` tells its ranks of the terminal that it has and they have not.
TERMINAL = "MOEMPI_TERMINAL"
CLEAR = "\r\x1b[2K"  # to the line's begin, and wipe it
REDRAWN_EVERY = 0.25  # seconds
_BAR = 20  # characters


class Counts(Protocol):
    """What the router knows of the job."""

    finished: int
    total: int
    new_tokens: int  # of the sequences that have ended
    expected: int  # new tokens of this run, at most


@dataclass(frozen=True)
class State:
    """How far a job is."""

    finished: int
    total: int
    tokens: int  # new ones of this run, also of sequences that have not ended
    expected: int
    seconds: float
    busiest: float | None  # share of a layer's tokens that its busiest expert got; None: not known

    @property
    def rate(self) -> float:
        """New tokens per second, since the first sequence was handed out."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds to go at that rate, if no sequence ends early; None while nothing has come out yet."""
        return max(0, self.expected - self.tokens) / self.rate if self.tokens else None


class Progress:
    """Shows finished sequences, tokens, tokens/s, time left, and how far the busiest expert stands out.

    Args:
        every: seconds between two lines of a log.
        terminal: where a bar is drawn; None: lines are logged instead.
        earlier: sequences that were finished before this run.
        load: tokens per layer and expert that this rank's gate has seen [L, E]; they stand for all ranks'.
        now: a clock, in s.
    """

    def __init__(
        self,
        every: float,
        terminal: Terminal | None = None,
        earlier: int = 0,
        load: Callable[[], np.ndarray | None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._every = REDRAWN_EVERY if terminal else every
        self._earlier, self._terminal, self._load, self._now = earlier, terminal, load, now
        self._drawn = False
        self.begin()

    def begin(self) -> None:
        """The first sequence is handed out now."""
        self._begin = self._now()
        self._next = self._begin + self._every

    def show(self, counts: Counts, count_tokens: Callable[[], int]) -> None:
        """Draw or log how far the job is, if it is time.

        Args:
            count_tokens: new tokens of all ranks, as far as they have told; asked for only when something is shown.
        """
        now = self._now()
        if now < self._next:
            return
        self._next = now + self._every
        tokens = max(count_tokens(), counts.new_tokens)
        share = busiest_share(self._load())
        finished, total = self._earlier + counts.finished, self._earlier + counts.total
        state = State(finished, total, tokens, counts.expected, now - self._begin, share)
        if self._terminal:
            self._drawn = True
            self._write(self._terminal, CLEAR + bar(state, self._terminal.columns))
        else:
            log.info("%s", line(state))

    def clear(self) -> None:
        """Wipe the bar."""
        if self._terminal and self._drawn:
            self._drawn = False
            self._write(self._terminal, CLEAR)

    def _write(self, terminal: Terminal, text: str) -> None:
        try:
            terminal.stream.write(text)
            terminal.stream.flush()
        except (OSError, ValueError):
            self._terminal = None  # it is gone; the job goes on


# ---------------------------------------------------------------- pure


def busiest_share(load: np.ndarray | None) -> float | None:
    """The largest share that an expert has of its layer's tokens [L, E]; None where there are none."""
    if load is None or not load.sum():
        return None
    of_layer = load.sum(axis=1)
    used = of_layer > 0
    return float((load[used].max(axis=1) / of_layer[used]).max())


def line(state: State) -> str:
    """One line for a log."""
    left = "" if state.left is None else f", about {duration(state.left)} left"
    busiest = "" if state.busiest is None else f", busiest expert {state.busiest:.0%} of its layer"
    return (
        f"{state.finished} of {state.total} sequences, {state.tokens:,} new tokens, {state.rate:,.0f} tokens/s"
        f"{left}{busiest}"
    )


def bar(state: State, columns: int) -> str:
    """The same as a bar of less than `columns` characters, coloured unless NO_COLOR is set; the ends go first."""
    left = "" if state.left is None else f"{duration(state.left)} left"
    busiest = "" if state.busiest is None else f"busiest {state.busiest:.0%}"
    parts = [f"{state.finished}/{state.total} seqs", f"{state.tokens:,} tokens", f"{state.rate:,.0f}/s", left, busiest]
    text = ""
    for part in filter(None, parts):
        if _BAR + len(text) + len(part) + 2 >= columns:
            break
        text += f"  {part}"
    return _drawn_bar(state.tokens, max(1, state.expected)) + text


def _drawn_bar(done: int, of: int) -> str:
    from rich.console import Console
    from rich.progress_bar import ProgressBar

    console = Console(file=io.StringIO(), force_terminal=True, width=_BAR + 1, legacy_windows=False)
    with console.capture() as captured:
        console.print(ProgressBar(total=of, completed=min(done, of), width=_BAR), end="")
    return captured.get().rstrip("\n")


def duration(seconds: float) -> str:
    """12 s, 3:07 min or 2:05 h."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02} min" if minutes < 100 else f"{minutes // 60}:{minutes % 60:02} h"


# ---------------------------------------------------------------- the terminal


@dataclass(frozen=True)
class Terminal:
    """Where a bar is drawn."""

    stream: TextIO
    columns: int


def terminal_for_ranks(stream: TextIO, environ: Mapping[str, str]) -> str:
    """What `TERMINAL` has to be for the ranks that this process starts: host, columns and device; empty: none.

    mpirun hands on what its ranks print line by line, which is too late for a bar. Rank 0 writes to the device itself,
    if it is on the same host.
    """
    terminal = own_terminal(stream, environ)
    return f"{platform.node()} {terminal.columns} {os.ttyname(stream.fileno())}" if terminal else ""


def open_terminal(environ: Mapping[str, str]) -> Terminal | None:
    """The terminal that the launcher told of; None where it told of none, or of one on another host."""
    host, _, rest = environ.get(TERMINAL, "").partition(" ")
    columns, _, device = rest.partition(" ")
    if host != platform.node() or not columns.isdecimal():
        return None
    try:
        handle = os.open(device, os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return None
    return Terminal(os.fdopen(handle, "w"), int(columns))


def own_terminal(stream: TextIO, environ: Mapping[str, str]) -> Terminal | None:
    """The terminal behind a stream of this process."""
    if environ.get("TERM", "dumb") == "dumb" or not stream.isatty():
        return None
    return Terminal(stream, os.get_terminal_size(stream.fileno()).columns or 80)
