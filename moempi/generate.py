"""What a microbatch does from the first sequence to the last."""

from __future__ import annotations

from moempi.home import Home
from moempi.layer import Forward


async def generate(home: Home, forward: Forward, microbatch: int) -> None:
    """Step the sequences of a microbatch until the router ends the job."""
    while not home.ended:
        step = home.next_step(microbatch)
        if step is None:
            await home.wait_for_news()
        else:
            home.accept(step, *await forward(step))


async def generate_in_lockstep(home: Home, forward: Forward) -> None:
    """The same for one microbatch, all ranks stepping together; a rank without sequences keeps the others company."""
    while True:
        step = home.next_step(0)
        working, ended = await home.engine.vote(step is not None, home.ended)
        if step is not None:
            home.accept(step, *await forward(step))
        elif working:
            await forward.sit_out()
        elif ended == home.engine.n_ranks:
            return
