"""Routing: the chosen experts, their gates, and the bias updates. The oracle is `naive.route`, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import freeze
from deepseek_jax.model import router
from deepseek_jax.model.experts import MoE
from deepseek_jax.model.types import RoutingContext
from tests.model import naive

WIDE = dict(num_experts=16, num_groups=4, groups_kept=2, experts_per_token=5)


@functools.partial(jax.jit, static_argnums=0)
def route(cfg, scores_NE, bias_E):
    chosen_NK = router.select(cfg, scores_NE, bias_E)
    return chosen_NK, router.gates(cfg, scores_NE, chosen_NK)


def random_scores(cfg, tokens=64, seed=0):
    logits_NE = 2 * np.random.default_rng(seed).standard_normal((tokens, cfg.num_experts))
    return naive.affinities(cfg, logits_NE).astype(np.float32)


def uniform_bias(low, high, experts=16):
    return np.random.default_rng(1).uniform(low, high, experts).astype(np.float32)


@pytest.mark.parametrize(
    ("overrides", "low", "high"),
    [
        (dict(), 0, 0),
        (dict(), -8, -4),  # every biased score is negative: a mask of 0.0 would let dropped groups win
        (dict(), -0.5, 0.5),
        (dict(), 3, 9),
        (dict(groups_kept=4), -8, -4),
        (dict(num_groups=1, groups_kept=1), -8, -4),
        (dict(num_groups=8, groups_kept=3), -8, -4),  # the group score is over the complete group
        (dict(router_bias="multiplicative"), 0.2, 3),
        (dict(router_bias="none"), 0, 0),
        (dict(normalize_gates=False, route_scale=1.0), -8, -4),
        (naive.V2, 0, 0),
        (dict(naive.V2, router_bias="additive"), -8, -4),
    ],
)
def test_choices_and_gates_are_those_of_a_loop_over_tokens(overrides, low, high):
    cfg = naive.tiny(**{**WIDE, **overrides})
    scores_NE, bias_E = random_scores(cfg), uniform_bias(low, high)

    chosen_NK, gates_NK = route(cfg, scores_NE, bias_E)

    expected = [naive.route(cfg, s_E.astype(np.float64), bias_E.astype(np.float64)) for s_E in scores_NE]
    assert np.array_equal(chosen_NK, [chosen for chosen, _ in expected])
    np.testing.assert_allclose(gates_NK, [gates for _, gates in expected], rtol=1e-5)


@pytest.mark.parametrize(("bias", "where"), [(0.0, "zero"), (-10.0, "negative")])
def test_a_dropped_group_is_never_chosen(bias, where):
    cfg = naive.tiny(num_groups=2, groups_kept=1, experts_per_token=3)
    scores_NE = np.array([[.9, .8, .1, .1, .7, .6, .6, .6]], np.float32)  # the first group wins, 1.7 to 1.3

    chosen_NK, _ = route(cfg, scores_NE, np.full(8, bias, np.float32))

    assert chosen_NK.max() < 4, f"{where} bias"


@pytest.mark.parametrize(
    ("score", "scores", "first"),
    [
        ("sigmoid", [.9, .0, .0, .0, .5, .5, .0, .0], 4),  # .9 against 1.0: two count
        ("sigmoid", [.9, .2, .0, .0, .5, .5, .4, .4], 0),  # 1.1 against 1.0: a third and fourth do not
        ("softmax", [.4, .0, .0, .0, .3, .3, .0, .0], 0),  # one counts
    ],
)
def test_a_group_is_judged_by_its_two_best_or_in_softmax_models_by_its_best(score, scores, first):
    cfg = naive.tiny(num_groups=2, groups_kept=1, experts_per_token=1, score=score)

    chosen_NK, _ = route(cfg, np.array([scores], np.float32), np.zeros(8, np.float32))

    assert chosen_NK[0, 0] == first


def test_the_gate_ignores_the_bias():
    cfg = naive.tiny(num_groups=1, groups_kept=1, experts_per_token=8)  # all are chosen: only the gate could differ
    scores_NE = random_scores(cfg)

    gates = []
    for bias_E in (np.zeros(8, np.float32), uniform_bias(-8, -4, 8)):
        chosen_NK, gates_NK = route(cfg, scores_NE, bias_E)
        gates.append(np.take_along_axis(np.asarray(gates_NK), np.argsort(chosen_NK), axis=1))

    np.testing.assert_allclose(*gates, rtol=1e-6)


@pytest.mark.parametrize(
    ("normalize", "scale", "total"), [(True, 2.5, 2.5), (True, 1.0, 1.0), (False, 1.0, None), (False, 16.0, None)])
def test_gates_sum_to_the_route_scale_if_they_are_normalized(normalize, scale, total):
    cfg = naive.tiny(normalize_gates=normalize, route_scale=scale)
    scores_NE = random_scores(cfg)

    chosen_NK, gates_NK = route(cfg, scores_NE, np.zeros(8, np.float32))

    plain = np.take_along_axis(scores_NE, np.asarray(chosen_NK), 1).sum(1) * scale
    np.testing.assert_allclose(gates_NK.sum(1), plain if total is None else np.full(64, total), rtol=1e-5)


def moe_and_variables(**overrides):
    cfg = naive.tiny(**overrides)
    x_BTD = np.random.default_rng(2).standard_normal((2, 6, cfg.d_model)).astype(np.float32)
    module = MoE(cfg, capture=("scores", "chosen"))
    bias_E = uniform_bias(-1, 1, cfg.num_experts)
    return module, naive.fill(jax.eval_shape(module.init, jax.random.key(0), x_BTD, bias_E)), x_BTD, bias_E


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_no_gradient_reaches_the_bias_while_the_router_weight_gets_one(kind):
    module, variables, x_BTD, bias_E = moe_and_variables(router_bias=kind)

    def total(variables, bias_E):
        y_BTD, stats = module.apply(variables, x_BTD, bias_E)
        return (y_BTD**2).sum() + stats.sequence_loss + stats.auxiliary_loss

    grads, dbias_E = jax.jit(jax.grad(total, argnums=(0, 1)))(variables, bias_E)

    assert not np.asarray(dbias_E).any()
    assert np.abs(grads["params"]["router"]["weight"]).max() > 1e-3


def test_every_choice_is_counted_once():
    module, variables, x_BTD, bias_E = moe_and_variables()

    _, stats = jax.jit(module.apply)(variables, x_BTD, bias_E)

    assert stats.counts_E.sum() == 2 * 6 * module.cfg.experts_per_token
    assert np.array_equal(stats.counts_E, np.bincount(np.ravel(stats.captured["chosen"]), minlength=8))


def test_scores_are_float32_in_a_bfloat16_model():
    module, variables, x_BTD, bias_E = moe_and_variables(dtype="bfloat16")

    _, stats = jax.eval_shape(module.apply, variables, x_BTD.astype(jnp.bfloat16), bias_E)

    assert stats.captured["scores"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("bias", "counts", "speed", "rule", "moved"),
    [
        ([[0, 0, 0, 0]], [[4, 0, 2, 2]], 0.001, "sign", [[-0.001, 0.001, 0, 0]]),
        ([[1, -1, 0.5, 0]], [[9, 9, 0, 2]], 0.1, "sign", [[0.9, -1.1, 0.6, 0.1]]),  # the mean is 5
        ([[0, 0], [0, 0]], [[30, 10], [0, 4]], 0.5, "sign", [[-0.5, 0.5], [0.5, -0.5]]),  # by its own mean
        ([[1, 2, 3, 4]], [[7, 0, 0, 1]], 0.0, "sign", [[1, 2, 3, 4]]),
        ([[1, 2, 3, 4]], [[7, 0, 0, 1]], 0.0, "proportional", [[1, 2, 3, 4]]),
        ([[0, 0, 0, 0]], [[8, 0, 4, 4]], 0.01, "proportional", [[-0.01, 0.01, 0, 0]]),
        ([[0, 0, 0, 0]], [[16, 0, 0, 0]], 0.01, "proportional", [[-0.03, 0.01, 0.01, 0.01]]),
        ([[0, 0]], [[0, 0]], 0.01, "proportional", [[0, 0]]),  # nothing was routed: no 0 / 0
        ([[0, 0]], [[0, 0]], 0.01, "sign", [[0, 0]]),
        ([[0] * 8], [[6] * 8], 0.001, "sign", [[0] * 8]),
    ],
)
def test_the_bias_moves_against_the_load(bias, counts, speed, rule, moved):
    after = router.update_bias(jnp.array(bias, jnp.float32), jnp.array(counts, jnp.int32), jnp.float32(speed), rule)

    np.testing.assert_allclose(after, np.array(moved, np.float32), atol=1e-7)
    assert after.dtype == jnp.float32


@pytest.mark.parametrize(
    "load", [61441, 1966081])
def test_an_even_load_moves_nothing_at_256_experts(load):
    after = router.update_bias(jnp.zeros((1, 256)), jnp.full((1, 256), load, jnp.int32), 0.001)

    assert not np.asarray(after).any()


@pytest.mark.parametrize(("kind", "start"), [("additive", 0.0), ("multiplicative", 1.0)])
def test_a_fresh_bias_changes_no_choice(kind, start):
    cfg, plain = naive.tiny(router_bias=kind), naive.tiny(router_bias="none")
    bias_LE, scores_NE = router.initial_bias(cfg, (3, 8)), random_scores(cfg)

    chosen_NK, _ = route(cfg, scores_NE, bias_LE[0])

    assert bias_LE.shape == (3, 8) and (bias_LE == start).all()
    assert np.array_equal(chosen_NK, route(plain, scores_NE, None)[0])


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_balance_losses_are_those_of_the_report(score):
    cfg = naive.tiny(score=score)
    scores_NE = random_scores(cfg, tokens=30)
    chosen_NK = np.random.default_rng(3).permuted(np.tile(np.arange(8), (30, 1)), axis=1)[:, :3]

    sequence = router.sequence_loss(cfg, scores_NE.reshape(3, 10, 8))
    auxiliary = router.auxiliary_loss(cfg, scores_NE, router.count_choices(chosen_NK, 8))

    exact_NE = scores_NE.astype(np.float64)
    np.testing.assert_allclose(sequence, naive.sequence_loss(cfg, exact_NE.reshape(3, 10, 8)), rtol=1e-6)
    np.testing.assert_allclose(auxiliary, naive.auxiliary_loss(cfg, exact_NE, chosen_NK), rtol=1e-6)


def test_balance_losses_are_one_for_even_loads_and_more_for_a_favourite():
    cfg = naive.tiny(experts_per_token=2)
    even_TE = np.stack([np.roll(np.linspace(0.9, 0.1, 8), t) for t in range(8)]).astype(np.float32)
    skewed_TE = np.broadcast_to(even_TE[0], (8, 8))

    losses = []
    for scores_TE in (even_TE, skewed_TE):
        chosen_TK = np.argsort(-scores_TE)[:, :2]
        losses.append((router.sequence_loss(cfg, scores_TE[None]),
                       router.auxiliary_loss(cfg, scores_TE, router.count_choices(chosen_TK, 8))))

    np.testing.assert_allclose(losses[0], 1, rtol=1e-6)
    assert min(losses[1]) > 1.5


def test_the_sequence_loss_looks_at_each_sequence_and_the_auxiliary_one_at_the_batch():
    cfg = naive.tiny(experts_per_token=1, num_groups=1, groups_kept=1)
    scores_BTE = np.full((8, 4, 8), 0.1, np.float32)
    scores_BTE[np.arange(8), :, np.arange(8)] = 0.9  # each sequence has one favourite; over the batch all is even

    auxiliary = router.auxiliary_loss(cfg, scores_BTE.reshape(32, 8), jnp.full(8, 4))

    assert router.sequence_loss(cfg, scores_BTE) > 4
    np.testing.assert_allclose(auxiliary, 1, rtol=1e-6)


def test_the_sequence_loss_pushes_a_favourite_down():
    cfg = naive.tiny(experts_per_token=2)
    logits_TE = np.random.default_rng(4).standard_normal((6, 8)).astype(np.float32)
    logits_TE[:, 3] += 4

    grad_TE = jax.grad(lambda x: router.sequence_loss(cfg, router.affinities(cfg, x)[None]))(logits_TE)

    assert (grad_TE[:, 3] > 0).all()


@pytest.mark.parametrize(("tokens", "experts_per_token"), [(64, 5), (7, 4), (1, 2)])
def test_forced_balance_gives_every_expert_the_same_load_and_a_token_different_experts(tokens, experts_per_token):
    cfg = freeze({"model": naive.TINY | WIDE | dict(experts_per_token=experts_per_token),
                  "balance": {"force_balanced": True}}).model
    x_ND = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, cfg.d_model)), jnp.float32)
    weights = {"weight": jnp.asarray(np.random.default_rng(1).standard_normal((cfg.d_model, 16)), jnp.float32)}
    bias_E = jnp.full(16, -3.0).at[0].set(9.0)  # with this bias every token would go to expert 0
    nothing = RoutingContext(None, None, None)
    found = jax.jit(lambda x_ND: router.apply_rule(cfg, x_ND, weights, bias_E, nothing))(x_ND)
    counts_E = np.asarray(router.count_choices(found.chosen_NK, 16))
    assert counts_E.max() - counts_E.min() <= 1
    assert all(len(set(row)) == experts_per_token for row in np.asarray(found.chosen_NK))
    np.testing.assert_array_equal(found.gates_NK, router.gates(cfg, found.scores_NE, found.chosen_NK))
