"""The picture shows every operation once, where it runs; the command says what the validator found."""

import json

import matplotlib.axes
import pytest

from deepseek_jax import cli, runtime
from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline import __main__ as pipeline
from deepseek_jax.pipeline import make_schedule
from deepseek_jax.pipeline.draw import draw


def drawn(monkeypatch, path, schedule):
    """Draws, and returns the (start, width, top, height, number) of every bar on both axes, in order."""
    bars, texts = [], []
    plain_bar, plain_text = matplotlib.axes.Axes.broken_barh, matplotlib.axes.Axes.text

    def bar(axes, xranges, yrange, **how):
        bars.append((*xranges[0], *yrange, how["facecolor"]))
        return plain_bar(axes, xranges, yrange, **how)

    def text(axes, x, y, label, **how):
        texts.append(label)
        return plain_text(axes, x, y, label, **how)

    monkeypatch.setattr(matplotlib.axes.Axes, "broken_barh", bar)
    monkeypatch.setattr(matplotlib.axes.Axes, "text", text)
    draw(schedule, path)
    return list(zip(bars, texts))


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("dualpipe", 4, 8), ("dualpipev", 2, 4), ("zb1p", 3, 4)])
def test_every_operation_is_drawn_once_in_each_half_and_none_on_top_of_another(
        tmp_path, monkeypatch, name, ranks, microbatches):
    schedule = make_schedule(name, ranks, microbatches)
    operations = [op for row in schedule.table for cell in row for op in cell]

    bars = drawn(monkeypatch, tmp_path / "a.png", schedule)

    assert (tmp_path / "a.png").stat().st_size > 10_000
    for half in (bars[:len(operations)], bars[len(operations):]):
        assert sorted(label for _, label in half) == sorted(str(op.microbatch) for op in operations)
        assert len({color for (*_, color), _ in half}) == len({(op.kind, op.direction) for op in operations})
        for (a, _), (b, _) in ((x, y) for i, x in enumerate(half) for y in half[:i]):
            apart = a[0] + a[1] <= b[0] or b[0] + b[1] <= a[0]
            assert apart or a[2] + a[3] <= b[2] + 1e-9 or b[2] + b[3] <= a[2] + 1e-9


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
