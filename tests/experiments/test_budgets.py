"""Studies that compare at equal budgets: the models are as large as they say, and their steps cost the same."""

import json
import types

import pytest

from deepseek_jax.scale.costs import conventions
from experiments.studies.dense import kinds
from experiments.studies.framework import timing
from experiments.studies.optimizers import arms


def test_the_dense_models_have_as_many_active_and_as_many_parameters_in_total():
    sizes = {kind: conventions(kinds.model(kind)) for kind in kinds.KINDS}

    assert sizes["active"]["main model"] == pytest.approx(sizes["mixture"]["active per token"], rel=0.01)
    assert sizes["total"]["main model"] == pytest.approx(sizes["mixture"]["main model"], rel=0.01)
    assert sizes["active"]["main model"] < 0.5 * sizes["total"]["main model"]


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize(("budget", "cost"), [("tokens", lambda kind: 1), ("compute", kinds.flops),
                                              ("time", kinds.seconds)])
def test_steps_of_a_budget_cost_as_much_as_those_of_the_mixture(kind, budget, cost):
    assert kinds.steps(kind, budget) * cost(kind) == pytest.approx(kinds.STEPS * cost("mixture"), rel=0.005)


def test_muon_has_the_steps_that_take_as_long_as_adamws():
    seconds = json.loads(arms.SECONDS.read_text())["seconds"]
    assert arms.equal_time_steps() * seconds["Muon"] == pytest.approx(arms.STEPS * seconds["AdamW"], rel=0.005)
    assert arms.arms()["Muon, twice the rate, equal time"]["train.steps"] == arms.equal_time_steps() < arms.STEPS


def test_compute_of_the_mixture_is_that_of_as_many_active_parameters():
    assert kinds.flops("mixture") == pytest.approx(kinds.flops("active"), rel=0.01)


def test_configs_that_are_timed_take_turns(tmp_path, monkeypatch, capsys):
    order = []
    # A step takes as long as its speed.
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: sum(order)))
    monkeypatch.setattr(timing, "stepper", lambda config: lambda: order.append(config.balance.bias_speed))

    timing.write_seconds("dense", {"one": {"balance.bias_speed": 1.0}, "two": {"balance.bias_speed": 2.0}},
                         tmp_path / "seconds.json", turns=3)

    assert order == 3 * ([1.0] * timing.TIMED + [2.0] * timing.TIMED)
    written = json.loads((tmp_path / "seconds.json").read_text())
    assert written["seconds"] == {"one": 1, "two": 2} and written["command"].endswith("dense.timing")
    assert written["quartiles_of_ratios"] == {"one": [1, 1], "two": [2, 2]}
    assert "two: 2000.0 ms a step, 2.00 of that of one" in capsys.readouterr().out


def test_equal_time_rests_on_ratios_within_turns(tmp_path, monkeypatch):
    """Medians of the turns alone would say 4 and 20: a turn in which one of both is disturbed counts once."""
    taken, calls = {1.0: [1, 4, 10], 2.0: [20, 8, 20]}, []

    def clock():
        return sum(taken[speed][calls[:n].count(speed) // timing.TIMED] for n, speed in enumerate(calls))

    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(timing, "stepper", lambda config: lambda: calls.append(config.balance.bias_speed))

    timing.write_seconds("dense", {"one": {"balance.bias_speed": 1.0}, "two": {"balance.bias_speed": 2.0}},
                         tmp_path / "seconds.json", turns=3)

    assert json.loads((tmp_path / "seconds.json").read_text())["seconds"] == {"one": 4, "two": 8}
