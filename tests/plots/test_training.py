"""The pictures of a run: they are drawn, from the right data, and show what they claim."""

import json
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from deepseek_jax.plots import training as plots
from deepseek_jax.training.metrics import MetricsWriter


def write_run(workdir, steps, layers=2, skewed_until=0, evaluate=True, mtp_depth=1):
    """A run whose expert 0 gets all tokens up to a step, and whose load is even afterwards."""
    (workdir / "config.json").write_text(json.dumps({"model": {"mtp_depth": mtp_depth}}))
    writer = MetricsWriter(workdir, None)
    for step in range(1, steps + 1):
        writer.write(step, loss=8.0 / step, mtp_loss=9.0 / step if step != 2 else float("nan"), lr=1e-3)
        counts_LE = np.full((layers, 8), 4)
        if step <= skewed_until:
            counts_LE = np.eye(8, dtype=int)[[0] * layers] * 32
        if layers:
            writer.write_expert_load(step, counts_LE)
        if evaluate and step % 2 == 0:
            writer.write(step, eval_loss=1.0, eval_bits_per_byte=2.0 / step)
    writer.close()


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved, to inspect their contents."""
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


@pytest.mark.parametrize("steps, layers, evaluate", [(0, 0, False), (1, 1, False), (2, 1, True), (60, 2, True),
                                                     (30, 9, False)])
def test_every_run_can_be_drawn_from_its_first_step_on(tmp_path, steps, layers, evaluate):
    write_run(tmp_path, steps, layers, evaluate=evaluate)
    for draw in (plots.plot_loss, plots.plot_expert_load):
        picture = matplotlib.image.imread(draw(tmp_path))
        assert picture.shape[1] >= 1000 and picture.std() > 0.01
    assert {"loss.png", "expert_load.png"} <= set(os.listdir(tmp_path))
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".new")]


def test_the_loss_picture_shows_training_mtp_and_bits_per_byte(tmp_path, saved):
    write_run(tmp_path, 6)
    plots.plot_loss(tmp_path)
    panels = {axis.get_ylabel(): axis for axis in saved[0].axes}
    training, validation = panels["loss, nats per token"], panels["bits per byte"]
    assert [text.get_text() for text in training.get_legend().get_texts()] == [
        "next token", "token after next, given the next (MTP)"]
    assert "0.333 at step 6" in validation.get_title(loc="left")
    assert len(panels) == 3 and panels["learning\nrate"].get_shared_x_axes().joined(panels["learning\nrate"], training)
    assert list(validation.lines[0].get_xdata()) == [2, 4, 6]
    assert sorted(len(line.get_xdata()) for line in training.lines) == [5, 5, 6, 6]  # NaN is left out


def test_an_evaluation_of_a_part_of_the_text_is_hollow(tmp_path, saved):
    rows = [dict(step=s, tokens=s, loss=3.0, lr=1e-3) for s in (1, 2, 3)]
    rows += [dict(step=s, eval_loss=1.0, eval_bits_per_byte=2.0, eval_share=share) for s, share in ((2, 0.1), (3, 1))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.plot_loss(tmp_path)
    plots.plot_runs({"a": rows, "b": rows[:3]}, tmp_path / "both.png")

    (validation,) = (axis for axis in saved[0].axes if axis.get_ylabel() == "bits per byte")
    points = {line.get_markerfacecolor(): list(line.get_xdata()) for line in validation.lines[1:3]}
    assert points.pop("white") == [2] and list(points.values()) == [[3]]
    assert [text.get_text() for text in validation.get_legend().get_texts()] == [
        "part of the held-out text", "all of it"]
    assert [line.get_markerfacecolor() for line in saved[1].axes[1].lines].count("white") == 2


def test_the_load_picture_is_dark_where_an_expert_is_overloaded_and_white_where_all_is_fair(tmp_path, saved):
    write_run(tmp_path, 40, skewed_until=20)
    plots.plot_expert_load(tmp_path)
    picture = saved[0].axes[0].images[0]
    colours_ES4 = picture.cmap(picture.norm(picture.get_array()))
    assert picture.get_array().shape == (8, 40)
    assert colours_ES4[:, 25:, :3].min() > 0.95
    red, _, blue, _ = colours_ES4[0, 5]
    assert red > 2 * blue  # expert 0, overloaded
    assert colours_ES4[1, 5, 2] > 2 * colours_ES4[1, 5, 0]  # expert 1, idle
    mean = next(line for line in saved[0].axes[2].lines if line.get_label() == "mean of the layers")
    assert mean.get_ydata()[0] == pytest.approx(7) and mean.get_ydata()[-1] == pytest.approx(0)


@pytest.mark.parametrize("layers, mtp_depth, names", [(3, 1, ["MoE 1", "MoE 2", "MTP"]), (2, 0, ["MoE 1", "MoE 2"]),
                                                      (3, 2, ["MoE 1", "MTP 1", "MTP 2"])])
def test_the_load_picture_names_mtp_modules(tmp_path, saved, layers, mtp_depth, names):
    write_run(tmp_path, 3, layers, mtp_depth=mtp_depth)
    plots.plot_expert_load(tmp_path)
    assert [axis.get_ylabel() for axis in saved[0].axes[:layers]] == names


def test_the_picture_of_a_dispatch_is_dark_where_many_copies_go(tmp_path, saved):
    sent_DD = np.zeros((4, 4), int)
    sent_DD[0, 1], sent_DD[0, 2] = 5, 100
    plots.plot_dispatch({"Hop 1": sent_DD}, 2, tmp_path / "a.png", "Diagonals.")
    axis, *_ = saved[0].axes
    picture = axis.images[0]
    light_DD = picture.cmap(picture.norm(picture.get_array()))[..., :3].mean(-1)
    assert light_DD[0, 2] < light_DD[0, 1] < light_DD[0, 0] and light_DD[0, 0] > 0.95
    assert axis.get_title(loc="left") == "Hop 1\n100 copies cross nodes"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1"]
    assert saved[0].get_supxlabel() == "4 devices on 2 nodes. Diagonals."


def test_a_long_run_is_averaged_into_a_picture_of_bounded_width(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(plots, "MAX_COLUMNS", 10)
    write_run(tmp_path, 40, skewed_until=20)
    plots.plot_expert_load(tmp_path)
    loads_ES = saved[0].axes[0].images[0].get_array()
    assert loads_ES.shape == (8, 10)
    assert np.allclose(loads_ES[0], [8] * 5 + [1] * 5)


def test_smoothing_neither_lags_nor_shifts_a_straight_line():
    line = np.arange(500.0)
    assert np.allclose(plots._smooth(line)[5:-5], line[5:-5])
    assert plots._smooth(np.array([3.0])) == [3.0]


def test_drawing_leaves_no_pyplot_behind(tmp_path):
    write_run(tmp_path, 3)
    program = ("import sys; from deepseek_jax.plots import training as plots; plots.plot_loss(sys.argv[1]); "
               "plots.plot_expert_load(sys.argv[1]); assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)


@pytest.mark.parametrize("steps", [601, 800, 900, 1201, 5000])
def test_a_long_run_keeps_its_time_axis_straight(steps):
    columns = plots._pool(np.arange(float(steps)))
    np.testing.assert_allclose(columns, np.linspace(0, steps - 1, plots.MAX_COLUMNS), atol=steps / plots.MAX_COLUMNS)
