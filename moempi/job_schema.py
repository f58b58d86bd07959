"""The job file as a JSON schema, for editors: names, types, defaults and what each option does."""

from __future__ import annotations

from typing import Any

from moempi.job import Job, required_options
from moempi.job_options import describe_options


def job_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) that every valid job file fits.

    What only shows when options are seen together, or with the model, is left to `moempi run --dry-run`.
    """
    schema = Job.model_json_schema()
    sections = schema.pop("$defs")
    properties = {name: _section(sections, value) for name, value in schema["properties"].items()}
    units = {name: unit for name, _, unit, _ in describe_options()}
    for section, table in properties.items():
        for key, entry in table["properties"].items():
            _as_written(entry, units[f"{section}.{key}"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moempi job",
        "type": "object",
        "additionalProperties": False,
        "required": sorted({option.split(".")[0] for option in required_options()}),
        "properties": properties,
    }


def _section(sections: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """A section in place of the reference to it."""
    section: dict[str, Any] = sections[value["$ref"].rpartition("/")[2]]
    return {key: section[key] for key in ("type", "additionalProperties", "required", "properties") if key in section}


def _as_written(entry: dict[str, Any], unit: str) -> None:
    """Describe an option as TOML has it: sizes may be text, nothing is null, files are text."""
    entry.pop("title", None)
    kinds = [kind for kind in entry.pop("anyOf", []) if kind.get("type") != "null"]
    if len(kinds) == 1:
        entry.update(kinds[0])
    elif kinds:
        entry["anyOf"] = kinds
    if entry.get("default", 0) is None:
        del entry["default"]
    entry.pop("format", None)
    if unit == "bytes":
        entry["type"] = ["integer", "string"]
    if unit and "unit" in entry:
        del entry["unit"]
        entry["description"] = f"{entry['description']} [{unit}]"
