"""What commands that make or describe a file share: the refusal to replace one, and the printed table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moempi.errors import JobError


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise a JobError when `path` is there and may not be replaced."""
    if path.exists() and not overwrite:
        raise JobError(f"{path}: exists already; give another name, or --overwrite to replace it")


def plural(n: int, word: str) -> str:
    """`1 sequence`, `2 sequences`."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def show(table: dict[str, Any], as_json: bool) -> None:
    """Print a table of names and values, for people or as one JSON object; a table inside is indented."""
    click.echo(json.dumps(table, indent=2) if as_json else "\n".join(_lines(table, "")))


def _lines(table: dict[str, Any], indent: str) -> list[str]:
    width = max(map(len, table), default=0) + 2
    lines: list[str] = []
    for name, value in table.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<{width}}{_text(value)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
