"""`moempi check`: walk files of strangers in a child process that may crash, before anything else opens them."""

from __future__ import annotations

from pathlib import Path

import click

from moempi.cli.results import plural


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILES...")
def check(files: tuple[Path, ...]) -> None:
    """Look through FILES in a child process with limits of memory and time; ends with 3 at the first bad one.

    A file is any HDF5 file of this program, or a job file (.toml), which stands for itself and the files it names.

    \b
    moempi check prompts.h5 model.h5
    moempi check jobs/demo.toml
    """
    from moempi.files.check_in_child import check_in_child
    from moempi.job import load_job

    named: list[Path] = []
    for file in files:
        named += load_job(file).files_to_read() if file.suffix == ".toml" else [file]
    check_in_child(named)
    click.echo(f"{plural(len(named), 'file')} looked through: sound")
