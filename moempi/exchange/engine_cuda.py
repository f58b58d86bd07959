"""The engine of a rank with a GPU: the same loop, with messages in its memory and its events among what is polled.

Attention, gate, pack and combine run on a stream of high priority, the experts on one of low priority: what brings
rows on their way is never behind an expert. The host launches and looks; it never waits for the GPU.

A dispatch is a frame where its rows are few: one message, whose receive is there before it (`exchange.frames`). Else it
is two: on the host, how many rows come for each slot; behind it the rows, received by source and tag into memory that
has been found for them in the meantime.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from moempi.device.arena import aligned
from moempi.device.cuda_clock import Clock
from moempi.device.cuda_memory import MessageMemory, Rows
from moempi.device.cuda_transfer import Copies, to_host
from moempi.exchange.arrivals import Arrival
from moempi.exchange.arrivals_cuda import CudaExperts
from moempi.exchange.carrier import Carrier, Direct, Staged
from moempi.exchange.engine import Channels, Engine, Limits
from moempi.exchange.frames import Frame, Frames
from moempi.exchange.host_memory import HostMemory
from moempi.exchange.plan import Message, Tags, header_bytes
from moempi.exchange.slots import LayerTable
from moempi.exchange.tasks import Future, Task, Whole
from moempi.planning.gpu_memory import frames_posted
from moempi.recorder import Recorder
from moempi.stages import ANSWER_KIND, DISPATCH_KIND, EXPERT, LOADED, NO_STEP, RECEIVE

T = TypeVar("T")

LOOKS = 64  # at clocks and messages, of a rank with nothing else to do, before its next turn


class Announced(NamedTuple):
    """What is known of a dispatch before its rows come."""

    source: int
    tag: int
    rows_per_slot: tuple[int, ...]


class CudaEngine(Engine):
    """Owns all messages between homes and experts on one rank, whose rows are on a GPU.

    Args:
        payload: a further duplicate of the communicator, for rows of dispatches.
        memory: of messages.
        host: pinned memory through which rows travel; None where MPI takes that of GPUs.
        largest_frame: bytes of one and its answer, the same on all ranks; 0 where there are none.
    """

    experts: CudaExperts
    looks = 1  # the next one follows at once

    def __init__(
        self,
        channels: Channels,
        tables: Mapping[int, LayerTable],
        experts: CudaExperts,
        dtype: torch.dtype,
        d_model: int,
        tags: Tags,
        limits: Limits,
        recorder: Recorder,
        *,
        payload: MPI.Intracomm,
        memory: MessageMemory,
        host: HostMemory | None = None,
        largest_frame: int = 0,
    ):
        super().__init__(channels, tables, experts, dtype, d_model, tags, limits, recorder)
        self.memory, self._host = memory, host
        self.slicer = Whole()
        self.takers.insert(0, self._look_at_clocks)
        self.high, self.low = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=0)
        self._high_clock, self._low_clock = Clock(self.high), Clock(self.low)
        copies = None if host is None else Copies()
        self._clocks = [self._high_clock, self._low_clock, *(copies.clocks if copies else ())]
        self._there, self._back = (self._carrier(comm, copies) for comm in (payload, channels.answers.Dup()))
        self._frames: Frames | None = None
        if largest_frame:
            address, posted = memory.memory.data_ptr(), frames_posted(self.n_ranks)
            self._frames = Frames(payload.Dup(), self.requests, address, memory.frames, largest_frame, posted)
        self._announced: deque[Announced] = deque()  # of dispatches that there has been no room for
        most_slots = max((table.slots_on(self.rank) for table in tables.values()), default=0)
        self._next_counts = np.empty(most_slots, dtype=np.int32)  # rows per slot, of the next dispatch
        # Not among the requests, on whose end the engine waits: this one is always there.
        self._next_announced = self._post_announced()
        self._wanting_room: list[Future] = []
        self._early: dict[int, deque[Callable[[], Any]]] = {}  # by microbatch, what may be done before it is needed
        self._did_one = False  # of these, since the GPU was last heard of
        self._counts: dict[tuple[int, int], Tensor] = {}

    def _carrier(self, comm: MPI.Intracomm, copies: Copies | None) -> Carrier:
        if self._host is None or copies is None:
            return Direct(comm, self.requests)
        return Staged(comm, self.requests, self._host, copies)

    # ------------------------------------------------------------ the loop

    def run(self, tasks: list[Task]) -> None:
        """Turn until every task has ended. Collective; a kernel that would make the host wait is an error in it."""
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self.high):
                super().run(tasks)
                self._high_clock.after(lambda: None)  # also for a step that was begun in vain, for which nobody waits
                while any(self._clocks):
                    self._look_at_clocks()
        finally:
            self._early.clear()
            torch.cuda.set_sync_debug_mode(before)

    def _rest(self) -> None:
        # Kernels and messages under way end within microseconds: sleeping would cost more than it saves, and a turn
        # takes several times as long as a look. What is found is acted on at once, and the next look follows.
        if self.requests or self.experts.waiting or any(self._clocks):
            self._empty_polls = self._sleeps = 0
            if self._work_early():
                return
            waited_for = self._waited_for()
            for number in range(LOOKS):
                self.recorder.rest(*waited_for)  # up to this look, which may end what it waits for
                if self._look(everywhere=number % 4 == 3):  # as the turn before the first one did
                    self.recorder.lap(RECEIVE)
                    self._go_on()
                    if self._early or self._ready or self.experts:
                        return
                    waited_for = self._waited_for()
        super()._rest()

    def _look(self, *, everywhere: bool) -> bool:
        """Whether anything has ended or come; where not everywhere, of messages only what this rank waits for."""
        # Each kind of look takes microseconds, of which half pass before what has come is seen.
        if self._look_at_clocks():
            return True
        for_rows = bool(self.experts.waiting)  # rows are here that wait for those of other homes; else for answers
        if (for_rows or everywhere) and self._take_arrivals(announced=everywhere or self._frames is None):
            return True
        return (everywhere or not for_rows) and self.requests.test()

    def _work_early(self) -> bool:
        """Do something before it is needed, while the rank waits for the GPU; whether there was anything."""
        # Not while it waits for messages, which take less long; and one thing, since two take longer than kernels.
        if not self._early or self._did_one or not any(self._clocks):
            return False
        self._did_one = True
        microbatch, works = next(iter(self._early.items()))
        works.popleft()()
        if not works:
            del self._early[microbatch]
        return True

    def meanwhile(self, microbatch: int, *works: Callable[[], Any]) -> None:
        """What may be done while the GPU computes, one work in a wait, in the place of what was named here before."""
        self._early.pop(microbatch, None)
        if works:
            self._early[microbatch] = deque(works)

    # ------------------------------------------------------------ what the GPU does

    def _look_at_clocks(self) -> bool:
        moved = False
        for clock in self._clocks:
            moved = clock.look() or moved
        if moved:
            self._did_one = False
        return moved

    def mark(self) -> Future:
        """Done when all has ended that the stream of high priority, which is the current one, has been given by now."""
        done = Future()
        self._high_clock.after(lambda: self.notify(done))
        return done

    async def fetch(self, *tensors: Tensor) -> list[np.ndarray]:
        """Copies of tensors on the host, once the current stream has come to here."""
        hosts = [to_host(tensor) for tensor in tensors]
        await self.mark()
        return [host.numpy() for host in hosts]

    def counts(self, microbatch: int, n: int) -> Tensor:
        """Pinned memory [n] int64 for the counts of a microbatch, which has one dispatch at a time."""
        key = microbatch, n
        if key not in self._counts:
            self._counts[key] = torch.zeros(n, dtype=torch.int64, pin_memory=True)
        return self._counts[key]

    async def counted(self, microbatch: int, n: int) -> np.ndarray:
        """A copy [n] of these counts, once the current stream has come to here."""
        await self.mark()
        return self.counts(microbatch, n).numpy().copy()

    # ------------------------------------------------------------ memory of messages

    async def room(self, n: int, d: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[int, Rows, Rows]:
        """A block of the homes' memory with rows [n, D] and their answers; waits until there is one."""
        while (pair := self.memory.take_pair(self.memory.home, n, d, dtypes)) is None:
            self._wanting_room.append(Future())
            await self._wanting_room[-1]
        return pair

    def give(self, block: int) -> None:
        """Take a block back, behind everything that has been launched on the current stream."""
        self._high_clock.after(lambda: self._given(block))

    def _given(self, block: int) -> None:
        self.memory.give(block)
        waiting, self._wanting_room = self._wanting_room, []
        for future in waiting:
            self.notify(future)

    # ------------------------------------------------------------ the home's side

    def send(  # type: ignore[override]
        self,
        message: Message,
        layer: int,
        microbatch: int,
        rows: Rows,
        answer: Rows,
        done: Future,
        *,
        framed: bool = False,
    ) -> None:
        """Dispatch rows [R, D], which are complete, to one rank; `answer` [R, D] is filled, then `done` notified.

        `done` is notified twice for a message to another rank: when the rows have left and when they are answered.

        Args:
            framed: a header lies ahead of the rows, and leaves with them where they are few enough.
        """
        tag = self.tags.of(layer, microbatch, message.piece)
        peer, per_slot, n = message.destination, message.rows_per_slot, len(rows)
        header = header_bytes(len(per_slot))
        if peer == self.rank:
            self.recorder.sent(DISPATCH_KIND, layer, peer, n, 0)
            counts = rows.address - header if framed and header else 0
            self.experts.add(Arrival(peer, tag, layer, microbatch, rows, answer, per_slot, n, done, counts=counts))
            return
        if framed and self._frames is not None and self._frames.has_room(header + rows.nbytes, answer.nbytes):
            self._frames.send(rows.address - header, header + rows.nbytes, peer, tag, lambda: self.notify(done))
        else:
            counted = np.array(per_slot, dtype=np.int32)
            self.requests.add(self._channels.dispatch.Isend(counted, peer, tag), lambda: counted)
            self._there.send(rows, peer, tag, lambda: self.notify(done))
        # Behind what the other rank waits for.
        self.expect((peer, tag), layer, microbatch, peer, n)
        self._back.receive(answer, peer, tag, lambda: self._answered(answer, peer, tag, layer, done))
        self.recorder.sent(DISPATCH_KIND, layer, peer, n, header + rows.nbytes)

    def _answered(self, answer: Rows, peer: int, tag: int, layer: int, done: Future) -> None:
        self.recorder.received(ANSWER_KIND, layer, peer, len(answer), answer.nbytes)
        self.answered((peer, tag), done)

    def notifications(self, message: Message) -> int:
        """How often `send` will notify."""
        return 1 if message.destination == self.rank else 2

    # ------------------------------------------------------------ the expert's side

    def _take_arrivals(self, *, announced: bool = True) -> bool:
        """Take what has come; `announced`: also look for dispatches that are."""
        moved, status = False, self._status
        while announced and self._next_announced.Test(status):
            tag = status.Get_tag()
            counts = self._next_counts[: self.tables[self.tags.layer(tag)].slots_on(self.rank)].tolist()
            self._announced.append(Announced(status.Get_source(), tag, tuple(counts)))
            self._next_announced = self._post_announced()
            moved = True
        while self._announced and self._receive(self._announced[0]):
            self._announced.popleft()
            moved = True
        # One at a time: what it completes is launched before the next look, and the next receive posted.
        if self._frames is not None:
            frame = self._frames.take()
            if frame is not None:
                self._came(frame)
                return True
            if self._frames.full and self.experts.waiting:
                self.experts.waiting.hurry()
                return moved or bool(self.experts)
        return moved

    def _came(self, frame: Frame) -> None:
        """A frame is here: rows behind a header that the kernels read; behind them there will be their answer."""
        layer, dtype = self.tags.layer(frame.tag), self.dtype
        n_slots = self.tables[layer].slots_on(self.rank)
        header = header_bytes(n_slots)
        n = (frame.nbytes - header) // (self.d_model * dtype.itemsize)
        behind = aligned(frame.nbytes)
        rows = self.memory.rows_at(frame.block + header, n, self.d_model, dtype)
        answer = self.memory.rows_at(frame.block + behind, n, self.d_model, dtype)
        self._landed(
            Arrival(
                frame.source,
                frame.tag,
                layer,
                self.tags.microbatch(frame.tag),
                rows,
                answer,
                () if header else (n,),
                n,
                block=frame.block,
                counts=rows.address - header if header else 0,
            ),
            frame.nbytes,
        )

    def _post_announced(self) -> MPI.Request:
        """A receive that is there before the next dispatch is announced: one test moves it along and finds it."""
        return self._channels.dispatch.Irecv(self._next_counts, MPI.ANY_SOURCE, MPI.ANY_TAG)

    def _receive(self, announced: Announced) -> bool:
        """Receive the rows of a dispatch if there is room for them and their answer."""
        layer, n = self.tags.layer(announced.tag), sum(announced.rows_per_slot)
        dtypes = self.dtype, self.answer_dtype(self.tables[layer])
        pair = self.memory.take_pair(self.memory.arrivals, n, self.d_model, dtypes)
        if pair is None:
            self.experts.waiting.hurry()
            return False
        block, rows, answer = pair
        arrival = Arrival(
            announced.source,
            announced.tag,
            layer,
            self.tags.microbatch(announced.tag),
            rows,
            answer,
            announced.rows_per_slot,
            n,
            block=block,
        )
        nbytes = header_bytes(len(announced.rows_per_slot)) + rows.nbytes
        self._there.receive(rows, announced.source, announced.tag, lambda: self._landed(arrival, nbytes))
        return True

    def _landed(self, arrival: Arrival, nbytes: int) -> None:
        """Rows are here, after so many bytes with what said for which slots they are."""
        self.recorder.received(DISPATCH_KIND, arrival.layer, arrival.source, len(arrival.rows), nbytes)
        self.experts.add(arrival)

    def serve(self) -> None:
        """Launch one expert call, and send the answers that are complete with it once it has ended."""
        layer, rows, finished = self._on_low_stream(lambda: self.experts.serve(0))
        self.experts.in_flight += 1
        self._low_clock.after(lambda: self._served(finished))
        self.recorder.lap(EXPERT, layer, tokens=rows)

    def _on_low_stream(self, work: Callable[[], T]) -> T:
        torch.cuda.set_stream(self.low)
        try:
            return work()
        finally:
            torch.cuda.set_stream(self.high)

    def _served(self, finished: list[Arrival]) -> None:
        self.experts.in_flight -= 1
        if not self.experts.in_flight and not self.experts.waiting:
            self.recorder.span(LOADED, -1, NO_STEP, self.experts.since, time.perf_counter_ns(), 0, 0, -1)
        for arrival in finished:
            self.answer(arrival)

    def answer(self, arrival: Arrival) -> None:
        """Send a complete answer home; local rows are home already."""
        if arrival.done is not None:
            self.recorder.sent(ANSWER_KIND, arrival.layer, self.rank, len(arrival.rows), 0)
            self.notify(arrival.done, self.rank)
            return
        self._back.send(arrival.answer, arrival.source, arrival.tag, lambda: self.memory.give(arrival.block))
        self.recorder.sent(ANSWER_KIND, arrival.layer, arrival.source, len(arrival.rows), arrival.answer.nbytes)

    def free(self) -> None:
        """Give communicators and pinned memory back. Collective."""
        self._next_announced.Cancel()
        self._next_announced.Wait()
        super().free()
        if self._frames is not None:
            self._frames.free()
        self._there.free()
        self._back.free()
        if self._host is not None:
            self._host.free()
