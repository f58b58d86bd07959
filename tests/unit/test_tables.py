"""What commands print for people: within 80 columns, right numbers, and a dry run that is a job file again."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table
from test_outputs import write_whole
from test_trace import merge, write_ranks

from moempi.cli import trace_tables
from moempi.cli.load_table import MOST_MARKS, bar, load_table, percents, plain_table
from moempi.cli.outputs import outputs
from moempi.cli.run import run
from moempi.cli.trace import trace
from moempi.errors import JobError
from moempi.job import Job, job_from_table, known_options, load_job, to_toml

DEMO = Path(__file__).parents[2] / "jobs/demo.toml"


def printed(table: Table, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def layer(number: int, load: list[int]) -> dict[str, object]:
    most = max(load)
    return {
        "layer": number,
        "tokens": sum(load),
        "tokens_per_expert": load,
        "busiest_expert": load.index(most),
        "busiest_expert_share": most / sum(load),
        "max_over_mean": most * len(load) / sum(load),
    }


# ---------------------------------------------------------------- load


def test_load_of_four_experts_by_hand() -> None:
    text = printed(load_table([layer(1, [10, 0, 30, 60]), layer(2, [25, 25, 25, 25])], 4))
    rows = [line.split() for line in text.splitlines() if line.strip()[0] in "12"]
    assert rows == [["1", "10", "0", "30", "60", "3", "60.0%", "2.40"], ["2", *["25"] * 4, "0", "25.0%", "1.00"]]
    assert "in % of 100 rows (tokens x K); even would be 25.0" in " ".join(text.split())


def test_the_busiest_expert_is_bold_and_those_below_half_the_mean_are_dim() -> None:
    assert [str(cell.style) for cell in percents([60, 30, 10, 0])] == ["bold", "", "dim", "dim"]


@pytest.mark.parametrize("n_experts", [1, 3, 16, 17, 40, 41, 64, 256])
def test_the_load_table_fits_80_columns_and_cuts_nothing(n_experts: int) -> None:
    load = [100_000 + 7919 * expert for expert in range(n_experts)]
    text = printed(load_table([layer(60, load)], n_experts))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert f"{load[-1] / sum(load):.1%}" in text


def test_a_bar_has_a_mark_for_every_expert_or_for_the_busiest_of_neighbours() -> None:
    assert bar([0, 1, 5, 9]) == " .+@"
    load = [0] * 80
    load[79] = 3
    assert bar(load) == " " * (MOST_MARKS - 1) + "@"


def test_a_title_that_is_longer_than_its_table_stays_in_one_line() -> None:
    table = plain_table("Some title that is longer than the table below it", "a", "b")
    table.add_row("1", "2")
    assert printed(table).splitlines()[0].rstrip() == "Some title that is longer than the table below it"


def test_the_load_of_a_run_that_routed_nothing_is_an_empty_table() -> None:
    assert "layer" in printed(load_table([], 16))


# ---------------------------------------------------------------- times


@pytest.mark.parametrize(
    "factor,heading,attend,wall",
    [
        (1.0, "mean s", "attend 2 750.000 60.0 75 50", "wall s 1250.000 100.0 1000 1500"),
        (1e-3, "mean s", "attend 2 0.750 60.0 75 50", "wall s 1.250 100.0 1.0 1.5"),
        (6e-4, "mean ms", "attend 2 450.000 60.0 75 50", "wall ms 750.000 100.0 600 900"),
        (1e-6, "mean ms", "attend 2 0.750 60.0 75 50", "wall ms 1.250 100.0 1.0 1.5"),
    ],
)
def test_times_of_short_runs_are_in_ms(factor: float, heading: str, attend: str, wall: str) -> None:
    found = {
        "n_ranks": 2,
        "ranks": [{"wall_seconds": seconds * factor, "coverage": 1.0} for seconds in (1000.0, 1500.0)],
        "time": [
            {"rank": rank, "stage": "attend", "container": False, "seconds": 750.0 * factor, "spans": 1}
            for rank in range(2)
        ],
    }
    text = printed(trace_tables.time(found)[0], 100)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert heading in text and attend in rows and wall in rows, text
    assert "at least 100.00% accounted for" in text


# ---------------------------------------------------------------- dry run


def dry_run(*arguments: str) -> str:
    result = CliRunner().invoke(run, [str(DEMO), "--dry-run", *arguments], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    """`--set` that gives the demo its input, which a fresh clone does not have yet."""
    from moempi.files.make_inputs import make_inputs

    folder = DEMO.parents[1] / "inputs"
    make_inputs(folder / "prompts.jsonl", folder / "tinymoe.h5", tmp_path / "prompts.h5")
    return f"input.file={tmp_path / 'prompts.h5'}"


def test_a_dry_run_prints_a_job_file_that_gives_the_same_job(inputs: str, tmp_path: Path) -> None:
    text = dry_run("-n", "6", "--set", inputs, "--set", "placement.replicas=0", "--set", "run.threads=2")
    (tmp_path / "again.toml").write_text(text)
    again = load_job(tmp_path / "again.toml")
    assert again == load_job(DEMO, [inputs, "placement.replicas=0", "run.threads=2"])


def test_the_memory_table_has_a_line_for_ranks_that_hold_the_same(inputs: str) -> None:
    lines = dry_run("-n", "6", "--set", inputs, "--set", "placement.replicas=0").split("# Memory per rank")[1]
    *table, trace = lines.splitlines()
    rows = [line.lstrip("# ").split() for line in table[2:]]
    # 16 experts of 5 layers on 6 ranks, in blocks: 3, 3, 2, 3, 3, 2.
    assert [(row[0], row[1]) for row in rows] == [("0-1", "15"), ("2", "10"), ("3-4", "15"), ("5", "10")]
    assert trace == "# The totals hold 192.0 MiB for the trace on its way to the disk."
    assert max(map(len, lines.splitlines())) <= 80


def test_toml_of_a_job_keeps_odd_text() -> None:
    table = {
        "model": {"weights": '/a "b"\\c\x7f\té.h5'},
        "input": {"file": "/in.h5"},
        "output": {"file": "/out.h5", "commit_every": 1e-5},
        "placement": {"strategy": "file", "file": "/p.h5", "strict": True},
    }
    job = job_from_table(table, Path("/job.toml"))
    assert Job.model_validate(tomllib.loads(to_toml(job))) == job
    written = {f"{section}.{key}" for section, options in tomllib.loads(to_toml(job)).items() for key in options}
    assert written == set(known_options()) - {"placement.load", "exchange.links", "trace.file"}  # none here


# ---------------------------------------------------------------- trace and outputs


def shown(command: click.Command, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(one) for one in arguments], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def test_only_the_tables_that_are_asked_for_are_printed(tmp_path: Path) -> None:
    write_ranks(tmp_path / "t.h5", "summary")
    merge(tmp_path / "t.h5", "summary")
    titles = {"time": "Time per stage", "load": "Load per expert", "traffic": "Traffic"}
    for wanted in ([], ["load"], ["traffic", "time"]):
        options = [part for name in wanted for part in ("--only", name)]
        text = shown(trace, "summary", tmp_path / "t.h5", *options)
        assert {name for name, title in titles.items() if title in text} == set(wanted or titles)


def test_completions_are_told_from_prompts_without_colours_and_found_by_id(tmp_path: Path) -> None:
    write_whole(tmp_path / "out.h5", 3)
    text = shown(outputs, "show", tmp_path / "out.h5", "--id", "p2", "--id", "p0")
    assert re.findall(r"^p\d", text, re.MULTILINE) == ["p2", "p0"]
    assert re.findall(r"^  prompt \d", text, re.MULTILINE) == ["  prompt 2", "  prompt 0"]
    assert len(re.findall(r"^> ", text, re.MULTILINE)) == 2
    assert "more" not in text
    line = shown(outputs, "show", tmp_path / "out.h5", "--id", "p1", "--json")
    assert json.loads(line)["id"] == "p1"


def test_an_id_that_is_not_there_is_an_error_that_names_some_that_are(tmp_path: Path) -> None:
    write_whole(tmp_path / "out.h5", 5)
    with pytest.raises(JobError, match=r"no sequence has the id 'x'; its 5 ids are p0, p1, p2, \.\.\."):
        shown(outputs, "show", tmp_path / "out.h5", "--id", "x")
