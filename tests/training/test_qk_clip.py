"""QK-clip: the largest logit of each head is measured, and each head above tau is scaled down to it separately."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from deepseek_jax.config import Config, ConfigError, OptimizerConfig, TrainConfig
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.model.attention import LOGITS
from deepseek_jax.training import qk_clip
from deepseek_jax.training.step import next_token_loss, start_state, train_step
from tests.model import naive

MODEL = naive.tiny(num_layers=2)  # a dense layer, one with experts, an MTP module
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (4, 13)).astype(np.int32)
FAST = {"xla_backend_optimization_level": 0}
FIRST = ("dense_layers", "attention")


@functools.cache
def variables(cfg):
    return naive.variables_of(cfg)


@functools.cache
def program(cfg):
    return jax.jit(lambda params: DeepSeekV3(cfg).apply(
        {"params": params, "router": variables(cfg)["router"]}, TOKENS[:, :-1], logits=False, mutable=[LOGITS])[1],
        compiler_options=FAST)


def measured(cfg, params):
    return program(cfg)(params)[LOGITS]


def of_first(tree):
    """The values of the first layer, whose inputs do not change by clipping."""
    return tree[FIRST[0]][FIRST[1]]


@pytest.mark.parametrize("q_rank", [12, None])
def test_a_head_above_tau_comes_down_to_it_and_another_stays(q_rank):
    cfg = dataclasses.replace(MODEL, q_rank=q_rank)
    params = variables(cfg)["params"]
    before = of_first(measured(cfg, params))["largest"][0]
    tau = float(before.mean())  # between the two heads
    high = int(before.argmax())

    clipped = qk_clip.clip(cfg, params, measured(cfg, params), tau)

    after = of_first(measured(cfg, clipped))["largest"][0]
    np.testing.assert_allclose(after[high], tau, rtol=1e-5)
    assert after[1 - high] == before[1 - high] < tau < before[high]


def test_values_and_the_rotary_key_stay_and_rope_takes_all_of_gamma():
    params, N = variables(MODEL)["params"], MODEL.nope_head_dim
    logits = measured(MODEL, params)
    tau = float(of_first(logits)["largest"].min()) / 2
    gamma_H = tau / of_first(logits)["largest"][0]

    old, new = of_first(params), of_first(qk_clip.clip(MODEL, params, logits, tau))

    assert {name for name in old if not jax.tree.all(jax.tree.map(np.array_equal, old[name], new[name]))} == {
        "q_b", "kv_b"}
    np.testing.assert_array_equal(new["kv_b"][..., N:], old["kv_b"][..., N:])
    root_1H1 = np.sqrt(gamma_H)[None, :, None]
    for name in ("q_b", "kv_b"):
        np.testing.assert_allclose(new[name][0, ..., :N], old[name][0, ..., :N] * root_1H1, rtol=1e-6)
    np.testing.assert_allclose(new["q_b"][0, ..., N:], old["q_b"][0, ..., N:] * gamma_H[None, :, None], rtol=1e-6)


def test_every_attention_is_measured_where_its_weights_are():
    params = variables(MODEL)["params"]
    paths = {path[:-1] for path in traverse_util.flatten_dict(params) if path[-1] == "kv_b"}

    logits = traverse_util.flatten_dict(measured(MODEL, params))

    assert {path[:-1] for path in logits} == paths and len(paths) == 3
    assert {x.shape for x in logits.values()} == {(1, 2), (2,)}
    assert qk_clip.largest(measured(MODEL, params)) == max(x.max() for x in logits.values())


def step_of(tau, micro_batches=1, **train):
    """-> (state after one step, metrics)."""
    config = Config(MODEL, train=TrainConfig(batch_size=4, sequence_length=12, steps=10, loss_chunk=7,
                                             accumulation_steps=micro_batches),
                    optimizer=OptimizerConfig(qk_clip=tau, warmup=0.0, learning_rate=1e-3))
    rows = TOKENS.reshape(micro_batches, -1, 13)
    batch = {"tokens": rows, "weights": np.ones(rows.shape, np.float32), "segment_ids": np.zeros_like(rows),
             "active": np.int32(micro_batches)}
    start = start_state(config, variables(MODEL)["params"], variables(MODEL)["router"], jax.random.key(0))
    return jax.jit(functools.partial(train_step, config, **train), compiler_options=FAST)(start, batch)


def test_a_step_clips_what_the_optimizer_made_by_the_logits_before_it():
    logits = measured(MODEL, variables(MODEL)["params"])
    tau = float(of_first(logits)["largest"].mean())
    free, never = step_of(None), step_of(1e9)
    state, metrics = step_of(tau)

    jax.tree.map(np.testing.assert_array_equal, free[0].params, never[0].params)
    assert "max_logit" not in free[1].own
    np.testing.assert_allclose(metrics.own["max_logit"], qk_clip.largest(logits), rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.params,
                 qk_clip.clip(MODEL, free[0].params, logits, tau))


def test_micro_batches_take_the_largest_logit_of_all():
    one, four = (step_of(1e9, n)[1].own["max_logit"] for n in (1, 4))
    np.testing.assert_allclose(four, one, rtol=1e-5)


def test_an_objective_that_measures_no_logits_is_refused():
    def loss(config, params, inputs):
        total, sums = next_token_loss(config, params, inputs)
        return total, sums._replace(logits={})

    with pytest.raises(ConfigError, match="this objective measures no logits; take --config.optimizer.qk_clip=None"):
        step_of(1e9, loss=loss)
