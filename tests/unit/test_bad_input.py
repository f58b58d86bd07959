"""Every kind of bad input is one clear error with its exit code, before any rank allocates and without MPI.

All through the command line, as a user meets it: `moempi run JOB --dry-run` looks at everything that a run looks at.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from checkpoints import CONFIG, cut, make_checkpoint, random_tensors

import moempi.errors
from moempi import mpi
from moempi.__main__ import run_command
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs
from moempi.files.placement import write_placement
from moempi.job import job_from_table
from moempi.model.huggingface import parse_config
from moempi.planning.placement import place

DOCS = Path(__file__).parents[2] / "docs"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `moempi ...` in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = mpi.guard(run_command, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def prompts(*rows: list[int], new: int = 0) -> Prompts:
    tokens = [np.array(row, np.int32) for row in rows]
    return Prompts([f"p{i}" for i in range(len(rows))], tokens, None, np.full(len(rows), new, np.int32))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A sound job: 5 experts, K = 2, vocabulary of 23, 64 positions."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    init_weights(tmp_path / "config.json", tmp_path / "w.h5", dtype="float32")
    write_inputs(tmp_path / "i.h5", prompts([1, 2, 3], [4], [5] * 20), {})
    (tmp_path / "job.toml").write_text(
        'model.weights = "w.h5"\ninput.file = "i.h5"\noutput.file = "out/o.h5"\ngenerate.max_new_tokens = 8\n'
    )
    return tmp_path / "job.toml"


def refused(found: tuple[int, str, str], code: int, said: str) -> None:
    """One message with this code, which the pattern matches; nothing on standard output and no traceback."""
    exit_code, out, err = found
    assert exit_code == code, err
    assert re.search(said, err), err
    assert err.startswith("moempi: error: ") and err.count("moempi: error") == 1
    assert "Traceback" not in err and not out


# ---------------------------------------------------------------- files that a job names


def attribute(file: str, name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with h5py.File(folder / file, "r+") as opened:
            opened.attrs[name] = value

    return change


def dataset(file: str, name: str, change: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[Path], None]:
    """Replace a dataset by what `change` makes of it, or remove it."""

    def replace(folder: Path) -> None:
        with h5py.File(folder / file, "r+") as opened:
            before = opened[name][...]
            del opened[name]
            if change is not None:
                opened[name] = change(before)

    return replace


def config(**keys: object) -> Callable[[Path], None]:
    text = json.dumps(CONFIG | keys).encode()
    return dataset("w.h5", "config", lambda before: np.frombuffer(text, np.uint8))


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def inputs(*rows: list[int], new: int = 0) -> Callable[[Path], None]:
    return lambda folder: write_inputs(folder / "i.h5", prompts(*rows, new=new), {})


def as_folder(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return change


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    # weights
    "no weights": (lambda f: (f / "w.h5").unlink(), r"`model\.weights` = .*w\.h5: there is no such file; expected moe"),
    "weights truncated": (lambda f: cut(f / "w.h5"), r"w\.h5: cannot be opened as HDF5 \(truncated, or not HDF5\)"),
    "weights are text": (write("w.h5", b"hello"), r"w\.h5: cannot be opened as HDF5"),
    "weights are a folder": (as_folder("w.h5"), r"w\.h5: cannot be opened as HDF5"),
    "weights are inputs": (
        lambda f: (f / "w.h5").write_bytes((f / "i.h5").read_bytes()),
        r"w\.h5: format is 'moempi-inputs'; expected 'moempi-weights'",
    ),
    "weights of another version": (attribute("w.h5", "version", 99), r"w\.h5: version 99 of moempi-weights; .* 1$"),
    "a tensor is missing": (
        dataset("w.h5", "model/layers/1/experts_down", None),
        r"w\.h5: /model/layers/1/experts_down is missing; expected \[5, 10, 6\]",
    ),
    "a tensor has another shape": (
        dataset("w.h5", "model/layers/2/gate", lambda gate: gate[:4]),
        r"w\.h5: /model/layers/2/gate has shape \[4, 10\]; the config says \[5, 10\]",
    ),
    "the config has more experts": (config(num_experts=6), r"/model/layers/1/gate has shape \[5, 10\].* \[6, 10\]"),
    "the config has more layers": (config(num_hidden_layers=4), r"/model/layers holds 3 layers; the config says 4"),
    "K over E": (config(num_experts_per_tok=9), r"w\.h5: /config: num_experts_per_tok is K = 9, .* E = 5 experts"),
    "K of zero": (config(num_experts_per_tok=0), r"/config: num_experts_per_tok = 0; expected a whole number"),
    "no angle": (config(rope_theta=float("nan")), r"/config: rope_theta = nan; expected a number above 0"),
    "epsilon of zero": (config(rms_norm_eps=0), r"/config: rms_norm_eps = 0; expected a number above 0"),
    "epsilon in words": (config(rms_norm_eps="small"), r"/config: rms_norm_eps = .small.; expected a number above 0"),
    "another model": (config(model_type="llama"), r"/config: model_type = 'llama'; only 'qwen3_moe' is supported"),
    # inputs
    "no inputs": (lambda f: (f / "i.h5").unlink(), r"`input\.file` = .*i\.h5: there is no such file; .*moempi inputs"),
    "inputs truncated": (lambda f: cut(f / "i.h5"), r"i\.h5: cannot be opened as HDF5 \(truncated, or not HDF5\)"),
    "inputs are JSON lines": (write("i.h5", b'{"id": "a"}\n'), r"i\.h5: cannot be opened as HDF5"),
    "inputs are weights": (
        lambda f: (f / "i.h5").write_bytes((f / "w.h5").read_bytes()),
        r"i\.h5: format is 'moempi-weights'; expected 'moempi-inputs'",
    ),
    "inputs of another version": (attribute("i.h5", "version", 0), r"i\.h5: version 0 of moempi-inputs; .* version 1"),
    "no offsets": (dataset("i.h5", "offsets", None), r"i\.h5: /offsets is missing"),
    "offsets that fall": (dataset("i.h5", "offsets", lambda o: o[[0, 2, 1, 3]]), r"/offsets must rise from 0 to 24"),
    "offsets that end early": (dataset("i.h5", "offsets", lambda o: o - o[1]), r"/offsets must rise from 0 to 24"),
    "tokens of another type": (dataset("i.h5", "tokens", lambda t: t.astype(float)), r"/tokens is float64 .* int32"),
    "a token too large": (
        inputs([1], [2, 23, 3]),
        r"i\.h5: prompt 'p1' \(number 1\) has token 23 at position 1; the model's vocabulary is 0 to 22",
    ),
    "a token too small": (inputs([-1]), r"prompt 'p0' \(number 0\) has token -1 at position 0; .* 0 to 22"),
    "an empty prompt": (inputs([1], []), r"i\.h5: prompt 'p1' \(number 1\) is empty; .* at least one token"),
    "a prompt too long": (
        inputs([1] * 57),
        r"prompt 'p0' .*has 57 tokens and may get 8 new ones; the model takes 64 in all: shorten it or lower",
    ),
    "its own wish too long": (inputs([1] * 5, new=60), r"has 5 tokens and may get 60 new ones; the model takes 64"),
    "a negative wish": (inputs([1], new=-2), r"has max_new_tokens = -2; expected 0 \(the default\) or more"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_bad_data(job: Path, command: Command, case: str) -> None:
    damage, said = DAMAGED[case]
    damage(job.parent)
    refused(command("run", job, "--dry-run", "-n", 4), 3, said)
    assert not (job.parent / "out").exists()


def test_the_longest_prompt_that_fits_is_admitted(job: Path, command: Command) -> None:
    inputs([1] * 56)(job.parent)
    code, _, err = command("run", job, "--dry-run")
    assert code == 0, err


def test_nan_in_a_checkpoint(tmp_path: Path, command: Command) -> None:
    tensors = random_tensors()
    tensors["model.layers.1.mlp.gate.weight"][3, 4] = torch.nan
    folder = make_checkpoint(tmp_path / "from", tensors)
    said = r"model\.layers\.1\.mlp\.gate\.weight holds nan at \[3, 4\]"
    refused(command("weights", "import", folder, tmp_path / "w.h5"), 3, said)
    assert not (tmp_path / "w.h5").exists()


def test_a_checkpoint_with_more_choices_than_experts(tmp_path: Path, command: Command) -> None:
    folder = make_checkpoint(tmp_path / "from", random_tensors(), CONFIG | {"num_experts_per_tok": 6})
    refused(command("weights", "import", folder, tmp_path / "w.h5"), 3, r"config\.json: .*K = 6, .* E = 5")


# ---------------------------------------------------------------- placements and loads


def placement_for(folder: Path, n_ranks: int) -> None:
    table = {"model": {"weights": "w.h5"}, "input": {"file": "i.h5"}, "output": {"file": "o.h5"}}
    options = job_from_table(table, folder / "job.toml").placement
    write_placement(folder / "p.h5", place(parse_config(json.dumps(CONFIG), "c"), n_ranks, options, 1, None, None), {})


def test_a_placement_that_is_missing_damaged_or_of_another_job(job: Path, command: Command) -> None:
    sets = ("--set", "placement.strategy=file", "--set", f"placement.file={job.parent / 'p.h5'}")
    dry = ("run", job, "--dry-run", *sets)
    refused(command(*dry, "-n", 4), 3, r"p\.h5: there is no such file; expected moempi placement")
    placement_for(job.parent, 4)
    code, _, err = command(*dry, "-n", 4)
    assert code == 0, err
    code, _, err = command(*dry, "-n", 3)
    assert code in (2, 3) and re.search(r"p\.h5: .*4.*3", err), err
    cut(job.parent / "p.h5")
    refused(command(*dry, "-n", 4), 3, r"p\.h5: cannot be opened as HDF5")


def test_a_load_that_is_missing(job: Path, command: Command) -> None:
    sets = ("--set", "placement.strategy=balanced", "--set", f"placement.load={job.parent / 't.h5'}")
    refused(command("run", job, "--dry-run", *sets), 3, r"t\.h5")


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("ranks", "override", "said"),
    [
        (4, "placement.strict=true", r"E = 5 experts.*N = 4 ranks.*2 slots.*placement\.strict"),
        (2, "memory.limit=1 KiB", r"memory\.limit = 1\.0 KiB: .* needs .* MiB"),
        (2, "memory.kv_tokens=1", r"memory\.kv_tokens = 1, but the longest sequence needs 64 positions"),
        (4, "exchange.ranks_per_node=[3, 2]", r"ranks_per_node = \[3, 2\] adds up to 5 ranks, the job has 4"),
        (4, "exchange.ranks_per_node=3", r"ranks_per_node = 3 does not divide the 4 ranks"),
        (2, "placement.replicas=99", r"99.*5 experts|replicas.*99"),
    ],
)
def test_what_does_not_fit(job: Path, command: Command, ranks: int, override: str, said: str) -> None:
    refused(command("run", job, "--dry-run", "-n", ranks, "--set", override), 4, said)


# ---------------------------------------------------------------- the command line and the job

WRONG = {
    "unknown verb": (("fly",), r"there is no command `fly`; there are run, .* \(see `moempi --help`\)"),
    "misspelt verb": (("rnu", "JOB"), r"there is no command `rnu`; did you mean `run`\?"),
    "misspelt second verb": (("trace", "sumary"), r"no command `trace sumary`; did you mean `trace summary`\?"),
    "no job": (("run",), r"Missing argument 'JOB'.*see `moempi run --help`"),
    "unknown flag": (("run", "JOB", "--fast"), r"--fast"),
    "no ranks": (("run", "JOB", "-n", "0"), r"-n.*0 is not in the range x>=1"),
    "ranks are text": (("run", "JOB", "-n", "many"), r"'many' is not a valid integer"),
    "two modes": (("run", "JOB", "--resume", "--overwrite"), r"--resume and --overwrite exclude each other"),
    "no such job": (("run", "no.toml"), r"no\.toml: there is no such job file"),
    "unknown option": (("run", "JOB", "--set", "run.capcity=3"), r"--set run\.capcity=3: .* mean `run\.capacity`\?"),
    "unknown section": (("run", "JOB", "--set", "rnu.capacity=3"), r"--set rnu\.capacity=3: .* mean `run`\?"),
    "wrong type": (("run", "JOB", "--set", "run.capacity=true"), r"`run\.capacity` = True: expected a whole number"),
    "set without a value": (("run", "JOB", "--set", "run.capacity"), r"--set run\.capacity: expected section\.key="),
    "fast on the CPU": (
        ("run", "JOB", "--dry-run", "--set", "model.mode=fast"),
        r"model\.mode = 'fast' on the CPU .* direct \(there is one node\)",
    ),
    "more leaves than hidden": (
        ("run", "JOB", "--dry-run", "--set", "model.leaves=8"),
        r"model\.leaves = 8, but an expert's hidden size is 6",
    ),
    "no mpirun": (("run", "JOB", "-n", "2", "--mpirun", "no-such-mpirun"), r"--mpirun is 'no-such-mpirun', but"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_usage(job: Path, command: Command, case: str) -> None:
    arguments, said = WRONG[case]
    refused(command(*(job if argument == "JOB" else argument for argument in arguments)), 2, said)


def test_a_missing_section(job: Path, command: Command) -> None:
    job.write_text('model.weights = "w.h5"\noutput.file = "o.h5"\n')
    refused(command("run", job), 2, r"job\.toml: `input\.file` is missing; every job needs it")


def test_files_that_exist_are_not_replaced(job: Path, command: Command) -> None:
    folder = job.parent
    (folder / "p.jsonl").write_text('{"id": "a", "tokens": [1]}\n')
    before = (folder / "w.h5").read_bytes(), (folder / "i.h5").read_bytes()
    refused(command("weights", "init", folder / "config.json", folder / "w.h5"), 2, r"w\.h5: exists already")
    refused(command("inputs", "make", folder / "p.jsonl", folder / "w.h5", folder / "i.h5"), 2, "i.h5: exists already")
    assert ((folder / "w.h5").read_bytes(), (folder / "i.h5").read_bytes()) == before


# ---------------------------------------------------------------- what is right parses


def test_dry_run_as_json(job: Path, command: Command) -> None:
    code, out, err = command("run", job, "--dry-run", "--json", "-n", 3, "--set", "run.capacity=2")
    assert code == 0 and not err
    plan = json.loads(out)
    assert plan["job"]["run"]["capacity"] == 2 and plan["job"]["engine"]["stall_timeout"] == 300
    assert plan["dtype"] == "float32" and [rank["rank"] for rank in plan["ranks"]] == [0, 1, 2]
    parts = ("shared_bytes", "expert_bytes", "kv_bytes", "message_bytes")
    assert all(rank["total"] >= sum(rank[part] for part in parts) > 0 for rank in plan["ranks"])
    assert not (job.parent / "out").exists(), "a dry run writes nothing"


def test_dry_run_for_people(job: Path, command: Command) -> None:
    code, out, _ = command("run", job, "--dry-run", "-n", 3)
    assert code == 0 and "capacity" in out and "stall_timeout" in out


@pytest.mark.parametrize("verb", [("weights", "info", "w.h5"), ("inputs", "info", "i.h5")])
def test_info_as_json(job: Path, command: Command, verb: tuple[str, str, str]) -> None:
    code, out, err = command(verb[0], verb[1], job.parent / verb[2], "--json")
    assert code == 0, err
    assert json.loads(out)["file"].endswith(verb[2])


# ---------------------------------------------------------------- exit codes


def exit_codes() -> set[int]:
    """Every code that moempi.errors knows."""
    names = vars(moempi.errors)
    constants = {value for name, value in names.items() if name.startswith("EXIT_")}
    return constants | {kind.exit_code for kind in names.values() if hasattr(kind, "exit_code")}


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    assert exit_codes() == {0, 1, 2, 3, 4, 75, 76, 130, 137}
    lines = (DOCS / "running.md").read_text(encoding="utf-8").splitlines()
    documented = {int(found[1]) for line in lines if (found := re.match(r"\|\s*`?(\d+)`?\s*\|", line))}
    assert documented == exit_codes()
