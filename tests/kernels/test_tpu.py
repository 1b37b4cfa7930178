"""The TPU's kernels in TPU interpret mode, in which unwritten memory is NaN, against their twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import api

pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan")

from kernels_pallas.reference import grouped_matmul as reference_experts  # noqa: E402
from kernels_pallas.tpu import fp8_grouped_matmul as grouped  # noqa: E402
from kernels_pallas.tpu import fp8_matmul as matmul  # noqa: E402
from kernels_pallas.tpu import grouped_matmul as experts  # noqa: E402
from kernels_pallas.tpu import mla_attention as attention  # noqa: E402

CONFIG = matmul.TuningConfig(block_m=128, block_n=128, slices=2)


def normal(shape, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(-3, 3, (*shape[:-1], 1)))
    return jnp.asarray(rng.standard_normal(shape) * sizes, jnp.float32)


def close(ours, theirs, tolerance=2e-6):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("form", ["blocks", "tiles"])
@pytest.mark.parametrize("shape", [(128, 256, 512), (200, 136, 400)])
def test_matmuls_are_their_twins(form, shape):
    M, N, K = shape
    a, b = api.quantize(normal((M, K))), normal((N, K), 1)
    b = api.quantize_blocks(b) if form == "blocks" else api.quantize(b)
    ours = matmul.fp8_matmul(a, b, out_dtype=jnp.float32, config=CONFIG, interpret=INTERPRET)
    close(ours, api.fp8_matmul(a, b, out_dtype=jnp.float32))


def test_a_matmul_rounds_once_to_its_output():
    a, b = api.quantize(normal((128, 256))), api.quantize_blocks(normal((128, 256), 1))
    ours = matmul.fp8_matmul(a, b, interpret=INTERPRET)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, api.fp8_matmul(a, b))), rtol=2.0**-7)


SIZES = jnp.array([128, 0, 256, 0], jnp.int32)


def test_grouped_products_are_their_twin_and_zero_past_the_last_group():
    a, b = api.quantize(normal((512, 400))), api.quantize_blocks(normal((4, 136, 400), 1))
    a = a._replace(values=a.values.at[384:].set(jnp.nan))  # rows of no expert may hold anything
    ours = grouped.fp8_grouped_matmul(a, b, SIZES, out_dtype=jnp.float32, config=CONFIG, interpret=INTERPRET)
    close(ours, api.fp8_grouped_matmul(a, b, SIZES, out_dtype=jnp.float32))
    assert not np.asarray(ours)[384:].any()


def test_k_grouped_products_are_their_twin_and_zero_for_an_empty_group():
    a, b = api.quantize(normal((136, 512))), api.quantize(normal((72, 512), 1))
    ours = grouped.fp8_grouped_matmul(a, b, SIZES, out_dtype=jnp.float32, config=CONFIG, interpret=INTERPRET)
    close(ours, api.fp8_grouped_matmul(a, b, SIZES, out_dtype=jnp.float32))
    assert not np.asarray(ours)[[1, 3]].any()


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a has K=128 and b has K=256"):
        matmul.fp8_matmul(api.quantize(normal((8, 128))), api.quantize_blocks(normal((8, 256))), interpret=INTERPRET)


# Groups that begin and end inside tiles, an empty group, and rows of no group.
UNEVEN, TILES = jnp.array([100, 0, 37, 90], jnp.int32), experts.TuningConfig(128, 128, 128)


def test_experts_products_are_their_twin_and_zero_past_the_last_group():
    x_RD, dy_RF, w_EDF = normal((300, 136)), normal((300, 200), 1), normal((4, 136, 200), 2)
    x_RD = x_RD.at[227:].set(jnp.nan)  # rows of no expert may hold anything
    options = dict(config=TILES, interpret=INTERPRET)
    ours = experts.grouped_matmul(x_RD, w_EDF, UNEVEN, **options)
    close(ours, reference_experts.grouped_matmul(x_RD, w_EDF, UNEVEN))
    back = experts.grouped_matmul(dy_RF, w_EDF, UNEVEN, transposed=True, **options)
    close(back, reference_experts.grouped_matmul(dy_RF, w_EDF, UNEVEN, transposed=True))
    assert not np.asarray(ours)[227:].any() and not np.asarray(back)[227:].any()


def test_the_gradient_of_experts_is_its_twin_and_zero_for_an_empty_group():
    x_RD, dy_RF = normal((300, 136)), normal((300, 200), 1)
    ours = experts.weights(x_RD, dy_RF, UNEVEN, config=TILES, interpret=INTERPRET)
    close(ours, reference_experts.weights(x_RD, dy_RF, UNEVEN))
    assert ours.dtype == jnp.float32 and not np.asarray(ours)[1].any()


@pytest.mark.parametrize("segments", [None, (50, 90, 60)], ids=["one segment", "three"])
def test_attention_and_its_gradients_are_those_of_the_twin(segments):
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.standard_normal((1, 200, 2, width)), jnp.float32) for width in (192, 192, 128, 128))
    ids = None if segments is None else jnp.asarray(np.repeat([0, 1, 0], segments), jnp.int32)[None]

    def run(attend, **options):
        o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids, scale=0.1, **options), q, k, v)
        return o, *pull(do)

    found = run(attention.mla_attention, block=128, interpret=True)  # the gradient has no other mode
    for ours, theirs in zip(found, run(functools.partial(api.mla_attention, implementation="reference"))):
        close(ours, theirs, 1e-5)
