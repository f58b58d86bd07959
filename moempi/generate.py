"""What a microbatch does from the first sequence to the last."""

from __future__ import annotations

from moempi.batch import Step
from moempi.home import Home
from moempi.layer import Forward
from moempi.stages import COMPOSE, STEP


async def generate(home: Home, forward: Forward, microbatch: int) -> None:
    """Step the sequences of a microbatch until the router ends the job."""
    while not home.ended:
        step = home.next_step(microbatch)
        if step is None:
            await home.wait_for_news()
        else:
            await take(step, home, forward)


async def generate_in_lockstep(home: Home, forward: Forward) -> None:
    """The same for one microbatch, all ranks stepping together; a rank without sequences keeps the others company."""
    while True:
        step = home.next_step(0)
        working, ended = await home.engine.vote(step is not None, home.ended)
        if step is not None:
            await take(step, home, forward)
        elif working:
            await forward.sit_out()
        elif ended == home.engine.n_ranks:
            return


async def take(step: Step, home: Home, forward: Forward) -> None:
    """Take a step through the layers, and note what it chose."""
    recorder, n = home.engine.recorder, step.n_tokens
    begin = recorder.since
    recorder.lap(COMPOSE, key=step.key, tokens=n)
    home.accept(step, *await forward(step))
    recorder.lap(COMPOSE, key=step.key)
    recorder.span(STEP, -1, step.key, begin, recorder.since, n, 0, -1)
