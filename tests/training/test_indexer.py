"""Training the indexer of sparse attention: what its warm-up trains, its metrics, and how a dense run continues."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import io
from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.config import BalanceConfig, Config, InitConfig, OptimizerConfig, TrainConfig, as_dict
from deepseek_jax.model.types import IndexerStats
from deepseek_jax.training.loop import starting_state
from deepseek_jax.training.losses import with_indexer
from deepseek_jax.training.step import init_state, start_state, train_step
from deepseek_jax.training.types import Normalizers
from tests.model import naive

SPARSE = dict(index_topk=4, index_heads=3, index_head_dim=8, num_layers=1, num_dense_layers=0, mtp_depth=0)
ROWS, T = 4, 12


def config_of(model=None, optimizer=None, **train):
    return Config(model=naive.tiny(**SPARSE | (model or {})), balance=BalanceConfig(bias_speed=0.1),
                  train=TrainConfig(**dict(batch_size=ROWS, sequence_length=T, steps=10) | train),
                  optimizer=OptimizerConfig(**dict(warmup=0.0, weight_decay=0.5) | (optimizer or {})))


def batch_of(rng, rows=ROWS, length=T):
    tokens = rng.integers(0, naive.TINY["vocab_size"], (1, rows, length + 1)).astype(np.int32)
    return {"tokens": tokens, "weights": np.ones(tokens.shape, np.float32),
            "segment_ids": np.ones(tokens.shape, np.int32), "active": np.int32(1)}


def state_of(config):
    variables = naive.variables_of(config.model)
    return start_state(config, variables["params"], variables["router"], jax.random.key(0))


def changed(before, after):
    """{path: whether the leaf differs}."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): differs for path, differs in leaves}


def test_the_warm_up_moves_the_indexer_alone():
    config = config_of(dict(index_warmup=True))
    state = state_of(config)

    after, metrics = jax.jit(functools.partial(train_step, config), compiler_options=naive.QUICKLY)(
        state, batch_of(np.random.default_rng(0)))

    moved = changed(state.params, after.params)
    assert len(moved) > 15 and all(differs == ("/indexer/" in path) for path, differs in moved.items())
    assert not any(changed(state.router, after.router).values())
    assert float(metrics.own["indexer_loss"]) > 0 and 0 < float(metrics.own["indexer_recall"]) < 1
    assert float(metrics.loss) > 1  # of the next token, for the curves


@pytest.mark.parametrize(("warmup", "expected"), [(False, 7.0 + 2.0 * 0.5 * 3.0), (True, 2.0 * 0.5 * 3.0)])
def test_the_loss_of_the_indexer_is_added_by_its_weight_and_stands_alone_in_the_warm_up(warmup, expected):
    config = config_of(dict(index_warmup=warmup), indexer_loss_weight=2.0)
    output = types.SimpleNamespace(indexer=IndexerStats(jnp.float32(3.0), jnp.float32(0.25)))
    losses = types.SimpleNamespace(weight=jnp.float32(8.0))
    normalizers = Normalizers(jnp.float32(1), jnp.ones(0), 0.0, share=0.5)

    loss, own = with_indexer(config, jnp.float32(7.0), output, losses, normalizers)

    assert float(loss) == expected
    assert {name: float(x) for name, x in own.items()} == {"indexer_loss": 24.0, "indexer_recall": 2.0}


def saved_run(folder, config):
    state = jax.jit(functools.partial(init_state, config), compiler_options=naive.QUICKLY)()
    folder.mkdir()
    io.write_json(folder / "config.json", as_dict(config))
    checkpoints = Checkpoints(str(folder), 1)
    checkpoints.save(1, state, {})
    checkpoints.close()
    return state


@pytest.mark.parametrize("has_one", [False, True])
def test_a_run_takes_the_indexer_of_the_run_before_or_starts_one(tmp_path, capsys, has_one):
    dense_ffn = dict(num_dense_layers=1)
    before = config_of(dense_ffn | ({} if has_one else dict(index_topk=None)), seed=1)
    source = saved_run(tmp_path / "before", before)
    config = Config(model=config_of(dense_ffn).model, train=TrainConfig(seed=2),
                    init=InitConfig(str(tmp_path / "before")))

    state = starting_state(config)

    fresh = jax.jit(functools.partial(init_state, config), compiler_options=naive.QUICKLY)()
    said = "has dense attention: the indexers start with new weights." in capsys.readouterr().out
    assert said != has_one
    attention = lambda state: state.params["dense_layers"]["attention"]
    np.testing.assert_array_equal(attention(state)["q_a"], attention(source)["q_a"])
    expected = attention(source if has_one else fresh)["indexer"]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), attention(state)["indexer"], expected)


@pytest.mark.slow
def test_the_warm_up_brings_the_divergence_down_by_ten_times():
    config = config_of(dict(index_warmup=True, index_heads=8, index_head_dim=16, attention_block=64),
                       dict(learning_rate=1e-2, weight_decay=0.0), batch_size=16, sequence_length=32, steps=1500)
    state, rng = state_of(config), np.random.default_rng(0)
    step = jax.jit(functools.partial(train_step, config))
    losses, recalls = [], []
    for _ in range(config.train.steps):
        state, metrics = step(state, batch_of(rng, 16, 32))
        losses.append(float(metrics.own["indexer_loss"]))
        recalls.append(float(metrics.own["indexer_recall"]))

    assert np.mean(losses[-20:]) < losses[0] / 10
    assert np.mean(recalls[-20:]) > recalls[0] + 0.1
