"""The job file: what is read, what is refused and in which words, and what `--set` does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moempi.errors import JobError
from moempi.job import Job, job_from_table, known_options, load_job, parse_bytes
from moempi.job_options import describe_options

REQUIRED = {"model": {"weights": "w.h5"}, "input": {"file": "i.h5"}, "output": {"file": "o.h5"}}
TEXT = 'model.weights = "w.h5"\ninput.file = "i.h5"\noutput.file = "o.h5"\n'
WHERE = Path("/jobs/job.toml")


def check(**sections: Any) -> Job:
    """The required options and these."""
    table: dict[str, Any] = dict(REQUIRED)
    for name, options in sections.items():
        both = isinstance(options, dict) and name in table
        table[name] = {**table[name], **options} if both else options
    return job_from_table(table, WHERE)


def message(**sections: Any) -> str:
    with pytest.raises(JobError) as refused:
        check(**sections)
    assert refused.value.exit_code == 2
    return str(refused.value)


# ---------------------------------------------------------------- what is read


def test_three_options_are_enough_and_all_others_have_defaults() -> None:
    job = check()
    assert job.run.capacity == 8 and job.exchange.arrival_budget == 256 * 2**20
    assert sorted(name for name, default, *_ in describe_options() if default == "required") == [
        "input.file",
        "model.weights",
        "output.file",
    ]


def test_every_option_is_described_once_with_a_default_that_passes_its_own_check() -> None:
    rows = describe_options()
    assert [row[0] for row in rows] == known_options() and len(set(known_options())) == len(rows)
    assert all(text for *_, text in rows)
    job = check()
    # The effective job, given as a job, is the same job: so all defaults are valid, and none is lost.
    assert Job.model_validate(json.loads(job.to_json())) == job
    assert [f"{s}.{key}" for s, options in json.loads(job.to_json()).items() for key in options] == known_options()


def test_paths_are_relative_to_the_job_file_and_tidy(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    path = tmp_path / "jobs" / "job.toml"
    path.write_text('model.weights = "../w.h5"\ninput.file = "./a//i.h5"\noutput.file = "/abs/x/../o.h5"\n')
    job = load_job(path)
    assert job.model.weights == tmp_path / "w.h5"
    assert job.input.file == tmp_path / "jobs" / "a" / "i.h5"
    assert str(job.output.file) == "/abs/o.h5"
    assert str(job.trace_file) == "/abs/o.trace.h5"


def test_paths_are_the_same_wherever_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.toml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert load_job(Path("job.toml")).model.weights == tmp_path / "w.h5"
    monkeypatch.chdir("/")
    assert load_job(Path(os.path.relpath(tmp_path / "job.toml", "/"))).model.weights == tmp_path / "w.h5"


def test_links_in_paths_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real.h5").touch()
    (tmp_path / "link.h5").symlink_to("real.h5")
    (tmp_path / "job.toml").write_text(TEXT.replace("w.h5", "link.h5"))
    assert load_job(tmp_path / "job.toml").model.weights == tmp_path / "link.h5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64 MiB", 2**26), ("64MiB", 2**26), (" 1.5 kib ", 1536), ("80 GB", 80 * 10**9), ("17", 17), (17, 17)],
)
def test_sizes(text: Any, expected: int) -> None:
    assert parse_bytes(text) == expected
    assert check(exchange={"arrival_budget": text}).exchange.arrival_budget == expected


# ---------------------------------------------------------------- what is refused, in which words

REFUSED = {
    "at least": ({"run": {"capacity": 0}}, "`run.capacity` = 0: expected at least 1"),
    "in one line": ({"run": {"microbatches": 0}}, "`run.microbatches` = 0: expected 'auto' or at least 1"),
    "at most": ({"run": {"microbatches": 65}}, "`run.microbatches` = 65: expected 'auto' or at most 64"),
    "neither type": ({"run": {"threads": "all"}}, "`run.threads` = 'all': expected 'auto' or a whole number"),
    "text for a number": ({"run": {"capacity": "8"}}, "`run.capacity` = '8': expected a whole number"),
    "fraction": ({"run": {"capacity": 8.5}}, "`run.capacity` = 8.5: expected a whole number"),
    "true for a number": ({"run": {"capacity": True}}, "`run.capacity` = True: expected a whole number"),
    "text for true": ({"generate": {"stop_at_eos": "no"}}, "`generate.stop_at_eos` = 'no': expected true or false"),
    "choice": ({"model": {"dtype": "f16"}}, "`model.dtype` = 'f16': expected 'auto', 'float32' or 'bfloat16'"),
    "power of two": ({"model": {"leaves": 3}}, "`model.leaves` = 3: expected a power of two"),
    "no time at all": ({"run": {"grace": 0}}, "`run.grace` = 0: expected greater than 0"),
    "endless": ({"run": {"grace": float("inf")}}, "`run.grace` = inf: expected a finite number"),
    "size": ({"memory": {"limit": "3 parsecs"}}, "`memory.limit` = '3 parsecs': expected a number of bytes, or a size"),
    "two dots": ({"memory": {"limit": "1.2.3 GiB"}}, "`memory.limit` = '1.2.3 GiB': expected a number of bytes"),
    "negative size": ({"memory": {"limit": -1}}, "`memory.limit` = -1: expected at least 0"),
    "number for a file": ({"trace": {"file": 3}}, "`trace.file` = 3: expected the name of a file"),
    "no name": ({"output": {"file": ""}}, "`output.file` = '': expected the name of a file"),
    "no section": ({"run": 3}, "`run` = 3: expected a section, [run]"),
    "unknown option": ({"run": {"capcity": 3}}, "unknown option `run.capcity`; did you mean `run.capacity`?"),
    "of another section": (
        {"run": {"max_new_tokens": 3}},
        "unknown option `run.max_new_tokens`; did you mean `generate.max_new_tokens`?",
    ),
    "unlike any option": ({"run": {"zzz": 3}}, "unknown option `run.zzz`; [run] has capacity, prefill_tokens"),
    "unlike any option, in a long name": ({"run": {"verbosity": 3}}, "unknown option `run.verbosity`; [run] has capac"),
    "unknown section, known option": (
        {"sampling": {"stop_at_eos": True}},
        "unknown section `sampling`; did you mean `generate.stop_at_eos`?",
    ),
    "unlike any section": ({"zzz": {}}, "unknown section `zzz`; there are admission, engine"),
    "unknown section": ({"exchnage": {}}, "unknown section `exchnage`; did you mean `exchange`?"),
    "nothing is near": ({"zzz": {}}, "unknown section `zzz`"),
    "file without strategy": ({"placement": {"file": "p.h5"}}, "`placement.file` is given, but `placement.strategy`"),
    "strategy without file": ({"placement": {"strategy": "file"}}, "`placement.strategy` = 'file' needs"),
    "load without balanced": ({"placement": {"load": "t.h5"}}, "`placement.load` is given, but `placement.strategy`"),
    "output over input": ({"output": {"file": "i.h5"}}, "`output.file` and `input.file` are both /jobs/i.h5"),
    "output over weights": ({"output": {"file": "x/../w.h5"}}, "`output.file` and `model.weights` are both /jobs/w.h5"),
    "trace over output": ({"trace": {"file": "o.h5"}}, "`trace.file` and `output.file` are both /jobs/o.h5"),
    "trace over weights": ({"trace": {"file": "w.h5"}}, "`trace.file` and `model.weights` are both /jobs/w.h5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    sections, expected = REFUSED[case]
    found = message(**sections)
    assert found.startswith(f"{WHERE}: {expected}"), found
    assert "\n" not in found


def test_all_that_is_wrong_is_said_at_once() -> None:
    lines = message(run={"capacity": 0, "typo": 1}, model={"leaves": 0}).splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{WHERE}: ") for line in lines)


@pytest.mark.parametrize("section", ["model", "input", "output"])
def test_a_missing_section_names_the_option_that_it_must_have(section: str) -> None:
    table = {name: options for name, options in REQUIRED.items() if name != section}
    option = f"{section}.{next(iter(REQUIRED[section]))}"
    with pytest.raises(JobError, match=f"^{WHERE}: `{option}` is missing; every job needs it$"):
        job_from_table(table, WHERE)
    with pytest.raises(JobError, match=f"^{WHERE}: `{option}` is missing; every job needs it$"):
        job_from_table({**table, section: {}}, WHERE)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"run = 3 4", "cannot be read as TOML: .*line 1"),
        (b"[run]\ncapacity = 1\ncapacity = 2\n", "cannot be read as TOML: .*line 3"),
        (b"\xff\xfe", "cannot be read as TOML"),
        (b"", "`model.weights` is missing"),
    ],
)
def test_a_file_that_is_no_job(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(JobError, match=said) as refused:
        load_job(path)
    assert str(path) in str(refused.value)


def test_a_job_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"no\.toml: there is no such job file"):
        load_job(tmp_path / "no.toml")
    with pytest.raises(JobError, match=r"cannot be read as TOML: .*directory"):
        load_job(tmp_path)


# ---------------------------------------------------------------- --set


def set_to(tmp_path: Path, *overrides: str) -> Job:
    (tmp_path / "job.toml").write_text(TEXT + "[run]\ncapacity = 3\n")
    return load_job(tmp_path / "job.toml", list(overrides))


def test_set_replaces_adds_and_the_last_one_counts(tmp_path: Path) -> None:
    job = set_to(tmp_path, "run.capacity=5", "run.capacity=7", "generate.stop_at_eos=false", "model.dtype=bfloat16")
    assert job.run.capacity == 7 and not job.generate.stop_at_eos and job.model.dtype == "bfloat16"
    assert set_to(tmp_path).run.capacity == 3


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ('model.dtype="bfloat16"', "model", "dtype", "bfloat16"),
        ("model.dtype = bfloat16 ", "model", "dtype", "bfloat16"),
        ("output.commit_every=2", "output", "commit_every", 2.0),
        ("engine.slice=1e-3", "engine", "slice", 0.001),
        ("exchange.arrival_budget=64 MiB", "exchange", "arrival_budget", 2**26),
        ("run.microbatches=auto", "run", "microbatches", "auto"),
        ("run.microbatches=2", "run", "microbatches", 2),
        ("output.file=/a=b.h5", "output", "file", Path("/a=b.h5")),
    ],
)
def test_set_takes_toml_or_plain_text(tmp_path: Path, override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(set_to(tmp_path, override), section), key) == value


def test_set_names_a_path_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    job = set_to(tmp_path, "output.file=../a/b.h5", "trace.file=t.h5")
    assert job.output.file == tmp_path / "a" / "b.h5" and job.trace.file == tmp_path / "here" / "t.h5"
    assert job.input.file == tmp_path / "i.h5"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.capcity=3"], "--set run.capcity=3: unknown option"),
        (["run.capacity=0"], "--set run.capacity=0: `run.capacity` = 0: expected at least 1"),
        (["placement.load=t.h5"], "--set placement.load=t.h5: `placement.load` is given, but"),
        (["placement.strategy=file"], "--set placement.strategy=file: `placement.strategy` = 'file' needs"),
        (["output.file=i.h5", "input.file=i.h5"], "--set output.file=i.h5 --set input.file=i.h5: `output.file` and"),
        (["run.capacity=0", "run.capacity=3", "model.leaves=3"], "--set model.leaves=3: `model.leaves` = 3: expected"),
    ],
)
def test_what_was_set_wrongly_is_not_blamed_on_the_job_file(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(JobError) as refused:
        set_to(tmp_path, *overrides)
    assert str(refused.value).startswith(said) and "job.toml" not in str(refused.value)


def test_what_is_wrong_in_the_job_file_is_not_blamed_on_set(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(TEXT + "run.capacity = 0\n")
    with pytest.raises(JobError, match=r"job\.toml: `run\.capacity` = 0"):
        load_job(tmp_path / "job.toml", ["model.leaves=2"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.capacity", "expected section.key=value"),
        ("capacity=3", "expected section.key=value"),
        ("run.=3", "expected section.key=value"),
        ("run.a.b=3", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("run.capcity=3", "did you mean `run.capacity`"),
        ("run.capacity=many", "`run.capacity` = 'many': expected a whole number"),
        ("run.capacity=1\nmodel.leaves=2", "`run.capacity` = "),
    ],
)
def test_set_refuses(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(JobError) as refused:
        set_to(tmp_path, override)
    assert said in str(refused.value)
