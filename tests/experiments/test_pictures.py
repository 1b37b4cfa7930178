"""The studies' pictures, drawn from the committed results: what a reader sees, in which order, and how legibly."""

import importlib
import itertools
import json
import pathlib

import matplotlib.text
import numpy as np
import pytest

from deepseek_jax import cli, runtime
from experiments.studies.framework import plots, runner
from experiments.studies.pipeline.study import draw_schedules

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "studies"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/results.json") if path.parent.name != "two_hop")
PANELS = {"balance_scope": 6, "bias_rule": 2, "dense": 3, "experts": 2, "fp8": 8, "larger": 2, "load_balance": 3,
          "long_context": 4, "mla": 2, "mtp": 3, "optimizers": 3, "pipeline": 3, "post_training": 3,
          "routing_limit": 2, "sparse_attention": 4, "specialization": 4}  # of all pictures; a colour bar is one


def study(name):
    return importlib.import_module(f"experiments.studies.{name}.study").STUDY


def results_of(name):
    return json.loads((FOLDER / name / "results.json").read_text())


def axes_of(figures):
    return [axis for figure in figures for axis in figure.axes]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """{study: its figures}."""
    figures = {name: [] for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setattr(plots, "save_figure", lambda figure, path, name=name: figures[name].append(figure))
            study(name).draw(results_of(name), [], tmp_path_factory.mktemp(name))
    for figure in itertools.chain(*figures.values()):
        figure.canvas.draw()
    return figures


def arms(*rows):
    """Results of arms with the seeds' values of one metric, `x`."""
    found = {f"arm {n}": {"metrics": {"x": {"mean": float(np.mean(row)), "low": low, "high": max(row) + 1,
                                            "seeds": {str(seed): value for seed, value in enumerate(row)}}}}
             for n, (low, row) in enumerate(rows)}
    return {"arms": found}


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_shows_something(pictures, name):
    axes = axes_of(pictures[name])
    assert all(axis.axison and (axis.lines or axis.images or axis.collections) for axis in axes)
    assert len(axes) == PANELS[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_as_wide_as_a_page_and_its_text_is_legible_there(pictures, name):
    for figure in pictures[name]:
        assert figure.get_figwidth() == 9  # inches
        sizes = {text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()}
        assert min(sizes) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut_off_at_the_edge(pictures, name):
    for figure in pictures[name]:
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


@pytest.mark.parametrize("name", NAMES)
def test_numbers_on_an_axis_are_plain_and_do_not_touch(pictures, name):
    for axis in axes_of(pictures[name]):
        for which, low, high in ((axis.xaxis, "x0", "x1"), (axis.yaxis, "y0", "y1")):
            bounds = sorted(which.get_view_interval())
            labels = [label for at, label in zip(which.get_ticklocs(), which.get_ticklabels())
                      if bounds[0] <= at <= bounds[1] and label.get_visible() and label.get_text()]
            assert not [label for label in labels if "$" in label.get_text()]  # mathematics: powers of ten
            boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: getattr(box, low))
            assert all(getattr(a, high) < getattr(b, low) for a, b in itertools.pairwise(boxes))


def test_the_first_rule_is_on_top_in_both_panels(pictures):
    results = results_of("bias_rule")
    for axis, metric in zip(pictures["bias_rule"][0].axes, ("max_vio_global", "loss")):
        means = [line for line in axis.lines if line.get_marker() == "o"]
        height = [axis.transData.transform((1, line.get_ydata()[0]))[1] for line in means]
        assert height == sorted(height, reverse=True)
        assert [line.get_xdata()[0] for line in means] == [found["metrics"][metric]["mean"]
                                                           for found in results["arms"].values()]
    labels = [label.get_text() for label in pictures["bias_rule"][0].axes[0].get_yticklabels()]
    assert labels == list(results["arms"])


def test_an_interval_that_reaches_zero_ends_in_an_arrow_on_a_logarithmic_axis():
    results, (_, (axis,)) = arms((0.1, [0.5, 1]), (-0.2, [0.2, 3])), plots.figure(3, 1)
    plots.intervals(axis, results, "x")
    plots.cut_at_zero(axis, results, "x")
    arrow, = (line for line in axis.lines if line.get_marker() == "<")
    assert list(arrow.get_ydata()) == [1] and arrow.get_xdata()[0] == axis.get_xlim()[0] < 0.1


def test_differences_are_those_of_equal_seeds_and_say_minus():
    results, (_, (axis,)) = arms((0, [1.0, 2, 3]), (0, [4.0, 6, 8])), plots.figure(3, 1)
    plots.differences(axis, results, "x", [("arm 1", "arm 0"), ("arm 1", "absent")])
    mean, = (line for line in axis.lines if line.get_marker() == "o")
    seeds, = (line for line in axis.lines if line.get_marker() == ".")
    assert mean.get_xdata()[0] == 4 and list(seeds.get_xdata()) == [3, 4, 5]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["arm 1\nminus arm 0"]


def test_schedules_that_coincide_share_a_line_with_both_names():
    _, (axis,) = plots.figure(3, 1)
    rows = [{"schedule": name, "microbatches": n, "idle": idle} for n in (1, 2)
            for name, idle in (("a", 5), ("b", 5 * n), ("c", 5))]
    draw_schedules(axis, rows, lambda row: row["idle"])
    assert [line.get_label() for line in axis.lines] == ["a, c", "b"]


def test_the_speed_up_shown_was_measured(pictures):
    axis = pictures["mtp"][0].axes[2]
    measured = {line.get_label(): line.get_ydata() for line in axis.lines if line.get_label().startswith("measured")}
    assert {name: [round(float(x), 2) for x in y] for name, y in measured.items()} == {
        "measured: tiny": [0.88, 0.98, 1.13, 1.01], "measured: small": [1.05, 1.25]}


def draw_again(monkeypatch, capsys, name, *more):
    monkeypatch.setattr("sys.argv", ["run", "--draw", *more])
    monkeypatch.setattr(runtime, "reuse_memory", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: runner._main(study(name)))
    return stop.value.code, capsys.readouterr().err


def test_pictures_are_drawn_again_without_measuring(monkeypatch, capsys, tmp_path):
    text = (FOLDER / "experts" / "results.json").read_text()
    (tmp_path / "results.json").write_text(text)
    monkeypatch.setattr(runner, "results_folder", lambda *_: tmp_path)
    monkeypatch.setattr(runner, "run", None)

    assert draw_again(monkeypatch, capsys, "experts") == (0, "")

    assert (tmp_path / "experts.png").stat().st_size > 10_000
    assert (tmp_path / "results.json").read_text() == text


def test_what_cannot_be_drawn_again_says_what_to_do(monkeypatch, capsys, tmp_path):
    code, said = draw_again(monkeypatch, capsys, "mla", "--quick", "--workdir", str(tmp_path))
    assert code == 2 and "there is no" in said and "leave --draw out to measure" in said and said.count("\n") == 1
    code, said = draw_again(monkeypatch, capsys, "two_hop")
    assert code == 2 and "does not hold the copies between devices" in said and said.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("fp8", "pipeline")])
def test_a_short_form_with_fewer_arms_is_drawn_too(name, tmp_path):
    results = results_of(name)
    kept = study(name).quick_arms
    results["arms"] = {arm: found for arm, found in results["arms"].items() if arm in kept}
    results["claims"] = [claim for claim in results["claims"] if claim["arm"] in kept and claim["against"] in kept]
    study(name).draw(results, [], tmp_path)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_fp8_is_drawn_from_two_variants_of_one_seed(tmp_path):
    losses = results_of("fp8")["settings"]["tiny"]["losses"]
    short = {variant: {"0": losses[variant]["0"][:4]} for variant in ("bf16", "fp8")}
    study("fp8").draw({"settings": {"tiny": {"losses": short}}}, [], tmp_path)
    assert (tmp_path / "loss_tiny.png").stat().st_size > 10_000
