"""Grouped products: each implementation against a loop over experts, and their gradients."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, implementation_here, row_alignment
from kernels_pallas import api
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


@pytest.mark.skipif(jax.__version_info__ < api.NEEDS_JAX, reason="kernels need a newer jax")
def test_on_a_hopper_bfloat16_experts_are_kernels_and_never_a_product_with_every_expert(monkeypatch):
    monkeypatch.setattr(api, "device_here", lambda: types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100"))
    x_RD, w_EDF = jax.ShapeDtypeStruct((300, 64), jnp.bfloat16), jax.ShapeDtypeStruct((4, 64, 128), jnp.float32)

    def text_of(implementation):
        def product_and_gradients(x_RD, w_EDF, sizes_E):
            y_RF, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E, 1, implementation), x_RD, w_EDF)
            return y_RF, *pull(y_RF)

        traced = jax.jit(product_and_gradients).trace(x_RD, w_EDF, jax.ShapeDtypeStruct((4,), jnp.int32))
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    kernels = text_of("auto")
    assert kernels.count("custom_call @mosaic_gpu") == 3 and "dot" not in kernels
    assert "custom_call @mosaic_gpu" not in text_of(implementation_here("xla"))


@pytest.mark.parametrize(("rows", "experts"), [(32768, 8), (98304, 64)], ids=["V3, 8 here", "V2-Lite, all here"])
def test_hopper_multiplies_at_most_a_tenth_more_rows_than_there_are(rows, experts):
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from kernels_pallas.hopper.grouped_matmul import ROWS, tiles_of_groups

    sizes = np.random.default_rng(0).multinomial(rows, np.random.default_rng(1).dirichlet([20] * experts))
    tables = tiles_of_groups(jnp.asarray(sizes), rows, rows // ROWS + 2 * experts)
    group, _, begin, end = map(np.asarray, tables)
    multiplied = ROWS * ((group < experts) & (begin < end)).sum()
    assert rows <= multiplied <= 1.1 * rows
