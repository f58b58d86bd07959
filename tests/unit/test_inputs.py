"""Inputs files: prompts there and back, JSON lines, and what is refused before a job starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from moempi.cli.inputs import inputs as inputs_group
from moempi.errors import DataError, JobError
from moempi.files import schema
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, check_prompts, info, read_inputs, write_inputs
from moempi.files.make_inputs import make_inputs
from moempi.files.weights import open_weights
from moempi.model.config import ModelConfig

INPUTS = Path(__file__).parents[2] / "inputs"
TINYMOE = INPUTS / "tinymoe.h5"


def prompts_of(*rows: list[int], text: bool = False, own: list[int] | None = None) -> Prompts:
    return Prompts(
        ids=[f"id-{i}" for i in range(len(rows))],
        tokens=[np.array(row, np.int32) for row in rows],
        text=[f"text ü {i}" for i in range(len(rows))] if text else None,
        max_new_tokens=np.array(own if own is not None else [0] * len(rows), np.int32),
    )


@pytest.mark.parametrize("rows", [[[1, 2, 3], [4], [5, 6]], [[9]], []], ids=["three", "one", "none"])
@pytest.mark.parametrize("text", [True, False])
def test_prompts_come_back(tmp_path: Path, rows: list[list[int]], text: bool) -> None:
    prompts = prompts_of(*rows, text=text, own=[5] * len(rows))
    write_inputs(tmp_path / "p.h5", prompts, {"a.jsonl": "00"})
    found = read_inputs(tmp_path / "p.h5")
    assert found.ids == prompts.ids and found.text == prompts.text
    assert [row.tolist() for row in found.tokens] == rows
    assert all(row.dtype == np.int32 for row in found.tokens)
    assert found.max_new_tokens.dtype == np.int32 and found.max_new_tokens.tolist() == [5] * len(rows)
    assert info(tmp_path / "p.h5")["sources"] == {"a.jsonl": "00"}


def test_an_empty_row_among_others_keeps_its_place(tmp_path: Path) -> None:
    write_inputs(tmp_path / "p.h5", prompts_of([], [1], [], [2, 3], []), {})
    assert [row.tolist() for row in read_inputs(tmp_path / "p.h5").tokens] == [[], [1], [], [2, 3], []]


def test_writing_refuses_duplicate_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompts 0 and 1 have the same id 'a'"):
        write_inputs(tmp_path / "p.h5", replace(prompts_of([1], [2]), ids=["a", "a"]), {})


# ---------------------------------------------------------------- damaged files


def put(file: h5py.File, name: str, data: np.ndarray) -> None:
    del file[name]
    file[name] = data


DAMAGED: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "no tokens": (lambda file: file.pop("tokens"), "/tokens is missing"),
    "no offsets": (lambda file: file.pop("offsets"), "/offsets is missing"),
    "no ids": (lambda file: file.pop("ids_offsets"), "/ids_offsets is missing"),
    "no own": (lambda file: file.pop("max_new_tokens"), "/max_new_tokens is missing"),
    "type": (lambda file: put(file, "tokens", np.zeros(3)), r"/tokens is float64 \[3\]; expected int32"),
    "dimensions": (lambda file: put(file, "tokens", np.zeros((3, 1), np.int32)), r"/tokens is int32 \[3, 1\]"),
    "falling": (lambda file: put(file, "offsets", np.array([0, 3, 2, 3])), "/offsets must rise from 0 to 3"),
    "short": (lambda file: put(file, "offsets", np.array([0, 1, 2])), "/offsets must rise from 0 to 3"),
    "counts": (lambda file: put(file, "offsets", np.array([0, 1, 3])), "/ids has 3 entries; .* there are 2"),
    "own": (lambda file: put(file, "max_new_tokens", np.zeros(2, np.int32)), "/max_new_tokens has 2 entries"),
    "ids": (lambda file: put(file, "ids", np.frombuffer(b"aaaaaaaaaaaa", np.uint8)), "have the same id"),
    "format": (lambda file: schema.set_text_attribute(file, "format", "moempi-weights"), "expected 'moempi-inputs'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_reading_refuses(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGED[case]
    write_inputs(tmp_path / "p.h5", prompts_of([1], [2], [3]), {})
    with h5py.File(tmp_path / "p.h5", "r+") as file:
        damage(file)
    with pytest.raises(DataError, match=message):
        read_inputs(tmp_path / "p.h5")


def test_reading_refuses_what_is_not_there_or_not_hdf5(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_inputs(tmp_path / "p.h5")
    (tmp_path / "p.h5").write_text("no HDF5")
    with pytest.raises(DataError, match="cannot be opened as HDF5"):
        read_inputs(tmp_path / "p.h5")


# ---------------------------------------------------------------- what the model cannot run


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    with open_weights(TINYMOE) as weights:
        return weights.config


REFUSED = {
    "vocabulary": (prompts_of([5], [1, 1023, 1024]), r"'id-1' \(number 1\) has token 1024 at position 2.*0 to 1023"),
    "negative": (prompts_of([-1, 2]), r"'id-0' \(number 0\) has token -1 at position 0"),
    "empty": (prompts_of([1], [], [2]), r"'id-1' \(number 1\) is empty"),
    "too long": (prompts_of([1], [0] * 1015), "has 1015 tokens and may get 10 new ones; the model takes 1024"),
    "own too long": (prompts_of([1] * 5, own=[1020]), "has 5 tokens and may get 1020 new ones"),
    "own negative": (prompts_of([1], own=[-3]), "max_new_tokens = -3"),
    "own and long": (prompts_of([1], own=[2**31 - 1]), "may get 2147483647 new ones"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses(config: ModelConfig, case: str) -> None:
    prompts, message = REFUSED[case]
    with pytest.raises(DataError, match=r"in\.h5: prompt .*" + message):
        check_prompts(prompts, Path("in.h5"), config, max_new_tokens=10)


def test_check_admits_the_limits(config: ModelConfig) -> None:
    check_prompts(prompts_of(), Path("in.h5"), config, 10)
    check_prompts(prompts_of([0, 1023], [1] * 1014, [1] * 1023, own=[0, 0, 1]), Path("in.h5"), config, 10)


def test_a_token_is_found_behind_empty_rows(config: ModelConfig) -> None:
    # The row is looked up by place in the flat array; empty rows are refused before, so test the longest run of ones.
    rows = [[1]] * 500 + [[2000]] + [[1]] * 3
    with pytest.raises(DataError, match=r"'id-500' \(number 500\) has token 2000 at position 0"):
        check_prompts(prompts_of(*rows), Path("in.h5"), config, 10)


# ---------------------------------------------------------------- JSON lines


def make(tmp_path: Path, *lines: object, weights: Path = TINYMOE) -> Prompts:
    path = tmp_path / "p.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    make_inputs(path, weights, tmp_path / "p.h5")
    return read_inputs(tmp_path / "p.h5")


def test_the_tokens_are_the_tokenizers_and_nothing_else(tmp_path: Path) -> None:
    texts = ["def f(x):\n", "ü", " <|endoftext|>", "word " * 60]
    prompts = make(tmp_path, *({"id": str(i), "prompt": text} for i, text in enumerate(texts)))
    with open_weights(TINYMOE) as weights:
        tokenizer = weights.tokenizer()
    assert tokenizer is not None
    assert [row.tolist() for row in prompts.tokens] == [tokenizer.encode(text).ids for text in texts]
    assert prompts.text == texts
    assert tokenizer.decode(prompts.tokens[3].tolist()) == texts[3]


def test_tokens_and_prompts_may_stand_side_by_side(tmp_path: Path) -> None:
    prompts = make(
        tmp_path,
        {"id": "a", "tokens": [3, 4], "max_new_tokens": 7},
        "",
        {"id": 12, "prompt": "KING:\n"},
        {"id": "c", "tokens": [1023], "max_new_tokens": 0},
    )
    assert prompts.ids == ["a", "12", "c"]
    assert prompts.tokens[0].tolist() == [3, 4] and prompts.tokens[2].tolist() == [1023]
    assert prompts.max_new_tokens.tolist() == [7, 0, 0]
    assert prompts.text is not None and prompts.text[0] == "#$" and prompts.text[1] == "KING:\n"


def test_weights_without_a_tokenizer_take_tokens_only(tmp_path: Path) -> None:
    with open_weights(TINYMOE) as weights:
        (tmp_path / "config.json").write_text(weights.config_text)
    init_weights(tmp_path / "config.json", tmp_path / "w.h5")
    assert make(tmp_path, {"id": "a", "tokens": [1]}, weights=tmp_path / "w.h5").text is None
    with pytest.raises(DataError, match="line 1: the weights file has no tokenizer; give `tokens`"):
        make(tmp_path, {"id": "a", "prompt": "x"}, weights=tmp_path / "w.h5")


def test_a_file_of_no_prompts(tmp_path: Path) -> None:
    assert make(tmp_path).ids == []


LINES = {
    "no JSON": ("{", "line 2: not valid JSON"),
    "no object": ([1], "line 2: holds a JSON list"),
    "no id": ({"prompt": "x"}, "line 2: has no .id.; every prompt needs one"),
    "empty id": ({"id": "", "prompt": "x"}, "line 2: id = ''"),
    "bool id": ({"id": True, "prompt": "x"}, "line 2: id = True"),
    "duplicate": ({"id": "a", "prompt": "x"}, r"line 2: id 'a' is taken: see .*p\.jsonl: line 1"),
    "neither": ({"id": "b"}, "line 2: expected either `prompt` or `tokens`"),
    "both": ({"id": "b", "prompt": "x", "tokens": [1]}, "line 2: expected either"),
    "empty prompt": ({"id": "b", "prompt": ""}, "line 2: prompt = ''"),
    "prompt is no text": ({"id": "b", "prompt": 3}, "line 2: prompt = 3"),
    "surrogate": ('{"id": "b", "prompt": "\\ud800"}', "line 2: prompt has half of a surrogate pair"),
    "no tokens": ({"id": "b", "tokens": []}, "line 2: tokens must be a list of whole numbers that is not empty"),
    "float": ({"id": "b", "tokens": [1.0]}, "line 2: tokens must be"),
    "bool": ({"id": "b", "tokens": [True]}, "line 2: tokens must be"),
    "negative": ({"id": "b", "tokens": [1, -1]}, "line 2: token -1 is outside"),
    "huge": ({"id": "b", "tokens": [2**40]}, "line 2: token 1099511627776 is outside"),
    "vocabulary": ({"id": "b", "tokens": [1024]}, r"p\.jsonl: prompt 'b' \(number 1\) has token 1024"),
    "count": ({"id": "b", "prompt": "x", "max_new_tokens": -1}, "line 2: max_new_tokens = -1"),
    "null count": ({"id": "b", "prompt": "x", "max_new_tokens": None}, "line 2: max_new_tokens = None"),
    "long": ({"id": "b", "tokens": [1] * 1024}, "'b' .* has 1024 tokens"),
    "key": ({"id": "b", "prompt": "x", "max_tokens": 1}, "line 2: unknown key 'max_tokens'; expected id, prompt"),
}


@pytest.mark.parametrize("case", LINES)
def test_make_refuses(tmp_path: Path, case: str) -> None:
    line, message = LINES[case]
    with pytest.raises(DataError, match=message):
        make(tmp_path, {"id": "a", "prompt": "first"}, line)
    assert not (tmp_path / "p.h5").exists()


def test_make_refuses_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"id": "a", "prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 1: not valid JSON: .*utf-8"):
        make_inputs(tmp_path / "p.jsonl", TINYMOE, tmp_path / "p.h5")


# ---------------------------------------------------------------- the committed prompts, and the commands


def test_the_committed_prompts(tmp_path: Path, config: ModelConfig) -> None:
    make_inputs(INPUTS / "prompts.jsonl", TINYMOE, tmp_path / "p.h5")
    prompts = read_inputs(tmp_path / "p.h5")
    check_prompts(prompts, tmp_path / "p.h5", config, 64)
    kinds = [name.split("-")[0] for name in prompts.ids]
    assert len(prompts.ids) >= 64 and kinds.count("verse") == kinds.count("code")
    lengths = sorted(len(row) for row in prompts.tokens)
    assert lengths[0] <= 2 and lengths[-1] >= 200 and lengths[len(lengths) // 2] < 60


def test_commands(tmp_path: Path) -> None:
    run, out = CliRunner(), str(tmp_path / "p.h5")
    arguments = ["make", str(INPUTS / "prompts.jsonl"), str(TINYMOE), out]
    made = run.invoke(inputs_group, [*arguments, "--json"])
    assert made.exit_code == 0 and json.loads(made.output)["prompts"] >= 64
    refused = run.invoke(inputs_group, arguments)
    assert isinstance(refused.exception, JobError) and "--overwrite" in str(refused.exception)
    assert run.invoke(inputs_group, [*arguments, "--overwrite"]).exit_code == 0
    assert json.loads(run.invoke(inputs_group, ["info", out, "--json"]).output) == json.loads(made.output)


# ---------------------------------------------------------------- replaced meanwhile


def replaced(path: Path) -> None:
    write_inputs(path.with_name("new.h5"), prompts_of([1]), {})
    path.with_name("new.h5").replace(path)


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [replaced, appended, Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "i.h5"
    write_inputs(path, prompts_of([1]), {})
    with schema.unchanged(path):
        read_inputs(path)
    said = r"i\.h5: (was replaced or written while it was read|cannot be read: No such)"
    with pytest.raises(DataError, match=said), schema.unchanged(path):
        read_inputs(path)
        change(path)


def test_other_weights_than_those_looked_at_are_refused() -> None:
    with open_weights(TINYMOE) as weights:
        weights.expect(weights.digest())
        with pytest.raises(DataError, match=r"tinymoe\.h5: was replaced .* go on with --resume"):
            weights.expect("0" * 64)
