"""Inputs cut into shards: where, what they say of themselves, and what is merged with what."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moempi.cli.inputs import inputs as command
from moempi.errors import DataError, JobError
from moempi.files import schema
from moempi.files.completions import Completion, read_head
from moempi.files.inputs import Prompts, read_inputs, write_inputs
from moempi.files.output_writer import OutputWriter
from moempi.files.outputs import merge_outputs, read_outputs
from moempi.files.shards import Stamp, cut, identity_of, read_stamp, split_inputs


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the environment holds is no matter here, and importing torch takes seconds.
    monkeypatch.setattr(schema, "environment", lambda: {"machine": "a test"})


def write_whole_input(path: Path, n: int = 7) -> Prompts:
    prompts = Prompts(
        [f"p{i}" for i in range(n)],
        [np.full(i % 3 + 1, i, dtype=np.int32) for i in range(n)],
        [f"prompt {i}" for i in range(n)],
        np.array([0, 5] * n, dtype=np.int32)[:n],
    )
    write_inputs(path, prompts, {})
    return prompts


# ---------------------------------------------------------------- cutting


@pytest.mark.parametrize(
    ("work", "shards", "cuts"),
    [
        ([1, 1, 1, 1], 2, [0, 2, 4]),
        ([1, 1, 1, 1], 1, [0, 4]),
        ([9, 1, 1, 1], 2, [0, 1, 4]),
        ([1, 1, 1, 9], 2, [0, 3, 4]),
        ([1, 1, 1, 99], 3, [0, 2, 3, 4]),  # no shard is empty, however long the last row is
        ([99, 1, 1, 1], 3, [0, 1, 2, 4]),
        ([3, 3, 3], 3, [0, 1, 2, 3]),
    ],
)
def test_cuts_are_even_in_work(work: list[int], shards: int, cuts: list[int]) -> None:
    assert cut(np.array(work), shards) == cuts


def test_no_cut_is_empty() -> None:
    chance = random.Random(3)
    for _ in range(300):
        work = [chance.choice([1, 2, 50, 1000]) for _ in range(chance.randint(1, 30))]
        shards = chance.randint(1, len(work))
        cuts = cut(np.array(work), shards)
        assert len(cuts) == shards + 1 and cuts[0] == 0 and cuts[-1] == len(work)
        assert all(a < b for a, b in pairwise(cuts))
    with pytest.raises(JobError, match="3 sequences cannot be cut into 4 shards"):
        cut(np.array([1, 1, 1]), 4)


def test_shards_hold_the_input_between_them_and_say_which_part(tmp_path: Path) -> None:
    prompts = write_whole_input(tmp_path / "in.h5")
    shown = CliRunner().invoke(command, ["split", str(tmp_path / "in.h5"), str(tmp_path / "cut"), "-k", "3", "--json"])
    sizes = json.loads(shown.output)
    parts = [read_inputs(Path(path)) for path in sizes]
    assert [len(part.ids) for part in parts] == list(sizes.values())
    assert [name for part in parts for name in part.ids] == prompts.ids
    assert [list(row) for part in parts for row in part.tokens] == [list(row) for row in prompts.tokens]
    assert [one for part in parts for one in part.text or []] == prompts.text
    assert [one for part in parts for one in part.max_new_tokens] == list(prompts.max_new_tokens)
    digest = schema.file_digest(tmp_path / "in.h5")
    firsts = np.cumsum([0, *sizes.values()]).tolist()
    stamps = [Stamp(i, 3, firsts[i], size, digest) for i, size in enumerate(sizes.values())]
    assert [read_stamp(Path(path)) for path in sizes] == stamps
    assert read_stamp(tmp_path / "in.h5") is None


def test_shards_that_are_there_stay_if_they_are_the_same(tmp_path: Path) -> None:
    write_whole_input(tmp_path / "in.h5")
    paths = split_inputs(tmp_path / "in.h5", tmp_path, 2, 64)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(JobError, match="exists already"):
        split_inputs(tmp_path / "in.h5", tmp_path, 2, 64)
    split_inputs(tmp_path / "in.h5", tmp_path, 2, 64, keep=True)
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(JobError, match="is not to be kept as this shard"):
        split_inputs(tmp_path / "in.h5", tmp_path, 3, 64, keep=True)
    split_inputs(tmp_path / "in.h5", tmp_path, 3, 64, keep=True, overwrite=True)
    assert [len(read_inputs(tmp_path / f"shard-00{i}.h5").ids) for i in range(3)] == [2, 2, 3]


@pytest.mark.parametrize("text", ["[]", "{}", '{"shard": 2, "of": 2, "first": 0, "sequences": 1, "whole": ""}', "x"])
def test_a_damaged_stamp_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "in.h5"
    write_inputs(path, Prompts(["a"], [np.array([1], np.int32)], None, np.zeros(1, np.int32)), {}, shard=text)
    with pytest.raises(DataError, match="/shard is damaged"):
        read_stamp(path)


# ---------------------------------------------------------------- merging


def write_output(path: Path, stamp: Stamp | None, ids: list[str], done: bool = True, **changes: str) -> Path:
    """An output of a shard; unfinished ones have finished their first sequence."""
    own = {"weights": "aa", "inputs": path.name, "mode": "exact", "dtype": "float32"}
    identity = own | identity_of(stamp) | changes
    source = path.with_suffix(".in.h5")
    empty = [np.array([1], np.int32)] * len(ids)
    write_inputs(source, Prompts(ids, empty, None, np.zeros(len(ids), np.int32)), {})
    job = json.dumps({"input": {"file": str(source)}})
    given = {"sources": {"inputs": schema.file_digest(source)}, "n_sequences": len(ids), "commit_every": 3600.0}
    with OutputWriter.start(path, job_json=job, identity=identity, **given) as writer:
        for row in range(len(ids) if done else 1):
            writer.put(Completion(row, np.array([7, row], np.int32), np.zeros(2, np.float32), "length"))
        if done:
            writer.finish(read_inputs(source), {"mode": "exact"})
    return path


def shards(folder: Path, n: int = 3, **changes: str) -> list[Path]:
    """Outputs of n shards of two sequences each."""
    return [
        write_output(folder / f"out-{i}.h5", Stamp(i, n, 2 * i, 2, "ww"), [f"p{2 * i}", f"p{2 * i + 1}"], **changes)
        for i in range(n)
    ]


def test_shards_are_merged_in_input_order_whatever_order_they_are_given_in(tmp_path: Path) -> None:
    first, second, third = shards(tmp_path)
    assert merge_outputs(tmp_path / "all.h5", [third, first, second]) == 6
    assert read_outputs(tmp_path / "all.h5").ids == [f"p{i}" for i in range(6)]
    # As one run of the whole input would have said.
    assert read_head(tmp_path / "all.h5").origin.identity == {
        "weights": "aa",
        "inputs": "ww",
        "mode": "exact",
        "dtype": "float32",
    }


def test_a_missing_or_doubled_shard_is_refused(tmp_path: Path) -> None:
    first, second, third = shards(tmp_path)
    out = tmp_path / "all.h5"
    with pytest.raises(DataError, match="1 of 3 shards are missing: 1"):
        merge_outputs(out, [third, first])
    assert merge_outputs(out, [third, first], incomplete=True) == 4
    assert read_outputs(out).ids == ["p0", "p1", "p4", "p5"]
    assert read_head(out).origin.identity["whole_inputs"] == "ww"
    twin = write_output(tmp_path / "twin.h5", Stamp(1, 3, 2, 2, "ww"), ["x", "y"])
    with pytest.raises(DataError, match=r"out-1.h5 and .*twin.h5 are of the same shard, 1 of 3"):
        merge_outputs(tmp_path / "b.h5", [first, second, third, twin])


@pytest.mark.parametrize(
    ("stamp", "shown"),
    [(Stamp(2, 3, 4, 2, "other"), "2 of 3"), (Stamp(2, 4, 4, 2, "ww"), "2 of 4"), (None, "no shard")],
)
def test_shards_of_another_input_or_cut_are_refused(tmp_path: Path, stamp: Stamp | None, shown: str) -> None:
    first, second, _ = shards(tmp_path)
    stranger = write_output(tmp_path / "stranger.h5", stamp, ["x", "y"])
    with pytest.raises(DataError, match=rf"\(0 of 3\) and .*stranger.h5 \({shown}\) are not shards"):
        merge_outputs(tmp_path / "all.h5", [first, second, stranger])


@pytest.mark.parametrize("key", ["weights", "dtype", "mode", "generate.max_new_tokens"])
def test_outputs_of_another_model_or_option_do_not_belong_together(tmp_path: Path, key: str) -> None:
    first = write_output(tmp_path / "a.h5", None, ["a"])
    other = write_output(tmp_path / "b.h5", None, ["b"], **{key: "other"})
    with pytest.raises(DataError, match=rf"do not belong together; these differ:\n  {key}: .* and 'other'"):
        merge_outputs(tmp_path / "all.h5", [first, other])
    assert merge_outputs(tmp_path / "all.h5", [first, other], mixed=True) == 2
    assert read_head(tmp_path / "all.h5").origin.identity[key] == "differs between the merged files"


def test_an_unfinished_shard_is_taken_as_far_as_it_is(tmp_path: Path) -> None:
    first, _, third = shards(tmp_path)
    (tmp_path / "out-1.h5").unlink()
    second = write_output(tmp_path / "out-1.h5", Stamp(1, 3, 2, 2, "ww"), ["p2", "p3"], done=False)
    assert merge_outputs(tmp_path / "all.h5", [first, second, third]) == 5
    assert read_outputs(tmp_path / "all.h5").ids == ["p0", "p1", "p2", "p4", "p5"]
    assert read_head(tmp_path / "all.h5").origin.identity["whole_inputs"] == "ww"
