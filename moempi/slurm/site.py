"""Site profiles: what is particular to a cluster, in TOML, so that a job file says nothing of it."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from moempi.errors import JobError
from moempi.job import Bytes, FileName, Section, option
from moempi.slurm.times import parse_time


def _plain(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("expected a text of one line that is not empty")
    return value


def _sbatch_option(value: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z-]*(=.+)?", value) or not value.isprintable():
        raise ValueError('expected an option of sbatch in one piece, like "--mail-type=END"')
    return value


def _command(value: str) -> str:
    if not shlex.split(value):
        raise ValueError("expected a command")
    return value


def _time(value: Any) -> Any:
    return parse_time(value) if isinstance(value, str) else value


Plain = Annotated[str, AfterValidator(_plain)]
Time = Annotated[float, BeforeValidator(_time), Field(gt=0, allow_inf_nan=False)]


class Site(Section):
    """A cluster, or a part of one. Every option has a default; none of them is a secret."""

    partition: Plain | None = option(None, "partition; Slurm's default where it is not given")
    account: Plain | None = option(None, "account that the time is taken from")
    qos: Plain | None = option(None, "quality of service")
    constraint: Plain | None = option(None, "features that nodes must have")
    exclusive: bool = option(False, "take whole nodes, with all of their memory")
    cores_per_rank: int = option(1, "cores of every rank", "cores", ge=1)
    cores_per_node: int = option(0, "cores of a node; 0: not known, one rank per node and GPU is asked for", ge=0)
    gpus_per_node: int = option(0, "GPUs of a node, one rank each; 0: ranks compute on cores", ge=0)
    memory_per_node: Bytes = option(0, "memory of a node that jobs can have; 0: not known", "bytes")
    max_time: Time = option(24 * 3600.0, 'longest time limit, in s or as Slurm writes it ("1-12:00:00")', "s")
    launcher: Annotated[str, AfterValidator(_command)] | None = option(
        None, 'what starts the ranks, like "srun --mpi=pmix"; by default the mpirun that `moempi run -n` finds'
    )
    env_file: FileName | None = option(None, "file that the script sources: modules, environments, variables")
    python: FileName | None = option(None, "the Python that has moempi on the nodes; by default the one that submits")
    sbatch: list[Annotated[str, AfterValidator(_sbatch_option)]] = option([], "further options of sbatch")
    rank_flops: float = option(10e9, "what the time estimate takes a rank to compute", "FLOP/s", gt=0)
    rank_bandwidth: float = option(5e9, "what the time estimate takes a rank to read of its weights", "bytes/s", gt=0)
    layer_latency: float = option(2e-3, "what the time estimate takes for messages, per layer and step", "s", ge=0)
    time_margin: float = option(3.0, "factor on the estimated time", ge=1)


def load_site(name: str | None) -> Site:
    """Read a site profile.

    Args:
        name: a file (with a / or .toml in it), or the name of one in `sites_folder()`; None: the one that is named
            default there, or no profile.

    Raises:
        JobError: naming the file, the option, what was found and what was expected.
    """
    if name is None:
        path = sites_folder() / "default.toml"
        if not path.exists():
            return Site()
    else:
        path = Path(name) if "/" in name or name.endswith(".toml") else sites_folder() / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such site profile{_known_sites()}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise JobError(f"{path}: cannot be read as TOML: {error}") from None
    try:
        site = Site.model_validate(table)
    except ValidationError as error:
        raise JobError("\n".join(f"{path}: {line}" for line in _explain(error))) from None
    folder = path.resolve().parent
    files = {key: Path(os.path.normpath(folder / value)) for key, value in site if isinstance(value, Path)}
    return site.model_copy(update=files)


def sites_folder() -> Path:
    """Where profiles lie that are given by name: sites/ in moempi's folder of the user's configuration."""
    configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(configuration) / "moempi" / "sites"


def _known_sites() -> str:
    known = sorted(path.stem for path in sites_folder().glob("*.toml"))
    return f"; there are {', '.join(known)}" if known else f"; none are in {sites_folder()}"


_PLAIN = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text",
    "a valid boolean": "true or false",
    "a valid list": "a list",
    "greater than or equal to": "at least",
}


def _explain(error: ValidationError) -> list[str]:
    """One line per option that is wrong."""
    lines: dict[str, str] = {}
    for item in error.errors():
        name = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, list(Site.model_fields), n=1, cutoff=0.0)[0]
            lines[name] = f"unknown option `{name}`; did you mean `{near}`?"
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            wanted = message.removeprefix("expected ")
            for theirs, ours in _PLAIN.items():
                wanted = wanted.replace(theirs, ours)
            lines.setdefault(name, f"`{name}` = {item['input']!r}: expected {wanted}")
    return list(lines.values())
