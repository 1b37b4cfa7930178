"""Notes on configs that are valid but rarely intended; none on the project's own configs."""

import pytest

from deepseek_jax.config import PRESETS, freeze, load_config
from deepseek_jax.config.advice import advice
from tests.model import naive


def notes(model=None, **balance):
    return advice(freeze({"model": naive.TINY | (model or {}), "balance": balance}))


@pytest.mark.parametrize("name", PRESETS)
def test_no_run_of_the_project_needs_one(name):
    assert advice(load_config(name)) == []


def test_softmax_scores_with_a_bias_are_noted():
    (note,) = notes(dict(score="softmax"), bias_speed=0.01)
    assert "the scores of 8 experts are about 0.12" in note and "balance.bias_speed=0.01" in note
    assert notes(dict(score="softmax", router_bias="none")) == notes(dict(score="softmax"), bias_speed=0.0) == []


def test_two_balancers_are_noted():
    (note,) = notes(aux_loss_weight=1e-3)
    assert note.startswith("two balancers at once")
    assert notes(aux_loss_weight=1e-3, bias_speed=0.0) == []


def test_forced_balance_is_noted():
    (note,) = notes(force_balanced=True)
    assert note.startswith("balance.force_balanced=True is for measuring speed")
