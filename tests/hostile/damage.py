"""One case: damage to a sound file, drawn from a generator. Most cases leave valid HDF5 with one wrong field."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

HUGE = 2**50
NUMBERS = (-1, 0, 1, 3, 7, 127, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, -(2**31), -(2**63))
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e308)
DTYPES = ("i1", "u1", "i2", "i4", "u4", "i8", "u8", ">i4", "f2", "f4", "f8", "S4", "bool", "c8")
TEXTS = ("", "{", "[]", "null", "1", '"x"', "{}", "[" * 100_000, '{"a": ' * 5000, "NaN", "\x00", "é" * 70_000)
VALUES = (None, True, -1, 0, 1e400, 2**70, "", "x", "../../x", "/etc/passwd", [], {}, [[]], [None], {"a": 1}, 3, 1.5)


def damage(path: Path, dice: Random) -> str:
    """Damage the file; returns in words what was done."""
    if path.suffix == ".h5":
        return _bytes(path, dice) if dice.random() < 0.3 else _field(path, dice)
    if path.suffix == ".safetensors":
        return _bytes(path, dice, 3000) if dice.random() < 0.4 else _header(path, dice)
    return _bytes(path, dice) if dice.random() < 0.2 else _text(path, dice)


def _bytes(path: Path, dice: Random, most: int | None = None) -> str:
    raw = bytearray(path.read_bytes())
    if dice.random() < 0.2:
        end = dice.randrange(len(raw))
        path.write_bytes(raw[:end])
        return f"cut to {end} bytes"
    # The first kilobytes of an HDF5 file are what describes it.
    end = min(len(raw), most or dice.choice((600, 4096, len(raw))))
    places = [dice.randrange(end) for _ in range(dice.choice((1, 1, 2, 8, 32)))]
    for place in places:
        raw[place] = dice.choice((0, 255, raw[place] ^ (1 << dice.randrange(8)), dice.randrange(256)))
    path.write_bytes(raw)
    return f"bytes at {places}"


# ---------------------------------------------------------------- HDF5 with one wrong field


def _field(path: Path, dice: Random) -> str:
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = dice.choice(names)
        if isinstance(file[name], h5py.Group) or dice.random() < 0.25:
            return _attribute(file if dice.random() < 0.6 else file[name], dice)
        if bytes(file[name].attrs.get("content", b"")) == b"UTF-8 text" and dice.random() < 0.7:
            return _json(file, name, dice)
        return dice.choice((_values, _values, _shape, _dtype, _claim, _elsewhere, _remove))(file, name, dice)


def _replace(file: h5py.File, name: str, data: Any, **options: Any) -> None:
    attributes = dict(file[name].attrs)
    del file[name]
    made = file.create_dataset(name, data=data, **options)
    for key, value in attributes.items():
        made.attrs.create(key, value, dtype=getattr(value, "dtype", None))


def _attribute(item: h5py.HLObject, dice: Random) -> str:
    name = dice.choice([*item.attrs] or ["extra"])
    value = dice.choice(
        (None, *NUMBERS, *FLOATS, np.bytes_(b"\xff\xfe"), np.bytes_(b"x" * 60_000), "text", np.zeros(5), np.zeros(0))
    )
    if name in item.attrs:
        del item.attrs[name]
    if value is not None:
        item.attrs[name] = value
    return f"attribute {name} of {item.name} is {str(value)[:40]!r}"


def _values(file: h5py.File, name: str, dice: Random) -> str:
    data = file[name][...]
    if not data.size:
        return _shape(file, name, dice)
    place: Any = dice.randrange(data.size)
    if data.dtype.kind == "f":
        value: float = dice.choice(FLOATS)
    else:
        limits = np.iinfo(data.dtype)
        value = min(max(dice.choice(NUMBERS), int(limits.min)), int(limits.max))
    if dice.random() < 0.2:
        place = ...
    with np.errstate(over="ignore"):
        data.reshape(-1)[place] = value
    _replace(file, name, data)
    return f"{name}[{place}] = {value}"


def _shape(file: h5py.File, name: str, dice: Random) -> str:
    data = file[name][...]
    changed = dice.choice((data[:0], data[:-1], data[None], np.concatenate([data, data]), data.ravel()[:1].sum()))
    _replace(file, name, changed)
    return f"{name} {data.shape} has shape {changed.shape}"


def _dtype(file: h5py.File, name: str, dice: Random) -> str:
    data, dtype = file[name][...], np.dtype(dice.choice(DTYPES))
    with np.errstate(all="ignore"):
        _replace(file, name, np.nan_to_num(data).astype(dtype))
    return f"{name} {data.dtype} is {dtype}"


def _claim(file: h5py.File, name: str, dice: Random) -> str:
    shape, dtype = file[name].shape or (1,), file[name].dtype
    claimed = (dice.choice((HUGE, 2**40, 2**33)), *shape[1:])
    del file[name]
    chunks = (dice.choice((1024, 2**26)), *shape[1:])
    made = file.create_dataset(name, claimed, dtype, chunks=chunks, compression=dice.choice((None, "gzip")))
    if dice.random() < 0.5 and chunks[0] == 1024:
        made[:1] = 1
    return f"{name} claims {claimed} in chunks of {chunks}"


def _elsewhere(file: h5py.File, name: str, dice: Random) -> str:
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    way = dice.choice(("soft", "link", "raw", "virtual", "loop", "vlen"))
    if way == "soft":
        file[name] = h5py.SoftLink("/sources")
    elif way == "link":
        file[name] = h5py.ExternalLink("inputs.h5", "/tokens")
    elif way == "raw":
        file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
    elif way == "virtual":
        layout = h5py.VirtualLayout((4,), dtype)
        layout[:] = h5py.VirtualSource("inputs.h5", "tokens", (4,))
        file.create_virtual_dataset(name, layout)
    elif way == "loop":
        file[name] = file["/"]
    else:
        file.create_dataset(name, data=["a"] * 3, dtype=h5py.string_dtype())
    return f"{name} is elsewhere ({way})"


def _remove(file: h5py.File, name: str, dice: Random) -> str:
    del file[name]
    if dice.random() < 0.3:
        file.create_group(name)
        return f"{name} is a group"
    return f"{name} is missing"


def _json(file: h5py.File, name: str, dice: Random) -> str:
    raw = bytes(file[name][...])
    text = _changed_json(raw.decode(), dice)
    _replace(file, name, np.frombuffer(text.encode(), np.uint8))
    return f"{name} holds {text[:60]!r}"


def _changed_json(text: str, dice: Random) -> str:
    if dice.random() < 0.3:
        return dice.choice(TEXTS)
    try:
        value = json.loads(text)
    except ValueError:
        return dice.choice(TEXTS)
    place = value
    while isinstance(place, dict) and place:
        key = dice.choice([*place])
        if not isinstance(place[key], dict) or dice.random() < 0.2:
            place[key] = dice.choice((*VALUES, *NUMBERS))
            break
        place = place[key]
    return json.dumps(value)


# ---------------------------------------------------------------- other files


def _header(path: Path, dice: Random) -> str:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    if dice.random() < 0.2:
        claimed = dice.choice((0, 1, length - 1, length + 1, 2**31, HUGE, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", claimed) + raw[8:])
        return f"header of {claimed} bytes"
    header = json.loads(raw[8 : 8 + length])
    entry = header[dice.choice([*header])]
    key = dice.choice([*entry])
    entry[key] = dice.choice(([HUGE, HUGE], [-1, 5], [2**62, 2**62, 4], [0], [8, 0], "F64", "I8", "BOOL", *VALUES))
    made = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(made)) + made + raw[8 + length :])
    return f"{key} is {str(entry[key])[:40]}"


def _text(path: Path, dice: Random) -> str:
    text = path.read_text()
    if path.suffix == ".json":
        text = _changed_json(text, dice)
    else:
        lines = text.splitlines()
        number = dice.randrange(len(lines))
        name = lines[number].partition(" = ")[0]
        others = ("[" * 5000, "nan", "inf", "1979-05-27", "'\\0'")
        value = dice.choice((*map(json.dumps, VALUES), *map(str, NUMBERS), *others))
        lines[number] = dice.choice((f"{name} = {value}", "", lines[number] * 2, "[x]", f"{name}.x = {value}"))
        text = "\n".join(lines)
    path.write_text(text)
    return f"text {text[:60]!r}"
