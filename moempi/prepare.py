"""Before any rank allocates: rank 0 looks at the files, everything is checked, and all ranks learn the layout."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moempi import analysis, mpi
from moempi.device.cpu import PRODUCTS, Cpu
from moempi.device.seam import Device
from moempi.errors import DataError, JobError, MoempiError
from moempi.exchange.nodes import Nodes
from moempi.files.completions import PARTIAL
from moempi.files.inputs import Prompts, check_prompts, read_inputs
from moempi.files.links import read_links
from moempi.files.output_writer import OutputWriter
from moempi.files.schema import environment, file_digest, unchanged
from moempi.files.shards import identity_of, read_stamp
from moempi.files.weights import open_weights
from moempi.job import Job
from moempi.layout import Layout, check_tags, lay_out
from moempi.model.config import ModelConfig
from moempi.model.network import product_shapes
from moempi.planning.gpu_memory import CONTEXT
from moempi.planning.links import Links
from moempi.router.messages import Assignment

if TYPE_CHECKING:  # `look` runs where there is no MPI, and must not start one
    from mpi4py import MPI

    from moempi.exchange.topology import Topology

log = logging.getLogger("moempi")

GPU_SHARE = 0.95  # of a GPU's memory is planned with: the plan is that exact
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """What every rank knows of a job before it builds anything."""

    config: ModelConfig
    layout: Layout
    eos_tokens: tuple[int, ...]  # that end a sequence; empty where the job ignores them
    model: str  # digest of the weights

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return DTYPES[self.layout.dtype]


@dataclass(frozen=True)
class Found:
    """What rank 0 read."""

    shape: Shape
    prompts: Prompts
    new_tokens: list[int]  # most new tokens of every sequence
    sources: dict[str, str]  # {name: SHA-256}


def look(job: Job, n_ranks: int, nodes: Nodes | None = None, *, verify: bool = False) -> Found:
    """Read and check what a job names, and decide its layout. No MPI.

    Args:
        nodes: that the ranks are on, where known.
        verify: recompute the digests that the weights file states, which reads all of it.

    Raises:
        DataError, JobError, FitError: naming file, dataset or option, what was found and what was expected.
    """
    _check_there(job)
    with open_weights(job.model.weights) as weights:
        config, stored = weights.config, weights.dtype
        eos_tokens = weights.eos_tokens if job.generate.stop_at_eos else ()
        model = weights.digest()
        if verify:
            weights.verify()
    if job.model.leaves > config.expert_hidden:
        raise JobError(f"model.leaves = {job.model.leaves}, but an expert's hidden size is {config.expert_hidden}")
    with unchanged(job.input.file):
        prompts, inputs = read_inputs(job.input.file), file_digest(job.input.file)
    check_prompts(prompts, job.input.file, config, job.generate.max_new_tokens)
    new_tokens = [int(own) or job.generate.max_new_tokens for own in prompts.max_new_tokens]
    positions = [len(t) + new - 1 for t, new in zip(prompts.tokens, new_tokens, strict=True)]
    dtype = job.model.dtype if job.model.dtype != "auto" else str(stored).removeprefix("torch.")
    load, links = _measured_load(job, config), _measured_links(job)
    layout = lay_out(
        job,
        config,
        dtype,
        n_ranks,
        positions,
        load,
        new_tokens=new_tokens,
        nodes=nodes,
        links=links,
        device=device_kind(job),
        gpu_bytes=_gpu_bytes(job, n_ranks, nodes),
    )
    sources = {"weights": model, "inputs": inputs}
    return Found(Shape(config, layout, eos_tokens, model), prompts, new_tokens, sources)


def _check_there(job: Job) -> None:
    """Refuse a job whose files are not there, naming the option and what makes such a file."""
    made_by = {
        "model.weights": (job.model.weights, "weights", "`moempi weights import` makes one from a checkpoint"),
        "input.file": (job.input.file, "inputs", "`moempi inputs make` makes one from JSON lines of prompts"),
        "placement.file": (job.placement.file, "placement", "`moempi.files.placement.write_placement` makes one"),
    }
    for option, (path, kind, way) in made_by.items():
        if path is not None and not path.exists():
            raise DataError(
                f"`{option}` = {path}: there is no such file; expected moempi {kind}. {way}. Relative paths in a job "
                "file begin at its folder, those in --set at the current one"
            )


def _measured_load(job: Job, config: ModelConfig) -> np.ndarray | None:
    """Tokens per MoE layer and expert [L, E] of the trace that `placement.load` names."""
    if job.placement.load is None:
        return None
    load = analysis.load_per_expert(analysis.load(job.placement.load))
    if load.shape != (config.n_layers, config.n_experts):
        raise DataError(
            f"{job.placement.load}: load of {load.shape[0]} layers x {load.shape[1]} experts; "
            f"the model has {config.n_layers} x {config.n_experts}"
        )
    return load[list(config.moe_layers)]


def _measured_links(job: Job) -> Links | None:
    """What `exchange.links` names."""
    if job.exchange.links is None:
        return None
    found = read_links(job.exchange.links)
    crowd = float(np.median(found.oversubscription))
    return Links(found.source, found.destination, found.latency, found.bandwidth, crowd)


def look_together(comm: MPI.Intracomm, job: Job, nodes: Nodes, *, verify: bool = False) -> tuple[Shape, Found | None]:
    """`look` on rank 0, its result or its error on all ranks. Collective.

    Raises:
        AgreedError: on every rank, with rank 0's error.
    """
    found, error = None, None
    if comm.rank == 0:
        try:
            found = look(job, comm.size, nodes, verify=verify)
            check_tags(found.shape.layout, found.shape.config.n_layers, mpi.largest_tag())
        except MoempiError as caught:
            error = caught
    mpi.agree(comm, error)
    if found is not None:
        tell(job, found.shape.layout)
    return comm.bcast(found.shape if found else None, root=0), found


def tell(job: Job, layout: Layout) -> None:
    """Say what the layout of a job makes of it that its author may not expect."""
    if layout.nodes.n_nodes > 1:
        log.info("%s, route %s: %s", layout.nodes.describe(), layout.route.name, layout.route.reason)
    if layout.kv_tokens < layout.kv_wanted:
        log.info(
            "memory for a KV cache of %d positions per home, not the %d of run.capacity = %d of the longest "
            "sequences: sequences wait for room",
            layout.kv_tokens, layout.kv_wanted, job.run.capacity,
        )  # fmt: skip


def _gpu_bytes(job: Job, n_ranks: int, nodes: Nodes | None) -> int:
    """What a rank may take of a GPU's memory, as this process sees it; 0 where it sees none."""
    if device_kind(job) != "cuda" or not torch.cuda.is_available():
        return 0
    on_node = max(map(len, nodes.ranks)) if nodes else n_ranks
    sharing = -(-on_node // torch.cuda.device_count()) if job.run.share_gpus else 1
    return int(GPU_SHARE * torch.cuda.get_device_properties(0).total_memory) // sharing


def device_kind(job: Job) -> str:
    """What the ranks of a job compute on, as this process sees it: "cpu" or "cuda"."""
    if job.run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return job.run.device


def choose_device(topology: Topology, job: Job, shape: Shape) -> Device:
    """This rank's device, its products self-tested; all ranks take the same kind of product. Collective.

    Raises:
        AgreedError: on every rank, where one has no GPU that it could take.
    """
    if shape.layout.device == "cpu":
        return _choose_cpu(topology, job, shape)
    device, error = None, None
    try:
        device = _choose_gpu(topology, job, shape)
    except MoempiError as caught:
        error = caught
    mpi.agree(topology.world, error)
    assert device is not None
    return device


def _choose_gpu(topology: Topology, job: Job, shape: Shape) -> Device:
    from moempi.device.cuda_binding import gpu_index, refuse_allocators, why_not_here

    missing = why_not_here()
    if missing:
        raise JobError(f"run.device = {job.run.device!r}: {missing}, or set run.device = 'cpu'")
    if job.exchange.gpu_aware != "off":
        refuse_allocators(os.environ)
    local, n_local = topology.place_on_node
    index = gpu_index(local, n_local, torch.cuda.device_count(), share=job.run.share_gpus)
    from moempi.device.cuda import Cuda

    device = Cuda(index, shape.layout.mode)
    if job.memory.limit:
        device.hold(job.memory.limit - CONTEXT)
    device.choose_products(product_shapes(shape.config, shape.dtype, job.model.leaves))
    return device


def _choose_cpu(topology: Topology, job: Job, shape: Shape) -> Cpu:
    device = Cpu(topology.threads if job.run.threads == "auto" else job.run.threads)
    shapes, slowest = product_shapes(shape.config, shape.dtype, job.model.leaves), PRODUCTS[0]
    while True:
        # Each rank tests what it is to take: of two processors the one may hold what the other does not.
        device.choose_products(shapes, slowest)
        kinds = set(topology.world.allgather(device.products))
        if len(kinds) == 1:
            return device
        slowest = max(kinds, key=PRODUCTS.index)


def open_output(
    comm: MPI.Intracomm, job: Job, found: Found | None, device: Device, *, resume: bool, overwrite: bool
) -> OutputWriter | None:
    """The writer of rank 0, with what an earlier run committed; None elsewhere. Collective.

    Raises:
        AgreedError: on every rank, with rank 0's error.
    """
    writer, error = None, None
    if found is not None:
        try:
            writer = OutputWriter.start(
                job.output.file,
                job_json=job.to_json(),
                identity=_identity(job, found, device),
                sources=found.sources,
                n_sequences=len(found.prompts.ids),
                commit_every=job.output.commit_every,
                resume=resume,
                overwrite=overwrite,
                trace=job.trace_file if job.trace.level != "off" else None,
            )
        except MoempiError as caught:
            error = caught
    mpi.agree(comm, error)
    return writer


def _identity(job: Job, found: Found, device: Device) -> dict[str, str]:
    """What a resume may not change, because the bits of the result depend on it."""
    built = environment()
    return {
        "weights": found.shape.model,
        "inputs": found.sources["inputs"],
        "generate.max_new_tokens": str(job.generate.max_new_tokens),
        "generate.stop_at_eos": str(job.generate.stop_at_eos),
        "dtype": found.shape.layout.dtype,
        "mode": found.shape.layout.mode,
        "model.leaves": str(job.model.leaves),
        "device": f"{device.name} {device.model}".strip(),
        "products": device.products,
        "kernels": str(device.arithmetic),
        "torch": built["torch"],
        "processor_capability": built["processor_capability"],
        **identity_of(read_stamp(job.input.file)),
    }


def assignments(found: Found, writer: OutputWriter) -> dict[int, Assignment]:
    """The sequences that are still to be finished, by row of the input, with what is generated of them."""
    todo = {}
    for row, (tokens, new) in enumerate(zip(found.prompts.tokens, found.new_tokens, strict=True)):
        if writer.latest.finish_reason[row] != PARTIAL:
            continue
        begun = writer.partial.get(row)
        generated = begun.tokens.tolist() if begun else []
        logprobs = begun.logprobs.tolist() if begun else []
        todo[row] = Assignment(row, [*tokens.tolist(), *generated], len(tokens), new, logprobs)
    return todo
