"""`moempi weights`: import, export, init, info."""

from __future__ import annotations

from pathlib import Path

import click

from moempi.cli.groups import Group
from moempi.cli.results import refuse_existing, show

_PATH = click.Path(path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace what is there.")


@click.group(cls=Group)
def weights() -> None:
    """Import, export, make and describe weights files.

    Example: moempi weights info inputs/tinymoe.h5
    """


@weights.command("import")
@click.argument("folder", type=_PATH)
@click.argument("out", type=_PATH)
@_overwrite
@_json
def import_(folder: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Make the weights file OUT from a Hugging Face checkpoint in FOLDER (safetensors).

    Example: moempi weights import checkpoints/qwen3 qwen3.h5
    """
    refuse_existing(out, overwrite)
    from moempi.files.import_weights import import_checkpoint
    from moempi.files.weights import info

    import_checkpoint(folder, out)
    show(info(out), as_json)


@weights.command()
@click.argument("file", type=_PATH)
@click.argument("folder", type=_PATH)
@_overwrite
def export(file: Path, folder: Path, overwrite: bool) -> None:
    """Write the checkpoint that FILE was imported from into FOLDER, bit for bit.

    Example: moempi weights export qwen3.h5 checkpoints/again
    """
    refuse_existing(folder, overwrite or _is_empty(folder))
    from moempi.files.export_weights import export_checkpoint

    export_checkpoint(file, folder)
    click.echo(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


@weights.command()
@click.argument("config", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random numbers.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--std", type=click.FloatRange(0, 1e6), default=0.02, show_default=True, help="Standard deviation.")
@click.option(
    "--gate-scale",
    type=click.FloatRange(0, 1e6),
    default=1.0,
    show_default=True,
    help="Factor on the gates' standard deviation; larger makes routes clearer.",
)
@_overwrite
@_json
def init(
    config: Path, out: Path, seed: int, dtype: str, std: float, gate_scale: float, overwrite: bool, as_json: bool
) -> None:
    """Make the weights file OUT with random numbers, of the shape that CONFIG (a config.json) says.

    Example: moempi weights init config.json random.h5 --seed 1 --gate-scale 20
    """
    refuse_existing(out, overwrite)
    from moempi.files.init_weights import init_weights
    from moempi.files.weights import info

    init_weights(config, out, seed, dtype, gate_scale, std)
    show(info(out), as_json)


@weights.command("info")
@click.argument("file", type=_PATH)
@click.option("--verify", is_flag=True, help="Read every dataset and compare its SHA-256 with the stored one.")
@_json
def info_(file: Path, verify: bool, as_json: bool) -> None:
    """Say what the weights FILE holds: shape, parameters, bytes, dtype, digest.

    Example: moempi weights info inputs/tinymoe.h5 --verify
    """
    from moempi.files.weights import info, open_weights

    table = info(file)
    if verify:
        with open_weights(file) as opened:
            opened.verify()
        table["verified"] = True
    show(table, as_json)
