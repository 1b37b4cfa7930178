"""Answers sampled in FP8: the weights are those of an FP8 checkpoint, and only training answers are sampled in FP8."""

import jax
import numpy as np
import pytest

from deepseek_jax.interop import load_hf, save_hf
from deepseek_jax.posttraining import rollout
from deepseek_jax.posttraining.fp8_sampler import as_fp8
from tests.model import naive
from tests.posttraining import policies
from tests.posttraining.test_rollout import TASK, rolled, trainers_view

CONFIG = policies.config_of(rollout=dict(fp8=True))
SPARSE = dict(index_topk=4, index_heads=4, index_head_dim=8)


@pytest.mark.parametrize("overrides", [dict(d_model=160) | SPARSE, dict(q_rank=None, mtp_depth=0)])
def test_the_weights_are_those_of_an_fp8_checkpoint_to_the_bit(overrides, tmp_path):
    cfg = naive.tiny(**overrides)
    variables = naive.variables_of(cfg)
    save_hf(str(tmp_path / "hf"), cfg, variables, fp8=True)
    _, stored = load_hf(str(tmp_path / "hf"), dtype="float32")
    rounded = jax.device_get(as_fp8(variables))
    jax.tree.map(np.testing.assert_array_equal, rounded, jax.device_get(stored))
    kept = jax.tree.map(lambda a, b: bool((a == b).all()), rounded, variables)
    assert kept["params"]["head"] and kept["router"]["bias"] and not kept["params"]["layers"]["ffn"]["gate"]


@pytest.mark.slow
def test_a_trainer_in_float32_disagrees_with_it_and_counts_how_many_routes_differ():
    variables = naive.variables_of(CONFIG.model)
    batch = rollout.batch_of(CONFIG, rolled(CONFIG))
    found = rollout.disagreement(batch, *trainers_view(CONFIG, batch, variables))
    assert abs(found["ratio_least"] - 1) > 0.01 and found["tokens_rerouted"] > 0
    nearer = rollout.disagreement(batch, *trainers_view(CONFIG, batch, as_fp8(variables)))  # the cache's error is left
    assert nearer["routers_rerouted"] < found["routers_rerouted"]


@pytest.mark.parametrize(("fp8", "number", "expected"), [(True, 0, "fp8"), (True, None, None), (False, 0, None)])
def test_only_answers_to_train_on_are_drawn_in_fp8(fp8, number, expected, monkeypatch):
    def engine(cfg, variables, options):
        raise Made(variables, options.cache)

    class Made(Exception):
        pass

    monkeypatch.setattr(rollout, "Engine", engine)
    monkeypatch.setattr(rollout, "as_fp8", lambda variables: f"{variables} in FP8")
    config = policies.config_of(rollout=dict(fp8=fp8))
    with pytest.raises(Made) as made:
        rollout.answer(config, "weights", TASK, policies.tokenizer(), [rollout.Problem((1,), None)], number)
    assert made.value.args == ("weights in FP8" if expected else "weights", expected)
