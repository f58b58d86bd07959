"""What the router and the home ranks say to each other."""

from __future__ import annotations

from dataclasses import dataclass

from moempi.files.completions import Completion


@dataclass(frozen=True)
class Assignment:
    """A sequence for a home rank, with what an earlier run had generated of it."""

    index: int  # row of the input file
    tokens: list[int]  # prompt, then generated tokens
    n_prompt: int
    max_new_tokens: int
    logprobs: list[float]


@dataclass(frozen=True)
class Want:
    """A home has, or will soon have, room for `n` more sequences."""

    n: int


@dataclass(frozen=True)
class Work:
    """Sequences for a home."""

    assignments: list[Assignment]


@dataclass(frozen=True)
class Done:
    """Sequences that a home has finished, or hands back half generated."""

    completions: list[Completion]


@dataclass(frozen=True)
class DrainWanted:
    """A rank was told by a signal to stop early."""


@dataclass(frozen=True)
class Drain:
    """Homes finish the step they are in and hand back what they have."""


@dataclass(frozen=True)
class Drained:
    """A home has handed back everything."""


@dataclass(frozen=True)
class End:
    """Every result is committed; no dispatch can be outstanding."""


@dataclass(frozen=True)
class Alive:
    """A rank is there; what it waits for, in words, and how many new tokens its home has made."""

    waiting: str
    tokens: int = 0


@dataclass(frozen=True)
class Left:
    """A rank has heard of the end; it sends no more signs of life."""


ToRouter = Want | Done | DrainWanted | Drained
ToHome = Work | Drain | End
