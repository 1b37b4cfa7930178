"""The picture shows every operation once, at its place, legibly; the command prints the validator's results."""

import itertools
import json

import matplotlib.axes
import pytest

from deepseek_jax import cli, runtime
from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline import __main__ as pipeline
from deepseek_jax.pipeline import draw as drawing
from deepseek_jax.pipeline import make_schedule
from deepseek_jax.pipeline.draw import draw
from deepseek_jax.pipeline.validate import validate


def drawn(monkeypatch, path, schedule):
    """Draws, and returns {(start, width, top, height): the lines that it is on} and the numbers' (line, x, label)."""
    bars, texts, colours = {}, [], set()
    plain_bar, plain_text = matplotlib.axes.Axes.broken_barh, matplotlib.axes.Axes.text

    def bar(axes, xranges, yrange, **how):
        bars.setdefault((*xranges[0], *yrange), []).append(axes.get_xlim())
        colours.add(how["facecolor"])
        return plain_bar(axes, xranges, yrange, **how)

    def text(axes, x, y, label, **how):
        texts.append((axes.get_xlim(), x, label))
        return plain_text(axes, x, y, label, **how)

    monkeypatch.setattr(matplotlib.axes.Axes, "broken_barh", bar)
    monkeypatch.setattr(matplotlib.axes.Axes, "text", text)
    draw(schedule, path)
    return bars, texts, colours


SCHEDULES = [("dualpipe", 4, 8, 1), ("dualpipe", 4, 16, 2), ("dualpipev", 2, 4, 1), ("zb1p", 3, 30, 3)]


@pytest.mark.parametrize(("name", "ranks", "microbatches", "lines"), SCHEDULES)
def test_every_operation_is_drawn_and_numbered_once_and_none_on_top_of_another(
        tmp_path, monkeypatch, name, ranks, microbatches, lines):
    schedule = make_schedule(name, ranks, microbatches)
    operations = [op for row in schedule.table for cell in row for op in cell]

    bars, texts, colours = drawn(monkeypatch, tmp_path / "a.png", schedule)

    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert sorted(label for *_, label in texts) == sorted(str(op.microbatch) for op in operations)
    assert len(bars) == len(operations)
    assert len(colours) == len({(op.kind, op.direction) for op in operations})
    for a, b in itertools.combinations(bars, 2):
        apart = a[0] + a[1] <= b[0] or b[0] + b[1] <= a[0]
        assert apart or a[2] + a[3] <= b[2] + 1e-9 or b[2] + b[3] <= a[2] + 1e-9


@pytest.mark.parametrize(("name", "ranks", "microbatches", "lines"), SCHEDULES)
def test_lines_follow_each_other_and_a_bar_is_on_each_that_it_reaches_into(
        tmp_path, monkeypatch, name, ranks, microbatches, lines):
    schedule = make_schedule(name, ranks, microbatches)

    bars, texts, _ = drawn(monkeypatch, tmp_path / "a.png", schedule)

    limits = sorted({limit for on in bars.values() for limit in on})
    assert len(limits) == lines and limits[0][0] == 0 and limits[-1][1] == pytest.approx(validate(schedule).makespan)
    assert all(a[1] == pytest.approx(b[0]) and b[1] - b[0] <= 36 for a, b in itertools.pairwise(limits))
    for (start, width, *_), on in bars.items():
        assert sorted(on) == [(low, high) for low, high in limits if start < high and start + width > low]
    assert all(low <= x <= high for (low, high), x, _ in texts)


def test_a_page_shows_the_numbers_and_a_legend_of_five(tmp_path, monkeypatch):
    figures, save = [], drawing.save_figure
    monkeypatch.setattr(drawing, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))

    draw(make_schedule("dualpipe", 8, 20), tmp_path / "a.png")

    figure, = figures
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*drawing.MEANING.values(), "paler: other direction"]
    assert "66 units of time (68 in lock step)" in figure.axes[0].get_title(loc="left")
    assert figure.get_figwidth() == 9 and min(text.get_fontsize() for axes in figure.axes for text in axes.texts) >= 8
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def test_very_unequal_costs_do_not_make_it_endless(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, path: saved.append(figure.get_figheight()))
    draw(make_schedule("1f1b", 2, 4), tmp_path / "a.png", {"f": 0.001, "b": 2, "w": 0.5})
    assert saved[0] <= 201


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["pipeline", *arguments])
    monkeypatch.setattr(runtime, "reuse_memory", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.run(pipeline.main)
    return stop.value.code, *capsys.readouterr()


def test_the_command_draws_and_writes_what_the_validator_found(tmp_path, monkeypatch, capsys):
    plot, figures = tmp_path / "dualpipe.svg", tmp_path / "dualpipe.json"

    code, out, _ = run(monkeypatch, capsys, "--schedule", "dualpipe", "--ranks", "8", "--microbatches", "20", "--plot",
                       str(plot), "--json", str(figures))

    assert code == 0
    assert plot.read_text().startswith("<?xml")
    result = json.loads(figures.read_text())
    assert (result["makespan"], result["lockstep_makespan"], result["idle"]) == (66, 68, [6] * 8)
    assert "66" in out and "68" in out


def test_the_table_has_a_row_for_every_schedule_that_exists(tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--schedule", "all", "--ranks", "3,4", "--microbatches", "8")

    assert code == 0
    rows = [line.split()[:2] for line in out.splitlines()[1:]]
    names = ["gpipe", "1f1b", "zb1p"]
    assert rows == [[name, "3"] for name in [*names, "dualpipev"]] + [
        [name, "4"] for name in [*names, "dualpipe", "dualpipev"]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--schedule", "dualpipe", "--ranks", "7", "--microbatches", "20"], "ranks=7 must be even; take 8"),
        (["--schedule", "dualpipe", "--ranks", "8", "--microbatches", "10"], "needs at least 16 micro-batches"),
        (["--schedule", "dual", "--ranks", "8", "--microbatches", "10"], "take one of gpipe"),
        (["--schedule", "all", "--ranks", "8", "--microbatches", "x"], "--microbatches x should be numbers"),
        (["--schedule", "all", "--ranks", "8", "--microbatches", "0"], "microbatches=0 must be a whole number"),
        (["--schedule", "all", "--ranks", "8", "--microbatches", "20", "--plot", "a.png"], "draws one schedule"),
        (["--schedule", "1f1b", "--ranks", "4,8", "--microbatches", "20"], "say --schedule all"),
        (["--schedule", "1f1b", "--ranks", "4", "--microbatches", "20", "--costs", "1,2"], "three or four numbers"),
        (["--schedule", "1f1b", "--ranks", "4", "--microbatches", "20", "--plot", "a.xyz"], "cannot draw a.xyz"),
        (["--schedule", "1f1b", "--ranks", "4", "--microbatches", "20", "--costs", "1,1,2"], "part of the backward"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capsys, arguments, complaint):
    code, out, err = run(monkeypatch, capsys, *arguments)

    assert code == 2
    assert err.startswith("error: ") and complaint in err and len(err.splitlines()) == 1


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot draw"):
        draw(make_schedule("1f1b", 2, 2), tmp_path / "a.txt")
