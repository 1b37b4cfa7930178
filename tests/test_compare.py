"""`compare`: the results of runs, and the differences between their configs."""

import json

import pytest

from deepseek_jax.config import as_dict, load_config
from deepseek_jax.table import aligned
from tests import runs


@pytest.fixture
def two(tmp_path):
    """Two runs of 60 steps that differ in their learning rate."""
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        config = as_dict(load_config("tiny"))
        config["optimizer"]["learning_rate"] = rate
        rows = [dict(step=s, tokens=64 * s, loss=9.0 if s <= 10 else 5.0 + rate, max_vio=0.5) for s in range(1, 61)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_only_what_differs_is_shown_and_the_last_steps_alone_count(two):
    result = runs.run("compare", two / "a", two / "b", "--json", two / "table.json")

    assert result.code == 0
    head, first, *rest = (line.split() for line in result.out.splitlines())
    assert head == ["a", "b"] and first == ["optimizer.learning_rate", "0.001", "0.002"]
    assert ["loss,", "last", "50", "steps", "5.001", "5.002"] in rest
    assert ["tokens_per_second,", "last", "50", "steps", "-", "-"] in rest and ["step", "60", "60"] in rest
    table = json.loads((two / "table.json").read_text())
    assert [row["step"] for row in table.values()] == [60, 60]


def test_runs_that_hold_out_different_texts_are_noted(two):
    assert "cannot be compared" not in runs.run("compare", two / "a", two / "b").err
    config = json.loads((two / "a" / "config.json").read_text())
    config["data"]["validation_fraction"] = 0.5
    (two / "a" / "config.json").write_text(json.dumps(config))
    assert "so their bits_per_byte cannot be compared" in runs.run("compare", two / "a", two / "b").err


def test_runs_that_scored_different_shares_of_the_text_are_noted(two):
    for name, share in (("a", 0.25), ("b", 1.0)):
        with open(two / name / "metrics.jsonl", "a") as f:
            f.write(json.dumps(dict(step=60, eval_loss=1.0, eval_bits_per_byte=2.0, eval_share=share)) + "\n")
    result = runs.run("compare", two / "a", two / "b")
    assert result.err.startswith("note: eval_share") and result.err.count("\n") == 1
    assert ["eval_share", "0.25", "1"] in [line.split() for line in result.out.splitlines()]


def test_columns_are_as_wide_as_their_longest_cell():
    assert aligned([("", "one"), ("first", "2"), ("b", "3,000")]) == "         one\nfirst      2\nb      3,000"
