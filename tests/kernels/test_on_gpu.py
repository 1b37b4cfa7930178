"""The kernels on a Hopper GPU against their twins, at small shapes with edge cases; 20 calls each agree to the bit.

    JAX_PLATFORMS=cuda python -m pytest tests/kernels/test_on_gpu.py       skipped elsewhere
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import api
from kernels_pallas.hopper import fp8_grouped_matmul as grouped
from kernels_pallas.hopper import fp8_matmul as matmul
from kernels_pallas.hopper import grouped_matmul as experts
from kernels_pallas.hopper import mla_decode as decode
from kernels_pallas.hopper import quantize as quantizers
from kernels_pallas.tools.compare import compare
from kernels_pallas.tools.shapes import Attention, Case

pytestmark = pytest.mark.skipif(api.runs_here() != "hopper", reason="needs a Hopper GPU")
RUNS = 20


def normal(shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(-3, 3, (*shape[:-1], 1)))
    return jnp.asarray(rng.standard_normal(shape) * sizes, dtype)


def twice_and_often(function, *arguments):
    """The result of a function; checks that RUNS consecutive calls agree to the bit, which a race would prevent."""
    run = jax.jit(function)
    first = jax.tree.map(np.asarray, run(*arguments))
    for other in [run(*arguments) for _ in range(RUNS)]:
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(x.view(np.uint8), np.asarray(y).view(np.uint8))
    return jax.tree.map(jnp.asarray, first)


def assert_right(ours, theirs):
    found = compare(ours, theirs)
    assert found["right"], found


@pytest.mark.parametrize("scale", ["float32", "power_of_two"])
@pytest.mark.parametrize("transposed", [False, True, "only"])
@pytest.mark.parametrize("shape", [(128, 128), (100, 90), (1, 8), (1000, 1416)])
def test_quantizers_are_their_twins(shape, transposed, scale):
    x = normal(shape, dtype=jnp.bfloat16)
    ours = twice_and_often(lambda x: quantizers.quantize(x, scale=scale, transposed=transposed), x)
    theirs = jax.jit(lambda x: api.quantize(x, scale=scale, transposed=transposed, implementation="reference"))(x)
    assert_right(ours, theirs)
    if scale == "power_of_two":  # without a division
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_an_infinite_or_nan_element_makes_its_tile_nan_and_no_other(value):
    x = np.array(normal((130, 300), dtype=jnp.bfloat16))
    x[129, 200] = value
    rows, columns = quantizers.quantize(jnp.asarray(x), transposed=True)
    expected = np.zeros((130, 300), bool)
    expected[129, 128:256] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(api.dequantize(rows))), expected)
    expected = np.zeros((300, 130), bool)
    expected[200, 128:] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(api.dequantize(columns))), expected)


@pytest.mark.parametrize("scale", ["float32", "power_of_two"])
@pytest.mark.parametrize("shape", [(128, 128), (12, 704), (1000, 1416)])
def test_swiglu_is_its_twin(shape, scale):
    gate, up = normal(shape, 1, jnp.bfloat16), normal(shape, 2, jnp.bfloat16)
    ours = twice_and_often(lambda g, u: quantizers.swiglu_quantize(g, u, scale=scale), gate, up)
    twin = jax.jit(lambda g, u: api.swiglu_quantize(g, u, scale=scale, implementation="reference"))
    assert_right(ours, twin(gate, up))


# One tile; one more tile than SMs; partial in every direction; few rows; one slice of K; more slices than the ring.
@pytest.mark.parametrize("form", ["blocks", "tiles"])
@pytest.mark.parametrize("shape", [(128, 128, 128), (128, 300 * 128, 256), (200, 136, 400), (12, 190, 96),
                                   (64, 4096, 2048), (1, 128, 7168)])
def test_matmuls_are_their_twins(shape, form):
    M, N, K = shape
    a, b = api.quantize(normal((M, K)), implementation="reference"), normal((N, K), 1)
    b = api.quantize_blocks(b) if form == "blocks" else api.quantize(b, implementation="reference")
    for dtype in (jnp.float32, jnp.bfloat16):
        ours = twice_and_often(lambda a, b, dtype=dtype: matmul.fp8_matmul(a, b, out_dtype=dtype), a, b)
        assert_right(ours, api.fp8_matmul(a, b, out_dtype=dtype, implementation="reference"))


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("shape", [(128, 256, 128), (128, 300, 1024), (1000, 1416, 7168), (4096, 4096, 512)])
def test_matmuls_whose_sms_share_rows_are_their_twins(shape, pair):
    M, N, K = shape
    a, b = api.quantize(normal((M, K)), implementation="reference"), api.quantize_blocks(normal((N, K), 1))
    config = matmul.TuningConfig(pair=pair)
    ours = twice_and_often(lambda a, b: matmul.fp8_matmul(a, b, config=config), a, b)
    assert_right(ours, api.fp8_matmul(a, b, implementation="reference"))


@pytest.mark.parametrize("sizes", [[128, 0, 256], [0, 0, 0], [0, 512, 0], [512, 0, 0], [0, 0, 384], [128] * 3])
@pytest.mark.parametrize("form", ["rows", "wgrad"])
@pytest.mark.parametrize("pair", [False, True])
def test_grouped_products_are_their_twins_with_empty_groups_and_rows_of_no_group(sizes, form, pair):
    sizes_E = jnp.asarray(sizes, jnp.int32)
    if form == "rows":
        a = api.quantize(normal((512, 200)), implementation="reference")
        b = api.quantize_blocks(normal((3, 136, 200), 1))
    else:
        a, b = (api.quantize(normal((n, 512), n), implementation="reference") for n in (136, 72))
    product = functools.partial(grouped.fp8_grouped_matmul, out_dtype=jnp.float32,
                                config=matmul.TuningConfig(pair=pair))
    ours = twice_and_often(product, a, b, sizes_E)
    assert_right(ours, api.fp8_grouped_matmul(a, b, sizes_E, out_dtype=jnp.float32, implementation="reference"))


@pytest.mark.parametrize("sizes", [[69, 0, 5, 150], [0, 0, 0, 0], [260, 0, 0, 0], [1, 7, 8, 9], [64, 64, 65, 63]])
@pytest.mark.parametrize("form", ["", "transposed", "weights"])
def test_experts_products_are_their_twins_wherever_groups_end(sizes, form):
    sizes_E, bfloat16 = jnp.asarray(sizes, jnp.int32), jnp.bfloat16
    x, dy = normal((260, 72), dtype=bfloat16), normal((260, 136), 1, bfloat16)
    if form == "weights":
        ours, theirs = experts.weights, lambda *a: api.grouped_matmul_weights(*a, implementation="reference")
        arguments = x, dy, sizes_E
    else:
        how = dict(transposed=form == "transposed")
        ours = functools.partial(experts.grouped_matmul, **how)
        theirs = functools.partial(api.grouped_matmul, implementation="reference", **how)
        arguments = x, normal((4, 136, 72) if form else (4, 72, 136), 2, bfloat16), sizes_E
    assert_right(twice_and_often(ours, *arguments), theirs(*arguments))


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("T", [1, 100, 128, 196, 1000])
def test_attention_and_its_gradients_are_the_twins(T, segments):
    case = Attention(2, T, 3, backward=True, segments=segments)
    arguments = case.random(jax.random.key(T))
    ours = twice_and_often(case.call("hopper"), *arguments)
    assert_right(ours, jax.jit(case.call("reference"))(*arguments))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("page", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("splits", [None, 1, 7])
def test_decoding_is_its_twin_over_any_pages_lengths_and_shares(page, splits, packed):
    lengths = np.array([1, 64, 65, 300], np.int32)
    pages, rng = -(-300 // page), np.random.default_rng(3)
    cache = rng.standard_normal((4 * pages, page, 576)).astype(np.float32)
    table = rng.permutation(len(cache)).reshape(4, pages)
    for b, length in enumerate(lengths):
        for p in range(pages):
            cache[table[b, p], max(0, length - p * page):] = np.nan  # was never written
    needed = np.arange(pages)[None] * page < lengths[:, None]
    nonsense = jnp.asarray(np.where(needed, table, 10**6), jnp.int32)
    cache = jnp.asarray(cache, jnp.bfloat16)
    cache = api.pack_fp8(cache, 64) if packed else cache
    q = jnp.asarray(rng.standard_normal((4, 20, 576)), jnp.bfloat16)
    config = decode.TuningConfig(splits=splits)
    ours = twice_and_often(lambda *x: decode.mla_decode(*x, scale=0.05, config=config), q, cache, nonsense,
                           jnp.asarray(lengths))
    theirs = api.mla_decode(q, cache, jnp.asarray(table, jnp.int32), jnp.asarray(lengths), scale=0.05,
                            implementation="reference")
    assert_right(ours, theirs)


def test_a_kernel_timed_by_cupti_says_its_name():
    from kernels_pallas.tools.timing import time_calls

    case = Case("quantize", 4096, 7168)
    timing = time_calls(jax.jit(case.call("hopper")), jax.jit(case.random)(jax.random.key(0)), 5)
    assert timing.clock == "cupti" and any("quantizer" in name for name in timing.kernels), timing
    assert 1e-5 < timing.seconds < 1e-2
