"""The documents say what is so: paths exist, commands parse, tables and listings are those of code and real files.

`python tests/unit/test_docs.py` (or `make docs`) writes the tables that are made from the code.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import h5py
import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from moempi import errors
from moempi.cli import moempi
from moempi.job import known_options, load_job
from moempi.job_options import describe_options
from moempi.job_schema import job_schema
from moempi.planning.memory import show_bytes

ROOT = Path(__file__).parents[2]
PLACES = (".", "inputs", "jobs", "slurm", "benchmarks", "docs", "docs/decisions")
PAGES = {"contributing.md", "changes.md"}  # of the site only: docs/site_pages.py
DOCUMENTS = sorted(path for place in PLACES for path in (ROOT / place).glob("*.md"))
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

# What a run, a build or a user makes; it is named in documents and not in the repository.
MADE = re.compile(r"(out|build|checkpoints?|logs|\.venv)/|inputs/prompts\.h5|(tests/unit|tests/mpi)/test_x\.py")
PATH = re.compile(r"(?<![\w./<-])(?:[\w.-]+/)+[\w.-]*")
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()}
BEGIN, END = "<!-- made by `make docs` from moempi/job.py; edit there -->\n", "<!-- end -->"


def code_of(text: str) -> Iterator[str]:
    """Lines of indented or fenced blocks, and what stands between backticks; a line that goes on is one."""
    text = re.sub(r"\\\n\s*", "", text)
    for paragraph in re.split(r"\n(?=    )|\n(?=\S)", text):
        if paragraph.startswith("    "):
            yield from (line.strip() for line in paragraph.splitlines())
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        yield from (line.strip() for line in block.splitlines())
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))


# ---------------------------------------------------------------- paths and links


@documents
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    named = [word.rstrip(".") for span in re.findall(r"`([^`]+)`", text) for word in PATH.findall(span)]
    missing = [
        word
        for word in named
        if word.split("/")[0] in FOLDERS and not MADE.match(word) and not (ROOT / word).exists() and "*" not in word
    ]
    assert not missing


@documents
def test_every_link_leads_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    inside = [target.split("#")[0] for target in targets if not target.startswith(("http", "#"))]
    assert not [target for target in inside if not (document.parent / target).exists()]


@documents
def test_no_document_names_a_place_outside_the_repository(document: Path) -> None:
    assert not re.findall(r"(?<![\w/])/(?:work|root|home|tmp)/[\w/.-]*|\.\./shared", document.read_text())


# ---------------------------------------------------------------- commands


def commands_of(text: str) -> Iterator[list[str]]:
    """The arguments of every `moempi ...` in code, also behind mpirun or srun."""
    for line in code_of(text):
        found = re.search(r"^(?:\$ )?(?:(?:mpirun|srun) .*?)?\bmoempi ([a-z-][^#]*)", line)
        if found and "..." not in found[1]:
            yield shlex.split(found[1].replace("RANKS", "4").replace("$PWD", "."))


def parse(arguments: list[str]) -> None:
    """Parse a command without running it; a verb with nothing behind it only has to exist."""
    command: click.Command = moempi
    rest, context = list(arguments), click.Context(moempi, info_name="moempi")
    while rest and isinstance(command, click.Group) and not rest[0].startswith("-"):
        found = command.get_command(context, rest.pop(0))
        assert found is not None, arguments
        command = found
    if rest and rest != ["--help"]:
        made = command.make_context(command.name, rest)
        keys = [override.partition("=")[0] for override in made.params.get("overrides", ())]
        assert set(keys) <= set(known_options()), keys


@documents
def test_every_command_that_a_document_shows_parses(document: Path) -> None:
    for arguments in commands_of(document.read_text()):
        try:
            parse(arguments)
        except click.ClickException as error:
            pytest.fail(f"moempi {shlex.join(arguments)}: {error.format_message()}")


@pytest.mark.parametrize("wrong", ["rum JOB", "run JOB --fast", "trace summary A B", "run JOB --set run.capcity=1"])
def test_a_command_that_does_not_parse_is_found(wrong: str) -> None:
    (arguments,) = commands_of(f"    mpirun -n 4 moempi {wrong}   # comment")
    with pytest.raises((click.ClickException, AssertionError)):
        parse(arguments)


def test_the_documents_show_commands_of_every_verb() -> None:
    shown = {arguments[0] for document in DOCUMENTS for arguments in commands_of(document.read_text())}
    assert set(moempi.list_commands(click.Context(moempi))) <= shown


@documents
def test_every_make_target_that_a_document_names_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match[1] for line in code_of(document.read_text()) if (match := re.match(r"(?:\$ )?make ([a-z-]+)", line))}
    assert named <= targets


# ---------------------------------------------------------------- options and exit codes


@documents
def test_every_option_that_a_document_names_exists(document: Path) -> None:
    sections = "|".join(sorted({option.split(".")[0] for option in known_options()}))
    spans = re.findall(r"`([^`]+)`", document.read_text())
    named = {word for span in spans for word in re.findall(rf"(?<![\w./]){'(?:' + sections + ')'}\.[a-z_]+\b", span)}
    files = {word for word in named if word.split(".")[1] in {"h5", "py", "md", "toml", "json", "safetensors"}}
    wrong = {"run.capcity"}  # shown as what is refused
    assert named - files - wrong <= set(known_options())


def options_table() -> str:
    """The table of docs/jobs.md."""
    lines = ["| option | default | unit | what it does |", "| --- | --- | --- | --- |"]
    for name, default, unit, text in describe_options():
        value = show_bytes(int(default)) if unit == "bytes" and default not in ("0", "required") else default
        shown = "none" if value == "null" else value if value == "required" else f"`{value}`"
        one, _, choices = value.partition(" of ")
        shown = f"`{one}` of {', '.join(f'`{each}`' for each in choices.split(', '))}" if choices else shown
        lines.append(f"| `{name}` | {shown} | {unit} | {text} |")
    return "\n".join(lines) + "\n"


def with_options_table(text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + options_table() + END + rest.split(END, 1)[1]


def test_the_table_of_options_is_that_of_the_job() -> None:
    text = (ROOT / "docs/jobs.md").read_text()
    assert text == with_options_table(text), "docs/jobs.md is old: run `make docs`"
    assert all(f"| `{name}` |" in text for name in known_options())


@pytest.mark.parametrize("job", sorted(ROOT.glob("jobs/*.toml")), ids=lambda path: path.name)
def test_jobs_are_valid_and_docs_name_them(job: Path) -> None:
    assert load_job(job).output.file.is_absolute()
    assert f"jobs/{job.name}" in (ROOT / "docs/jobs.md").read_text()


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs/running.md").read_text(), re.MULTILINE)
    classes = [errors.MoempiError, *errors.MoempiError.__subclasses__()]
    constants = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    known = {*constants, *(kind.exit_code for kind in classes), 128 + signal.SIGKILL}
    assert sorted(map(int, rows)) == sorted(known)


def test_the_numbers_of_the_engine_are_those_of_the_code() -> None:
    from moempi.exchange import engine

    section = (ROOT / "docs/architecture.md").read_text().split("## The engine")[1].split("\n## ")[0]
    options = {name: default for name, default, _, _ in describe_options()}
    said = [
        f"{engine.EMPTY_POLLS} looks with `sched_yield` ({milliseconds(engine.SPIN)} of looks where",
        f"double from {1e6 * engine.SHORTEST_SLEEP:g} us to {milliseconds(engine.LONGEST_SLEEP)}",
        f"({milliseconds(engine.LONGEST_IDLE_SLEEP)} where no request is open)",
        f"each sleep is of {milliseconds(engine.LONGEST_RUNG_SLEEP)}, or",
        f"control messages once in {milliseconds(engine.SERVICE_INTERVAL)}",
        f"`engine.slice` ({milliseconds(float(options['engine.slice']))})",
    ]
    assert not [one for one in said if one not in " ".join(section.split())]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:g} ms"


def test_the_glossary_is_sorted_and_defines_a_word_once() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    assert len(words) > 30
    assert words == sorted(set(words))


# ---------------------------------------------------------------- files


def listing(heading: str) -> dict[str, str]:
    """{name: kind as h5ls prints it} of the listings under a heading of docs/files.md."""
    text = (ROOT / "docs/files.md").read_text()
    section = re.search(rf"^## {heading}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    return dict(re.findall(r"^    (/[\w./]*) +((?:Group|Dataset \{.*?\}))", section[0], re.MULTILINE))


def names_of(path: Path) -> dict[str, str]:
    """The same of a real file."""
    names = {"/": "Group"}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        shape = "" if isinstance(item, h5py.Group) else ", ".join(map(str, item.shape))
        names[f"/{name}"] = f"Dataset {{{shape}}}" if shape else "Group"

    with h5py.File(path) as file:
        file.visititems(note)
    return names


def test_files_md_lists_the_weights() -> None:
    real, shown = names_of(ROOT / "inputs/tinymoe.h5"), listing("Weights")
    assert shown.items() <= real.items()
    # Layer 0 stands for the dense layers; of the MoE layers, what differs is listed.
    experts = {"/model/layers/1/gate", "/model/layers/1/experts_gate_up", "/model/layers/1/experts_down"}
    listed = {name for name in real if not re.match(r"/model/layers/[1-9]", name)} | experts
    assert listed <= shown.keys()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs.h5, out.h5 and out.trace.h5 of a run of three prompts on one rank."""
    from moempi.files.make_inputs import make_inputs

    folder = tmp_path_factory.mktemp("docs")
    prompts = (ROOT / "inputs/prompts.jsonl").read_text().splitlines()
    (folder / "three.jsonl").write_text("\n".join(prompts[:3]))
    make_inputs(folder / "three.jsonl", ROOT / "inputs/tinymoe.h5", folder / "inputs.h5")
    files = {"input.file": "inputs.h5", "output.file": "out.h5"}
    overrides = [f"{key}={json.dumps(str(folder / name))}" for key, name in files.items()]
    options = [*overrides, "generate.max_new_tokens=2", "trace.level=routes"]
    arguments = [part for option in options for part in ("--set", option)]
    command = [sys.executable, "-m", "moempi", "run", str(ROOT / "jobs/demo.toml"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("heading", "name"), [("Inputs", "inputs.h5"), ("Outputs", "out.h5"), ("Trace", "out.trace.h5")]
)
def test_files_md_lists_what_a_run_reads_and_writes(heading: str, name: str, small_run: Path) -> None:
    shown = listing(heading).keys() - {"/index"}  # which only the part files of outputs have
    assert shown == names_of(small_run / name).keys()


def test_files_md_lists_the_inputs_that_the_demo_reads(tmp_path: Path) -> None:
    from moempi.files.make_inputs import make_inputs

    make_inputs(ROOT / "inputs/prompts.jsonl", ROOT / "inputs/tinymoe.h5", tmp_path / "prompts.h5")
    shown, real = listing("Inputs"), names_of(tmp_path / "prompts.h5")
    del shown["/environment"], real["/environment"]  # as long as the names of versions are
    assert shown == real


def test_files_md_lists_a_placement(tmp_path: Path) -> None:
    from moempi.files.placement import write_placement
    from moempi.files.weights import open_weights
    from moempi.job import PlacementOptions
    from moempi.planning.placement import place

    with open_weights(ROOT / "inputs/tinymoe.h5") as weights:
        placement = place(weights.config, 16, PlacementOptions(), 1)
    write_placement(tmp_path / "placement.h5", placement)
    assert listing("Placement") == names_of(tmp_path / "placement.h5")


def test_files_md_lists_measured_links(tmp_path: Path) -> None:
    from moempi.bench.fit import ladder
    from moempi.bench.links import summarize
    from moempi.files.links import write_links

    sizes, pairs = ladder(2**26), [(a, b) for b in range(8) for a in range(b)]
    where: list[dict[str, int | str]] = [{"node": rank // 2, "host": f"n{rank:03d}"} for rank in range(8)]
    times = {pair: [1e-6 + size / 1e9 for size in sizes] for pair in pairs}
    write_links(tmp_path / "links.h5", summarize(times, sizes, where, ["cpu"] * 8, [1.0] * 8))
    assert listing("Links") == names_of(tmp_path / "links.h5")


def test_what_is_said_of_the_demo_is_so() -> None:
    prompts = (ROOT / "inputs/prompts.jsonl").read_text().splitlines()
    ids = {json.loads(line)["id"] for line in prompts}
    shown = re.search(r"^DEMO_IDS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert shown is not None
    assert set(shown[1].split()) <= ids
    assert f"{len(prompts)} prompts" in (ROOT / "inputs/README.md").read_text()
    assert load_job(ROOT / "jobs/demo.toml").output.file == ROOT / "out/demo.h5"


# ---------------------------------------------------------------- the site


def test_the_site_has_every_document_and_nothing_else() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    shown = set(re.findall(r": ([\w/.-]+\.md)$", config, re.MULTILINE))
    there = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    assert shown == there | PAGES


def test_every_picture_is_used_and_described() -> None:
    used = dict(re.findall(r"!\[(.+?)\]\(\S*images/([\w.-]+)\)", "".join(d.read_text() for d in DOCUMENTS)))
    assert set(used.values()) == {path.name for path in (ROOT / "docs/images").iterdir()}


# ---------------------------------------------------------------- jobs and their schema


def schema_text() -> str:
    return json.dumps(job_schema(), indent=2) + "\n"


def test_the_schema_of_jobs_is_that_of_the_code() -> None:
    assert (ROOT / "jobs/job.schema.json").read_text() == schema_text(), "jobs/job.schema.json is old: run `make docs`"


@pytest.mark.parametrize("job", sorted(ROOT.glob("jobs/*.toml")), ids=lambda path: path.name)
def test_jobs_fit_the_schema_that_they_name_and_say_what_they_are_for(job: Path) -> None:
    text = job.read_text()
    jsonschema.validate(tomllib.loads(text), job_schema())
    first, second, *_ = text.splitlines()
    assert first == "#:schema job.schema.json" and second.startswith("# ")


@pytest.mark.parametrize(
    "wrong",
    [
        "run.capcity = 3",
        "rnu.capacity = 3",
        "run.capacity = 0",
        'run.capacity = "3"',
        'model.dtype = "f16"',
        "memory.limit = true",
        "placement.file = 3",
        'run.microbatches = "many"',
    ],
)
def test_the_schema_refuses_what_a_job_refuses(wrong: str) -> None:
    right = 'model.weights = "w"\ninput.file = "i"\noutput.file = "o"\n'
    jsonschema.validate(tomllib.loads(f'{right}memory.limit = "1 GiB"\nrun.threads = "auto"'), job_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomllib.loads(right + wrong), job_schema())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moempi.files.make_inputs import make_inputs

    path = tmp_path_factory.mktemp("prompts") / "prompts.h5"
    make_inputs(ROOT / "inputs/prompts.jsonl", ROOT / "inputs/tinymoe.h5", path)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace with the load that some routing would have left, of the demo's layers and experts."""
    from moempi.files.trace import Clocks, merge_trace, write_part
    from moempi.recorder import Recorder

    path = tmp_path_factory.mktemp("trace") / "t.h5"
    notes = Recorder("summary", 0, 1, 6, 16, 2)
    for layer in range(1, 6):
        notes.routed(layer, np.arange(16) * layer)
    about = {**notes.describe(), "mode": "exact", "job": "{}", "start": 0, "offset": 0, "error": 0}
    write_part(path, 0, 1, notes.take(), about)
    clocks = Clocks(0, *(np.zeros(1, np.int64) for _ in range(4)))
    merge_trace(path, "{}", {}, clocks=clocks, ranks=[{"node": 0}], meta={**notes.describe(), "mode": "exact"})
    return path


@pytest.mark.parametrize("ranks", [1, 4, 16])
@pytest.mark.parametrize("job", sorted(ROOT.glob("jobs/*.toml")), ids=lambda path: path.name)
def test_jobs_fit_the_model_and_ranks_that_they_are_for(job: Path, ranks: int, prompts: Path, measured: Path) -> None:
    overrides = [f"input.file={prompts}"]
    if load_job(job).placement.load is not None:
        overrides.append(f"placement.load={measured}")
    arguments = [part for override in overrides for part in ("--set", override)]
    done = CliRunner().invoke(moempi, ["run", str(job), "--dry-run", "-n", str(ranks), *arguments])
    assert done.exit_code == 0, done.exception
    assert f"on {ranks} ranks" in done.output or ranks == 1


if __name__ == "__main__":
    jobs = ROOT / "docs/jobs.md"
    jobs.write_text(with_options_table(jobs.read_text()))
    (ROOT / "jobs/job.schema.json").write_text(schema_text())
    print(f"{jobs} and jobs/job.schema.json: {len(known_options())} options")
