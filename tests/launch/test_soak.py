"""A job of thousands of short sequences holds no more at its end than after its warm-up; planted leaks are seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from soaks import HELD, LIMIT, growth, growth_of_fewest, growths, soak, write_job

RANKS = 3
SEQUENCES = 9000  # some seconds: fewer notes than a dozen of each rank say little


def test_growth_by_hand() -> None:
    sequences = np.arange(0, 5001, 100)
    flat = np.where(sequences < 1000, 50, 100)  # what grows while it warms up is no leak
    assert growth(sequences, flat) == pytest.approx(0)
    # 100 at 2000 sequences, where the warm-up ends, 5 more with every thousand.
    assert growth(sequences, 90 + sequences / 200) == pytest.approx(0.05)
    # Two requests that stay with every thousand sequences, among up to six that come and go: 4 and 6 are the fewest.
    pending = np.arange(len(sequences)) % 7
    assert growth_of_fewest(sequences, pending) == 0
    assert growth_of_fewest(sequences, np.where(sequences < 3500, pending, 2)) == 0
    assert growth_of_fewest(sequences, pending + sequences // 1000 * 2) == pytest.approx(2 / 2 / 1.5)


def test_memory_open_files_and_requests_stay_as_they_are(tmp_path: Path) -> None:
    found = growths(soak(write_job(tmp_path, SEQUENCES), RANKS))
    grown = [(rank, name, one[name]) for rank, one in enumerate(found) for name in HELD if one[name] >= LIMIT]
    assert not grown, f"grows by more than {LIMIT:.0%} per 1000 sequences: {grown}; all: {found}"


def test_planted_leaks_are_seen_on_every_rank(tmp_path: Path) -> None:
    found = growths(soak(write_job(tmp_path, SEQUENCES), RANKS, "everything"))
    assert all(one["memory"] >= LIMIT and one["files"] >= LIMIT for one in found), found
