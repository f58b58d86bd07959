"""The job file: every option, its default, its unit, its check.

A job is TOML. `load_job` reads it, applies `--set section.key=value` overrides, resolves paths (in the job file
against its folder, in `--set` against the current one) and returns one immutable `Job`. Nothing here imports MPI
or torch.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from moempi.errors import JobError
from moempi.job_errors import explain

Blame = Callable[..., str]  # options -> where the first of them was set: the job file, or --set

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(value: Any) -> Any:
    """Bytes of `"64 MiB"` or `"80 GB"`; what is no text is left for pydantic to look at.

    Raises:
        ValueError: a text that is no size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if not match or match[2].lower() not in _UNITS:
        raise ValueError('expected a number of bytes, or a size like "64 MiB"')
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("expected a power of two")
    return value


def _file_name(value: Any) -> Any:
    if not isinstance(value, str | Path) or value == "":
        raise ValueError("expected the name of a file")
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# TOML has no paths: the one place where another type than the option's own is taken.
FileName = Annotated[Path, BeforeValidator(_file_name), Field(strict=False)]


def option(default: Any, text: str, unit: str = "", **checks: Any) -> Any:
    """A field of a section: its default, what it does, its unit and its bounds."""
    return Field(default, description=text, json_schema_extra={"unit": unit} if unit else None, **checks)


class Section(BaseModel):
    """One table of the job file; an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelOptions(Section):
    weights: FileName = option(..., "weights file, made by `moempi weights import` or `init`")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "type of weights and activations; auto takes the type that the weights are stored in"
    )
    mode: Literal["auto", "exact", "fast"] = option(
        "auto",
        "exact: bits never depend on the layout; fast: they may, and relays send a node's weighted sum back as one "
        "row (on the CPU only with relays). auto is exact on the CPU",
    )
    leaves: Annotated[int, AfterValidator(_power_of_two)] = option(
        1, "blocks that every expert's hidden dimension is summed in; a cut expert needs as many as its pieces", ge=1
    )


class InputOptions(Section):
    file: FileName = option(..., "prompts, made by `moempi inputs make`")


class OutputOptions(Section):
    file: FileName = option(..., "completions; must not exist unless --resume or --overwrite is given")
    commit_every: Seconds = option(10.0, "longest time that a finished sequence stays uncommitted", "s")


class GenerateOptions(Section):
    max_new_tokens: int = option(64, "new tokens per sequence, where the input does not say otherwise", "tokens", ge=1)
    stop_at_eos: bool = option(True, "end a sequence at the model's end-of-sequence token")


class RunOptions(Section):
    capacity: int = option(8, "sequences that a home rank works on at the same time", "sequences", ge=1)
    prefill_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = option(
        "auto",
        "most tokens of one microbatch in a step, or run.capacity if that is more; auto: 512, on GPUs up to 8192 "
        "where the KV cache has room beside them",
        "tokens",
    )
    microbatches: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = option(
        "auto",
        "microbatches in flight on every rank; auto: 1, or 2 where expert calls have many rows; in prefill 2 on "
        "several CPU ranks with large experts (over 2^17 weights), 3 on GPUs",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "what the ranks compute on; auto: a GPU each where torch sees any, else the CPU"
    )
    share_gpus: bool = option(False, "let several ranks of a node take turns on a GPU, for trials")
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = option(
        "auto", "threads per rank; auto divides the node's cores among its ranks"
    )
    grace: Seconds = option(30.0, "time that a drain may take after a signal", "s")


class PlacementOptions(Section):
    strategy: Literal["linear", "balanced", "random", "file"] = option("linear", "how experts are placed on ranks")
    file: FileName | None = option(None, "placement file, for strategy = file")
    load: FileName | None = option(
        None, "trace whose measured load `balanced` packs by; without one, experts count alike"
    )
    seed: int = option(0, "seed of strategy = random", ge=0)
    strict: bool = option(False, "refuse more than one slot per rank and layer")
    replicas: Literal["auto"] | Annotated[int, Field(ge=0)] = option(
        "auto",
        "extra slots per layer for copies of the busiest experts; auto evens slots out, and under a measured load "
        "and a memory.limit adds more while they even that load out",
    )


class AdmissionOptions(Section):
    policy: Literal["balanced", "rank0"] = option("balanced", "which ranks are homes: all of them, or rank 0 alone")
    homes: Literal["all"] | Annotated[int, Field(ge=1)] = option(
        "all", "most ranks that are homes, spread evenly; two to a core are fastest where ranks share cores", "ranks"
    )


class ExchangeOptions(Section):
    route: Literal["auto", "direct", "leader", "rail"] = option(
        "auto",
        "way of rows between nodes: direct, rank to rank; leader, through the first rank of each node; rail, every "
        "rank relaying for itself. auto: by the measured links of exchange.links, direct without them",
    )
    ranks_per_node: Literal["auto"] | Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] = option(
        "auto", "pretend nodes of so many neighbouring ranks, or a list of them; auto: ranks that share memory", "ranks"
    )
    links: FileName | None = option(None, "measured links of the ranks, for route = auto")
    relay_budget: Bytes = option(
        64 * 2**20,
        "memory of a relay for each of its four kinds of hops; raised to one largest message",
        "bytes",
    )
    lockstep: bool = option(False, "meet all ranks in a barrier after every layer, for comparison")
    arrival_budget: Bytes = option(
        256 * 2**20, "memory for received rows and their answers; raised to one largest message", "bytes"
    )
    piece_bytes: Annotated[int, BeforeValidator(parse_bytes), Field(ge=1, lt=2**31)] = option(
        256 * 2**20, "larger messages are sent in pieces", "bytes"
    )
    gpu_aware: Literal["auto", "on", "off"] = option(
        "auto",
        "on: MPI gets the memory of GPUs; off: rows pass through pinned memory of the host; auto: on where bytes that "
        "are sent between GPUs before the job arrive",
    )


class EngineOptions(Section):
    slice: Seconds = option(0.004, "what computations on CPUs are cut to, between two looks at the network", "s")
    stall_timeout: Seconds = option(
        300.0, "an unanswered dispatch older than this, or a rank silent for longer, ends the job", "s"
    )


class MemoryOptions(Section):
    limit: Bytes = option(
        0, "memory per rank that the job may plan with; 0: not checked, or on GPUs nearly all that a GPU has", "bytes"
    )
    kv_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = option(
        "auto",
        "positions in a home's KV cache; auto: capacity times the longest sequence, or what memory.limit leaves, so "
        "that sequences wait for room",
        "tokens",
    )


class TraceOptions(Section):
    level: Literal["off", "summary", "full", "routes"] = option(
        "summary", "summary: counts and sums; full: and spans; routes: and every token's experts and weights"
    )
    file: FileName | None = option(None, "trace file; by default beside the output, ending in .trace.h5")
    flush_every: Seconds = option(300.0, "longest time that a rank keeps its trace in memory", "s")


class ProgressOptions(Section):
    every: Seconds = option(10.0, "time between two lines of progress", "s")


class Job(Section):
    """A whole job, checked. Paths are absolute once `load_job` has returned it."""

    model: ModelOptions
    input: InputOptions
    output: OutputOptions
    generate: GenerateOptions = GenerateOptions()
    run: RunOptions = RunOptions()
    placement: PlacementOptions = PlacementOptions()
    admission: AdmissionOptions = AdmissionOptions()
    exchange: ExchangeOptions = ExchangeOptions()
    engine: EngineOptions = EngineOptions()
    memory: MemoryOptions = MemoryOptions()
    trace: TraceOptions = TraceOptions()
    progress: ProgressOptions = ProgressOptions()

    def to_json(self) -> str:
        """The effective job: every option with its value, as JSON text."""
        return json.dumps(self.model_dump(mode="json"), indent=2)

    @property
    def trace_file(self) -> Path:
        """Where the trace goes: `trace.file`, or the output's name ending in .trace.h5."""
        return self.trace.file or self.output.file.with_suffix(".trace.h5")

    def files_to_read(self) -> list[Path]:
        """The files that a run of the job reads, of those that are there; commits and traces in parts are not."""
        named = (self.model.weights, self.input.file, self.placement.file, self.placement.load, self.exchange.links)
        return [path for path in named if path is not None and path.is_file()]


def load_job(path: Path, overrides: list[str] | None = None) -> Job:
    """Read and check a job file.

    Args:
        path: the TOML file; relative paths inside it are relative to its folder.
        overrides: `section.key=value` strings; a value is TOML, or plain text where it is not valid TOML. Relative
            paths in them are relative to the current folder.

    Raises:
        JobError: naming the file or the override, the option, what was found and what was expected.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such job file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise JobError(f"{path}: cannot be read as TOML: {error}") from None
    given = {_apply(table, override): override for override in overrides or []}
    return job_from_table(table, path, given)


def job_from_table(table: dict[str, Any], path: Path, given: Mapping[str, str] | None = None) -> Job:
    """Check a table of options as if it stood in the job file `path` (which need not exist).

    Args:
        given: {option: override} of those that were set on the command line.
    """
    given = given or {}

    def blame(*options: str) -> str:
        # An unknown section is named without a key.
        overrides = [
            f"--set {override}"
            for option in options
            for name, override in given.items()
            if name == option or name.startswith(f"{option}.")
        ]
        return " ".join(overrides) or str(path)

    try:
        job = Job.model_validate(table)
    except ValidationError as error:
        lines = explain(error, known_options(), required_options())
        raise JobError("\n".join(f"{blame(option)}: {line}" for option, line in lines)) from None
    _check_together(job, blame)
    job = _resolve_paths(job, path.resolve().parent, given)
    _keep_apart(job, blame)
    return job


def _apply(table: dict[str, Any], override: str) -> str:
    """Set an option in the table; returns its name."""
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or not name or "." in name:
        raise JobError(f"--set {override}: expected section.key=value, for example --set run.capacity=16")
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        read = {}
    # A text of several lines may read as several options: it is a text.
    value = read["value"] if list(read) == ["value"] else text.strip()
    held = table.setdefault(section, {})
    if not isinstance(held, dict):
        raise JobError(f"--set {override}: the job file has `{section} = {held!r}` where a section [{section}] belongs")
    held[name] = value
    return f"{section}.{name}"


def required_options() -> list[str]:
    """Options without a default, as `section.key`."""
    return [
        f"{section}.{key}"
        for section, field in Job.model_fields.items()
        for key, entry in field.annotation.model_fields.items()  # type: ignore[union-attr]
        if entry.is_required()
    ]


def known_options() -> list[str]:
    """Every option as `section.key`, in the order of this file."""
    return [
        f"{section}.{key}"
        for section, field in Job.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    ]


def _check_together(job: Job, blame: Blame) -> None:
    strategy = job.placement.strategy
    if strategy == "file" and job.placement.file is None:
        raise JobError(f"{blame('placement.strategy')}: `placement.strategy` = 'file' needs `placement.file`")
    for name, needs in (("file", "file"), ("load", "balanced")):
        option = f"placement.{name}"
        if getattr(job.placement, name) is not None and strategy != needs:
            raise JobError(
                f"{blame(option, 'placement.strategy')}: `{option}` is given, but `placement.strategy` is "
                f"{strategy!r}; it is for {needs!r}"
            )


def _keep_apart(job: Job, blame: Blame) -> None:
    """Refuse a job that would write over a file that it reads, or write two files under one name."""
    read: dict[str, Path | None] = {
        "model.weights": job.model.weights,
        "input.file": job.input.file,
        "placement.file": job.placement.file,
        "placement.load": job.placement.load,
        "exchange.links": job.exchange.links,
    }
    seen = {name: file for name, file in read.items() if file is not None}
    for name, file in (("output.file", job.output.file), ("trace.file", job.trace_file)):
        same = next((other for other, taken in seen.items() if taken == file), None)
        if same is not None:
            raise JobError(f"{blame(name, same)}: `{name}` and `{same}` are both {file}; give them different names")
        seen[name] = file


def _resolve_paths(job: Job, folder: Path, given: Container[str]) -> Job:
    """Make paths absolute: those of the job file from its folder, those that were `given` from the current one."""
    changes: dict[str, Section] = {}
    for name in type(job).model_fields:
        section = getattr(job, name)
        paths = {key: value for key, value in section if isinstance(value, Path)}
        begin = {key: Path.cwd() if f"{name}.{key}" in given else folder for key in paths}
        # Tidied as text: the name that a message shows is the one that the user wrote, links not followed.
        whole = {key: Path(os.path.normpath(begin[key] / value)) for key, value in paths.items()}
        if whole:
            changes[name] = section.model_copy(update=whole)
    return job.model_copy(update=changes)


def to_toml(job: Job) -> str:
    """The effective job as a job file: every option with its value; those without one are left out."""
    lines = []
    for section, options in job.model_dump(mode="json", exclude_none=True).items():
        lines += [f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in options.items()), ""]
    return "\n".join(lines)


def _toml_value(value: str | bool | int | float) -> str:
    # JSON's escapes are TOML's too, but for the one control character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
