"""Checkpoint to weights file and back, bit for bit; and every checkpoint that is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from checkpoints import CONFIG, LAYER1, TINYMOE, Tensors, assert_same_bits, cut, make_checkpoint, random_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moempi.errors import DataError, JobError
from moempi.files.export_weights import export_checkpoint
from moempi.files.import_weights import import_checkpoint
from moempi.files.weights import open_weights

# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_import_then_export_gives_the_checkpoint_back(
    tmp_path: Path, dtype: torch.dtype, fused: bool, block: int
) -> None:
    tensors = random_tensors(dtype, fused)
    # Bits that a conversion through another float would not keep.
    tensors["model.norm.weight"][:3] = torch.tensor([-0.0, 1e-40, -3e38]).to(dtype)
    folder = make_checkpoint(tmp_path / "from", tensors)
    import_checkpoint(folder, tmp_path / "w.h5", block=block)
    export_checkpoint(tmp_path / "w.h5", tmp_path / "to")
    assert_same_bits(load_file(tmp_path / "to" / "model.safetensors"), tensors)
    with safe_open(tmp_path / "to" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name in ("config.json", "generation_config.json", "merges.txt"):
        assert (tmp_path / "to" / name).read_bytes() == (folder / name).read_bytes()


def test_shards_come_back_as_the_same_shards(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    folder = make_checkpoint(tmp_path / "from", tensors)
    (folder / "model.safetensors").unlink()
    shard_of = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    import_checkpoint(folder, tmp_path / "w.h5")
    export_checkpoint(tmp_path / "w.h5", tmp_path / "to")
    assert not (tmp_path / "to" / "model.safetensors").exists()
    for shard in set(shard_of.values()):
        assert_same_bits(load_file(tmp_path / "to" / shard), load_file(folder / shard))


def test_tied_embeddings_and_one_expert(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True, "num_experts": 1, "num_experts_per_tok": 1, "mlp_only_layers": []}
    tensors = random_tensors(config=config)
    assert "lm_head.weight" not in tensors
    import_checkpoint(make_checkpoint(tmp_path / "from", tensors, config), tmp_path / "w.h5")
    with open_weights(tmp_path / "w.h5") as weights:
        assert "head" not in weights.shapes
        assert weights.config.moe_layers == (0, 1, 2)
    export_checkpoint(tmp_path / "w.h5", tmp_path / "to")
    assert_same_bits(load_file(tmp_path / "to" / "model.safetensors"), tensors)


def test_the_committed_tinymoe_survives_an_export_and_an_import(tmp_path: Path) -> None:
    export_checkpoint(TINYMOE, tmp_path / "to")
    import_checkpoint(tmp_path / "to", tmp_path / "again.h5")
    with open_weights(TINYMOE) as committed, open_weights(tmp_path / "again.h5") as again:
        assert committed.digest() == again.digest()
        assert committed.checkpoint_files() == again.checkpoint_files()
        again.verify()
        committed.verify()
        assert committed.dtype == torch.bfloat16 and committed.eos_tokens == (0,)
        tokenizer = committed.tokenizer()
        assert tokenizer is not None
        assert tokenizer.decode(tokenizer.encode("def f(x):\n").ids) == "def f(x):\n"


def test_names_are_those_of_the_transformers_library() -> None:
    # Written out by hand: the other tests make their checkpoints with the table that is tested here.
    each = {name: tuple(tensor.shape) for name, tensor in random_tensors().items()}
    assert len(each) == 3 + 3 * 8 + 3 + 2 * (1 + 3 * 5)
    assert each["model.embed_tokens.weight"] == each["lm_head.weight"] == (23, 10)
    assert each["model.norm.weight"] == each["model.layers.2.input_layernorm.weight"] == (10,)
    assert each["model.layers.2.post_attention_layernorm.weight"] == (10,)
    assert each["model.layers.2.self_attn.q_proj.weight"] == (24, 10)
    assert each["model.layers.2.self_attn.k_proj.weight"] == each["model.layers.2.self_attn.v_proj.weight"] == (12, 10)
    assert each["model.layers.2.self_attn.o_proj.weight"] == (10, 24)
    assert each["model.layers.2.self_attn.q_norm.weight"] == each["model.layers.2.self_attn.k_norm.weight"] == (6,)
    assert each["model.layers.0.mlp.gate_proj.weight"] == each["model.layers.0.mlp.up_proj.weight"] == (14, 10)
    assert each["model.layers.0.mlp.down_proj.weight"] == (10, 14)
    assert each["model.layers.1.mlp.gate.weight"] == (5, 10)
    assert each[f"{LAYER1}4.gate_proj.weight"] == each[f"{LAYER1}4.up_proj.weight"] == (6, 10)
    assert each[f"{LAYER1}4.down_proj.weight"] == (10, 6)
    fused = {name: tuple(tensor.shape) for name, tensor in random_tensors(fused=True).items()}
    assert fused["model.layers.1.mlp.experts.gate_up_proj"] == (5, 12, 10)
    assert fused["model.layers.1.mlp.experts.down_proj"] == (5, 10, 6)


def test_export_does_not_mix_two_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "to", random_tensors())
    (tmp_path / "to" / "other.safetensors").write_bytes(b"")
    with pytest.raises(JobError, match=r"other\.safetensors"):
        export_checkpoint(TINYMOE, tmp_path / "to")


def test_export_says_that_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/to: cannot be written: Not a directory"):
        export_checkpoint(TINYMOE, tmp_path / "file" / "to")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ".."])
def test_export_keeps_to_its_folder_and_its_own_names(tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(TINYMOE, tmp_path / "w.h5"))
    with h5py.File(path, "r+") as file:
        file["checkpoint"].create_dataset(name, data=np.zeros(3, np.uint8))
    if name == "..":
        with pytest.raises(DataError, match=r"has a file named '\.\.'"):
            export_checkpoint(path, tmp_path / "to")
        return
    export_checkpoint(path, tmp_path / "to")
    assert (tmp_path / "to" / name).read_bytes() != bytes(3)


# ---------------------------------------------------------------- what import refuses


def nan_at(name: str, *index: int, value: float = float("nan")) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][index] = value

    return change


def replace(name: str, tensor: torch.Tensor | None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor

    return change


REFUSED = {
    "missing": (replace(f"{LAYER1}3.up_proj.weight", None), r"1 \(model.*1\.mlp\.experts\.3\.up_proj\.weight\)"),
    "shape": (replace("model.norm.weight", torch.zeros(11)), r"model\.norm\.weight has shape \[11\].*says \[10\]"),
    "transposed": (replace(f"{LAYER1}0.down_proj.weight", torch.zeros(6, 10)), r"\[6, 10\].*\[10, 6\]"),
    "scalar": (replace("model.norm.weight", torch.tensor(1.0)), r"has shape \[\]"),
    "empty": (replace("model.norm.weight", torch.zeros(0)), r"has shape \[0\]"),
    "mixed": (replace("model.norm.weight", torch.zeros(10).bfloat16()), r"model\.norm\.weight has dtype BF16.*has F32"),
    "unknown": (lambda tensors: tensors.update(extra=torch.zeros(1)), r"1 \(extra\) unknown tensors"),
    "nan": (nan_at("model.embed_tokens.weight", 21, 3), r"model\.embed_tokens\.weight holds nan at \[21, 3\]"),
    "inf": (nan_at(f"{LAYER1}4.up_proj.weight", 5, 9, value=float("-inf")), r"4\.up_proj.* holds -inf at \[5, 9\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_import_refuses(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    tensors = random_tensors()
    change(tensors)
    folder = make_checkpoint(tmp_path / "from", tensors)
    with pytest.raises(DataError, match=message):
        import_checkpoint(folder, tmp_path / "w.h5", block=100)
    # Neither a half-written file nor a temporary one is left.
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_import_refuses_float16(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="F16; expected F32 or BF16; convert it"):
        import_checkpoint(make_checkpoint(tmp_path / "from", random_tensors(torch.float16)), tmp_path / "w.h5")


def test_import_refuses_a_head_beside_tied_embeddings(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "from", random_tensors(), CONFIG | {"tie_word_embeddings": True})
    with pytest.raises(DataError, match=r"lm_head\.weight is not expected: tie_word_embeddings"):
        import_checkpoint(folder, tmp_path / "w.h5")


FILES = {
    "truncated": (lambda folder: cut(folder / "model.safetensors"), r"\.safetensors: cannot be read as safetensors"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be read as safetensors"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"from: is no checkpoint: there is no config\.json in it .*found .*model\.safetensors",
    ),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "JSON list; expected an object"),
    "eos": (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "x"}'), "eos.* = 'x'"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json: is not a tokenizer"),
}


@pytest.mark.parametrize("case", FILES)
def test_import_refuses_files(tmp_path: Path, case: str) -> None:
    damage, message = FILES[case]
    folder = make_checkpoint(tmp_path / "from", random_tensors())
    damage(folder)
    with pytest.raises(DataError, match=message):
        import_checkpoint(folder, tmp_path / "w.h5")
    assert not (tmp_path / "w.h5").exists()


def test_import_names_a_pickle_and_does_not_read_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "from", random_tensors())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin may be a pickle"):
        import_checkpoint(folder, tmp_path / "w.h5")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../other.safetensors"}}, "expected a .safetensors file beside it"),
        ({"weight_map": {"a": "model.bin"}}, "expected a .safetensors file beside it"),
        ({"weight_map": {}}, "no `weight_map`"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: cannot be read"),
        ({"weight_map": {"a": "one.safetensors"}}, "has tensor .* in one.safetensors, but .* does not"),
    ],
)
def test_import_refuses_an_index(tmp_path: Path, index: dict, message: str) -> None:
    folder = make_checkpoint(tmp_path / "from", random_tensors())
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        import_checkpoint(folder, tmp_path / "w.h5")
