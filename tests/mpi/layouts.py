"""Runs of one model in many layouts at once: each on its own part of the world, all compared to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import Model
from mpi4py import MPI

from moempi.files.placement import write_placement
from moempi.files.weights import open_weights
from moempi.job import Job
from moempi.mpi import meet
from moempi.planning.placement import Placement, cut_expert, place
from moempi.report import Outcome
from moempi.run import run

Cut = tuple[int, int, int]  # (layer, expert, pieces)


@dataclass(frozen=True)
class Layout:
    """Ranks, options ({"section.key": value}), and experts that a placement file cuts into pieces."""

    ranks: int
    options: Mapping[str, Any] = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"N={self.ranks} {options}" + (f" cuts={list(self.cuts)}" if self.cuts else "")


@dataclass(frozen=True)
class Ran:
    """A run that has ended."""

    layout: Layout
    job: Job
    outcome: Outcome  # whole on rank 0 of the world


def fitting(world: MPI.Intracomm, layouts: Sequence[Layout]) -> list[Layout]:
    """The layouts that a launch has ranks for: all of them on 16; for debugging on fewer ranks, the smaller ones."""
    return [layout for layout in layouts if layout.ranks <= world.size]


def run_all(world: MPI.Intracomm, model: Model, layouts: Sequence[Layout], folder: Path) -> list[Ran]:
    """Run a model in every layout, as many at a time as the world has ranks for. Collective over the world."""
    jobs = [job_of(model, layout, folder / f"{i}.h5") for i, layout in enumerate(layouts)]
    outcomes: dict[int, Outcome] = {}
    for together in into_rounds([layout.ranks for layout in layouts], world.size):
        outcomes |= _run_round(world, jobs, layouts, together)
    return [Ran(layout, job, outcomes[i]) for i, (layout, job) in enumerate(zip(layouts, jobs, strict=True))]


def into_rounds(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Cases by number, packed into rounds of at most `room` ranks: the largest first, each where it still fits."""
    rounds: list[list[int]] = []
    for case in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        assert sizes[case] <= room, f"{sizes[case]} ranks wanted, the launch has {room}"
        for together in rounds:
            if sum(sizes[i] for i in together) + sizes[case] <= room:
                together.append(case)
                break
        else:
            rounds.append([case])
    return rounds


def _run_round(
    world: MPI.Intracomm, jobs: Sequence[Job], layouts: Sequence[Layout], together: Sequence[int]
) -> dict[int, Outcome]:
    seats = [case for case in together for _ in range(layouts[case].ranks)]
    mine = seats[world.rank] if world.rank < len(seats) else None
    part = world.Split(MPI.UNDEFINED if mine is None else mine, world.rank)
    told = None
    if mine is not None:
        if part.rank == 0 and layouts[mine].cuts:
            write_cuts(jobs[mine], layouts[mine])
        outcome = run(part, jobs[mine])
        told = (mine, outcome) if part.rank == 0 else None
        part.Free()
    meet(world)
    return dict(one for one in world.allgather(told) if one is not None)


def job_of(model: Model, layout: Layout, output: Path) -> Job:
    """The job of a layout; one with cuts names a placement file that `write_cuts` makes."""
    options = dict(layout.options)
    if layout.cuts:
        options = {name: value for name, value in options.items() if not name.startswith("placement.")}
        options |= {"placement.strategy": "file", "placement.file": output.with_suffix(".placement.h5")}
    return model.job(output, options)


def write_cuts(job: Job, layout: Layout) -> None:
    """The placement file of a layout with cuts: as placed without them, then cut."""
    with open_weights(job.model.weights) as weights:
        config = weights.config
    named = {name.split(".")[1]: value for name, value in layout.options.items() if name.startswith("placement.")}
    placement = place(config, layout.ranks, type(job.placement).model_validate(named), job.model.leaves)
    for layer, expert, pieces in layout.cuts:
        placement = cut_expert(placement, layer, expert, ranks_for(placement, layer, expert, pieces))
    assert job.placement.file is not None
    write_placement(job.placement.file, placement)


def ranks_for(placement: Placement, layer: int, expert: int, pieces: int) -> list[int]:
    """Ranks for the pieces of replica 0: those that hold no other replica, the highest first."""
    held = (placement.layer == layer) & (placement.expert == expert) & (placement.replica != 0)
    free = sorted(set(range(placement.n_ranks)) - set(placement.rank[held].tolist()), reverse=True)
    return free[:pieces]
