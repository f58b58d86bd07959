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
    for n in [0, *rank_counts(results)]:
        cells = [f"moempi, {n} rank{'s' * (n > 1)}" if n else "transformers"]
        for dtype in dtypes:
            runs, peer = chosen(results, n, dtype), chosen(results, 0, dtype)
            found = [run["tokens_per_second"] for run in runs]
            ratio = median(found) / median(run["tokens_per_second"] for run in peer)
            spread = f" ({min(found):.0f} to {max(found):.0f})" * (len(found) > 1)
            cells.append(f"{median(found):.0f}{spread}" + f", {ratio:.2f} x" * (n > 0))
        start = median(run["start_seconds"] for dtype in dtypes for run in chosen(results, n, dtype))
        rows.append([*cells, f"{start:.1f}"])
    return table(["new tokens/s", *dtypes, "start-up, s"], rows)


def profile(results: dict[str, Any]) -> str:
    """Milliseconds of every stage per forward step of a rank, and their share of the run."""
    counts = rank_counts(results)
    dtype = min(run["dtype"] for run in results["runs"])  # bfloat16: what the weights are stored in
    columns = [
        shares([run["stage_seconds"] for run in runs], runs) for runs in (chosen(results, n, dtype) for n in counts)
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
    head = [f"ms per step, {dtype}", *(f"{n} rank{'s' * (n > 1)}" for n in counts)]
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
    for n in rank_counts(results):
        runs = chosen(results, n, dtype)
        steps = median(max(run["steps"]) for run in runs)
        per_step = median(sum(run["expert_calls"]) / (run["moe_layers"] * max(run["steps"])) for run in runs)
        rows_per_call = median(sum(run["expert_rows"]) / sum(run["expert_calls"]) for run in runs)
        call = median(1e6 * run["stage_seconds"]["expert"] / sum(run["expert_calls"]) for run in runs)
        rows.append([str(n), f"{steps:.0f}", f"{per_step:.1f}", f"{rows_per_call:.1f}", f"{call:.0f}"])
    experts = next(run["n_experts"] for run in results["runs"] if run["ranks"])
    head = [
        "ranks",
        "steps of the busiest rank",
        f"expert calls per (layer, step), {experts} experts",
        "rows per call",
        "us per call",
    ]
    return table(head, rows)


def rank_counts(results: dict[str, Any]) -> list[int]:
    """Ranks that moempi was measured on, ascending."""
    return sorted({run["ranks"] for run in results["runs"]} - {0})


def chosen(results: dict[str, Any], ranks: int, dtype: str) -> Runs:
    """The rounds of one system; 0 ranks: transformers."""
    return [run for run in results["runs"] if run["ranks"] == ranks and run["dtype"] == dtype]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in lines
    )
