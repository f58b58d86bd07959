"""The engine: one loop per rank that owns all progress.

Every turn takes arrivals, completes requests, resumes the coroutines that can go on and gives work to the
experts. Nothing in it blocks: sends and receives complete through one `Testsome`, and a rank with nothing
to do backs off, so that oversubscribed ranks leave the cores to those that have; where a core is its own it looks
longer before it sleeps, because waking takes longer than an answer.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from moempi.errors import StallError
from moempi.exchange.account import Account
from moempi.exchange.arrivals import Arrival, Experts
from moempi.exchange.plan import Message, Tags, header_bytes
from moempi.exchange.requests import Requests
from moempi.exchange.slots import LayerTable
from moempi.exchange.tasks import PAUSE, Future, Slicer, Task
from moempi.exchange.unanswered import Unanswered
from moempi.exchange.wire import as_bytes, frame, read_header
from moempi.recorder import Recorder
from moempi.stages import (
    ANSWER_KIND,
    BARRIER,
    CONTROL,
    DISPATCH_KIND,
    EXPERT,
    EXPOSED,
    IDLE,
    LOADED,
    NO_STEP,
    POLL,
    RECEIVE,
)

EMPTY_POLLS = 5  # before the first sleep; with more of them ranks that share a core keep it from each other
SPIN = 2e-3  # seconds that a rank which has its cores to itself goes on looking before the first sleep
SHORTEST_SLEEP = 50e-6
SERVICE_INTERVAL = 1e-3  # seconds between two looks at control messages, which cost as much as those at rows
LONGEST_SLEEP = 1e-3  # while requests are open
LONGEST_IDLE_SLEEP = 5e-3  # otherwise
LONGEST_RUNG_SLEEP = 20e-3  # otherwise, where whoever sends rings


@dataclass(frozen=True)
class Channels:
    """One communicator per kind of traffic, so that a probe sees only what it is for; all duplicates of one."""

    dispatch: MPI.Intracomm
    answers: MPI.Intracomm
    barrier: MPI.Intracomm


@dataclass(frozen=True)
class Limits:
    """What bounds an engine: bytes of the arrival budget, seconds of a stall, a slice of computation, spinning."""

    arrival_budget: int
    stall_timeout: float
    slice: float
    spin: float = 0.0


class Engine:
    """Owns all messages between homes and experts on one rank.

    Args:
        channels: collective duplicates of the communicator that the job runs on.
        tables: routing table of every MoE layer.
        experts: the slots of this rank.
        dtype: of the rows.
        d_model: D.
        tags: how tags name layer, microbatch and piece.
        limits: budget, time-out, slice.
        recorder: gets spans, rows and bytes.
    """

    looks = 2  # of a test of requests

    def __init__(
        self,
        channels: Channels,
        tables: Mapping[int, LayerTable],
        experts: Experts,
        dtype: torch.dtype,
        d_model: int,
        tags: Tags,
        limits: Limits,
        recorder: Recorder,
    ):
        self.rank, self.n_ranks = channels.dispatch.rank, channels.dispatch.size
        self.tables, self.experts, self.tags, self.recorder = tables, experts, tags, recorder
        self.dtype, self.d_model = dtype, d_model
        self.requests = Requests(self.looks)
        self.arrivals = Account(limits.arrival_budget)
        self.slicer = Slicer(limits.slice)
        self.takers: list[Callable[[], bool]] = [self._take_arrivals]  # of what comes; each says whether anything had
        self.services: list[Callable[[], bool]] = []  # polled now and then; each says whether anything happened
        self._channels, self._limits = channels, limits
        self._ready: deque[Task] = deque()
        self._living = 0
        self._unanswered: dict[Hashable, Unanswered] = {}
        self._meeting: tuple[int, float] | None = (
            None  # layer after which all ranks meet, and since when this one waits
        )
        self._status = MPI.Status()
        self._clock, self._looked = 0.0, time.perf_counter()
        self._empty_polls, self._empty_since, self._sleeps = 0, 0.0, 0
        self._services_due = 0.0

    # ------------------------------------------------------------ the loop

    def run(self, tasks: list[Task]) -> None:
        """Turn until every task has ended and every request is complete. Collective over the ranks of the job."""
        self._ready.extend(tasks)
        self._living = len(tasks)
        self.recorder.start()
        while self._living:
            self.turn()
        since = self._clock
        self._complete(since)
        # Others may still be at it: go on serving them until all are here.
        self.requests.add(self._channels.barrier.Ibarrier(), lambda: None)
        self._complete(since)

    def _complete(self, since: float) -> None:
        """Turn until no request is open; `since`: when this rank's tasks had ended, on the engine's own clock."""
        while self.requests:
            self.turn()
            if self._clock - since > self._limits.stall_timeout:
                raise StallError(
                    f"rank {self.rank}: has come to its end, not all ranks have in {self._clock - since:.1f} s "
                    f"(engine.stall_timeout = {self._limits.stall_timeout:g} s)"
                )

    def turn(self) -> None:
        """Look at the network, resume one task, serve one expert; rest if there was nothing to do."""
        moved = self.poll()
        self._look_for_stall()
        if moved or self._ready or self.experts:
            self.recorder.lap(RECEIVE if moved else POLL)
        if self._go_on() or moved:
            self._empty_polls = self._sleeps = 0
        else:
            self._rest()

    def _go_on(self) -> bool:
        """Resume one task, serve one expert; whether there was anything to do."""
        resumed = bool(self._ready)
        if resumed:
            # A task that only waits now lets the next one add its rows before the experts compute;
            # one that paused is in the middle of long work and gives way to them.
            paused = self._resume(self._ready.popleft())
            if self._ready and not paused:
                return True
        if self.experts:
            self.serve()
            return True
        return resumed

    def poll(self) -> bool:
        """Take arrivals, complete requests, ask the services; whether anything happened."""
        moved = False
        for take in (*self.takers, self.requests.test):
            moved = take() or moved
        if self._looked < self._services_due:
            return moved
        self._services_due = self._looked + SERVICE_INTERVAL
        begin = time.perf_counter_ns()
        acted = [service() for service in self.services]
        if any(acted):
            self.recorder.lap(RECEIVE if moved else POLL, end=begin)
            self.recorder.lap(CONTROL)
            moved = True
        return moved

    def _resume(self, task: Task) -> bool:
        try:
            waiting = task.send(None)
        except StopIteration:
            self._living -= 1
            return False
        if waiting is PAUSE:
            self._ready.append(task)
            return True
        waiting.task = task
        return False

    def notify(self, future: Future, by: int = -1) -> None:
        """One of the things that `future` waits for has happened; `by`: the rank that did it."""
        future.left -= 1
        if future.left:
            return
        future.by, future.at = by, time.perf_counter_ns()
        if future.task is not None:
            self._ready.append(future.task)
        if future.then is not None:
            future.then()

    def serve(self) -> None:
        """One expert call, and the answers that are complete with it."""
        begin = time.perf_counter_ns()
        # The lap of the expert begins where the last one ended, a little before rows that have just been put here.
        self.experts.since = min(self.experts.since, self.recorder.since)
        layer, rows, finished = self.experts.serve(self.slicer.size(EXPERT))
        self.slicer.learn(EXPERT, rows, begin)
        self.recorder.lap(EXPERT, layer, tokens=rows)
        if not self.experts.loaded:
            self.recorder.span(LOADED, -1, NO_STEP, self.experts.since, self.recorder.since, 0, 0, -1)
        for arrival in finished:
            self.answer(arrival)

    def _rest(self) -> None:
        self._empty_polls += 1
        if self._empty_polls == 1:
            self._empty_since = self._looked
        if self._empty_polls <= EMPTY_POLLS or self._looked - self._empty_since < self._limits.spin:
            os.sched_yield()
        elif self.requests.bell.sleep(self._nap()):
            self._services_due = 0.0  # it may have been for them
            # The look that takes a message out of the network is not the one that finds it.
            self._empty_polls = self._sleeps = 0
        else:
            self._sleeps += 1
        self.recorder.rest(*self._waited_for())  # the look at the network that found nothing is part of it

    def _waited_for(self) -> tuple[int, int]:
        """What a rank with nothing to do waits for, as a stage and a peer of the trace."""
        oldest = next(iter(self._unanswered.values()), None)
        if oldest is not None:
            return EXPOSED, oldest.peer
        return (BARRIER if self._meeting else IDLE), -1

    def _nap(self) -> float:
        """Seconds to sleep: longer and longer while nothing comes, up to what is under way allows.

        MPI moves long messages only while it is looked at, so a rank with open requests never sleeps long. One without
        sleeps until it is rung for, if all others can do that.
        """
        busy = bool(self.requests) or self.experts.loaded  # rows that wait for more do not for long
        if not busy and self.requests.bell.hears_all:
            return LONGEST_RUNG_SLEEP
        nap = min(LONGEST_SLEEP if busy else LONGEST_IDLE_SLEEP, SHORTEST_SLEEP * 2 ** min(self._sleeps, 10))
        if self.experts.waiting:
            nap = min(nap, max(0.0, (self.experts.waiting.due - time.perf_counter_ns()) / 1e9))
        return nap

    def now(self) -> float:
        """The engine's own clock (s)."""
        return self._clock

    def waits(self) -> str:
        """What this rank waits for, in words: the oldest dispatch that has not come back, or a meeting; else empty."""
        oldest = next(iter(self._unanswered.values()), None)
        if oldest is not None:
            return oldest.describe(self._clock)
        if self._meeting is not None:
            layer, since = self._meeting
            return f"all ranks to meet after layer {layer}, {self._clock - since:.1f} s"
        return ""

    def _look_for_stall(self) -> None:
        # The clock adds at most a second per turn: a job that was suspended does not wake into a time-out.
        now = time.perf_counter()
        self._clock += min(1.0, now - self._looked)
        self._looked = now
        oldest = next(iter(self._unanswered.values()), None)
        if oldest is not None and self._clock - oldest.since > self._limits.stall_timeout:
            raise StallError(
                f"rank {self.rank}: no answer from {oldest.describe(self._clock)} "
                f"(engine.stall_timeout = {self._limits.stall_timeout:g} s)"
            )

    def free(self) -> None:
        """Give the communicators back, and the bell. Collective."""
        self.requests.bell.close()
        for comm in (self._channels.dispatch, self._channels.answers, self._channels.barrier):
            comm.Free()

    # ------------------------------------------------------------ the home's side: rows out, answers in

    def answer_dtype(self, table: LayerTable) -> torch.dtype:
        """Type of the answers of a layer: partial sums of cut experts travel in float32."""
        return torch.float32 if table.cut else self.dtype

    def send(self, message: Message, layer: int, microbatch: int, rows: Tensor, answer: Tensor, done: Future) -> None:
        """Dispatch rows [R, D] to one rank; `answer` [R, D] is filled, then `done` notified.

        The receive for the answer is posted first, into memory that the caller has reserved.
        """
        tag = self.tags.of(layer, microbatch, message.piece)
        peer, n = message.destination, len(rows)
        if peer == self.rank:
            self.recorder.sent(DISPATCH_KIND, layer, peer, n, 0)
            self.experts.add(Arrival(peer, tag, layer, microbatch, rows, answer, message.rows_per_slot, n, done))
            return
        self.expect((peer, tag), layer, microbatch, peer, n)
        receive = self._channels.answers.Irecv(as_bytes(answer), peer, tag)
        self.requests.add(receive, lambda: self.take_answer((peer, tag), answer, layer, done))
        payload = frame(rows, message.rows_per_slot)
        self.requests.add(self._channels.dispatch.Isend(payload, peer, tag), lambda: payload, to=peer)
        self.recorder.sent(DISPATCH_KIND, layer, peer, n, payload.nbytes)

    def expect(self, key: Hashable, layer: int, microbatch: int, peer: int, rows: int, way: str = "") -> None:
        """Rows leave for a rank, and `answered` will be called when they are back; until then they may stall."""
        self._unanswered[key] = Unanswered(self._clock, layer, microbatch, peer, rows, self.recorder.since, way)

    def take_answer(self, key: Hashable, answer: Tensor, layer: int, done: Future) -> None:
        """The answer [R, D] of a slot's rank is here."""
        peer = self._unanswered[key].peer
        self.recorder.received(ANSWER_KIND, layer, peer, len(answer), answer.nbytes)
        self.answered(key, done)

    def answered(self, key: Hashable, done: Future | None = None) -> None:
        """What was expected has come; `done` is notified, None where it was expected for another home."""
        dispatch = self._unanswered.pop(key)
        if done is not None:
            self.recorder.answered(dispatch.peer, dispatch.posted)
            self.notify(done, dispatch.peer)

    # ------------------------------------------------------------ the expert's side: rows in, answers out

    def _take_arrivals(self) -> bool:
        moved, status = False, self._status
        while self._probe():
            if not self._take_arrival(status.Get_source(), status.Get_tag(), status.Get_count(MPI.BYTE)):
                break
            moved = True
        return moved

    def _probe(self) -> bool:
        """Whether a dispatch has come, and in `_status` which. One look may take it in, and only the next find it."""
        look, status = self._channels.dispatch.Iprobe, self._status
        return look(MPI.ANY_SOURCE, MPI.ANY_TAG, status) or look(MPI.ANY_SOURCE, MPI.ANY_TAG, status)

    def _take_arrival(self, source: int, tag: int, nbytes: int) -> bool:
        """Receive a dispatch if the budget has room for its rows and their answer; else leave it where it is."""
        table = self.tables[self.tags.layer(tag)]
        header = header_bytes(table.slots_on(self.rank))
        n = (nbytes - header) // (self.d_model * self.dtype.itemsize)
        charged = nbytes + n * self.d_model * self.answer_dtype(table).itemsize
        if not self.arrivals.take(charged):
            self.experts.waiting.hurry()  # rows that wait hold the room that their company needs
            return False
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        request = self._channels.dispatch.Irecv(as_bytes(buffer), source, tag)
        self.requests.add(request, lambda: self._arrived(source, tag, buffer, header, n, charged))
        return True

    def _arrived(self, source: int, tag: int, buffer: Tensor, header: int, n: int, charged: int) -> None:
        layer = self.tags.layer(tag)
        table = self.tables[layer]
        rows = buffer[header:].view(self.dtype).view(n, self.d_model)
        counts = read_header(buffer, table.slots_on(self.rank)) if header else (n,)
        answer = torch.empty(n, self.d_model, dtype=self.answer_dtype(table))
        microbatch = self.tags.microbatch(tag)
        self.recorder.received(DISPATCH_KIND, layer, source, n, buffer.nbytes)
        self.experts.add(Arrival(source, tag, layer, microbatch, rows, answer, counts, n, charged=charged))

    def answer(self, arrival: Arrival) -> None:
        """Send a complete answer home; local rows are home already."""
        if arrival.done is not None:
            self.recorder.sent(ANSWER_KIND, arrival.layer, self.rank, arrival.rows.shape[0], 0)
            self.notify(arrival.done, self.rank)
            return
        payload = as_bytes(arrival.answer)
        send = arrival.reply or partial(self._channels.answers.Isend, dest=arrival.source, tag=arrival.tag)
        # The callback keeps the arrival, and with it the memory that is sent.
        self.requests.add(send(payload), lambda: self.arrivals.give(arrival.charged), to=arrival.source)
        self.recorder.sent(ANSWER_KIND, arrival.layer, arrival.source, arrival.rows.shape[0], payload.nbytes)

    # ------------------------------------------------------------ lockstep, for comparison

    async def meet(self, layer: int) -> None:
        """Wait until every rank has come to the end of a layer. Collective."""
        done = Future()
        self._meeting = layer, self._clock
        self.requests.add(self._channels.barrier.Ibarrier(), lambda: self.notify(done))
        await done
        self._meeting = None

    async def vote(self, *mine: bool) -> list[int]:
        """How many ranks said yes to each question. Collective."""
        votes, done = np.array(mine, dtype=np.int64), Future()
        counts = np.zeros_like(votes)
        self.requests.add(self._channels.barrier.Iallreduce(votes, counts), lambda: self.notify(done))
        await done
        return counts.tolist()
