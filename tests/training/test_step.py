"""One step: micro-batches add up to the batch, and routing biases move once, by the loads of the complete batch."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import BalanceConfig, Config, DataConfig, OptimizerConfig, TrainConfig
from deepseek_jax.model.router import update_bias
from deepseek_jax.training import step as steps
from deepseek_jax.training.step import accumulate, mtp_weight, split_batch, start_state, train_step
from deepseek_jax.training.types import Sums, TokenLosses
from tests.model import naive

MODEL = naive.tiny(num_layers=2, mtp_depth=2, dtype="float32")
ROWS, T = 8, 12
FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time


def config_of(accumulation_steps=1, model=MODEL, optimizer=None, balance=None, **train):
    """The balance losses have weights so large that omitting one would show."""
    train = dict(batch_size=ROWS, sequence_length=T, loss_chunk=7, steps=10,
                 accumulation_steps=accumulation_steps) | train
    return Config(model=model, train=TrainConfig(**train), optimizer=OptimizerConfig(**(optimizer or {})),
                  balance=BalanceConfig(**{"sequence_loss_weight": 0.5, **(balance or {})}))


def batch_of(micro_batches, seed=0, active=None):
    """ROWS rows; token weights are 0, 1 or in between, and the micro-batches differ much in their sums."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 1, (ROWS, T + 1)) * (rng.random((ROWS, T + 1)) < np.linspace(0.1, 1, ROWS)[:, None])
    made = {"tokens": rng.integers(0, MODEL.vocab_size, (ROWS, T + 1)).astype(np.int32),
            "weights": weights.astype(np.float32), "segment_ids": np.ones((ROWS, T + 1), np.int32)}
    made = {name: x.reshape(micro_batches, -1, T + 1) for name, x in made.items()}
    return made | {"active": np.int32(micro_batches if active is None else active)}


@functools.cache
def variables():
    return naive.variables_of(MODEL)


@functools.cache
def accumulated(config):
    return jax.jit(lambda batch: accumulate(config, variables()["params"], variables()["router"], batch, jnp.int32(0)),
                   compiler_options=FAST)


def assert_close(found, expected, rtol=2e-5):
    """Compares leaf by leaf, to the rounding error of the leaf's largest entry."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max() + 1e-9),
                 found, expected)


def objective_of(config, sums):
    """The differentiated loss without its balance term, computed from the sums of the batch."""
    mtp = (sums.losses.mtp_nats_D / sums.losses.mtp_weight_D).mean()
    return sums.losses.nats / sums.losses.weight + mtp_weight(config, 0) * mtp


def test_four_micro_batches_are_one_large_batch():
    whole, parts = (accumulated(config_of(m))(batch_of(m)) for m in (1, 4))

    assert np.ptp(batch_of(4)["weights"].sum((1, 2))) > 10  # so that a mean of means would be wrong
    assert_close(parts[0], whole[0])
    jax.tree.map(np.testing.assert_array_equal, parts[1].counts, whole[1].counts)
    assert_close(parts[1].losses, whole[1].losses)
    for bias, counts, same in zip(*(jax.tree.leaves(x) for x in (variables()["router"], parts[1].counts,
                                                                 whole[1].counts))):
        np.testing.assert_array_equal(update_bias(bias, counts, 0.01), update_bias(bias, same, 0.01))


def test_the_gradient_by_the_head_is_that_of_the_main_and_the_mtp_loss_by_their_weights():
    config, batch = config_of(1), batch_of(1)
    params = variables()["params"]
    grads, _ = accumulated(config)(batch)
    rng = np.random.default_rng(5)
    # The choice of experts, at which the loss is not continuous, does not depend on the head.
    direction = jax.tree_util.tree_map_with_path(
        lambda path, x: rng.standard_normal(x.shape).astype(np.float32) * (path[0].key == "head"), params)

    @functools.partial(jax.jit, compiler_options=FAST)
    def sums(params):
        return steps.forward(config, params, variables()["router"],
                             split_batch(config, **{k: batch[k][0] for k in ("tokens", "weights", "segment_ids")}))[1]

    def loss(size):
        nats, weight, mtp, mtp_weight_D = sums(jax.tree.map(lambda p, d: p + size * d, params, direction))
        return float(nats / weight + 0.3 * (mtp / mtp_weight_D).mean())

    slope = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
    np.testing.assert_allclose((loss(1e-2) - loss(-1e-2)) / 2e-2, slope, rtol=2e-3)


def test_every_token_is_counted_once_for_each_of_its_experts():
    _, sums = accumulated(config_of(4))(batch_of(4))

    for counts_LE in sums.counts.values():
        np.testing.assert_array_equal(counts_LE.sum(-1), ROWS * T * MODEL.experts_per_token)
    assert {name: len(c) for name, c in sums.counts.items()} == {"bias": MODEL.num_moe_layers, "mtp_bias": 2}


def test_what_lies_in_micro_batches_that_the_ramp_leaves_out_has_no_influence():
    zeros, garbage = batch_of(4, active=2), batch_of(4, active=2)
    for name in ("tokens", "weights", "segment_ids"):
        zeros[name][2:] = 0
        garbage[name][2:] = 7
    a, b = (accumulated(config_of(4))(x) for x in (zeros, garbage))

    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert a[1].counts["bias"].sum() == ROWS / 2 * T * MODEL.experts_per_token * MODEL.num_moe_layers


def test_a_batch_seen_twice_has_the_gradient_of_the_batch():
    half, twice = batch_of(4, active=2), batch_of(4)
    for name in ("tokens", "weights", "segment_ids"):
        twice[name][2:] = twice[name][:2]
    (grads, sums), (same, doubled) = (accumulated(config_of(4))(x) for x in (half, twice))

    assert_close(same, grads)
    assert_close(doubled, jax.tree.map(lambda x: 2 * x, sums))


@pytest.mark.parametrize("remat", ["report", "full"])
def test_recomputing_changes_neither_loss_nor_gradient_nor_loads(remat):
    model = dataclasses.replace(MODEL, remat=remat)
    found, expected = (accumulated(config_of(1, model=m))(batch_of(1)) for m in (model, MODEL))

    jax.tree.map(np.testing.assert_array_equal, found[1].counts, expected[1].counts)
    np.testing.assert_allclose(objective_of(config_of(), found[1]), objective_of(config_of(), expected[1]), rtol=1e-6)
    assert_close(found[0], expected[0])


# The complete step.


def test_steps_trace_once_and_move_the_biases_once_by_the_loads_of_the_batch_until_they_freeze():
    config = config_of(4, ramp_from=2, ramp_until=0.4, ema_decay=0.75, balance=dict(bias_speed=0.01, bias_until=0.5))
    run = jax.jit(chex.assert_max_traces(lambda state, batch: train_step(config, state, batch), n=1),
                  compiler_options=FAST)
    state = start_state(config, variables()["params"], variables()["router"], jax.random.key(0))
    for index, active in enumerate([1, 2, 3, 4, 4, 4, 4]):
        batch = batch_of(4, seed=index, active=active)
        if index == 3:
            batch["tokens"][:] = 5  # every token to the same experts
        old, (state, metrics) = state, run(state, batch)

        assert state.step == index + 1
        for name, counts_LE in metrics.counts.items():
            assert (counts_LE.sum(-1) == active * ROWS // 4 * T * MODEL.experts_per_token).all()
            mean_L1 = np.asarray(counts_LE).mean(-1, keepdims=True)
            moved = np.float32(0.01 if index < 5 else 0) * np.sign(mean_L1 - counts_LE).astype(np.float32)
            np.testing.assert_array_equal(state.router[name], old.router[name] + moved)
        jax.tree.map(lambda e, o, p: np.testing.assert_allclose(e, 0.75 * o + 0.25 * p, rtol=1e-5, atol=1e-7),
                     state.ema, old.ema, state.params)
        assert all(np.isfinite(getattr(metrics, name)) for name in ("loss", "mtp_loss", "lr", "grad_norm"))


@pytest.fixture
def cheap_model(monkeypatch):
    """Replaces the model: gradients equal the parameters, and loads depend only on the step."""
    def accumulate(config, params, router, batch, step, loss, base, reference):
        counts = {name: (jnp.arange(b.size).reshape(b.shape) * (3 + step) % 7).astype(jnp.int32)
                  for name, b in router.items()}
        losses = TokenLosses(jnp.float32(6), jnp.float32(3), jnp.array([2.0, 8.0]), jnp.array([2.0, 4.0]))
        return params, Sums(losses, counts, None, jnp.float32(3), jnp.float32(5))

    monkeypatch.setattr(steps, "accumulate", accumulate)


def run_cheaply(config, n=3):
    params = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "norm": {"scale": jnp.ones(3)}}
    state = start_state(config, params, {"bias": jnp.linspace(-0.1, 0.1, 16).reshape(2, 8)}, jax.random.key(0))
    for _ in range(n):
        state, metrics = train_step(config, state, {"active": np.int32(2)})
    return state, metrics


@pytest.mark.parametrize(
    ("optimizer", "train"),
    [(dict(weight_decay=50.0), {}), (dict(clip_norm=1e-6, b1=0.0), {}), (dict(learning_rate=0.5), {}),
     (dict(moment_dtype="bfloat16"), {}), ({}, dict(ema_decay=0.9))],
    ids=["weight decay", "clipping", "learning rate", "moments", "EMA"])
def test_biases_are_untouched_by(cheap_model, optimizer, train):
    base = dict(learning_rate=0.01, warmup=0.0)
    plain, _ = run_cheaply(config_of(optimizer=base))
    other, _ = run_cheaply(config_of(optimizer=base | optimizer, **train))

    np.testing.assert_array_equal(other.router["bias"], plain.router["bias"])
    assert np.abs(plain.router["bias"] - np.linspace(-0.1, 0.1, 16).reshape(2, 8)).max() > 5e-4  # and they moved
    changed = other.ema if train else other.params
    assert not np.array_equal(changed["w"], plain.params["w"])  # while the variation had an effect
    assert "bias" not in str(jax.tree_util.tree_structure((other.params, other.opt_state, other.ema)))


def test_metrics_are_means_over_what_counted(cheap_model):
    _, metrics = run_cheaply(config_of(), n=1)

    assert (metrics.loss, metrics.mtp_loss) == (2.0, 1.5)
    np.testing.assert_allclose(metrics.grad_norm, np.sqrt((np.linspace(-1, 1, 6) ** 2).sum() + 3), rtol=1e-6)
    np.testing.assert_allclose(metrics.lr, 2.2e-4, rtol=1e-6)
    assert (metrics.sequence_loss, metrics.auxiliary_loss) == (1.5, 2.5)  # of two micro-batches


def test_the_range_of_the_biases_is_that_after_the_step(cheap_model):
    state, metrics = run_cheaply(config_of(), n=2)
    assert (metrics.bias_low, metrics.bias_high) == (state.router["bias"].min(), state.router["bias"].max())
    assert -0.11 < metrics.bias_low < -0.09 and 0.09 < metrics.bias_high < 0.11


def test_a_fresh_moving_average_is_a_copy_that_donation_cannot_take_along():
    params = {"w": jnp.ones(3)}
    state = start_state(config_of(ema_decay=0.9), params, {}, jax.random.key(0))

    assert state.ema["w"] is not params["w"] and np.array_equal(state.ema["w"], params["w"])
    assert start_state(config_of(), params, {}, jax.random.key(0)).ema == {}


@pytest.mark.parametrize(("step", "weight"), [(0, 0.3), (6, 0.3), (7, 0.1), (9, 0.1)])
def test_the_mtp_weight_drops_where_it_is_told(step, weight):
    config = config_of(mtp_weights=((0.0, 0.3), (0.7, 0.1)))

    np.testing.assert_allclose(mtp_weight(config, jnp.int32(step)), weight)


def test_without_masks_a_row_is_one_segment_and_every_weight_stays():
    batch = {name: x[0] for name, x in batch_of(1).items() if name != "active"}
    parts = split_batch(config_of(), **batch)

    np.testing.assert_array_equal(parts.tokens_BT, batch["tokens"][:, :-1])
    np.testing.assert_array_equal(parts.targets_BT, batch["tokens"][:, 1:])
    np.testing.assert_array_equal(parts.weights_BT, batch["weights"][:, 1:])
    assert parts.segment_ids_BT is None and parts.positions_BT is None


def test_with_masks_positions_start_again_and_no_document_predicts_the_next():
    config = dataclasses.replace(config_of(), data=DataConfig(mask_documents=True))
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 4, 4], [1] * 8])
    parts = split_batch(config, jnp.zeros((2, 8), jnp.int32), jnp.full((2, 8), 0.5), segments)

    np.testing.assert_array_equal(parts.positions_BT, [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    np.testing.assert_array_equal(parts.weights_BT, [[0.5, 0.5, 0, 0.5, 0, 0, 0.5], [0.5] * 7])
    np.testing.assert_array_equal(parts.segment_ids_BT, segments[:, :-1])
