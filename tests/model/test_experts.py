"""Experts: the plan that sorts choices into rows, the grouped products, and their sum against a loop over experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.model import experts
from deepseek_jax.model.experts import IMPLEMENTATIONS, MoE
from tests.model import naive

N, K, E = 12, 3, 8
ALIGNMENTS = (1, 8, 16)
plan = jax.jit(experts.plan, static_argnums=(1, 2, 3))

# name -> the experts of each of N tokens
ROUTINGS = {
    "mixed": np.random.default_rng(0).permuted(np.tile(np.arange(E), (N, 1)), axis=1)[:, :K],
    "all_to_the_first": np.tile([0, 1, 2], (N, 1)),
    "all_to_the_last": np.tile([7, 6, 5], (N, 1)),
    "one_has_none": 1 + np.random.default_rng(1).permuted(np.tile(np.arange(E - 1), (N, 1)), axis=1)[:, :K],
    "one_token_apart": np.array([[0, 2, 4]] * (N - 1) + [[5, 3, 1]]),
}


def routings():
    """Any N choices of K different experts, few or many of them in use."""
    def of(used):
        return st.lists(st.permutations(used).map(lambda p: p[:K]), min_size=N, max_size=N)

    return st.lists(st.integers(0, E - 1), min_size=K, max_size=E, unique=True).flatmap(of).map(np.array)


def check(chosen_NK, align, even=False):
    p = jax.tree.map(np.asarray, plan(chosen_NK.astype(np.int32), E, align, even))
    choices = chosen_NK.reshape(-1)
    counts = np.bincount(choices, minlength=E)
    ends = np.cumsum(p.sizes_E)

    # Conservation: every choice has one row, and that row says so; every other row is marked empty.
    assert np.array_equal(p.choice_R[p.row_NK.reshape(-1)], np.arange(N * K))
    assert (p.choice_R < N * K).sum() == N * K and p.choice_R.max() <= N * K
    # Groups: contiguous, in the order of the experts, aligned, full ones first; all equal, or no larger than need be.
    room = len(p.choice_R) // E
    equal = even and counts.max() <= room
    assert np.array_equal(p.sizes_E, [room] * E if equal else -(-counts // align) * align)
    assert len(p.choice_R) >= ends[-1] and len(p.choice_R) % align == 0
    for e in range(E):
        rows = p.choice_R[ends[e] - p.sizes_E[e]:ends[e]]
        # Stable: the tokens of an expert stay in order.
        assert np.array_equal(rows[:counts[e]], np.flatnonzero(choices == e))
        assert (rows[counts[e]:] == N * K).all()
    assert (p.choice_R[ends[-1]:] == N * K).all()
    assert equal or ends[-1] - N * K <= E * (align - 1)


@pytest.mark.parametrize("align", ALIGNMENTS)
@settings(max_examples=40)
@given(chosen_NK=routings())
def test_the_plan_gives_every_choice_one_row_and_sorts_rows_by_expert(align, chosen_NK):
    check(chosen_NK, align)


@pytest.mark.parametrize(("align", "even"), [(1, False), (8, False), (2, True), (8, True)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_plan_holds_under_skew(routing, align, even):
    check(ROUTINGS[routing], align, even)


def test_groups_are_equal_where_no_expert_needs_more_than_the_mean_load_and_the_alignment():
    assert (plan(ROUTINGS["mixed"], E, 8, True).sizes_E == 16).all()
    assert len(set(np.asarray(plan(ROUTINGS["all_to_the_first"], E, 2, True).sizes_E))) > 1


def test_a_token_lies_in_each_of_its_rows_and_empty_rows_are_zero():
    p = plan(ROUTINGS["mixed"], E, 8)
    x_ND = jnp.asarray(np.random.default_rng(2).standard_normal((N, 5)), jnp.float32)

    x_RD = np.asarray(experts.to_rows(x_ND, p))

    np.testing.assert_array_equal(x_RD[p.row_NK], np.repeat(x_ND[:, None], K, axis=1))
    assert not x_RD[np.asarray(p.choice_R) == N * K].any()


def test_the_gradient_of_a_token_is_the_sum_over_its_rows_and_over_no_empty_one():
    p = plan(ROUTINGS["one_token_apart"], E, 8)
    dx_RD = np.random.default_rng(3).standard_normal((len(p.choice_R), 5)).astype(np.float32)

    dx_ND, = jax.vjp(lambda x_ND: experts.to_rows(x_ND, p), jnp.zeros((N, 5)))[1](jnp.asarray(dx_RD))

    np.testing.assert_allclose(dx_ND, dx_RD[p.row_NK].sum(1), rtol=1e-5)


def weights(D=6, F=5, num_experts=E):
    rng = np.random.default_rng(4)
    return [rng.standard_normal(shape).astype(np.float32)
            for shape in ((num_experts, D, F), (num_experts, D, F), (num_experts, F, D))]


# implementation, alignment, equal groups where they fit
LAYOUTS = [(name, experts.row_alignment(name, N * K, E), False) for name in IMPLEMENTATIONS]
LAYOUTS += [("cpu", 2, True), ("cpu", 8, True)]


@functools.cache
def grouped(implementation, align):
    """The product and its gradients by rows and weights, jitted once."""
    def run(x_RD, w_EDF, sizes_E, dy_RF):
        y_RF, pull = jax.vjp(lambda x, w: experts.grouped_matmul(x, w, sizes_E, align, implementation), x_RD, w_EDF)
        return y_RF, *pull(dy_RF)

    return jax.jit(run)


@pytest.mark.parametrize(("implementation", "align", "even"), LAYOUTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_grouped_product_is_a_loop_over_experts_and_so_are_its_gradients(routing, implementation, align, even):
    p = plan(ROUTINGS[routing], E, align, even)
    filled = np.asarray(p.choice_R < N * K)[:, None]
    rng = np.random.default_rng(5)
    x_RD, dy_RF = (rng.standard_normal((len(filled), d)).astype(np.float32) * filled for d in (6, 5))
    w_EDF = weights()[0]

    found = grouped(implementation, align)(x_RD, w_EDF, p.sizes_E, dy_RF)

    y_RF, dx_RD, dw_EDF = np.zeros_like(dy_RF), np.zeros_like(x_RD), np.zeros_like(w_EDF)
    ends = np.cumsum(p.sizes_E)
    for e, (start, end) in enumerate(zip(ends - p.sizes_E, ends)):
        y_RF[start:end] = x_RD[start:end] @ w_EDF[e]
        dx_RD[start:end] = dy_RF[start:end] @ w_EDF[e].T
        dw_EDF[e] = x_RD[start:end].T @ dy_RF[start:end]
    for name, a, b in zip(("y", "dx", "dw"), found, (y_RF, dx_RD, dw_EDF)):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


def dense(x_ND, chosen_NK, gates_NK, gate_EDF, up_EDF, down_EFD):
    """Every token by every expert, weighed by its gate or 0."""
    share_NE = (gates_NK[:, :, None] * (chosen_NK[:, :, None] == jnp.arange(gate_EDF.shape[0])[None, None])).sum(1)
    both = [jnp.einsum("ND,EDF->NEF", x_ND, w, precision="highest") for w in (gate_EDF, up_EDF)]
    return jnp.einsum("NEF,EFD,NE->ND", jax.nn.silu(both[0]) * both[1], down_EFD, share_NE)


@functools.cache
def routed(implementation):
    """Output and gradients by tokens, gates and the three weights."""
    f = dense if implementation == "dense" else functools.partial(experts.routed_experts, implementation=implementation)

    def run(x_ND, chosen_NK, gates_NK, *weights):
        y_ND, pull = jax.vjp(lambda x, gates, *w: f(x, chosen_NK, gates, *w), x_ND, gates_NK, *weights)
        return y_ND, *pull(jnp.cos(jnp.arange(y_ND.size, dtype=jnp.float32)).reshape(y_ND.shape))

    return jax.jit(run)


def compare_with_dense(implementation, chosen_NK, num_experts):
    rng = np.random.default_rng(6)
    x_ND = rng.standard_normal((len(chosen_NK), 6)).astype(np.float32)
    gates_NK = rng.uniform(0.1, 1, chosen_NK.shape).astype(np.float32)
    arguments = (x_ND, chosen_NK.astype(np.int32), gates_NK, *weights(num_experts=num_experts))

    found, expected = (routed(name)(*arguments) for name in (implementation, "dense"))

    for name, a, b in zip(("y", "dx", "dgates", "dgate", "dup", "ddown"), found, expected):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routed_experts_are_the_sum_over_experts_and_so_are_their_gradients(routing, implementation):
    compare_with_dense(implementation, ROUTINGS[routing], E)


@pytest.mark.parametrize(
    ("tokens", "num_experts"),
    [(1, 8), (43, 8), (171, 8), (350, 8), (160, 8), (320, 16)])  # 160: 60 rows an expert, 67 with room for padding
def test_tiles_are_exact_for_any_number_of_tokens(tokens, num_experts):
    chosen_NK = np.random.default_rng(7).permuted(np.tile(np.arange(num_experts), (tokens, 1)), axis=1)[:, :K]

    compare_with_dense("cpu", chosen_NK, num_experts)


@pytest.mark.parametrize("rows", [64, 512, 4096, 131072])
def test_padding_is_at_most_half_of_the_rows_of_a_real_batch(rows):
    align = experts.row_alignment("cpu", rows, 32)

    assert align >= 8
    assert rows < 1024 or 32 * (align - 1) / rows < 0.5


@pytest.mark.parametrize("shared", [0, 2])
def test_the_layer_adds_its_shared_experts_to_the_routed_ones(shared):
    cfg = naive.tiny(num_shared_experts=shared, dtype="float64")
    rng = np.random.default_rng(8)
    x_BTD, bias_E = rng.standard_normal((2, 5, cfg.d_model)), rng.uniform(-8, -4, cfg.num_experts)
    with jax.enable_x64(True):
        module = MoE(cfg)
        variables = naive.fill(jax.eval_shape(module.init, jax.random.key(0), x_BTD, bias_E), np.float64)

        y_BTD, stats = jax.jit(module.apply)(variables, x_BTD, bias_E)

        expected, expected_stats = naive.moe(cfg, variables["params"], x_BTD, bias_E)
        np.testing.assert_allclose(y_BTD, expected, atol=1e-12)
        for name, value in expected_stats.items():
            np.testing.assert_allclose(stats[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("implementation", ["cpu", "ragged"])
def test_the_gradient_of_a_float32_master_stays_float32_in_a_bfloat16_model(implementation):
    align = experts.row_alignment(implementation, 32, 2)
    x_RD = jnp.ones((32, 8), jnp.bfloat16)
    w_EDF, sizes_E = jnp.ones((2, 8, 4)), jnp.array([16, 16], jnp.int32)
    dy_RF = jnp.ones((32, 4), jnp.bfloat16).at[0].set(1.0078125).at[16].set(1.0078125)

    dw_EDF = jax.vjp(lambda w: experts.grouped_matmul(x_RD, w, sizes_E, align, implementation), w_EDF)[1](dy_RF)[0]

    np.testing.assert_array_equal(dw_EDF, 16.0078125)  # bfloat16 would make it 16
    assert dw_EDF.dtype == jnp.float32
