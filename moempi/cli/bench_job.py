"""`moempi bench job`: a random model of a given shape as a whole job, on several numbers of ranks."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moempi import mpi
from moempi.cli.measuring import options_of, refuse_ranks_in_ranks, start_mpi, start_ranks
from moempi.cli.results import refuse_existing
from moempi.errors import EXIT_DONE, DataError, JobError

if TYPE_CHECKING:
    from mpi4py import MPI

MANY = click.IntRange(1)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "--ranks", type=MANY, help="Start mpirun with this many ranks.")
@click.option("--counts", type=MANY, multiple=True, help="Ranks that a job runs on; may be given several times. By "
              "default all.")  # fmt: skip
@click.option("--config", type=click.Path(path_type=Path), help="A config.json, in place of the options of the shape.")
@click.option("--layers", type=MANY, default=8, show_default=True)
@click.option("--d-model", type=MANY, default=1024, show_default=True, help="The model's dimension.")
@click.option("--hidden", type=MANY, default=512, show_default=True, help="Hidden dimension of an expert.")
@click.option("--experts", type=MANY, default=32, show_default=True, help="Of a layer.")
@click.option("--top-k", type=MANY, default=4, show_default=True, help="Experts of a token.")
@click.option("--heads", type=MANY, default=16, show_default=True)
@click.option("--kv-heads", type=MANY, default=4, show_default=True)
@click.option("--head-dim", type=MANY, default=64, show_default=True)
@click.option("--vocab", type=MANY, default=16384, show_default=True)
@click.option("--prompts", type=MANY, default=32, show_default=True)
@click.option("--prompt-tokens", type=MANY, default=256, show_default=True, help="Of a prompt of the prefill.")
@click.option("--new-tokens", type=click.IntRange(2), default=33, show_default=True, help="Of a prompt of the decode.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rounds", type=MANY, default=1, show_default=True, help="Of every job; medians count.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="An option of the jobs.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
@click.option("--mpirun", metavar="COMMAND", help="The mpirun that -n starts; by default the one beside this Python.")
@click.pass_context
def job(ctx: click.Context, out: Path, ranks: int | None, overwrite: bool, mpirun: str | None, **given: Any) -> int:
    """Measure a random model as a whole job, and write the figures to OUT (JSON).

    Prefill: long prompts and one new token each. Decode: prompts of 16 tokens and many new ones. Weights and prompts
    lie in a folder beside OUT meanwhile; all experts of a layer are the same numbers, which no kernel minds.

    \b
    moempi bench job job.json -n 4 --counts 1 --counts 2 --counts 4
    moempi bench job job.json -n 2 --device cuda --config config.json
    """
    refuse_ranks_in_ranks(ranks)
    if mpi.launched_rank() == 0:
        refuse_existing(out, overwrite)
    n_ranks = ranks or mpi.launched_size()
    if max(given["counts"], default=1) > n_ranks:
        raise JobError(f"--counts {max(given['counts'])}: there are {n_ranks} ranks (-n)")
    if ranks is not None:
        return start_ranks(["bench", "job", str(out), *options_of(ctx)], ranks, mpirun)
    _measure(start_mpi(given["device"]), out, given)
    return EXIT_DONE


def config_of(given: dict[str, Any]) -> dict[str, Any]:
    """The config.json that the options name or describe."""
    if given["config"] is not None:
        return _read(given["config"])
    return {
        "model_type": "qwen3_moe",
        "hidden_size": given["d_model"],
        "num_hidden_layers": given["layers"],
        "num_attention_heads": given["heads"],
        "num_key_value_heads": given["kv_heads"],
        "head_dim": given["head_dim"],
        "vocab_size": given["vocab"],
        "intermediate_size": given["hidden"],
        "moe_intermediate_size": given["hidden"],
        "num_experts": given["experts"],
        "num_experts_per_tok": given["top_k"],
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": max(given["prompt_tokens"], 16) + given["new_tokens"],
        "eos_token_id": 0,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"--config {path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("vocab_size"), int):
        raise DataError(f"--config {path}: expected a config.json, with vocab_size and the other sizes of a model")
    return found


def _measure(world: MPI.Intracomm, out: Path, given: dict[str, Any]) -> None:
    from moempi.bench.jobs import measure_jobs, phases_of, rates, write_together

    phases = phases_of(given["prompts"], given["prompt_tokens"], given["new_tokens"])
    config, counts = config_of(given), given["counts"] or (world.size,)
    made = tempfile.mkdtemp(prefix=f"{out.stem}-", dir=out.resolve().parent) if world.rank == 0 else ""
    folder = Path(world.bcast(made, root=0))
    overrides = [f"run.device={given['device']}", *given["overrides"]]
    try:
        write_together(world, folder, config, phases, given["dtype"])
        found = measure_jobs(world, folder, phases, counts, overrides, given["rounds"])
    finally:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if world.rank == 0:
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        results = {"config": config, "options": shown, "rates": rates(found), "jobs": found}
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        click.echo("\n".join([*lines(results), f"figures: {out}"]))
    mpi.meet(world)


def lines(results: dict[str, Any]) -> list[str]:
    """The rates as a table."""
    rows = [["ranks", "prefill, tokens/s", "scaling", "decode, tokens/s", "scaling"]]
    for one in results["rates"]:
        rows.append([str(one["ranks"])])
        for phase in ("prefill", "decode"):
            rows[-1] += [f"{one[phase]:.0f}", f"{one[f'{phase}_scaling']:.2f}"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
