"""Grouped products: each implementation against a loop over experts, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, row_alignment
from tests.model.test_permute import ROUTINGS, E, K, N, sort_by_expert

# implementation, alignment, equal groups where they fit
LAYOUTS = [(name, row_alignment(name, N * K, E), False) for name in IMPLEMENTATIONS]
LAYOUTS += [("cpu", 2, True), ("cpu", 8, True)]


def weights(D=6, F=5, num_experts=E):
    rng = np.random.default_rng(4)
    return [rng.standard_normal(shape).astype(np.float32)
            for shape in ((num_experts, D, F), (num_experts, D, F), (num_experts, F, D))]


@functools.cache
def grouped(implementation, align):
    """The product and its gradients by rows and weights, jitted once."""
    def run(x_RD, w_EDF, sizes_E, dy_RF):
        y_RF, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E, align, implementation), x_RD, w_EDF)
        return y_RF, *pull(dy_RF)

    return jax.jit(run)


@pytest.mark.parametrize(("implementation", "align", "even"), LAYOUTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_grouped_product_is_a_loop_over_experts_and_so_are_its_gradients(routing, implementation, align, even):
    p = sort_by_expert(ROUTINGS[routing], E, align, even)
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


@pytest.mark.parametrize("rows", [64, 512, 4096, 131072])
def test_padding_is_at_most_half_of_the_rows_of_a_real_batch(rows):
    align = row_alignment("cpu", rows, 32)

    assert align >= 8
    assert rows < 1024 or 32 * (align - 1) / rows < 0.5


@pytest.mark.parametrize("implementation", ["cpu", "ragged"])
def test_the_gradient_of_a_float32_master_stays_float32_in_a_bfloat16_model(implementation):
    align = row_alignment(implementation, 32, 2)
    x_RD = jnp.ones((32, 8), jnp.bfloat16)
    w_EDF, sizes_E = jnp.ones((2, 8, 4)), jnp.array([16, 16], jnp.int32)
    dy_RF = jnp.ones((32, 4), jnp.bfloat16).at[0].set(1.0078125).at[16].set(1.0078125)

    dw_EDF = jax.vjp(lambda w: grouped_matmul(x_RD, w, sizes_E, align, implementation), w_EDF)[1](dy_RF)[0]

    np.testing.assert_array_equal(dw_EDF, 16.0078125)  # bfloat16 would make it 16
    assert dw_EDF.dtype == jnp.float32
