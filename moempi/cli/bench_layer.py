"""`moempi bench layer`: a stack of MoE layers beside its experts alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from moempi import mpi
from moempi.bench.stack import Stack
from moempi.cli.measuring import options_of, refuse_ranks_in_ranks, start_mpi, start_ranks
from moempi.cli.results import plural, refuse_existing
from moempi.errors import EXIT_DONE, JobError

MANY = click.IntRange(1)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "--ranks", type=MANY, help="Start mpirun with this many ranks.")
@click.option("--tokens", type=MANY, multiple=True, default=(512,), show_default=True, help="Of a microbatch; may be "
              "given several times.")  # fmt: skip
@click.option("--layers", type=MANY, default=6, show_default=True)
@click.option("--d-model", type=MANY, default=1024, show_default=True, help="The model's dimension.")
@click.option("--hidden", type=MANY, default=512, show_default=True, help="Hidden dimension of an expert.")
@click.option("--experts", type=MANY, default=8, show_default=True, help="Of a layer.")
@click.option("--top-k", type=MANY, default=2, show_default=True, help="Experts of a token.")
@click.option("--microbatches", type=click.IntRange(1, 64), default=2, show_default=True, help="In flight on a rank.")
@click.option("--skew", type=click.FloatRange(0), default=0.0, show_default=True, help="Zipf exponent of how often "
              "experts are chosen; 0: all alike.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--mode", type=click.Choice(["exact", "fast"]), default="exact", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--gpu-aware", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True, help="As "
              "exchange.gpu_aware.")  # fmt: skip
@click.option("--rounds", type=MANY, default=5, show_default=True, help="Of which the medians count.")
@click.option("--passes", type=MANY, default=2, show_default=True, help="Of a microbatch through all layers, in a "
              "round.")  # fmt: skip
@click.option("--trace", type=click.Path(path_type=Path), help="Write the trace of one more round, of the last number "
              "of tokens, for `moempi trace`.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT and the trace where they exist.")
@click.option("--mpirun", metavar="COMMAND", help="The mpirun that -n starts; by default the one beside this Python.")
@click.pass_context
def layer(
    ctx: click.Context, out: Path, ranks: int | None, overwrite: bool, mpirun: str | None, **given: object
) -> int:
    """Measure a stack of MoE layers beside its experts alone, and write the figures to OUT (JSON).

    Microbatches go through the layers with the engine, messages and kernels of `moempi run`; experts are random, routes
    are drawn before the clock starts, and there is no attention. "pure" are the same rows through the same experts
    without anything else; on GPUs "ceiling" adds pack and combine. Times are ms per layer and microbatch, the slowest
    rank's.

    \b
    moempi bench layer layer.json -n 2 --tokens 64 --tokens 512
    moempi bench layer layer.json -n 2 --device cuda --d-model 7168 --experts 2
    """
    refuse_ranks_in_ranks(ranks)
    trace: Path | None = given["trace"]  # type: ignore[assignment]
    if mpi.launched_rank() == 0:
        if trace and trace.resolve() == out.resolve():
            raise JobError(f"--trace {trace}: OUT is the same file; give another")
        for path in (out, trace) if trace else (out,):
            refuse_existing(path, overwrite)
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
    stack, how = _stack(given)
    stack.check(str(how["device"]))
    if ranks is not None:
        return start_ranks(["bench", "layer", str(out), *options_of(ctx)], ranks, mpirun)
    world = start_mpi(str(how["device"]))
    from moempi.bench.run_layers import run_layers

    results = run_layers(world, stack, **how)  # type: ignore[arg-type]
    if world.rank == 0:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        told = [f"trace: {trace}, of a round with {results['ms_of_trace']:.3f} ms"] if trace else []
        click.echo("\n".join([*lines(results), f"figures: {out}", *told]))
    mpi.meet(world)
    return EXIT_DONE


def _stack(given: dict[str, object]) -> tuple[Stack, dict[str, object]]:
    """What is measured, and how."""
    how = {name: given.pop(name) for name in ("tokens", "device", "rounds", "passes", "trace")}
    return Stack(**given), how  # type: ignore[arg-type]


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The results as a table."""
    s = results["stack"]
    flying = f"{s['microbatches']} microbatch{'es' if s['microbatches'] > 1 else ''}"
    yield (
        f"{plural(s['layers'], 'MoE layer')}, d {s['d_model']}, hidden {s['hidden']}, E {s['experts']}, "
        f"K {s['top_k']}, {s['dtype']}, {s['mode']}, {flying}; {plural(results['ranks'], 'rank')} on "
        f"{results['device']}"
    )
    names = list(results["results"][0]["ms"]) if results["results"] else []
    others = [name for name in names if name != "stack"]
    head = ["tokens", *(f"{name}, ms" for name in names), *(f"of {name}" for name in others)]
    yield "Medians per layer and microbatch, of the slowest rank:"
    rows = [[*head, "tokens/s", "TFLOP/s a rank"]]
    for one in results["results"]:
        rows.append([str(one["tokens"]), *(f"{one['ms'][name]:.3f}" for name in names)])
        rows[-1] += [f"{one[f'of_{name}']:.3f}" for name in others]
        rows[-1] += [f"{one['tokens_per_second']:.0f}", f"{one['tflops_per_rank']:.3g}"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
