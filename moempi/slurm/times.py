"""Times as Slurm writes them."""

from __future__ import annotations

import math
import re

_FORMS = (
    r"(?:(?P<d>\d+)-)?(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)",  # [days-]hours:minutes:seconds
    r"(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>\d+))?",  # days-hours[:minutes]
    r"(?P<m>\d+)(?::(?P<s>\d+))?",  # minutes[:seconds]
)


def parse_time(text: str) -> float:
    """Seconds of a time as sbatch --time takes it: "90" (minutes), "1:30:00", "2-12", "2-12:30:00".

    Raises:
        ValueError: it is none of these, or nothing.
    """
    for form in _FORMS:
        if found := re.fullmatch(form, text.strip(), re.ASCII):
            parts = {unit: int(number or 0) for unit, number in found.groupdict().items()}
            seconds = 86400 * parts.get("d", 0) + 3600 * parts.get("h", 0) + 60 * parts["m"] + parts.get("s", 0)
            if seconds:
                return float(seconds)
    raise ValueError('expected a time limit like "90" (minutes), "1:30:00" or "2-12:00:00"')


def show_time(seconds: float) -> str:
    """A time limit for sbatch, in whole minutes, rounded up: "1-02:03:00"."""
    minutes = max(1, math.ceil(seconds / 60))
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{clock}" if days else clock
