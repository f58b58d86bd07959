"""Pictures of a trace: what they show by hand-worked traces, their files, and clear errors where there is nothing."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_trace import N, merge, recorder, write_ranks

from moempi import analysis
from moempi.analysis.timeline import WAIT, WORK, Window, busy_window, spans_in
from moempi.cli.trace import PICTURES
from moempi.cli.trace import trace as command
from moempi.errors import DataError, JobError
from moempi.files import schema
from moempi.files.trace import write_part
from moempi.plots import load as load_plot
from moempi.plots import picture
from moempi.stages import ATTEND, DECODE, EXPERT, IDLE, STAGES, STEP
from moempi.stages import WAIT as WAITING

matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib, the extra `plot`")


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "environment", lambda: {"machine": "a test"})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    write_ranks(tmp_path / "t.h5", "full")
    merge(tmp_path / "t.h5", "full")
    return tmp_path / "t.h5"


def one_rank(path: Path, *spans: tuple[int, int, int]) -> analysis.Trace:
    """A trace in which rank 0 has these (stage, begin, end)."""
    notes = recorder("full")
    for stage, begin, end in spans:
        notes.span(stage, 1, (0, 1, DECODE), begin + 1000, end + 1000, 1, 0, -1)
    about = {**notes.describe(), "mode": "exact", "job": "{}", "start": 1000, "offset": 0, "error": 0}
    write_part(path, 0, 1, notes.take(), about)
    merge(path, "full")
    return analysis.load(path)


def plot(trace: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(command, ["plot", str(trace), "--out", str(out), *options])


# ---------------------------------------------------------------- the window


def test_work_names_stages_that_exist_and_none_twice() -> None:
    names = [stage for stages in WORK.values() for stage in stages]
    assert len(names) == len(set(names)) and set(names) < set(STAGES)


def test_spans_are_cut_to_the_window_and_sorted_by_what_they_are_for(tmp_path: Path) -> None:
    trace = one_rank(
        tmp_path / "t.h5", (ATTEND, 0, 10), (EXPERT, 20, 40), (EXPERT, 90, 95), (STEP, 0, 100), (WAITING, 15, 80)
    )
    found = spans_in(trace, Window(5, 30))
    assert {kind: rows.tolist() for kind, rows in found.items() if len(rows)} == {
        "attention": [[0, 5, 10]],
        "expert": [[0, 20, 30]],
        WAIT: [[0, 15, 30]],
    }


def test_a_window_lies_in_the_middle_unless_it_is_asked_elsewhere(tmp_path: Path) -> None:
    trace = one_rank(tmp_path / "t.h5", (ATTEND, 0, 100), (EXPERT, 900, 1100))
    assert busy_window(trace) == Window(0, 1100)
    assert busy_window(trace, length=1e-7) == Window(500, 600)
    assert busy_window(trace, begin=2e-7, length=1e-7) == Window(200, 300)
    with pytest.raises(DataError, match=r"no spans from 1\.000 to 2\.000 s; it has some from 0\.000 to 0\.000 s"):
        busy_window(trace, begin=1.0, length=1.0)


def test_many_spans_make_the_window_shorter(tmp_path: Path) -> None:
    trace = one_rank(tmp_path / "t.h5", *((IDLE, 10 * i, 10 * i + 5) for i in range(3000)))
    window = busy_window(trace)
    assert 1400 < len(spans_in(trace, window)["idle"]) < 1600


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("what", PICTURES)
@pytest.mark.parametrize("ending", picture.FORMATS)
def test_pictures_are_written_in_every_format(what: str, ending: str, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / f"p{ending}"
    done = plot(trace, out, "--what", what)
    assert done.exit_code == 0, done.output
    head = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[ending]
    assert out.read_bytes().startswith(head) and str(out) in done.output


def texts(svg: Path) -> list[str]:
    return [element.text or "" for element in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_load_picture_has_the_shares_as_numbers(trace: Path, tmp_path: Path) -> None:
    assert plot(trace, tmp_path / "p.svg").exit_code == 0
    load = analysis.load_per_expert(analysis.load(trace))
    shares = 100 * load / load.sum(axis=1, keepdims=True)
    shown = texts(tmp_path / "p.svg")
    assert all(f"{share:.0f}" in shown for share in shares.flat)
    assert any("even would be 20.0 %" in text for text in shown)


def test_the_same_trace_gives_the_same_file(trace: Path, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        assert plot(trace, tmp_path / name, "--what", "timeline").exit_code == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_kinds_of_work_differ_without_colour(trace: Path, tmp_path: Path) -> None:
    """Every two kinds differ in hatching, or in luminance by a quarter."""
    from moempi.plots.timeline import timeline_figure

    found = analysis.load(trace)
    figure = timeline_figure(found, busy_window(found))
    shown = [c for c in figure.axes[0].collections if c.get_label() in WORK]
    assert len(shown) == len(WORK)
    looks = [(c.get_hatch(), float(np.dot(c.get_facecolor()[0][:3], (0.21, 0.72, 0.07)))) for c in shown]
    for i, (hatch, light) in enumerate(looks):
        assert all(hatch != other or abs(light - lightness) > 0.25 for other, lightness in looks[i + 1 :])


def test_shades_of_a_matrix_fall_evenly_in_luminance() -> None:
    ramp = matplotlib.colormaps[picture.SHADES](np.linspace(0, 1, 50))[:, :3] @ (0.21, 0.72, 0.07)
    assert np.all(np.diff(ramp) < 0)


def test_many_experts_and_ranks_get_no_numbers_and_fewer_ticks() -> None:
    figure, (axes,) = picture.new_figure(6, 4)
    picture.draw_matrix(figure, axes, np.ones((4, 200)), str, "%")
    picture.label_ticks(axes.xaxis, [str(one) for one in range(200)])
    assert not axes.texts and [tick.get_text() for tick in axes.get_xticklabels()][:3] == ["0", "8", "16"]


# ---------------------------------------------------------------- nothing to show


def test_a_trace_without_spans_says_which_level_has_them(tmp_path: Path) -> None:
    write_ranks(tmp_path / "t.h5", "summary")
    merge(tmp_path / "t.h5", "summary")
    done = plot(tmp_path / "t.h5", tmp_path / "p.png", "--what", "timeline")
    assert isinstance(done.exception, DataError)
    assert "which has no spans; they need 'full'" in str(done.exception)


def test_an_empty_trace_is_refused_with_a_word_why(tmp_path: Path) -> None:
    one_rank(tmp_path / "t.h5")
    for what, word in (("load", "no token"), ("traffic", f"({N} ranks)"), ("timeline", "no spans")):
        done = plot(tmp_path / "t.h5", tmp_path / "p.png", "--what", what)
        assert isinstance(done.exception, DataError) and word in str(done.exception), what
    assert not (tmp_path / "p.png").exists()


def test_bad_requests(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out, options, word in (
        ("p.gif", [], "ends in .png, .svg, .pdf; found '.gif'"),
        ("p", [], "found 'no ending'"),
        ("no/p.png", [], "cannot be written: No such file"),
        ("p.png", ["--begin", "1"], "--what is load"),
    ):
        done = plot(trace, tmp_path / out, *options)
        assert isinstance(done.exception, JobError) and word in str(done.exception), done.exception
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    done = plot(trace, tmp_path / "p.png")
    assert isinstance(done.exception, JobError) and "pip install 'moempi[plot]'" in str(done.exception)


def test_matplotlib_is_loaded_only_to_draw() -> None:
    source = Path(load_plot.__file__).parent
    for module in source.glob("*.py"):
        outside = [line for line in module.read_text().splitlines() if line.startswith(("import", "from"))]
        assert not any("matplotlib" in line for line in outside), module


# ---------------------------------------------------------------- specialists


def test_specialists_by_hand() -> None:
    from moempi.analysis.specialists import Specialist, specialists

    load = np.zeros((2, 3, 4), dtype=np.int64)  # groups, layers, experts
    load[0, 1], load[1, 1] = [6, 2, 2, 0], [1, 1, 1, 1]
    load[0, 2], load[1, 2] = [1, 0, 0, 0], [0, 0, 0, 0]
    assert specialists(["verse", "code"], load) == [
        Specialist(1, "verse", 0, 0.6, 0.25),
        Specialist(1, "code", 3, 0.25, 0.0),
        Specialist(2, "verse", 0, 1.0, 0.0),
        Specialist(2, "code", 1, 0.0, 0.0),
    ]


def test_load_by_group_adds_up_to_the_routes(tmp_path: Path) -> None:
    from moempi.analysis.specialists import load_by_group

    notes = recorder("routes")
    experts, weights = np.array([[0, 1], [1, 4], [0, 3]], dtype=np.int16), np.ones((3, 2), np.float32)
    notes.routes(2, 0, 1, np.array([0, 2, 1]), np.zeros(3, np.int32), experts, weights)
    about = {**notes.describe(), "mode": "exact", "job": "{}", "start": 1000, "offset": 0, "error": 0}
    write_part(tmp_path / "t.h5", 0, 1, notes.take(), about)
    merge(tmp_path / "t.h5", "routes")
    names, load = load_by_group(analysis.load(tmp_path / "t.h5"), ["b", "a", "b"])
    assert names == ["b", "a"] and load.sum() == 6
    assert load[0, 2].tolist() == [1, 2, 0, 0, 1] and load[1, 2].tolist() == [1, 0, 0, 1, 0]
