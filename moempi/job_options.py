"""What there is to be said of the options of a job file, for tables, completion and the schema."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args

from moempi.job import Job, Section


def describe_options() -> list[tuple[str, str, str, str]]:
    """(name, default, unit, text) of every option, for the table in docs/jobs.md."""
    rows = []
    for section, field in Job.model_fields.items():
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, Section)
        for key, entry in model.model_fields.items():
            extra = entry.json_schema_extra
            unit = str(extra["unit"]) if isinstance(extra, dict) and "unit" in extra else ""
            default = "required" if entry.is_required() else json.dumps(entry.get_default(), default=str)
            choices = _choices(entry.annotation)
            shown = f"{default} of {', '.join(choices)}" if choices else default
            rows.append((f"{section}.{key}", shown, unit, entry.description or ""))
    return rows


def choices_of(option: str) -> list[str]:
    """The values that an option may have, where it has a list of them; else, and of an unknown one, nothing."""
    section, _, key = option.partition(".")
    field = Job.model_fields.get(section)
    entry = field.annotation.model_fields.get(key) if field else None  # type: ignore[union-attr]
    found = _choices(entry.annotation) if entry else []
    return found or (["true", "false"] if entry and entry.annotation is bool else [])


def _choices(annotation: Any) -> list[str]:
    return list(map(str, get_args(annotation))) if getattr(annotation, "__origin__", None) is Literal else []
