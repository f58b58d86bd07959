"""Whether outputs that are to be merged belong together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from moempi.errors import DataError
from moempi.files.completions import Head
from moempi.files.shards import number_of

# In these the outputs of different prompts differ.
_OF_THE_INPUT = {"inputs", "shard", "whole_inputs"}


class Headed(Protocol):
    """Whatever has the head of an outputs file."""

    @property
    def head(self) -> Head: ...


H = TypeVar("H", bound=Headed)


def check_alike(heads: Sequence[Head]) -> None:
    """Raises DataError, naming the values, where weights, dtype, options or libraries differ between outputs."""
    for head in heads[1:]:
        first, other = heads[0].origin.identity, head.origin.identity
        lines = [
            f"  {key}: {first.get(key, 'not set')!r} and {other.get(key, 'not set')!r}"
            for key in sorted({*first, *other} - _OF_THE_INPUT)
            if first.get(key) != other.get(key)
        ]
        if lines:
            text = "\n".join(lines)
            raise DataError(
                f"{heads[0].path} and {head.path} do not belong together; these differ:\n{text}\n"
                "Leave one out, or give --mixed to join them all the same"
            )


def in_input_order(shards: Sequence[H], *, incomplete: bool) -> list[H]:
    """Outputs of the shards of one input, in its order; any others as they are given.

    Raises:
        DataError: shards of different inputs or cuts, one twice, or, unless `incomplete`, one missing.
    """
    found = {id(one): number_of(one.head.origin.identity) for one in shards}
    numbers = [number for number in found.values() if number is not None]
    if not numbers:
        return list(shards)
    _check_one_input(shards)
    names: dict[tuple[int, int] | None, Path] = {}
    for one in shards:
        other = names.setdefault(found[id(one)], one.head.path)
        if other != one.head.path:
            raise DataError(f"{other} and {one.head.path} are of the same shard, {one.head.origin.identity['shard']}")
    missing = sorted(set(range(numbers[0][1])) - {shard for shard, _ in numbers})
    if missing and not incomplete:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise DataError(
            f"{len(missing)} of {numbers[0][1]} shards are missing: {listed}; give their outputs too, or --incomplete "
            "to do without them"
        )
    return sorted(shards, key=lambda one: found[id(one)] or (0, 0))


def _check_one_input(shards: Sequence[Headed]) -> None:
    first = shards[0].head
    for head in (one.head for one in shards):
        mine, its = number_of(first.origin.identity), number_of(head.origin.identity)
        same = first.origin.identity.get("whole_inputs") == head.origin.identity.get("whole_inputs")
        if mine is None or its is None or mine[1] != its[1] or not same:
            kinds = [one.origin.identity.get("shard", "no shard") for one in (first, head)]
            raise DataError(
                f"{first.path} ({kinds[0]}) and {head.path} ({kinds[1]}) are not shards of one and the same cut of "
                "one input, so that there is no order for them"
            )


def is_whole(heads: Sequence[Head]) -> bool:
    """Whether outputs are those of all shards of one input; they have been put in order already."""
    numbers = [number_of(head.origin.identity) for head in heads]
    return bool(numbers) and numbers == [(shard, len(numbers)) for shard in range(len(numbers))]
