"""Files from strangers: hundreds of damaged ones, and those that only a look at what they claim can refuse."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from moempi.errors import DataError, JobError
from moempi.files import check_in_child as child
from moempi.files.check_in_child import check_in_child
from moempi.files.completions import Completion
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, read_inputs, write_inputs
from moempi.files.output_parts import write_part
from moempi.files.outputs import Origin, read_outputs
from moempi.files.parts import make_folder, parts_folder
from moempi.files.safe import check_attributes
from moempi.files.schema import parse_json, set_text_attribute, text_attribute
from moempi.job import load_job

ROOT = Path(__file__).parents[2]


def test_hundreds_of_damaged_files_are_read_or_refused() -> None:
    seed = int(os.environ.get("MOEMPI_HOSTILE_SEED") or random.randrange(10**6))
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "tests/hostile/soak.py"), "--cases", "250", "--seed", str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, env=environ, timeout=300)
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-8000:]}{done.stderr[-2000:]}"
    assert f"seed {seed}" in done.stdout and " refused" in done.stdout


def test_the_soak_reports_what_fails_hangs_and_dies(tmp_path: Path) -> None:
    """A reader that raises, one that never returns and one that ends the process, each blamed on its case."""
    code = """
import sys, signal, os
sys.path.insert(0, "tests/hostile")
import soak, readers
soak.SECONDS = 1
def bad(path):
    number = bad.calls = bad.calls + 1
    if number == 1: raise ZeroDivisionError("a bug")
    if number == 2: os.kill(os.getpid(), signal.SIGSEGV)
    while number == 3: pass
bad.calls = 0
readers.READERS = {"inputs.h5": bad}
made = soak.run_child
calls = []
def counted(numbers, *rest):
    found = made(numbers, *rest)
    bad.calls += len(found[0]) + bool(found[1])
    return found
soak.run_child = counted
print(dict(soak.soak(range(5), 1, soak.Path(sys.argv[1]))))
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=120)
    assert "'FAILED': 1" in done.stdout and "'DIED': 2" in done.stdout and "'read': 2" in done.stdout, done.stdout
    assert "ZeroDivisionError: a bug" in done.stdout
    assert "SIGSEGV" in done.stdout and "SIGPROF" in done.stdout
    assert len(list(tmp_path.iterdir())) == 2


def test_json_that_is_nested_without_end_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json('{"a": ' * 100_000)
    assert parse_json(b'{"a": 1}') == {"a": 1}


# ---------------------------------------------------------------- what is refused before it is read


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    rows = [np.array([1, 2, 3], np.int32), np.array([4], np.int32)]
    write_inputs(tmp_path / "i.h5", Prompts(["a", "b"], rows, None, np.zeros(2, np.int32)), {})
    return tmp_path / "i.h5"


def changed(change: Callable[[h5py.File], object]) -> Callable[[h5py.File], object]:
    def apply(file: h5py.File) -> None:
        del file["tokens"]
        change(file)

    return apply


def zeros(file: h5py.File, shape: int, chunk: int, **options: object) -> h5py.Dataset:
    return file.create_dataset("tokens", (shape,), "i4", chunks=(chunk,), **options)


def doubly_packed(file: h5py.File) -> None:
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_chunk((1024,))
    options.set_deflate(9)
    options.set_deflate(9)
    h5py.h5d.create(file.id, b"tokens", h5py.h5t.NATIVE_INT32, h5py.h5s.create_simple((1024,)), dcpl=options)


def deep(file: h5py.File) -> None:
    file.create_group("/".join("g" * 20))


def twice(file: h5py.File) -> None:
    file["again"] = file["offsets"]


CLAIMS: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "2^50 numbers without a byte": (changed(lambda f: zeros(f, 2**50, 1024)), "/tokens claims 4503599627370496 bytes"),
    "one chunk of them": (
        changed(lambda f: zeros(f, 2**40, 1024, compression="gzip").__setitem__(slice(0, 1), 1)),
        "/tokens claims 4398046511104 bytes, but stores",
    ),
    "a chunk of a gigabyte": (changed(lambda f: zeros(f, 4, 2**28, maxshape=(None,))), "chunks of 1073741824 bytes"),
    "packed twice": (changed(doubly_packed), r"/tokens has the filters \[1, 1\]"),
    "groups without end": (lambda f: f.__setitem__("loop", f["/"]), "/loop is the same object as another"),
    "deep groups": (deep, "lies in more than 16 groups"),
    "two names for one dataset": (twice, "is the same object as another; expected one name for each"),
    "an array for a version": (lambda f: f.attrs.__setitem__("version", [1, 2]), r"version \[1 2\] of moempi-inputs"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_what_a_file_claims_is_checked_before_it_is_read(inputs: Path, case: str) -> None:
    change, said = CLAIMS[case]
    with h5py.File(inputs, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=said):
        read_inputs(inputs)


def test_text_in_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    """A byte of an attribute's type, which h5py has no name for."""
    path = tmp_path / "any.h5"
    with h5py.File(path, "w") as file:
        set_text_attribute(file, "sha256", "z" * 61)
    raw = path.read_bytes()
    utf8 = bytes([0x13, 0x11, 0, 0, 61, 0, 0, 0])  # class and version, padding and encoding, length
    assert raw.count(utf8) == 1
    path.write_bytes(raw.replace(utf8, bytes([0x13, 0xC1, 0, 0, 61, 0, 0, 0])))
    with h5py.File(path) as file:
        assert text_attribute(file, "sha256") == ""
        with pytest.raises(DataError, match="attribute sha256 of / has text in an unknown encoding"):
            check_attributes(file, path)


def test_zeros_that_were_packed_well_are_read(tmp_path: Path) -> None:
    rows = [np.zeros(2_000_000, np.int32)]
    write_inputs(tmp_path / "i.h5", Prompts(["a"], rows, None, np.zeros(1, np.int32)), {})
    assert (tmp_path / "i.h5").stat().st_size < 100_000
    assert len(read_inputs(tmp_path / "i.h5").tokens[0]) == 2_000_000


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "i.h5")
    with pytest.raises(DataError, match="it is no regular file"):
        read_inputs(tmp_path / "i.h5")
    with pytest.raises(DataError, match="it is no regular file"):
        check_in_child([tmp_path / "i.h5"])


def test_commits_that_name_a_device_as_their_input_open_nothing(tmp_path: Path) -> None:
    target = tmp_path / "o.h5"
    make_folder(parts_folder(target))
    job = json.dumps({"input": {"file": "/dev/zero"}})
    completion = Completion(0, np.array([1], np.int32), np.zeros(1, np.float32), "length")
    write_part(target, 1, [completion], Origin(job, {"mode": "exact"}, {"inputs": "00"}, 1), lambda: None)
    assert read_outputs(target).ids == ["0"]


def test_a_job_of_nested_brackets_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "j.toml").write_text("x = " + "[" * 20_000)
    with pytest.raises(JobError, match=r"j\.toml: cannot be read as TOML"):
        load_job(tmp_path / "j.toml")


# ---------------------------------------------------------------- the child


def test_the_child_finds_sound_files_sound_and_names_the_bad_one(inputs: Path) -> None:
    check_in_child([inputs, inputs])
    bad = inputs.with_name("bad.h5")
    bad.write_bytes(inputs.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"^\S*bad\.h5: cannot be opened as HDF5"):
        check_in_child([inputs, bad])


@pytest.mark.parametrize(
    ("does", "said"),
    [("os.kill(os.getpid(), 11)", r"i\.h5: .*crashed the HDF5 library \(SIGSEGV\)"),
     ("[0 for _ in iter(int, 1)]", r"i\.h5: .*took too long"),
     ("bytearray(2**40)", r"i\.h5: .*failed: MemoryError")],
)  # fmt: skip
def test_a_child_that_crashes_hangs_or_grows_is_one_message(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, said: str
) -> None:
    # Stands in for the library: run before the child's first walk, within its limits.
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, h5py\nbefore = h5py.File\ndef opened(*given, **named):\n    {does}\nh5py.File = opened\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(DataError, match=said):
        check_in_child([inputs], seconds=3)
    assert time.monotonic() - began < child.SECONDS


def test_large_tensors_are_only_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 turns bfloat16 into float32 number by number: a large model's would take longer than the child may."""
    config = {"model_type": "qwen3_moe", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "vocab_size": 30, "intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 2,
              "num_experts_per_tok": 1, "max_position_embeddings": 8}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    init_weights(tmp_path / "config.json", tmp_path / "w.h5", 1, "bfloat16")
    read, get = [], h5py.Dataset.__getitem__

    def noting(dataset: h5py.Dataset, key: object) -> object:
        read.append(dataset.name)
        return get(dataset, key)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", noting)
    child.walk(tmp_path / "w.h5")
    assert "/config" in read and not [name for name in read if name.startswith("/model/")]
