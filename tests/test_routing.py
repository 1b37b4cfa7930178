"""`load` and `routing_of`: loading a run or a checkpoint, and the experts that it chooses for the tokens of a text."""

import os

import jax
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.config import ConfigError
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.interop import save_hf
from tests.model import naive


@pytest.fixture(scope="module")
def model():
    cfg = naive.tiny(vocab_size=288, num_layers=2)
    return deepseek_jax.LoadedModel(cfg, naive.variables_of(cfg), train_tokenizer(["def value(17):\n"] * 20, 288))


def test_the_routes_of_a_text_are_those_of_the_model_token_by_token(model):
    routing = deepseek_jax.routing_of(model, "def value(17):")
    cfg, variables, tokenizer = model

    assert "".join(routing.tokens[1:]) == "def value(17):" and routing.ids_T[0] == tokenizer.bos
    T, L, E, K = len(routing.tokens), cfg.num_moe_layers, cfg.num_experts, cfg.experts_per_token
    assert routing.scores_LTE.shape == (L, T, E) and routing.chosen_LTK.shape == (L, T, K)
    output = deepseek_jax.DeepSeekV3(cfg).apply(variables, routing.ids_T[None])
    np.testing.assert_array_equal(routing.loads(), output.counts["bias"])
    assert 0 < routing.scores_LTE.min() and routing.scores_LTE.max() < 1  # sigmoids


def test_a_model_without_experts_says_so(model):
    dense = model._replace(cfg=deepseek_jax.model_config("tiny", num_layers=1, num_dense_layers=1, mtp_depth=0))
    with pytest.raises(ConfigError, match="no experts"):
        deepseek_jax.routing_of(dense, "x")


def test_what_is_neither_a_run_nor_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no config.json"):
        deepseek_jax.load(str(tmp_path))


def test_on_the_host_the_same_variables_are_numpy_arrays(model, tmp_path):
    folder = str(tmp_path / "hf")
    save_hf(folder, model.cfg, model.variables)
    model.tokenizer.save(os.path.join(folder, "tokenizer.json"))

    found, expected = (deepseek_jax.load(folder, on_host=on_host).variables for on_host in (True, False))

    assert all(type(x) is np.ndarray for x in jax.tree.leaves(found))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_step_and_an_average_are_of_runs_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    for options in (dict(step=3), dict(ema=True)):
        with pytest.raises(ConfigError, match="no moving average and no steps"):
            deepseek_jax.load(str(tmp_path), **options)
