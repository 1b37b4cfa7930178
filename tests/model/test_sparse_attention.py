"""Sparse attention: choices and scores against loops, its memory, and which loss trains which parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, Yarn
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.model.attention import MLA
from deepseek_jax.model.indexer import chosen_mask
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.sparse_attention import SparseMLA, divergence, recall
from tests.model import naive
from tests.precision import float64

SPARSE = dict(index_topk=3, index_heads=3, index_head_dim=7)
T = 9
POSITIONS = np.stack([np.arange(T), [0, 1, 2, 3, 4, 0, 1, 2, 3]])
SEGMENTS = np.array([[0] * T, [0] * 5 + [1] * 4])


def module_of(**overrides):
    """cfg, SparseMLA, its variables, and its input arrays, in float64."""
    cfg = naive.tiny(dtype="float64", **SPARSE | overrides)
    x_BTD = np.random.default_rng(0).standard_normal((2, T, cfg.d_model))
    rope = rope_table(cfg, POSITIONS, jnp.float64)
    module = SparseMLA(cfg)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_BTD, rope, SEGMENTS)
    return cfg, module, naive.fill(shapes, np.float64), (x_BTD, rope, SEGMENTS)


def run(module, variables, *arrays):
    return jax.jit(module.apply, compiler_options=naive.QUICKLY)(variables, *arrays)


def without_indexer(tree):
    return {k: without_indexer(x) for k, x in tree.items() if k != "indexer"} if hasattr(tree, "items") else tree


@pytest.mark.parametrize(
    "overrides",
    [dict(), dict(attention_block=64, index_topk=1),
     dict(yarn=Yarn(original_length=32, mscale=0.7, mscale_all_dim=0.5), rope_theta=100.0)],
    ids=["blocks", "one_block_one_token", "yarn"],
)
def test_sparse_attention_is_the_naive_one_in_float64(overrides):
    with float64():
        cfg, module, variables, arrays = module_of(**overrides)

        y_BTD, _ = run(module, variables, *arrays)

        expected = [naive.mla(cfg, variables["params"], *row) for row in zip(arrays[0], POSITIONS, SEGMENTS)]
        np.testing.assert_allclose(y_BTD, np.stack(expected), atol=1e-12)


@pytest.mark.parametrize("overrides", [dict(index_topk=T), dict(index_topk=2, index_warmup=True)],
                         ids=["topk_of_all", "warm_up"])
def test_attention_that_chooses_all_tokens_is_the_dense_one(overrides):
    with float64():
        cfg, module, variables, arrays = module_of(**overrides)
        y_BTD, stats = run(module, variables, *arrays)
        expected_BTD = run(MLA(cfg), without_indexer(variables), *arrays)

        np.testing.assert_allclose(y_BTD, expected_BTD, atol=1e-12)
    assert (float(stats.recall) > 1 - 1e-12) == ("index_warmup" not in overrides)


def test_a_model_reports_the_mean_of_its_layers_and_mtp_modules():
    cfg = naive.tiny(**SPARSE, num_layers=2)
    variables, tokens_BT = naive.variables_of(cfg), np.random.default_rng(0).integers(0, 64, (2, T))
    dense = naive.tiny(num_layers=2)

    output = naive.forward(cfg)(variables, tokens_BT)
    last = variables["params"]["mtp_1"]["block"]["attention"]["indexer"]
    last["weights_proj"] = np.zeros_like(last["weights_proj"])
    silent = naive.forward(cfg)(variables, tokens_BT)

    assert silent.indexer.loss != output.indexer.loss and silent.indexer.recall != output.indexer.recall
    assert output.indexer.loss.shape == () and 0 < float(output.indexer.recall) < 1
    np.testing.assert_array_equal(silent.logits_BTW, output.logits_BTW)
    assert jax.eval_shape(naive.forward(dense), without_indexer(variables), tokens_BT).indexer is None


@pytest.mark.parametrize("topk", [1, 3, 5, 8])
def test_of_equal_scores_the_first_are_chosen_as_a_stable_sort_does(topk):
    score_BTS = jnp.asarray(np.random.default_rng(1).integers(-1, 3, (2, 4, 7)), jnp.float32)
    score_BTS = score_BTS.at[0, 0, 2:].set(-jnp.inf)

    found = np.asarray(chosen_mask(score_BTS, topk))

    expected = np.zeros(found.shape, bool)
    np.put_along_axis(expected, np.argsort(-score_BTS, axis=-1, stable=True)[..., :topk], True, axis=-1)
    np.testing.assert_array_equal(found, expected)


def test_gradients_are_slopes_and_the_loss_of_the_indexer_reaches_the_indexer_alone():
    with float64():
        _, module, variables, arrays = module_of()

        def objectives(params):
            y_BTD, stats = module.apply({"params": params}, *arrays)
            return jnp.stack([(y_BTD ** 2).mean(), stats.loss])

        @functools.partial(jax.jit, compiler_options=naive.QUICKLY)
        def values_and_gradients(params):
            values, pull = jax.vjp(objectives, params)
            return values, pull(jnp.array([1.0, 0.0]))[0], pull(jnp.array([0.0, 1.0]))[0]

        params, rng, h = variables["params"], np.random.default_rng(4), 1e-6
        _, main, indexer = values_and_gradients(params)
        for name in params:
            reached = [any(np.any(g) for g in jax.tree.leaves(grads[name])) for grads in (main, indexer)]
            assert reached == [name != "indexer", name == "indexer"], name
        drawn = jax.tree.map(lambda x: rng.standard_normal(x.shape), params)
        for part, grads in enumerate((main, indexer)):  # each along a direction of the parameters that it trains
            direction = {name: jax.tree.map(lambda d, by=(name == "indexer") == part: d * by, tree)
                         for name, tree in drawn.items()}
            there, back = (values_and_gradients(jax.tree.map(lambda x, d, h=h: x + h * d, params, direction))[0][part]
                           for h in (h, -h))
            slope = (there - back) / (2 * h)
            along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)))
            np.testing.assert_allclose(along, slope, rtol=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
def test_loss_and_recall_are_those_of_the_attention_written_out(warmup):
    rng = np.random.default_rng(5)
    s_BHTS, score_BTS = rng.standard_normal((1, 2, 3, 6)), rng.standard_normal((1, 3, 6))
    chosen_BTS = rng.permuted(np.arange(6) < 3, axis=-1)[None, None] | np.zeros((1, 3, 1), bool)
    seen_BTS = np.ones((1, 3, 6), bool)
    over_BTS = seen_BTS if warmup else chosen_BTS
    share = lambda s, over: np.exp(s) * over / (np.exp(s) * over).sum(-1, keepdims=True)
    p_BTS, q_BTS = share(s_BHTS, over_BTS[:, None]).mean(1), share(score_BTS, over_BTS)
    with float64():
        found = divergence(jnp.asarray(p_BTS), jnp.asarray(score_BTS), over_BTS)
        mass = recall(jnp.asarray(s_BHTS), seen_BTS, chosen_BTS)

    logs = np.log(np.where(over_BTS, p_BTS, 1)) - np.log(np.where(over_BTS, q_BTS, 1))
    np.testing.assert_allclose(found, (p_BTS * logs).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(mass, (share(s_BHTS, True) * chosen_BTS[:, None]).sum(-1).mean(1), rtol=1e-12)


def test_scores_of_all_queries_never_exist_at_once():
    cfg, T = naive.tiny(**SPARSE, num_heads=8, attention_block=8), 256
    module, x_BTD = SparseMLA(cfg), jnp.zeros((1, T, cfg.d_model))
    rope = rope_table(cfg, jnp.arange(T)[None], jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_BTD, rope, None)
    total = lambda variables: sum(x.sum() for x in jax.tree.leaves(module.apply(variables, x_BTD, rope, None)))

    compiled = jax.jit(jax.grad(total), compiler_options=naive.QUICKLY).lower(shapes).compile()

    assert compiled.memory_analysis().temp_size_in_bytes < 4 * cfg.num_heads * T * T


@pytest.mark.parametrize(("overrides", "words"), [
    (dict(q_rank=None), "set model.q_rank"),
    (dict(index_head_dim=4), r"model.index_head_dim=4; take more"),
    (dict(index_topk=0), "model.index_topk=0 must be positive, or None"),
    (dict(attention="own.module:Attention"), "take index_topk=None"),
    (dict(index_topk=None, index_warmup=True), "with model.index_topk=None there is none; set it"),
])
def test_an_indexer_that_does_not_fit_is_one_line(overrides, words):
    with pytest.raises(ConfigError, match=words):
        naive.tiny(**SPARSE | overrides)


def test_a_dense_model_has_no_parameter_of_the_indexer():
    shapes = jax.eval_shape(lambda: DeepSeekV3(naive.tiny()).init(jax.random.key(0), np.zeros((1, 4), np.int32)))

    assert not any("indexer" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes))
