"""What a job asks Slurm for: pure decisions from options, site profile and what the job needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moempi.errors import FitError, JobError
from moempi.planning.memory import show_bytes
from moempi.slurm.site import Site
from moempi.slurm.times import show_time

# The interpreter and its libraries, beyond what the memory plan of a rank counts.
PROCESS_BYTES = 600 * 2**20
MEMORY_MARGIN = 1.2
# The scheduler's signal may come up to a minute early or late, and writing the last commit takes its time.
SIGNAL_SLACK = 90.0
START = 120.0  # s in which ranks start and read their weights
LEAST_TIME = 600.0


@dataclass(frozen=True)
class Needs:
    """What the plan of a job says, on the ranks that it shall have."""

    rank_bytes: int  # of a node's memory, for the fullest rank
    gpu_bytes: int  # of a GPU, for the same; 0 where ranks compute on cores
    weight_bytes: int  # weights that the fullest rank reads in every step
    layers: int
    flops_per_token: float
    prompt_tokens: int
    new_tokens: int  # at most
    longest_new: int
    places: int  # sequences worked on at the same time, over all homes


@dataclass(frozen=True)
class Request:
    """What sbatch is asked for."""

    nodes: int
    tasks_per_node: int
    cores_per_task: int
    gpus_per_node: int
    memory_per_node: int  # bytes; 0: not asked for, whole nodes have all of theirs
    seconds: float  # time limit
    lead: int  # seconds before the limit at which the job is told to commit and stop

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node


def tasks_per_node(site: Site, asked: int | None, device: str = "auto") -> int:
    """Ranks on every node: as asked, else one per GPU, else as many as the cores allow.

    Args:
        device: `run.device` of the job.
    """
    gpus = site.gpus_per_node if device != "cpu" else 0
    return asked or gpus or max(1, site.cores_per_node // site.cores_per_rank)


def resolve(
    needs: Needs,
    site: Site,
    *,
    nodes: int,
    tasks: int,
    seconds: float | None,
    memory: int | None,
    grace: float,
    share_gpus: bool = False,
) -> Request:
    """What a job of `nodes` x `tasks` ranks asks for.

    Args:
        seconds: time limit; None: estimated.
        memory: bytes per node; None: as planned, with a margin.
        grace: `run.grace` of the job.
        share_gpus: `run.share_gpus` of the job.

    Raises:
        FitError: the nodes have fewer cores or GPUs, or less memory than that.
        JobError: more time than the site gives, or too little to stop in order.
    """
    cores = tasks * site.cores_per_rank
    if site.cores_per_node and cores > site.cores_per_node:
        raise FitError(
            f"{tasks} ranks per node of {site.cores_per_rank} cores each are {cores} cores, but the site's nodes have "
            f"{site.cores_per_node}; give fewer --tasks-per-node or more --nodes"
        )
    lead = math.ceil(grace + SIGNAL_SLACK)
    return Request(
        nodes=nodes,
        tasks_per_node=tasks,
        cores_per_task=site.cores_per_rank,
        gpus_per_node=_gpus(site, tasks, share=share_gpus) if needs.gpu_bytes else 0,
        memory_per_node=0 if site.exclusive and memory is None else _memory(needs, site, tasks, memory),
        seconds=_time(needs, site, nodes * tasks, seconds, lead),
        lead=lead,
    )


def _gpus(site: Site, tasks: int, *, share: bool) -> int:
    if not site.gpus_per_node:
        raise FitError(
            "run.device = 'cuda', but the site's nodes have no GPUs (gpus_per_node = 0): give another --site, or "
            "--set run.device=cpu"
        )
    if site.gpus_per_node < tasks and not share:
        raise FitError(
            f"{tasks} ranks per node need as many GPUs, but the site's nodes have {site.gpus_per_node}; give fewer "
            "--tasks-per-node or more --nodes, or let ranks take turns with --set run.share_gpus=true"
        )
    return min(site.gpus_per_node, tasks)


def _memory(needs: Needs, site: Site, tasks: int, asked: int | None) -> int:
    process = 0 if needs.gpu_bytes else PROCESS_BYTES  # a plan for GPUs counts it
    planned = math.ceil(tasks * (needs.rank_bytes * MEMORY_MARGIN + process))
    wanted = planned if asked is None else asked
    if site.memory_per_node and wanted > site.memory_per_node:
        raise FitError(
            f"{tasks} ranks per node need {show_bytes(wanted)} (the fullest is planned with "
            f"{show_bytes(needs.rank_bytes)}), but the site's nodes have {show_bytes(site.memory_per_node)}; spread "
            "the ranks over more --nodes"
        )
    return wanted


def _time(needs: Needs, site: Site, ranks: int, asked: float | None, lead: int) -> float:
    wanted = max(LEAST_TIME, site.time_margin * estimate(needs, site, ranks)) if asked is None else asked
    if asked is not None and asked > site.max_time:
        raise JobError(f"--time {show_time(asked)} is more than the site's max_time, {show_time(site.max_time)}")
    # A job that needs longer than it may take is requeued until it is done.
    given = min(wanted, site.max_time)
    if given < lead + 60:
        what = "the site's max_time" if given < wanted else "--time" if asked is not None else "the estimated time"
        raise JobError(
            f"{what}, {show_time(given)}, leaves no time to work: the job is told to stop {lead} s before its end "
            f"(run.grace and a minute and a half), and needs at least {show_time(lead + 60)}"
        )
    return given


def estimate(needs: Needs, site: Site, ranks: int) -> float:
    """A short estimate of a run in seconds, from the rates that the site states; evenly spread work is assumed."""
    prefill = needs.prompt_tokens * needs.flops_per_token / (ranks * site.rank_flops)
    steps = max(needs.longest_new, math.ceil(needs.new_tokens / needs.places))
    compute = needs.new_tokens * needs.flops_per_token / (ranks * site.rank_flops)
    read = steps * (needs.weight_bytes / site.rank_bandwidth + needs.layers * site.layer_latency)
    return START + prefill + max(compute, read)
