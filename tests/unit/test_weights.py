"""Weights files: what a rank reads, damage, and seeded init."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from checkpoints import CONFIG, LAYER1, TINYMOE, Tensors, cut, make_checkpoint, random_tensors
from click.testing import CliRunner

from moempi.cli.weights import weights as weights_group
from moempi.errors import DataError, JobError
from moempi.files import schema
from moempi.files.export_weights import export_checkpoint
from moempi.files.import_weights import import_checkpoint
from moempi.files.init_weights import init_weights
from moempi.files.tensors import row_blocks
from moempi.files.weights import info, open_weights
from moempi.model.huggingface import count_parameters, parse_config

# ---------------------------------------------------------------- reading


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    folder = tmp_path_factory.mktemp("imported")
    tensors = random_tensors(request.param)
    import_checkpoint(make_checkpoint(folder / "from", tensors), folder / "w.h5")
    return folder / "w.h5", tensors


@pytest.mark.parametrize(("lo", "hi"), [(0, 6), (0, 3), (3, 6), (2, 5), (5, 6)])
def test_a_hidden_range_of_an_expert(imported: tuple[Path, Tensors], lo: int, hi: int) -> None:
    path, tensors = imported
    with open_weights(path) as weights:
        gate_up, down = weights.expert(1, 4, lo, hi)
    gate, up = (tensors[f"{LAYER1}4.{name}_proj.weight"][lo:hi] for name in ("gate", "up"))
    assert torch.equal(gate_up, torch.cat([gate, up]))
    assert torch.equal(down, tensors[f"{LAYER1}4.down_proj.weight"][:, lo:hi])
    assert gate_up.is_contiguous() and down.is_contiguous()


@pytest.mark.parametrize(("lo", "hi"), [(0, 7), (3, 3), (-1, 2), (4, 2)])
def test_a_hidden_range_outside_the_expert_is_refused(imported: tuple[Path, Tensors], lo: int, hi: int) -> None:
    with open_weights(imported[0]) as weights, pytest.raises(ValueError, match="hidden range"):
        weights.expert(1, 0, lo, hi)


def test_tensors_keep_their_dtype_and_outlive_the_file(imported: tuple[Path, Tensors]) -> None:
    path, tensors = imported
    with open_weights(path) as weights:
        q, dense = weights.tensor("layers/2/q"), weights.tensor("layers/0/mlp_gate_up")
        assert weights.dtype == q.dtype == tensors["lm_head.weight"].dtype
        assert weights.eos_tokens == (7, 9)  # generation_config.json goes before config.json
        assert weights.tokenizer() is None
    assert torch.equal(q, tensors["model.layers.2.self_attn.q_proj.weight"])
    halves = [tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(dense, torch.cat(halves))


def test_other_tools_see_bfloat16_as_floats(imported: tuple[Path, Tensors]) -> None:
    path, tensors = imported
    with h5py.File(path) as file:
        assert file["model/embedding"].dtype == np.float32
        seen = torch.from_numpy(file["model/embedding"][...])
    assert torch.equal(seen, tensors["model.embed_tokens.weight"].float())


def test_the_callers_own_error_is_not_called_a_damaged_file(imported: tuple[Path, Tensors]) -> None:
    with pytest.raises(RuntimeError, match="mine"), open_weights(imported[0]):
        raise RuntimeError("mine")


def test_parameters_are_counted() -> None:
    config = parse_config(json.dumps(CONFIG), "config")
    total, active = count_parameters(config)
    attention = 10 + 24 * 10 + 2 * 12 * 10 + 10 * 24 + 6 + 6 + 10
    expert = 3 * 6 * 10
    assert total == 2 * 23 * 10 + 10 + 3 * attention + 3 * 14 * 10 + 2 * (5 * 10 + 5 * expert)
    assert total - active == 2 * (5 - 2) * expert
    assert total == sum(tensor.numel() for tensor in random_tensors().values())


# ---------------------------------------------------------------- damaged weights files


def retype(file: h5py.File) -> None:
    del file["model/norm"]
    file["model/norm"] = np.zeros(10, np.float64)


def reshape(file: h5py.File) -> None:
    del file["model/layers/1/experts_down"]
    file["model/layers/1/experts_down"] = np.zeros((5, 6, 10), np.float32)


def hollow(file: h5py.File) -> None:
    del file["model/norm"]
    file.create_dataset("model/norm", (10,), np.float32)  # no storage: reads as zeros


def other_config(file: h5py.File, **changes: object) -> None:
    del file["config"]
    schema.write_text(file, "config", json.dumps(CONFIG | changes))


def mix(file: h5py.File) -> None:
    with h5py.File(TINYMOE) as other:
        kind = other["model/norm"].id.get_type()
    del file["model/norm"]
    space = h5py.h5s.create_simple((10,))
    h5py.h5d.create(file["model"].id, b"norm", kind, space).write(space, space, np.zeros(10, np.uint16), mtype=kind)


DAMAGED: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "type": (retype, r"/model/norm has type float64; expected float32 or bfloat16"),
    "mixed": (mix, r"/model/norm is torch\.bfloat16, but /model/embedding is torch\.float32"),
    "shape": (reshape, r"/model/layers/1/experts_down has shape \[5, 6, 10\]; the config says \[5, 10, 6\]"),
    "hollow": (hollow, r"/model/norm claims 40 bytes, but stores 0"),
    "missing": (lambda file: file.pop("model/head"), r"/model/head is missing; expected \[23, 10\]"),
    "extra": (lambda file: file["model"].create_dataset("x", data=[1]), r"/model/x is not a tensor of the model"),
    "layers": (lambda file: other_config(file, num_hidden_layers=4), "3 layers; the config says 4"),
    "experts": (lambda file: other_config(file, num_experts=6), r"gate has shape \[5, 10\]; the config says \[6, 10\]"),
    "config": (lambda file: other_config(file, mlp_only_layers=1), "/config: a key has a value of another type"),
    "no config": (lambda file: file.pop("config"), "has no `config`"),
    "no model": (lambda file: file.pop("model"), "holds 0 layers"),
    "version": (lambda file: file.attrs.modify("version", 2), "version 2 of moempi-weights"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    import_checkpoint(make_checkpoint(folder / "from", random_tensors()), folder / "w.h5")
    return folder / "w.h5"


@pytest.mark.parametrize("case", DAMAGED)
def test_opening_refuses(tmp_path: Path, sound: Path, case: str) -> None:
    damage, message = DAMAGED[case]
    path = Path(shutil.copy(sound, tmp_path / "w.h5"))
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(DataError, match=message):
        open_weights(path)


def test_opening_refuses_a_truncated_file(tmp_path: Path, sound: Path) -> None:
    path = Path(shutil.copy(sound, tmp_path / "w.h5"))
    cut(path)
    with pytest.raises(DataError, match="truncated"):
        open_weights(path)


@pytest.mark.parametrize("name", ["model/layers/2/experts_down", "config", "checkpoint/merges.txt"])
def test_verify_finds_one_changed_bit(tmp_path: Path, sound: Path, name: str) -> None:
    path = Path(shutil.copy(sound, tmp_path / "w.h5"))
    with h5py.File(path) as file:
        offset = file[name].id.get_offset()
    raw = bytearray(path.read_bytes())
    # In the config: the first blank of its indentation, so that it stays valid JSON.
    at = offset + (raw[offset:].index(b"\n") + 1 if name == "config" else 0)
    raw[at] = ord("\t") if name == "config" else raw[at] ^ 1
    path.write_bytes(raw)
    with open_weights(path) as weights, pytest.raises(DataError, match=f"/{name} is damaged: its SHA-256"):
        weights.verify()


def test_the_digest_follows_weights_config_and_end_tokens(tmp_path: Path, sound: Path) -> None:
    digests = {info(sound)["digest"]}
    for number, change in enumerate(["tensor", "config", "eos"]):
        tensors = random_tensors()
        if change == "tensor":
            tensors["model.norm.weight"][0] += 1
        config = CONFIG | ({"rope_theta": 5.0} if change == "config" else {})
        folder = make_checkpoint(tmp_path / change, tensors, config)
        if change == "eos":
            (folder / "generation_config.json").write_text("{}")
        import_checkpoint(folder, tmp_path / "w.h5")
        digests.add(info(tmp_path / "w.h5")["digest"])
        assert len(digests) == number + 2, change


# ---------------------------------------------------------------- init


@pytest.fixture()
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def digest_of_init(config_path: Path, **options: object) -> str:
    out = config_path.with_name("init.h5")
    init_weights(config_path, out, **options)  # type: ignore[arg-type]
    return str(info(out)["digest"])


def test_init_has_the_same_bits_whatever_the_block(config_path: Path) -> None:
    assert len({digest_of_init(config_path, block=block) for block in (1, 40, 123, 2**20)}) == 1


def test_init_follows_seed_dtype_and_scales(config_path: Path) -> None:
    plain = digest_of_init(config_path)
    changes: list[dict[str, object]] = [{"seed": 1}, {"dtype": "float32"}, {"std": 0.03}, {"gate_scale": 20.0}]
    assert len({plain, *(digest_of_init(config_path, **change) for change in changes)}) == 5
    assert digest_of_init(config_path, seed=0) == plain


def test_init_is_pinned(config_path: Path) -> None:
    # Changes when the generator, its keys or the order of numbers change: then every seeded benchmark changes too.
    init_weights(config_path, config_path.with_name("w.h5"), seed=5, dtype="float32", std=1.0)
    with open_weights(config_path.with_name("w.h5")) as weights:
        found = weights.tensor("embedding")[0, :3].tolist()
    assert found == pytest.approx([-0.11318989, -0.92245477, -0.05298959], rel=1e-6)


def test_an_experts_numbers_do_not_depend_on_the_number_of_experts(config_path: Path) -> None:
    found = []
    for n_experts in (5, 3):
        config_path.write_text(json.dumps(CONFIG | {"num_experts": n_experts}))
        init_weights(config_path, config_path.with_name("w.h5"))
        with open_weights(config_path.with_name("w.h5")) as weights:
            found.append(weights.expert(2, 1, 0, 6))
            other = weights.expert(2, 2, 0, 6)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], other[0])


def test_init_scales_gates_and_leaves_norms_at_one(config_path: Path) -> None:
    config_path.write_text(json.dumps(CONFIG | {"hidden_size": 500, "num_experts": 20}))
    init_weights(config_path, config_path.with_name("w.h5"), dtype="float32", gate_scale=20, std=0.05)
    with open_weights(config_path.with_name("w.h5")) as weights:
        assert weights.tensor("layers/1/gate").std().item() == pytest.approx(1.0, rel=0.05)
        assert weights.tensor("layers/1/experts_down").std().item() == pytest.approx(0.05, rel=0.05)
        assert weights.tensor("layers/1/experts_down").mean().item() == pytest.approx(0, abs=0.001)
        assert weights.tensor("layers/1/q_norm").eq(1).all()


def test_init_exports_and_imports_to_the_same_digest(config_path: Path, tmp_path: Path) -> None:
    digest = digest_of_init(config_path)
    export_checkpoint(tmp_path / "init.h5", tmp_path / "to")
    import_checkpoint(tmp_path / "to", tmp_path / "w.h5")
    assert info(tmp_path / "w.h5")["digest"] == digest


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((5, 10), 80, [(0, 2), (2, 4), (4, 5)]),
        ((5, 10), 79, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ((5, 10), 1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ((5, 10), 200, [(0, 5)]),
        ((7,), 12, [(0, 3), (3, 6), (6, 7)]),
        ((2, 3, 4), 48, [(0, 1), (1, 2)]),
    ],
)
def test_blocks_of_rows(shape: tuple[int, ...], block: int, expected: list[tuple[int, int]]) -> None:
    assert list(row_blocks(shape, 4, block)) == expected


# ---------------------------------------------------------------- commands


def test_commands(tmp_path: Path, config_path: Path) -> None:
    run = CliRunner()
    out = str(tmp_path / "w.h5")
    made = run.invoke(weights_group, ["init", str(config_path), out, "--seed", "3", "--json"])
    assert made.exit_code == 0 and json.loads(made.output)["dtype"] == "bfloat16"
    again = run.invoke(weights_group, ["init", str(config_path), out])
    assert isinstance(again.exception, JobError) and "--overwrite" in str(again.exception)
    assert run.invoke(weights_group, ["init", str(config_path), out, "--seed", "3", "--overwrite"]).exit_code == 0
    shown = run.invoke(weights_group, ["info", out, "--verify"])
    assert shown.exit_code == 0 and "n_experts" in shown.output
    assert run.invoke(weights_group, ["export", out, str(tmp_path / "to")]).exit_code == 0
    refused = run.invoke(weights_group, ["export", out, str(tmp_path / "to")])
    assert isinstance(refused.exception, JobError)
    back = run.invoke(weights_group, ["import", str(tmp_path / "to"), str(tmp_path / "v.h5"), "--json"])
    assert json.loads(back.output)["digest"] == json.loads(made.output)["digest"]
