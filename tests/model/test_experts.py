"""Experts: their gated sum against a loop over experts, and the MoE layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.experts import ExpertWeights, MoE, routed_experts
from deepseek_jax.model.grouped_matmul import IMPLEMENTATIONS
from tests.model import naive
from tests.model.test_grouped_matmul import weights
from tests.model.test_permute import ROUTINGS, E, K
from tests.precision import float64


def dense(x_ND, chosen_NK, gates_NK, gate_EDF, up_EDF, down_EFD):
    """Every token through every expert, weighted by its gate or 0."""
    share_NE = (gates_NK[:, :, None] * (chosen_NK[:, :, None] == jnp.arange(gate_EDF.shape[0])[None, None])).sum(1)
    both = [jnp.einsum("ND,EDF->NEF", x_ND, w, precision="highest") for w in (gate_EDF, up_EDF)]
    return jnp.einsum("NEF,EFD,NE->ND", jax.nn.silu(both[0]) * both[1], down_EFD, share_NE)


@functools.cache
def routed(implementation):
    """Output, and gradients by tokens, gates and the three weights."""
    def f(x_ND, chosen_NK, gates_NK, *weights):
        if implementation == "dense":
            return dense(x_ND, chosen_NK, gates_NK, *weights)
        return routed_experts(x_ND, chosen_NK, gates_NK, ExpertWeights(*weights), implementation)

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
    [(1, 8), (43, 8), (350, 8), (160, 8),  # 160: 60 rows an expert, 67 with room for padding
     pytest.param(171, 8, marks=pytest.mark.slow), pytest.param(320, 16, marks=pytest.mark.slow)])
def test_tiles_are_exact_for_any_number_of_tokens(tokens, num_experts):
    chosen_NK = np.random.default_rng(7).permuted(np.tile(np.arange(num_experts), (tokens, 1)), axis=1)[:, :K]

    compare_with_dense("cpu", chosen_NK, num_experts)


@pytest.mark.parametrize("shared", [0, 2])
def test_the_layer_adds_its_shared_experts_to_the_routed_ones(shared):
    cfg = naive.tiny(num_shared_experts=shared, dtype="float64")
    rng = np.random.default_rng(8)
    x_BTD, bias_E = rng.standard_normal((2, 5, cfg.d_model)), rng.uniform(-8, -4, cfg.num_experts)
    with float64():
        module = MoE(cfg)
        variables = naive.fill(jax.eval_shape(module.init, jax.random.key(0), x_BTD, bias_E), np.float64)

        y_BTD, stats = jax.jit(module.apply)(variables, x_BTD, bias_E)

        expected, expected_stats = naive.moe(cfg, variables["params"], x_BTD, bias_E)
        np.testing.assert_allclose(y_BTD, expected, atol=1e-12)
        for name, value in expected_stats.items():
            np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-12, err_msg=name)
