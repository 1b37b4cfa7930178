"""Pictures of bytes: every byte is drawn, and every group has a colour and a descriptive name."""

import json
import pathlib

import pytest

from deepseek_jax.scale import draw, memory

FOLDER = pathlib.Path("experiments/scale")
REPORTS = [path for path in sorted(FOLDER.glob("*.json")) if "bytes_per_device" in json.loads(path.read_text())]


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are drawn, instead of writing files."""
    drawn = []
    monkeypatch.setattr(draw, "save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def ends(figure):
    return [max(bar.get_x() + bar.get_width() for bar in axis.patches) for axis in figure.axes]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_bars_end_at_the_totals_of_the_report(path, figures):
    report = json.loads(path.read_text())
    draw.draw_report("unused.png", report)

    bars = [report[key] for key in ("planned", "given", "bytes") if report.get(key)]
    totals = [sum(bar.values()) / 1e9 for bar in bars]
    assert totals[-1] == report["bytes_per_device"] / 1e9
    assert ends(figures[0]) == pytest.approx(totals, rel=2e-3)
    assert path.with_suffix(".png").exists()


def test_every_group_of_the_planner_has_a_name_and_a_colour_of_its_own():
    assert memory.LABELS.keys() == set(memory.GROUPS) <= draw.COLOURS.keys()
    assert len({draw.COLOURS[group] for group in memory.GROUPS}) == len(memory.GROUPS)


def test_groups_that_are_too_thin_are_drawn_together(figures):
    draw.draw_memory("unused.png", {"bar": {"masters": 50e9, "moments": 0.3e9, "kept": 0.2e9}}, 80e9, "")

    names = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert names == ["master weights, float32: 50.0 GB", "smaller groups: 0.5 GB"]
    assert ends(figures[0]) == pytest.approx([50.5])


@pytest.mark.parametrize(("size", "line"), [(50e9, True), (1e9, False)])
def test_the_line_at_the_memory_is_there_where_it_is_near(size, line, figures):
    draw.draw_memory("unused.png", {"bar": {"masters": size}}, 80e9, "")

    axis = figures[0].axes[0]
    assert bool(axis.lines) == line and "80 GB" in axis.get_xlabel()
    assert (axis.get_xlim()[1] > 80) == line


def test_a_decode_step_is_said_to_have_a_complete_copy_on_each_device(figures):
    draw.draw_report("unused.png", json.loads((FOLDER / "v2_lite_16b_h100_8_decode.json").read_text()))

    assert "each device with a complete copy" in figures[0].get_suptitle()
