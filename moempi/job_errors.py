"""What is wrong with a job, in the words of its options; a near miss gets a hint."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError


def explain(error: ValidationError, known: list[str], required: list[str]) -> list[tuple[str, str]]:
    """(option, what is wrong with it), one per option, also where none of the types that it may have fits.

    Args:
        known: every option, as `section.key`.
        required: those without a default.
    """
    # A union's branches add their own names behind section and key: only the first two name the option.
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for item in error.errors():
        found.setdefault(tuple(map(str, item["loc"][:2])), []).append(dict(item))
    return [(".".join(where), _explain_one(where, items, known, required)) for where, items in found.items()]


def _explain_one(where: tuple[str, ...], items: list[dict[str, Any]], known: list[str], required: list[str]) -> str:
    name, kind = ".".join(where), items[0]["type"]
    if kind == "extra_forbidden":
        unknown = "section" if len(where) == 1 else "option"
        return f"unknown {unknown} `{name}`; {_hint(where, items[0]['input'], known)}"
    if kind == "missing":
        needed = [name] if len(where) > 1 else [key for key in required if key.startswith(f"{name}.")]
        return f"{' and '.join(f'`{key}`' for key in needed)} is missing; every job needs it"
    if len(where) == 1:
        return f"`{name}` = {items[0]['input']!r}: expected a section, [{name}]"
    expected = " or ".join(dict.fromkeys(_expected(item["msg"]) for item in items))
    return f"`{name}` = {items[0]['input']!r}: expected {expected}"


_PLAIN = {
    "a valid dictionary": "a section",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid ": "a ",
    "a integer": "a whole number",
    "a string": "text",
    "a boolean": "true or false",
}


def _expected(message: str) -> str:
    """What pydantic's message asks for, in the words of the other errors."""
    text = message.removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("expected ")
    for theirs, ours in _PLAIN.items():
        text = text.replace(theirs, ours)
    return text


def _hint(where: tuple[str, ...], value: Any, known: list[str]) -> str:
    """What `where`, which was set to `value`, may have meant; where nothing is near, what there is."""
    sections = sorted({key.split(".")[0] for key in known})
    names = [where[1]] if len(where) > 1 else list(value) if isinstance(value, dict) else []
    # A similar section comes first, then a right name in a wrong section, then a similar option.
    near = difflib.get_close_matches(where[0], sections, n=1) if len(where) == 1 else []
    near = near or [key for key in known if key.split(".")[1] in names]
    near = near or difflib.get_close_matches(".".join(where), known, n=1, cutoff=0.75)
    if near:
        return f"did you mean `{near[0]}`?"
    inside = [key.split(".")[1] for key in known if key.startswith(f"{where[0]}.")]
    return f"[{where[0]}] has {', '.join(inside)}" if inside else f"there are {', '.join(sections)}"
