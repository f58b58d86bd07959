"""A home's microbatches where the KV cache is short, stepped by a loop of plain Python: who takes what in, and when."""

from __future__ import annotations

from collections import deque

import torch

from moempi.batch import Step
from moempi.exchange.tasks import PAUSE, Future, Task
from moempi.generate import generate
from moempi.home import Home
from moempi.model.cache import KVCache
from moempi.model.config import PAGE
from moempi.recorder import Recorder
from moempi.router.messages import Assignment, Done, End, ToRouter, Work


class Loop:
    """What a home needs of an engine: tasks go on one after the other, and parked ones once they are notified."""

    rank = 0

    def __init__(self) -> None:
        self.ready: deque[Task] = deque()
        self.recorder = Recorder("summary", 0, 1, 1, 1, 1)
        self.recorder.start()

    def notify(self, future: Future) -> None:
        assert future.task is not None
        self.ready.append(future.task)

    def run(self) -> None:
        """Until no task can go on."""
        while self.ready:
            task = self.ready.popleft()
            try:
                waiting = task.send(None)
            except StopIteration:
                continue
            if waiting is PAUSE:
                self.ready.append(task)
            else:
                waiting.task = task


def home_of(loop: Loop, told: list[ToRouter], cache: KVCache, **sizes: int) -> Home:
    """A home on a loop, which notes what it tells the router."""
    return Home(loop, cache, group=1, eos_tokens=(), tell=told.append, **sizes)  # type: ignore[arg-type]


async def forward(step: Step) -> tuple[list[int], list[float]]:
    """Choose token 1 for every sequence, after the other microbatches have had their turn."""
    await PAUSE
    return [1] * len(step.choosing), [0.0] * len(step.choosing)


def test_a_sequence_taken_in_for_a_microbatch_without_any_wakes_it() -> None:
    loop, told = Loop(), list[ToRouter]()
    cache = KVCache(1, 1, 2, 10 * PAGE, torch.float32)
    home = home_of(loop, told, cache, capacity=4, n_microbatches=2, n_decoding=2, budget=1000)
    # Of 10 pages the first takes 6 and leaves room for the last alone, which waits behind the others: microbatch 1 has
    # nothing to do. When the first ends, microbatch 0 takes in two of 5 pages, one of them for microbatch 1.
    pages = [6, 5, 5, 4]
    home.hear(Work([Assignment(i, [2] * (PAGE * n - 1), PAGE * n - 1, 2, []) for i, n in enumerate(pages)]))
    loop.ready.extend(generate(home, forward, m) for m in range(2))  # type: ignore[arg-type]
    loop.run()
    done = [c.index for message in told if isinstance(message, Done) for c in message.completions]
    assert sorted(done) == [0, 1, 2, 3]
    assert cache.has_room(10 * PAGE)
    home.hear(End())
    loop.run()


def test_sequences_whose_prompt_is_done_move_to_the_microbatch_that_decodes() -> None:
    loop, told, steps = Loop(), list[ToRouter](), list[tuple[int, int, int]]()
    cache = KVCache(1, 1, 2, 20 * PAGE, torch.float32)
    home = home_of(loop, told, cache, capacity=6, n_microbatches=3, n_decoding=1, budget=8)

    async def noting(step: Step) -> tuple[list[int], list[float]]:
        single = sum(len(s.tokens) - s.cached == 1 for s in step.sequences)
        steps.append((step.microbatch, single, len(step.sequences)))
        return await forward(step)

    home.hear(Work([Assignment(i, [2] * n, n, 20, []) for i, n in enumerate((30, 17, 1, 16, 3, 19))]))
    loop.ready.extend(generate(home, noting, m) for m in range(3))  # type: ignore[arg-type]
    loop.run()
    assert {m for m, _, _ in steps} == {0, 1, 2}  # prompts of up to 30 tokens, in steps of up to 8
    assert all(single == 0 for m, single, _ in steps if m > 0)
    assert (0, 6, 6) in steps
    done = {c.index: len(c.tokens) for message in told if isinstance(message, Done) for c in message.completions}
    assert done == dict.fromkeys(range(6), 20)
    assert not any(home.resident)
    home.hear(End())
    loop.run()
    assert not loop.ready
