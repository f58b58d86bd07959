"""The engine of a rank with a GPU: the same loop, with messages in its memory and its events among what is polled.

Attention, gate, pack and combine run on a stream of high priority, the experts on one of low priority: what brings
rows on their way is never behind an expert. The host launches and looks; it never waits for the GPU.

A dispatch is two messages: on the host, how many rows come for each slot; behind it the rows, received by source and
tag into memory that has been found for them in the meantime.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from moempi.device.cuda_memory import Block, MessageMemory, block_bytes
from moempi.device.cuda_transfer import to_host
from moempi.exchange.arrivals import Arrival
from moempi.exchange.arrivals_cuda import CudaExperts
from moempi.exchange.engine import Channels, Engine, Limits
from moempi.exchange.plan import Message, Tags, header_bytes
from moempi.exchange.slots import LayerTable
from moempi.exchange.tasks import Future, Slicer, Task
from moempi.recorder import Recorder
from moempi.stages import ANSWER_KIND, DISPATCH_KIND, EXPERT, LOADED, NO_STEP


class Whole(Slicer):
    """No slices: a GPU computes while the host looks at the network."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def size(self, kind: int) -> int:
        """Everything at once."""
        return 2**62


@dataclass(frozen=True)
class Header:
    """What is known of a dispatch before its rows come."""

    source: int
    tag: int
    rows_per_slot: tuple[int, ...]


class CudaEngine(Engine):
    """Owns all messages between homes and experts on one rank, whose rows are on a GPU.

    Args:
        payload: a further duplicate of the communicator, for rows of dispatches.
        memory: of messages.
        experts: the slots of this rank.
    """

    experts: CudaExperts

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
    ):
        super().__init__(channels, tables, experts, dtype, d_model, tags, limits, recorder)
        self.memory, self._payload = memory, payload
        self.slicer = Whole()
        self.high, self.low = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=0)
        self._marks: list[tuple[torch.cuda.Event, Callable[[], Any]]] = []
        self._headers: deque[Header] = deque()  # of dispatches that there has been no room for
        self._wanting_room: list[Future] = []

    # ------------------------------------------------------------ the loop

    def run(self, tasks: list[Task]) -> None:
        """Turn until every task has ended. Collective; a kernel that would make the host wait is an error in it."""
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self.high):
                super().run(tasks)
                while self._marks:
                    self._look_at_marks()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def poll(self) -> bool:
        """Events of the GPU, then what every engine looks at."""
        moved = self._look_at_marks()
        return super().poll() or moved

    def _rest(self) -> None:
        # Kernels and messages under way end within microseconds: sleeping would cost more than it saves.
        if self._marks or self.requests:
            self._empty_polls = 0
        super()._rest()

    # ------------------------------------------------------------ what the GPU does

    def mark(self) -> torch.cuda.Event:
        """An event behind everything that has been launched on the current stream."""
        event = torch.cuda.Event()
        event.record()
        return event

    def after(self, event: torch.cuda.Event | None, callback: Callable[[], Any]) -> None:
        """Call back once an event has passed; at once where there is none to wait for."""
        if event is None:
            callback()
        else:
            self._marks.append((event, callback))

    def _look_at_marks(self) -> bool:
        if not self._marks:
            return False
        passed = [event.query() for event, _ in self._marks]
        if not any(passed):
            return False
        due = [callback for (_, callback), done in zip(self._marks, passed, strict=True) if done]
        self._marks = [mark for mark, done in zip(self._marks, passed, strict=True) if not done]
        for callback in due:
            callback()
        return True

    async def passed(self, event: torch.cuda.Event) -> None:
        """Until an event has passed."""
        done = Future()
        self.after(event, lambda: self.notify(done))
        await done

    async def fetch(self, *tensors: Tensor) -> list[np.ndarray]:
        """Copies of tensors on the host, once the current stream has come to here."""
        hosts = [to_host(tensor) for tensor in tensors]
        await self.passed(self.mark())
        return [host.numpy() for host in hosts]

    # ------------------------------------------------------------ memory of messages

    async def room(self, nbytes: int) -> Block:
        """A block of the homes' memory; waits until there is one."""
        while (block := self.memory.take(nbytes, home=True)) is None:
            self._wanting_room.append(Future())
            await self._wanting_room[-1]
        return block

    def give(self, block: Block) -> None:
        """Take a block back, behind everything that has been launched on the current stream."""
        self.after(self.mark(), lambda: self._given(block))

    def _given(self, block: Block) -> None:
        self.memory.give(block)
        waiting, self._wanting_room = self._wanting_room, []
        for future in waiting:
            self.notify(future)

    def _buffer(self, rows: Tensor) -> list[Any]:
        return [MPI.buffer.fromaddress(self.memory.address(rows), rows.nbytes), MPI.BYTE]

    # ------------------------------------------------------------ the home's side

    def send(self, message: Message, layer: int, microbatch: int, rows: Tensor, answer: Tensor, done: Future) -> None:
        """Dispatch rows [R, D], which are complete, to one rank; `answer` [R, D] is filled, then `done` notified.

        `done` is notified twice for a message to another rank: when the rows have left and when they are answered.
        """
        tag = self.tags.of(layer, microbatch, message.piece)
        peer, n = message.destination, len(rows)
        if peer == self.rank:
            self.recorder.sent(DISPATCH_KIND, layer, peer, n, 0)
            self.experts.add(Arrival(peer, tag, layer, microbatch, rows, answer, message.rows_per_slot, n, done))
            return
        self.expect((peer, tag), layer, microbatch, peer, n)
        receive = self._channels.answers.Irecv(self._buffer(answer), peer, tag)
        self.requests.add(receive, lambda: self._landed(answer, peer, tag, layer, done))
        header = np.array(message.rows_per_slot, dtype=np.int32)
        self.requests.add(self._channels.dispatch.Isend(header.view(np.uint8), peer, tag), lambda: header)
        self.after(self.memory.leave(rows), lambda: self._leave(rows, peer, tag, done))
        nbytes = header_bytes(len(message.rows_per_slot)) + rows.nbytes
        self.recorder.sent(DISPATCH_KIND, layer, peer, n, nbytes)

    def _landed(self, answer: Tensor, peer: int, tag: int, layer: int, done: Future) -> None:
        self.after(self.memory.land(answer), lambda: self.take_answer((peer, tag), answer, layer, done))

    def _leave(self, rows: Tensor, peer: int, tag: int, done: Future) -> None:
        self.requests.add(self._payload.Isend(self._buffer(rows), peer, tag), lambda: self.notify(done))

    def notifications(self, message: Message) -> int:
        """How often `send` will notify."""
        return 1 if message.destination == self.rank else 2

    # ------------------------------------------------------------ the expert's side

    def _take_arrivals(self) -> bool:
        moved, status = False, self._status
        while self._channels.dispatch.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            counts = np.empty(status.Get_count(MPI.BYTE) // 4, dtype=np.int32)
            source, tag = status.Get_source(), status.Get_tag()
            self._channels.dispatch.Recv(counts.view(np.uint8), source, tag)  # a few bytes, and they are here
            self._headers.append(Header(source, tag, tuple(counts.tolist())))
            moved = True
        while self._headers and self._receive(self._headers[0]):
            self._headers.popleft()
            moved = True
        return moved

    def _receive(self, header: Header) -> bool:
        """Receive the rows of a dispatch if there is room for them and their answer."""
        layer, n = self.tags.layer(header.tag), sum(header.rows_per_slot)
        answer_dtype = self.answer_dtype(self.tables[layer])
        sizes = [n * self.d_model * dtype.itemsize for dtype in (self.dtype, answer_dtype)]
        block = self.memory.take(block_bytes(sizes), home=False)
        if block is None:
            return False
        rows = self.memory.rows(block, 0, n, self.d_model, self.dtype)
        answer = self.memory.rows(block, block_bytes(sizes[:1]), n, self.d_model, answer_dtype)
        request = self._payload.Irecv(self._buffer(rows), header.source, header.tag)
        arrival = Arrival(
            header.source,
            header.tag,
            layer,
            self.tags.microbatch(header.tag),
            rows,
            answer,
            header.rows_per_slot,
            n,
            charged=block.offset,
        )
        self.requests.add(request, lambda: self.after(self.memory.land(rows), lambda: self._landed_rows(arrival)))
        return True

    def _landed_rows(self, arrival: Arrival) -> None:
        nbytes = header_bytes(len(arrival.rows_per_slot)) + arrival.rows.nbytes
        self.recorder.received(DISPATCH_KIND, arrival.layer, arrival.source, len(arrival.rows), nbytes)
        self.experts.add(arrival)

    def serve(self) -> None:
        """Launch one expert call, and send the answers that are complete with it once it has ended."""
        with torch.cuda.stream(self.low):
            layer, rows, finished = self.experts.serve(0)
            end = self.mark()
        self.recorder.lap(EXPERT, layer, tokens=rows)
        self.experts.in_flight += 1
        self.after(end, lambda: self._served(finished))

    def _served(self, finished: list[Arrival]) -> None:
        self.experts.in_flight -= 1
        if not self.experts.in_flight and not self.experts:
            self.recorder.span(LOADED, -1, NO_STEP, self.experts.since, time.perf_counter_ns(), 0, 0, -1)
        for arrival in finished:
            self.answer(arrival)

    def answer(self, arrival: Arrival) -> None:
        """Send a complete answer home; local rows are home already."""
        if arrival.done is not None:
            self.recorder.sent(ANSWER_KIND, arrival.layer, self.rank, len(arrival.rows), 0)
            self.notify(arrival.done, self.rank)
            return
        self.recorder.sent(ANSWER_KIND, arrival.layer, arrival.source, len(arrival.rows), arrival.answer.nbytes)
        self.after(self.memory.leave(arrival.answer), lambda: self._reply(arrival))

    def _reply(self, arrival: Arrival) -> None:
        request = self._channels.answers.Isend(self._buffer(arrival.answer), arrival.source, arrival.tag)
        self.requests.add(request, lambda: self.memory.give(Block(arrival.charged, home=False)))

    def free(self) -> None:
        """Give the communicators back. Collective."""
        super().free()
        self._payload.Free()
