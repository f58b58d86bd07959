"""The `moempi` command: a verb, then files. Each verb is a module here that is imported when it is used."""

from __future__ import annotations

import importlib

import click

from moempi import __version__
from moempi.cli.groups import Group

# verb -> what the list of verbs says of it; module and command are named like the verb.
VERBS = {
    "run": "Run a job: completions for a file of prompts.",
    "doctor": "Say what of this machine is fine for moempi, and what to do about the rest.",
    "job": "Describe the job file: a schema for editors.",
    "submit": "Submit a job to Slurm.",
    "status": "Say how far submitted jobs are.",
    "cancel": "End a submitted job, in order.",
    "weights": "Import, export, make and describe weights files.",
    "inputs": "Make, cut and describe files of prompts.",
    "outputs": "Show, compare and merge files of completions.",
    "trace": "Say and draw where every token and every microsecond went.",
    "check": "Look through files of strangers where a crash does no harm.",
    "bench": "Measure links, layers and whole jobs on a machine.",
}


class Verbs(Group):
    """A group that imports a verb when it is used, so that help is fast and needs neither torch nor mpi4py."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(f"moempi.cli.{cmd_name}"), cmd_name)
        return command

    def short_help_of(self, ctx: click.Context, name: str) -> str:
        return VERBS[name]


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moempi")
def moempi() -> None:
    """Run Mixture-of-Experts language models as an MPI batch job, one expert per rank.

    Prompts in an HDF5 file go in, completions in an HDF5 file come out, and a trace says where every token and every
    microsecond went.

    \b
    moempi run jobs/demo.toml -n 16      starts mpirun itself
    mpirun -n 16 moempi run jobs/demo.toml
    """
