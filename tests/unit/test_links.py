"""Measured links: latency and bandwidth from times, the file, the table. No MPI."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from moempi.bench.fit import ladder, latency_and_bandwidth
from moempi.bench.links import summarize
from moempi.cli.bench import bench
from moempi.cli.links_table import as_dict, links_table
from moempi.errors import DataError, JobError
from moempi.files.links import MeasuredLinks, read_links, write_links

SIZES = [1, 1000, 1_000_000]
# Of three ranks, two of them on one node: 10 us + 1 GB/s inside it, 50 us + 100 MB/s to the other one.
INSIDE = [10e-6, 11e-6, 1010e-6]
OUTSIDE = [50e-6, 60e-6, 10_050e-6]
WHERE: list[dict[str, int | str]] = [
    {"node": 0, "host": "a"},
    {"node": 0, "host": "a"},
    {"node": 1, "host": "b"},
]

DEVICES = ["NVIDIA H100 0", "NVIDIA H100 1", "cpu"]
CROWDS = [1.0, 2.5, 1.0]


@pytest.fixture
def links() -> MeasuredLinks:
    return summarize({(1, 2): OUTSIDE, (0, 1): INSIDE, (0, 2): OUTSIDE}, SIZES, WHERE, DEVICES, CROWDS)


def test_ladder() -> None:
    assert ladder(1) == [1]
    assert ladder(64) == [1, 4, 16, 64]
    assert ladder(65) == [1, 4, 16, 64, 65]
    assert ladder(2**26)[-1] == 2**26 and len(ladder(2**26)) == 14


@pytest.mark.parametrize(
    ("size", "time", "latency", "bandwidth"),
    [
        # 8000 bytes take 8 us more than 1: 1 GB/s.
        ([1, 1000, 8000], [2e-6, 3e-6, 10e-6], 2e-6, 1e9),
        # A burst: 1000 bytes pass as fast as 1. What lies between does not count.
        ([1, 1000, 8000], [2e-6, 2e-6, 10e-6], 2e-6, 1e9),
        # A disturbed first size: the shortest time is the latency.
        ([1, 4, 16, 5000], [9e-6, 2e-6, 3e-6, 12e-6], 2e-6, 5e8),
        # The largest message was the fastest: its own time is all that is known.
        ([1, 2], [3.0, 2.0], 2.0, 1.0),
        # Sizes in any order.
        ([3000, 1000], [5e-6, 2e-6], 2e-6, 1e9),
    ],
)
def test_fit_by_hand(size: list[int], time: list[float], latency: float, bandwidth: float) -> None:
    assert latency_and_bandwidth(np.array(size), np.array(time)) == pytest.approx((latency, bandwidth))


def test_summary(links: MeasuredLinks) -> None:
    assert links.source.tolist() == [0, 0, 1] and links.destination.tolist() == [1, 2, 2]
    assert links.latency == pytest.approx([10e-6, 50e-6, 50e-6])
    assert links.bandwidth == pytest.approx([1e9, 1e8, 1e8])
    assert links.between.tolist() == [False, True, True]


def test_a_file_gives_back_what_was_written(tmp_path: Path, links: MeasuredLinks) -> None:
    write_links(tmp_path / "links.h5", links)
    read = read_links(tmp_path / "links.h5")
    for name in ("size", "source", "destination", "time", "latency", "bandwidth", "node", "oversubscription"):
        found, expected = getattr(read, name), getattr(links, name)
        assert found.dtype == expected.dtype and np.array_equal(found, expected), name
    assert read.host == ["a", "a", "b"] and read.device == DEVICES
    with h5py.File(tmp_path / "links.h5", "r+") as file:
        del file["ranks/device"], file["ranks/oversubscription"]
    old = read_links(tmp_path / "links.h5")  # the first of these files say neither
    assert old.device == ["cpu"] * 3 and old.oversubscription.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("time", np.ones((2, 3)), r"/time has the shape \(2, 3\); expected \(3, 3\)"),
        ("latency", np.array([1.0, np.nan, 1.0]), "/latency holds numbers that are not above 0"),
        ("destination", np.array([1, 2, 3]), "/destination holds 1 to 3; expected ranks below 3"),
        ("source", np.array([0.0, 0.0, 1.0]), "/source is float64 .* expected whole numbers"),
        ("bandwidth", None, "there is no dataset /bandwidth"),
        ("ranks/oversubscription", np.array([1.0, 0.5, 1.0]), "/ranks/oversubscription holds numbers that are below 1"),
        ("ranks/oversubscription", np.ones(2), "/ranks/oversubscription has 2 entries; expected 3"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, links: MeasuredLinks, name: str, value: np.ndarray | None, said: str
) -> None:
    path = tmp_path / "links.h5"
    write_links(path, links)
    with h5py.File(path, "r+") as file:
        del file[name]
        if value is not None:
            file[name] = value
    with pytest.raises(DataError, match=f"{path}: {said}"):
        read_links(path)


def test_the_table_has_a_line_for_every_pair(links: MeasuredLinks) -> None:
    assert links_table(links) == [
        "3 ranks on 2 nodes; a message from GPU to GPU takes latency + bytes / bandwidth",
        "ranks  nodes  latency, us  bandwidth, MB/s  1 B, us  1000 B, us  976.6 KiB, us",
        "0 - 1      0         10.0           1000.0     10.0        11.0         1010.0",
        "0 - 2  0 - 1         50.0            100.0     50.0        60.0        10050.0",
        "1 - 2  0 - 1         50.0            100.0     50.0        60.0        10050.0",
    ]


def test_many_ranks_are_shown_by_nodes() -> None:
    where: list[dict[str, int | str]] = [{"node": rank // 4, "host": f"n{rank // 4}"} for rank in range(12)]
    pairs = [(a, b) for a in range(12) for b in range(a + 1, 12)]
    times = {(a, b): INSIDE if a // 4 == b // 4 else OUTSIDE for a, b in pairs}
    many = summarize(times, SIZES, where, ["cpu"] * len(where), [1.0] * len(where))
    assert [line.split() for line in links_table(many)[2:]] == [
        ["0", "6", "10.0", "1000.0", "10.0", "11.0", "1010.0"],
        ["0", "-", "1", "16", "50.0", "100.0", "50.0", "60.0", "10050.0"],
        ["0", "-", "2", "16", "50.0", "100.0", "50.0", "60.0", "10050.0"],
        ["1", "6", "10.0", "1000.0", "10.0", "11.0", "1010.0"],
        ["1", "-", "2", "16", "50.0", "100.0", "50.0", "60.0", "10050.0"],
        ["2", "6", "10.0", "1000.0", "10.0", "11.0", "1010.0"],
    ]


def test_json_has_all(links: MeasuredLinks) -> None:
    found = as_dict(links)
    assert found["pairs"][1]["source"] == 0 and found["pairs"][1]["destination"] == 2
    assert found["pairs"][1]["time"] == OUTSIDE and found["size"] == SIZES and found["node"] == [0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["links.h5"], "a link needs two ranks: give -n RANKS"),
        (["links.h5", "-n", "2", "--largest", "4 GiB"], "--largest 4294967296: expected 2 bytes to 2 GiB - 1"),
        (["{here}", "-n", "2"], "exists already"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    ended = CliRunner().invoke(bench, ["links", *(word.format(here=tmp_path) for word in arguments)])
    assert isinstance(ended.exception, JobError) and said in str(ended.exception)
