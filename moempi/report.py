"""How a run ended, and writing it down."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moempi.build import Rank
from moempi.errors import EXIT_DONE
from moempi.files.completions import PARTIAL
from moempi.files.output_writer import OutputWriter
from moempi.files.trace import complete
from moempi.files.weights import open_weights
from moempi.job import Job
from moempi.mpi import meet
from moempi.planning.gpu_memory import peaks
from moempi.prepare import Found
from moempi.router.router import Router
from moempi.tracing import Tracer

if TYPE_CHECKING:
    from mpi4py import MPI


class Took(NamedTuple):
    """What generating took on one rank."""

    seconds: float
    processor_seconds: float  # of all its threads


@dataclass(frozen=True)
class Outcome:
    """What a run came to; whole on rank 0, only the exit code elsewhere."""

    exit_code: int
    mode: str = "exact"
    device: str = "cpu"
    messages: str = ""  # on a GPU: how rows travel, and why so
    ranks: int = 0
    nodes: int = 0
    route: str = ""  # of rows between nodes, and why
    route_reason: str = ""
    sequences: int = 0  # of the input
    finished: int = 0  # of them, by this run and those that it goes on with
    new_tokens: int = 0  # of all these runs
    earlier_finished: int = 0  # what the runs before this one had committed
    earlier_new_tokens: int = 0
    seconds: float = 0.0  # from the first sequence handed out to the last one committed
    processor_seconds: tuple[float, ...] = ()  # that every rank used meanwhile
    steps: tuple[int, ...] = ()  # forward steps of every rank
    expert_calls: tuple[int, ...] = ()
    expert_rows: tuple[int, ...] = ()
    memory_planned: tuple[int, ...] = ()  # bytes of every rank
    memory_peak: tuple[int, ...] = ()  # bytes of every rank; on GPUs only
    output: Path | None = None
    trace: Path | None = None
    already_done: bool = False

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of this run."""
        return (self.new_tokens - self.earlier_new_tokens) / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        table = asdict(self) | {"tokens_per_second": self.tokens_per_second}
        return {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}


def finish(
    comm: MPI.Intracomm,
    job: Job,
    rank: Rank,
    tracer: Tracer,
    router: Router | None,
    found: Found | None,
    writer: OutputWriter | None,
    took: Took,
    drained_code: int,
) -> Outcome:
    """Write the final files and gather what was measured. Collective.

    Args:
        router, found, writer: on rank 0.
        took: by this rank.
        drained_code: the exit code if the run was told to stop early.
    """
    experts = rank.engine.experts
    counts = comm.gather((rank.home.steps, experts.calls, experts.rows_computed, took.processor_seconds), root=0)
    uses = comm.gather(rank.device.memory_use(), root=0)
    outcome = Outcome(exit_code=EXIT_DONE)
    if router is not None and found is not None and writer is not None and counts is not None:
        steps, calls, rows, processor = (tuple(column) for column in zip(*counts, strict=True))
        earlier, tokens = committed_before(writer)
        outcome = Outcome(
            exit_code=EXIT_DONE if router.finished == router.total else drained_code,
            mode=found.shape.layout.mode,
            device=rank.device.describe(),
            messages=rank.messages,
            ranks=comm.size,
            nodes=found.shape.layout.nodes.n_nodes,
            route=found.shape.layout.route.name,
            route_reason=found.shape.layout.route.reason,
            sequences=len(found.prompts.ids),
            finished=earlier + router.finished,
            new_tokens=tokens + router.new_tokens,
            earlier_finished=earlier,
            earlier_new_tokens=tokens,
            seconds=took.seconds,
            processor_seconds=processor,
            steps=steps,
            expert_calls=calls,
            expert_rows=rows,
            memory_planned=tuple(plan.total for plan in found.shape.layout.memory),
            memory_peak=tuple(peaks([use for use in uses or () if use is not None])),
            output=job.output.file,
            trace=None if job.trace.level == "off" else tracer.path,
        )
        if outcome.exit_code == EXIT_DONE:
            write_output(job, found, writer, outcome)
    tracer.finish(found.sources if found else None, outcome.as_dict())
    meet(comm)
    rank.free()
    code = comm.bcast(outcome.exit_code, root=0)
    return Outcome(exit_code=code) if comm.rank else outcome


def committed_before(writer: OutputWriter | None) -> tuple[int, int]:
    """(finished sequences, new tokens) that the runs before this one have committed; rank 0, nothing elsewhere."""
    if writer is None:
        return 0, 0
    return int((writer.latest.finish_reason != PARTIAL).sum()), int(writer.latest.length.sum())


def nothing_to_do(job: Job, found: Found | None) -> Outcome:
    """What a run comes to whose output is complete already; its trace is completed here where it was killed before."""
    if found is not None and job.trace.level != "off":
        complete(job.trace_file)
    n = len(found.prompts.ids) if found else 0
    return Outcome(EXIT_DONE, sequences=n, finished=n, earlier_finished=n, output=job.output.file, already_done=True)


def write_output(job: Job, found: Found, writer: OutputWriter, outcome: Outcome) -> None:
    """Merge the commits into the final file, with text where the weights have a tokenizer. Rank 0."""
    with open_weights(job.model.weights) as weights:
        weights.expect(found.shape.model)
        tokenizer = weights.tokenizer()
    meta: dict[str, Any] = {"mode": outcome.mode, **outcome.as_dict()}
    if tokenizer is not None:
        meta["decode"] = lambda tokens: tokenizer.decode([int(token) for token in tokens])
    writer.finish(found.prompts, meta)
