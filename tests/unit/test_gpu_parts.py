"""What the GPU path decides without a GPU: blocks of memory, which GPU a rank takes, what MPI needs, who goes where."""

from __future__ import annotations

import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from moempi.batch import Sequence, compose
from moempi.device import cuda_binding
from moempi.device.arena import ALIGNMENT, Arena, aligned
from moempi.device.cuda_binding import gpu_index, installed_cupys, refuse_allocators, why_not
from moempi.device.cuda_graphs import Graphs
from moempi.device.product_tiles import LEAN, MIDDLE, THIN, TILES, tile_for, with_room
from moempi.device.telling import telling_cache
from moempi.device.tile_plan import for_kernels, plan_step, plan_tiles
from moempi.errors import JobError
from moempi.exchange import gpu_mpi
from moempi.exchange.waiting import LONGEST, CallCost, Waiting
from moempi.model.attention import Span
from moempi.planning.gpu_memory import GRAPH_SHAPES, ROUND_ROWS, room_of, usual_rows


def test_blocks_are_taken_first_fit_and_join_again() -> None:
    arena = Arena(1024, 4 * ALIGNMENT)
    first, second, third = arena.take(1), arena.take(ALIGNMENT + 1), arena.take(ALIGNMENT)
    assert (first, second, third) == (1024, 1024 + ALIGNMENT, 1024 + 3 * ALIGNMENT)
    assert arena.take(1) is None and arena.in_use == 4 * ALIGNMENT
    arena.give(1024)
    arena.give(1024 + 3 * ALIGNMENT)
    assert arena.take(2 * ALIGNMENT) is None, "two free blocks that do not touch are not one"
    arena.give(1024 + ALIGNMENT)
    assert arena.take(4 * ALIGNMENT) == 1024


def test_blocks_never_overlap_and_an_empty_arena_is_whole() -> None:
    rng = random.Random(3)
    arena, held = Arena(0, 100 * ALIGNMENT), {}
    for _ in range(3000):
        if held and rng.random() < 0.5:
            begin = rng.choice(list(held))
            del held[begin]
            arena.give(begin)
        else:
            size = rng.randint(1, 20 * ALIGNMENT)
            begin = arena.take(size)
            if begin is not None:
                assert all(begin + size <= b or b + s <= begin for b, s in held.items())
                held[begin] = size
        assert arena.in_use == sum(map(aligned, held.values()))
    for begin in held:
        arena.give(begin)
    assert arena.take(100 * ALIGNMENT) == 0


def test_what_never_fits_and_what_was_never_taken_are_errors() -> None:
    arena = Arena(0, ALIGNMENT)
    with pytest.raises(ValueError, match="1024 bytes in an arena of 512"):
        arena.take(ALIGNMENT + 1)
    with pytest.raises(KeyError):
        arena.give(0)


def test_a_gpu_each_or_in_turns() -> None:
    assert [gpu_index(rank, 4, 4, share=False) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_index(rank, 5, 2, share=True) for rank in range(5)] == [0, 1, 0, 1, 0]
    with pytest.raises(JobError, match=r"3 ranks on this node, but 2 GPUs .* run\.share_gpus = true"):
        gpu_index(0, 3, 2, share=False)


CUPY = {"cupy-cuda13x": "14.2.0"}


@pytest.mark.parametrize(
    ("torch_cuda", "seen", "cupys", "expected"),
    [
        ("13.0", True, CUPY, ""),
        ("13.0", True, {"cupy": "14.2.0"}, ""),  # built on the machine itself
        ("12.8", True, {"cupy-cuda12x": "13.6.0"}, ""),
        (None, False, CUPY, "this torch (2.11.0) is built without CUDA: install a CUDA build of it"),
        ("13.0", False, CUPY, "torch sees no GPU: look at nvidia-smi and at CUDA_VISIBLE_DEVICES"),
        ("13.0", True, {}, "there is no cupy: pip install cupy-cuda13x (torch 2.11.0 is built for CUDA 13.0)"),
        (
            "13.0", True, {"cupy-cuda12x": "13.6.0"},
            "cupy-cuda12x 13.6.0 is built for CUDA 12, but torch 2.11.0 for CUDA 13.0: "
            "pip uninstall cupy-cuda12x, then pip install cupy-cuda13x",
        ),
        (
            "12.8", True, CUPY,
            "cupy-cuda13x 14.2.0 is built for CUDA 13, but torch 2.11.0 for CUDA 12.8: "
            "pip uninstall cupy-cuda13x, then pip install cupy-cuda12x",
        ),
        (
            "13.0", True, {**CUPY, "cupy-cuda12x": "13.6.0"},
            "cupy-cuda12x 13.6.0 and cupy-cuda13x 14.2.0 are installed and overwrite each other: "
            "pip uninstall cupy-cuda12x cupy-cuda13x, then pip install cupy-cuda13x",
        ),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_of_a_gpu(
    torch_cuda: str | None, seen: bool, cupys: dict[str, str], expected: str
) -> None:
    assert why_not("2.11.0", torch_cuda, seen=seen, cupys=cupys) == expected


def test_installed_cupys_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in {"cupy_cuda12x": "13.6.0", "cupy_plots": "1.0"}.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    before = installed_cupys()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_cupys() == {**before, "cupy-cuda12x": "13.6.0"}


def test_a_torch_without_cuda_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_binding.torch.version, "cuda", None)
    assert cuda_binding.why_not_here() == why_not(cuda_binding.torch.__version__, None, seen=False, cupys={})


VALUES = ["expandable_segments:True", "a:1, expandable_segments: True", "backend:cudaMallocAsync"]


@pytest.mark.parametrize("value", VALUES)
def test_allocators_that_mpi_cannot_share_are_refused(value: str) -> None:
    with pytest.raises(JobError, match=r"PYTORCH_CUDA_ALLOC_CONF = .*exchange\.gpu_aware = 'off'"):
        refuse_allocators({"PYTORCH_CUDA_ALLOC_CONF": value})
    refuse_allocators({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})


def test_a_child_may_start_a_launcher_of_its_own() -> None:
    kept = {"PATH": "/bin", "OMPI_MCA_pml": "ucx", "UCX_TLS": "sm"}
    launcher = {"OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1", "PRTE_X": "1", "OMPI_MCA_ess_base_vpid": "1"}
    assert gpu_mpi.child_environment(kept | launcher) == kept


def test_mpi_that_is_loaded_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", np)
    environ: dict[str, str] = {}
    assert "loaded before" in gpu_mpi.prepare(environ) and not environ


def test_a_sites_own_mpi_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setenv("MPI4PY_LIBMPI", "/site/libmpi.so")
    environ: dict[str, str] = {}
    assert "site's own MPI" in gpu_mpi.prepare(environ) and not environ


def test_an_mpi_that_was_not_made_ready_is_not_given_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the process; a child's MPI, which is made ready, says nothing of it."""
    monkeypatch.setattr(gpu_mpi, "embedded", lambda: True)
    monkeypatch.setattr(gpu_mpi, "_ready", False)
    monkeypatch.setattr(gpu_mpi, "find_ucx", lambda: None)
    assert "without the wheel libucx-cu13" in gpu_mpi.why_not_ready()
    monkeypatch.setattr(gpu_mpi, "find_ucx", lambda: Path("/ucx"))
    assert "loaded before" in gpu_mpi.why_not_ready()
    monkeypatch.setattr(gpu_mpi, "_ready", True)
    assert gpu_mpi.why_not_ready() == ""
    monkeypatch.setattr(gpu_mpi, "_ready", False)
    monkeypatch.setattr(gpu_mpi, "embedded", lambda: False)
    assert gpu_mpi.why_not_ready() == ""


@pytest.mark.parametrize("lengths", [[1], [64, 65, 1, 200], [1] * 16, [3] * 17])
def test_a_steady_step_is_padded_to_few_shapes(lengths: list[int]) -> None:
    """Its own rows come first and as they are; padding has a page of its own."""
    spans = [Span(n - 1, n, [10 * i + j for j in range(4)]) for i, n in enumerate(lengths)]
    plan, alone, n = plan_step(spans, 4, spare=999), plan_tiles(spans, 4), len(lengths)
    assert plan.steady and len(plan.positions) % 16 == 0 and plan.pages.shape[1] == 32
    for name in ("positions", "write_pages", "write_offsets", "tiles", "row_positions"):
        found, wanted = getattr(plan, name)[:n], getattr(alone, name)
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype, name
    assert torch.equal(plan.pages[:n, : alone.pages.shape[1]], alone.pages)
    assert (plan.write_pages[n:] == 999).all() and (plan.pages[n:, 0] == 999).all()
    assert not plan_step([*spans, Span(5, 7, [0])], 4, spare=999).steady


@pytest.mark.parametrize("group", [1, 8, 40])
def test_the_next_plan_of_a_steady_step_is_as_any(group: int) -> None:
    """Across the ends of pages; where the longest comes to a new one, there is none."""
    ends = [1, 60, 63, 64, 127, 300, 129, 500, 2, 190, 64, 1, 1, 255, 80, 90, 100]
    pages = [[20 * i + j for j in range(12)] for i in range(len(ends))]
    plan, anew = None, []
    for step in range(150):
        spans = [Span(end + step - 1, end + step, of) for end, of in zip(ends, pages, strict=True)]
        expected = plan_step(spans, group, spare=999)
        plan = plan.following if plan is not None else None
        if plan is None:
            anew.append(step)
            plan = expected
        # Kernels read them by their address.
        for name, wanted in {**expected.tensors(), "lines": expected.lines}.items():
            found = getattr(plan, name)
            assert torch.equal(found, wanted) and found.dtype == wanted.dtype and found.is_contiguous(), name
        assert plan.steady and plan.group == group
    assert anew == [0, 13, 77, 141], "513 positions do not fit eight pages"
    assert plan_tiles(spans, group).following is None, "not steady"


def test_what_recordings_read_lies_at_the_same_places_for_every_number_of_sequences_of_a_shape() -> None:
    def sizes(n: int) -> list[tuple[str, int]]:
        sequences = [Sequence(i, [1] * 9, 9, 5, pages=[i], cached=8) for i in range(n)]
        step = compose(0, 1, sequences, 512, 4, partial(plan_step, spare=999))
        found = for_kernels(step)
        assert found["turns"].tolist() == [i + 8 for i in range(n)] + [-1] * (-n % 16)
        assert list(found)[-2:] == ["tokens", "last"], "whose lengths are those of the step"
        return [(name, tensor.nbytes) for name, tensor in found.items()][:-2]

    assert all(sizes(n) == sizes(16) for n in range(1, 16)) and sizes(17) != sizes(16)


@pytest.mark.parametrize(
    "rows,outputs,weights,expected",
    [
        (1, 64, None, (64, 64)),  # nothing fills anything
        (16, 5120, None, (64, 64)),  # 40 tiles of 128 outputs would leave the GPU idle
        (512, 5120, None, (128, 128)),  # 160 of them
        (8192, 7168, None, (128, 128)),  # rows side by side never take the widest
        (8192, 7168, 1, (128, 256)),
        (32, 2048, 32, (64, 128)),  # 512 tiles, none of them full
        (25, 2048, 32, (64, 128)),
        (24, 2048, 32, (32, 128)),  # few weights have more than 32
        (24, 2048, 8, (64, 64)),  # 128 tiles of 128 outputs
        (24, 30000, None, (64, 128)),  # side by side
        (65, 2048, 32, (128, 256)),
        (64, 2048, 32, (64, 128)),  # half of 128 rows are not enough
        (128, 7168, 1, (64, 64)),  # 112 tiles of 64 rows and 128 outputs
    ],
)
def test_tiles_are_filled_and_enough(rows: int, outputs: int, weights: int | None, expected: tuple[int, int]) -> None:
    assert tile_for(torch.bfloat16, rows, outputs, weights)[:2] == expected


def test_a_stage_less_where_all_tiles_have_room() -> None:
    assert [with_room(MIDDLE, n) for n in (264, 265, 396, 397)] == [MIDDLE, LEAN, LEAN, MIDDLE]
    assert all(with_room(tile, 300) == tile for tile in TILES[torch.bfloat16] if tile != MIDDLE)
    assert set(TILES[torch.bfloat16]) > {MIDDLE, LEAN, THIN}, "or no test and no self-test sees them"


def test_tiles_of_float32() -> None:
    assert tile_for(torch.float32, 32, 2048, 64)[:2] == (16, 64)
    assert tile_for(torch.float32, 33, 2048, 64)[:2] == (64, 64)


class FakeGraph:
    """A graph whose memory ends with the last of its pool, as torch's does."""

    living: Counter[int] = Counter()
    used: set[int] = set()

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert pool not in self.used or self.living[pool], "the memory of this pool has gone"
        self.pool = pool
        self.used.add(pool)
        self.living[pool] += 1

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        self.living[self.pool] -= 1


def test_recordings_outlive_those_that_were_pushed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, record, replay; a shape that others pushed out begins again, also where no recording is left."""
    pools = iter(range(100))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    graphs, ran = Graphs(), Counter[int]()

    def run(shape: int) -> int:
        return graphs.run(shape, "part", lambda: ran.update([shape]) or shape)

    assert [run(0) for _ in range(4)] == [0] * 4 and ran[0] == 2, "the first time and the recording"
    for shape in range(1, GRAPH_SHAPES + 1):
        run(shape)
    for _ in range(3):
        assert run(0) == 0
    assert ran[0] == 4 and not FakeGraph.living[0] and FakeGraph.living[1] == 1


def test_work_without_memory_for_its_recording_runs_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: -1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    graphs, ran = Graphs(), Counter[str]()

    def work() -> int:
        ran["times"] += 1
        if ran["times"] == 2:
            raise torch.OutOfMemoryError("in the recording")
        return ran["times"]

    assert [graphs.run("shape", "part", work) for _ in range(4)] == [1, 3, 4, 5]


def test_the_rooms_of_recorded_calls_are_few_and_large_enough() -> None:
    rooms = [room_of(rows) for rows in range(1, 3000)]
    assert all(0 <= room - rows < ROUND_ROWS for rows, room in enumerate(rooms, start=1)), rooms
    assert len(set(rooms)) == 7
    for around in (512, 1024, 2048):
        assert len({room_of(around + off) for off in range(-200, 201)}) == 1, "what varies a little stays in its room"
        assert usual_rows(room_of(around)) == around
    assert usual_rows(room_of(1)) == 128


CALL, SLOT, FEW = 200_000, 1_000, 512
LAYERS = 6
COSTS = {layer: CallCost(CALL, SLOT, FEW) for layer in range(LAYERS)}
COST = CALL + 4 * SLOT


def test_few_rows_wait_for_who_has_sent_of_late() -> None:
    waiting = Waiting(COSTS)
    waiting.add(0, home=0, rows=3, slots=4, now=0)
    assert waiting and waiting.choose(0) == 0, "nobody else is expected yet"
    waiting.add(0, home=1, rows=3, slots=4, now=10)
    waiting.take(0, {}, now=10)
    assert not waiting
    waiting.add(1, home=0, rows=3, slots=4, now=100)
    assert waiting.choose(100) is None and waiting.choose(99 + COST) is None and waiting.choose(100 + COST) == 1
    waiting.add(1, home=1, rows=3, slots=4, now=200)
    assert waiting.choose(200) == 1, "all are here"
    waiting.take(1, {}, now=200)
    waiting.add(2, home=1, rows=1, slots=2, now=300)
    late = 300 + CALL + 2 * SLOT
    assert waiting.choose(late - 1) is None and waiting.choose(late) == 2
    waiting.take(2, {}, now=late)
    waiting.add(3, home=1, rows=1, slots=1, now=late)
    assert waiting.choose(late) == 3, "home 0 did not come, and is not waited for again"


def test_what_costs_nothing_never_waits() -> None:
    waiting = Waiting({0: CallCost(0, 0, 0), 1: CallCost(0, 0, 0)})
    for home in (0, 1):
        waiting.add(0, home, rows=1, slots=1, now=0)
    waiting.take(0, {}, now=0)
    waiting.add(1, home=0, rows=1, slots=1, now=1)
    assert waiting.choose(1) == 1


def test_who_has_sent_rows_of_a_layer_is_not_waited_for_with_more_of_it() -> None:
    waiting = Waiting(COSTS)
    for home in (0, 1):
        waiting.add(0, home, rows=1, slots=1, now=0)
    waiting.take(0, {}, now=0)
    waiting.add(1, home=0, rows=1, slots=1, now=100)
    assert waiting.choose(100) is None, "home 1 is"
    waiting.take(1, {}, now=100)  # for whatever reason
    waiting.add(1, home=1, rows=1, slots=1, now=200)
    assert waiting.choose(200) == 1


@pytest.mark.parametrize("first", range(LAYERS))
def test_the_home_that_is_ahead_waits_for_the_one_behind(first: int) -> None:
    """Else they stay a layer apart; the step's end counts as one layer more."""
    behind, ahead = first, (first + 1) % LAYERS
    waiting = Waiting(COSTS)
    waiting.add(ahead, home=0, rows=1, slots=4, now=0)
    waiting.add(behind, home=1, rows=1, slots=4, now=1)
    assert waiting.choose(1) == behind, "home 0 has been there"
    waiting.take(behind, {}, now=1)
    assert waiting.choose(2) is None and waiting.due == COST
    waiting.add(ahead, home=1, rows=1, slots=4, now=3)
    assert waiting.choose(3) == ahead
    waiting.take(ahead, {}, now=3)
    assert not waiting, "one call for both"


@pytest.mark.parametrize("apart", range(1, LAYERS))
def test_of_two_homes_the_nearer_way_round_says_who_is_behind(apart: int) -> None:
    waiting = Waiting(COSTS)
    waiting.add(0, home=0, rows=1, slots=1, now=0)
    waiting.take(0, {}, now=0)
    waiting.add(apart, home=1, rows=1, slots=1, now=1)
    assert waiting.choose(1) == (None if apart <= LAYERS // 2 else apart)


@pytest.mark.parametrize("places", [(0, LAYERS // 2), (LAYERS // 2, 0), (0, 2, 4), (5, 1, 3)])
def test_homes_do_not_wait_for_each_other_in_a_circle(places: tuple[int, ...]) -> None:
    """Each is behind the next one: what came first is computed."""
    waiting = Waiting(COSTS)
    for home, layer in enumerate(places):
        waiting.add(layer, home, rows=1, slots=1, now=home)
    assert waiting.choose(10) == places[0]
    waiting.note(places[0], home=99, rows=1)  # of which nothing waits here
    assert waiting.choose(10) is None, "it may come"


def test_of_two_layers_each_is_behind_the_other() -> None:
    waiting = Waiting(dict.fromkeys((3, 8), COSTS[0]))
    for home in (0, 1):
        waiting.add(3, home, rows=1, slots=1, now=0)
    waiting.take(3, {}, now=0)
    waiting.add(8, home=0, rows=1, slots=1, now=1)
    assert waiting.choose(1) is None
    waiting.add(8, home=1, rows=1, slots=1, now=2)
    assert waiting.choose(2) == 8
    waiting.take(8, {}, now=2)
    waiting.add(3, home=1, rows=1, slots=1, now=3)
    assert waiting.choose(3) is None, "home 0 begins its next step"


def test_what_stands_in_the_way_waits_no_longer() -> None:
    waiting = Waiting(COSTS)
    for home in (0, 1):
        waiting.add(0, home, rows=1, slots=4, now=0)
    waiting.take(0, {}, now=0)
    waiting.add(1, home=0, rows=1, slots=4, now=100)
    assert waiting.choose(101) is None
    waiting.hurry()
    assert waiting.choose(101) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_is_kept_while_it_holds(seed: int) -> None:
    """Kept or made anew, it waits as long; which of several that need not wait may differ, until one is late."""
    rng, waiting, now, chosen = random.Random(seed), Waiting(COSTS), 0, set[int | None]()
    for _ in range(400):
        now += rng.choice([0, 1, SLOT, CALL, LONGEST // 8])
        layer, home, rows = rng.randrange(LAYERS), rng.randrange(3), FEW if rng.random() < 0.02 else 1
        match rng.randrange(8):
            case 0 | 1 | 2:
                waiting.add(layer, home, rows, slots=4, now=now)
            case 3:
                waiting.note(layer, home, rows)
            case 4 | 5 | 6 if waiting:
                waiting.take(rng.choice(list(waiting._queues)), {home: 3} if rng.random() < 0.2 else {}, now)
            case 7 if rng.random() < 0.1:
                waiting.hurry()
        if waiting:
            kept, anew = waiting.choose(now), waiting._choose(now)
            first = next(iter(waiting._queues))
            assert (kept is None) == (anew is None) and (kept is None or kept in waiting._queues)
            assert kept == first or now - waiting._queues[first].came <= LONGEST
            chosen.add(kept)
    assert None in chosen and len(chosen) > LAYERS // 2


def test_nobody_is_waited_for_longer_than_the_longest_wait() -> None:
    waiting = Waiting(dict.fromkeys(range(2), CallCost(CALL, LONGEST, FEW)))
    waiting.note(1, home=1, rows=1)  # who is expected for layer 0
    waiting.add(0, home=0, rows=1, slots=4, now=0)
    assert waiting.choose(LONGEST) is None and waiting.choose(LONGEST + 1) == 0


def test_what_is_many_rows_for_its_layer_does_not_wait_whoever_has_more() -> None:
    waiting = Waiting({0: CallCost(CALL, SLOT, 100), 1: CallCost(CALL, SLOT, 10)})
    waiting.note(1, home=1, rows=1)  # who is expected for layer 0
    waiting.note(0, home=2, rows=1)  # for layer 1
    waiting.add(0, home=0, rows=50, slots=4, now=0)
    assert waiting.choose(0) is None
    waiting.add(1, home=0, rows=20, slots=4, now=1)
    assert waiting.choose(1) == 1


def test_many_rows_go_first_but_not_for_ever() -> None:
    waiting = Waiting(COSTS)
    waiting.add(0, home=0, rows=5, slots=4, now=0)
    waiting.add(1, home=1, rows=FEW, slots=4, now=1)
    assert waiting.choose(1) == 1
    assert waiting.choose(LONGEST + 1) == 0
    waiting.take(1, {1: 7}, now=2)
    assert waiting.choose(2) == 1, "what a call had no room for is the first of all"
    waiting.take(1, {}, now=3)
    waiting.take(0, {}, now=3)
    waiting.add(2, home=0, rows=5, slots=4, now=4)
    assert waiting.choose(4) == 2, "who sends many rows is not waited for"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_order_of_positions_shows_in_what_attention_is_tested_with(dtype: torch.dtype) -> None:
    """In the dimensions that cancel; in bfloat16 in no others, since rounding hides it."""
    keys, values = (x[0] for x in telling_cache(2, 4, 128, 64, dtype, torch.device("cpu")))  # of a page: by heads
    query = torch.randn(4, 1, 128, generator=torch.Generator().manual_seed(3))
    weights = ((query @ keys.float()).squeeze(1) / 128**0.5).softmax(-1).to(dtype).float()  # [4, 64]
    sums = []
    for order in (range(64), reversed(range(64))):
        total = torch.zeros(4, 128)
        for position in order:
            total += weights[:, position, None] * values[:, position].float()
        sums.append(total.to(dtype))
    differ = (sums[0] != sums[1]).float().mean(0)
    assert differ[::2].mean() > 0.05
    assert dtype == torch.float32 or differ[1::2].mean() < 0.02
    assert sums[0][:, ::2].abs().max() < 1e-5 < sums[0][:, 1::2].abs().mean()
