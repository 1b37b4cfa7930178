"""A user-defined part that does not work is named in one line, before any data is read."""

import jax.numpy as jnp
import pytest

from deepseek_jax.config import BalanceConfig, ConfigError
from deepseek_jax.model.parts import check_parts
from deepseek_jax.model.router import BiasRule
from deepseek_jax.model.types import Routing
from examples.own_router import hash_route
from tests import runs
from tests.model import naive


def raising(cfg, x_ND, weights, bias_E, context):
    raise ValueError("no such\nexpert")


def three(cfg, x_ND, weights, bias_E, context):
    return 3


def float_choices(*arguments):
    scores_NE, chosen_NK, gates_NK = hash_route(*arguments)
    return Routing(scores_NE, chosen_NK.astype(jnp.float32), gates_NK)


def a_choice_too_many(*arguments):
    scores_NE, chosen_NK, gates_NK = hash_route(*arguments)
    return Routing(scores_NE, jnp.pad(chosen_NK, ((0, 0), (0, 1))), gates_NK)


FAILS = " fails when a model is built with it: "


def fails(model, *parts, balance=None):
    with pytest.raises(ConfigError) as error:
        check_parts(model, balance)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(("name", "complaint"), [
    ("naive", "is no function"),
    ("check_parts", FAILS + "TypeError"),
    ("raising", FAILS + "ValueError: no such expert"),
    ("three", "returned 3; a rule returns Routing(scores, chosen, gates): float [8, 8], int [8, 3], float [8, 3]."),
    ("float_choices", "a rule returns Routing(scores, chosen, gates)"),
    ("a_choice_too_many", "a rule returns Routing(scores, chosen, gates)"),
])
def test_a_routing_rule(name, complaint):
    fails(naive.tiny(router=f"{__name__}:{name}"), f"model.router='{__name__}:{name}'", complaint)


@pytest.mark.parametrize(("name", "complaint"), [("FAILS", "is no module"), ("three", FAILS + "TypeError")])
def test_an_attention(name, complaint):
    fails(naive.tiny(attention=f"{__name__}:{name}"), f"model.attention='{__name__}:{name}'", complaint)


ONE_VALUE = BiasRule(lambda bias_LE: (), lambda bias_LE, counts_LE, speed, state: bias_LE)
NO_STATE = BiasRule(lambda bias_LE: bias_LE, lambda bias_LE, counts_LE, speed, state: (bias_LE, ()))
WHOLE_NUMBERS = BiasRule(lambda bias_LE: (), lambda bias_LE, counts_LE, speed, state: (counts_LE, state))
ONE_ARGUMENT = BiasRule(lambda bias_LE: (), lambda bias_LE: (bias_LE, ()))
GOOD = BiasRule(lambda bias_LE: bias_LE, lambda bias_LE, counts_LE, speed, state: (bias_LE - speed * state, state))


@pytest.mark.parametrize(("name", "complaint"), [
    ("ONE_VALUE", "update must return (biases, state)"),
    ("NO_STATE", "update must return (biases, state)"),
    ("WHOLE_NUMBERS", "update must return (biases, state)"),
    ("ONE_ARGUMENT", FAILS + "TypeError"),
])
def test_a_bias_rule(name, complaint):
    fails(naive.tiny(), f"balance.bias_rule='{__name__}:{name}'", complaint,
          balance=BalanceConfig(bias_rule=f"{__name__}:{name}"))


def test_parts_that_work_say_nothing():
    check_parts(naive.tiny(router="examples.own_router:hash_route"), BalanceConfig(bias_rule=f"{__name__}:GOOD"))


def test_training_names_the_part_before_it_touches_the_work_directory(tmp_path):
    config = runs.write_config(tmp_path)
    said = runs.run("train", "--config", config, "--workdir", tmp_path / "run",
                    f"--config.model.router={__name__}:three")
    said.assert_error("returned 3; a rule returns Routing")
    assert not (tmp_path / "run").exists()
