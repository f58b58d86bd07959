"""A home rank: the sequences that live here, what they do next, and what becomes of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import numpy as np

from moempi.batch import Sequence, Step, compose, go_on
from moempi.exchange.engine import Engine
from moempi.exchange.tasks import Future
from moempi.files.completions import Completion
from moempi.model.attention import ON_CPU, Planner
from moempi.model.cache import KVCache
from moempi.model.config import PAGE
from moempi.router.messages import Assignment, Done, Drain, Drained, End, ToHome, ToRouter, Want, Work

log = logging.getLogger("moempi")

AHEAD = 2  # steps before a sequence must end in which its successor is asked for


class Home:
    """Takes sequences in, lets microbatches step them, and reports those that end.

    Args:
        cache: where keys and values of the sequences lie.
        capacity: sequences worked on at the same time.
        n_microbatches: in flight.
        n_decoding: of them take the sequences that have one token to go in a step.
        budget: most tokens of a microbatch in a step.
        group: query heads per key-value head.
        eos_tokens: tokens that end a sequence; empty to ignore them.
        tell: sends a message to the router.
        planner: the device's plans of attention.
    """

    def __init__(
        self,
        engine: Engine,
        cache: KVCache,
        *,
        capacity: int,
        n_microbatches: int,
        n_decoding: int,
        budget: int,
        group: int,
        eos_tokens: tuple[int, ...],
        tell: Callable[[ToRouter], None],
        planner: Planner = ON_CPU,
    ):
        self.engine, self.cache = engine, cache
        self.capacity, self.budget, self.group = capacity, budget, group
        self.eos_tokens, self.tell, self._planner = frozenset(eos_tokens), tell, planner
        self.n_decoding = n_decoding
        self.resident: list[list[Sequence]] = [[] for _ in range(n_microbatches)]
        self._last: dict[int, Step] = {}  # the last step of each microbatch
        self.steps = self.new_tokens = 0
        self.ended = self.draining = False
        self._waiting: deque[Sequence] = deque()
        self._drained = self._told = False
        self._asked = 0
        self._parked: list[Future] = []

    @property
    def n_microbatches(self) -> int:
        """How many microbatches are in flight."""
        return len(self.resident)

    # ------------------------------------------------------------ messages of the router

    def hear(self, message: ToHome) -> None:
        """Act on a message of the router."""
        match message:
            case Work(assignments):
                self._waiting.extend(_sequence(a) for a in assignments)
                self._asked = max(0, self._asked - len(assignments))
            case Drain():
                self.draining = True
            case End():
                self.ended = True
        self._wake()

    async def wait_for_news(self) -> None:
        """Until the router has said something, or a sequence has been taken in, by whichever microbatch."""
        future = Future()
        self._parked.append(future)
        await future

    def _wake(self) -> None:
        parked, self._parked = self._parked, []
        for future in parked:
            self.engine.notify(future)

    # ------------------------------------------------------------ steps

    def next_step(self, microbatch: int) -> Step | None:
        """The next step of a microbatch, or None where it has no sequences."""
        if self.draining:
            self._hand_back(microbatch)
            return None
        self._take_in()
        if microbatch >= self.n_decoding:
            self._gather(microbatch)
        sequences = self.resident[microbatch]
        if not sequences:
            return None
        self.steps += 1
        last = self._last.get(microbatch)
        step = go_on(last, self.steps, sequences, self._planner.go_on) if last else None
        if step is None:
            step = compose(microbatch, self.steps, sequences, self.budget, self.group, self._planner.make)
        self._last[microbatch] = step
        self._ask_ahead()
        return step

    def accept(self, step: Step, tokens: list[int], logprobs: list[float]) -> None:
        """Note the next token of every sequence in `step.choosing`, and report those that have ended."""
        for sequence, chunk in zip(step.sequences, step.chunks, strict=True):
            sequence.cached += chunk
        self.new_tokens += len(tokens)
        ended = []
        for sequence, token, logprob in zip(step.choosing, tokens, logprobs, strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if token in self.eos_tokens or not sequence.remaining:
                ended.append(sequence)
        for sequence in ended:
            self._let_go(sequence, step.microbatch)
        if ended:
            self.tell(Done([_completion(s, self.eos_tokens) for s in ended]))
            self._ask_ahead()

    def _take_in(self) -> None:
        # In order: a large sequence that has to wait for room is not overtaken for ever by small ones.
        while self._waiting and sum(map(len, self.resident)) < self.capacity:
            sequence = self._waiting[0]
            if not self.cache.has_room(sequence.most_positions):
                self._tell_of_waiting()
                return
            self._waiting.popleft()
            sequence.pages = self.cache.take(sequence.most_positions)
            min(self.resident, key=len).append(sequence)
            self._wake()  # its microbatch may be one that had nothing to do

    def _gather(self, microbatch: int) -> None:
        """Sequences whose prompt is done move on to where they decode: expert calls are fewer, and larger."""
        here, decoding = self.resident[microbatch], self.resident[: self.n_decoding]
        moving = [s for s in here if len(s.tokens) - s.cached == 1]
        if moving:
            self.resident[microbatch] = [s for s in here if len(s.tokens) - s.cached > 1]
            for sequence in moving:
                min(decoding, key=len).append(sequence)
            self._wake()  # one of those may have had nothing to do

    def _tell_of_waiting(self) -> None:
        """Say once that the cache is full."""
        level, self._told = (logging.DEBUG if self._told else logging.INFO), True
        log.log(
            level, "rank %d: the KV cache of %d positions is full: %d sequences at work, %d wait for room",
            self.engine.rank, self.cache.n_pages * PAGE, sum(map(len, self.resident)), len(self._waiting),
        )  # fmt: skip

    def _ask_ahead(self) -> None:
        """Ask for as many sequences as will find a free place within the next steps."""
        staying = sum(s.remaining > AHEAD for sequences in self.resident for s in sequences)
        room = self.capacity - staying - len(self._waiting) - self._asked
        if room > 0:
            self._asked += room
            self.tell(Want(room))

    def _let_go(self, sequence: Sequence, microbatch: int) -> None:
        self.resident[microbatch].remove(sequence)
        self.cache.give_back(sequence.pages)

    def _hand_back(self, microbatch: int) -> None:
        """Return a microbatch's unfinished sequences to the router; say so once all are returned."""
        leaving = [*self._waiting, *self.resident[microbatch]]
        self._waiting.clear()
        for sequence in list(self.resident[microbatch]):
            self._let_go(sequence, microbatch)
        begun = [_completion(s, self.eos_tokens, partial=True) for s in leaving if s.logprobs]
        if begun:
            self.tell(Done(begun))
        if not any(self.resident) and not self._drained:
            self._drained = True
            self.tell(Drained())


def _sequence(a: Assignment) -> Sequence:
    return Sequence(a.index, list(a.tokens), a.n_prompt, a.max_new_tokens, list(a.logprobs))


def _completion(sequence: Sequence, eos_tokens: frozenset[int], *, partial: bool = False) -> Completion:
    reason = "partial" if partial else "eos" if sequence.tokens[-1] in eos_tokens else "length"
    return Completion(
        index=sequence.index,
        tokens=np.array(sequence.tokens[sequence.n_prompt :], dtype=np.int32),
        logprobs=np.array(sequence.logprobs, dtype=np.float32),
        finish_reason=reason,
    )
