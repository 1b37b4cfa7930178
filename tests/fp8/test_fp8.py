"""FP8: quantizers bit-equal to NumPy, products against float64, gradients, and the residuals for the backward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax import fp8
from deepseek_jax.checkpoint.arrays import dequantize as stored_dequantize
from deepseek_jax.config import ConfigError, FP8Config, MeshConfig, as_dict, default_config, freeze, model_config
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.parallel.mesh import make_mesh
from kernels_pallas import api

E4M3 = ml_dtypes.float8_e4m3fn
tiles = jax.jit(fp8.quantize_tiles, static_argnames=("scale", "axis"))
blocks = jax.jit(fp8.quantize_blocks, static_argnames="scale")


def oracle(x, rows, scale="float32"):
    """The recipe in NumPy, tile by tile: float32 division, ml_dtypes' rounding."""
    x = np.asarray(x, np.float32)
    values, scales = np.empty(x.shape, E4M3), np.empty((-(-x.shape[0] // rows), -(-x.shape[1] // 128)), np.float32)
    with np.errstate(invalid="ignore"):
        for i, j in np.ndindex(scales.shape):
            part = np.s_[i * rows:(i + 1) * rows, j * 128:(j + 1) * 128]
            s = np.maximum(np.abs(x[part]).max(), np.float32(1e-4)) / np.float32(448)
            if scale == "power_of_two" and np.isfinite(s):
                mantissa, exponent = np.frexp(s)
                s = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
            scales[i, j] = s
            values[part] = (x[part] / s).astype(E4M3)
    return values, scales


def same_bits(q, expected):
    values, scales = (np.asarray(x) for x in q)
    # All NaNs are equal: their sign and payload do not matter.
    nan = np.isnan(expected[0].astype(np.float32))
    np.testing.assert_array_equal(np.isnan(values.astype(np.float32)), nan)
    np.testing.assert_array_equal(np.where(nan, 0, values.view(np.uint8)), np.where(nan, 0, expected[0].view(np.uint8)))
    np.testing.assert_array_equal(scales, expected[1])


def data(shape, seed=0, spread=6.0):
    """Normal numbers whose rows and columns differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(-spread, spread, (shape[0], 1)) + rng.uniform(-spread, spread, (1, shape[1])))
    return (rng.standard_normal(shape) * sizes).astype(np.float32)


def bfloat16_data(shape):
    """Numbers of few bits: their quotients are often halfway between two numbers of E4M3, where an ulp decides."""
    return data(shape).astype(ml_dtypes.bfloat16).astype(np.float32)


SPECIAL = {
    "numbers": data((130, 300)),
    "one_row": data((1, 128)),
    "one_tile_a_row": bfloat16_data((512, 128)),
    "one_tile_a_column": bfloat16_data((128, 512)),
    "one_tile": bfloat16_data((128, 128)),
    "one_row_of_bfloat16": bfloat16_data((1, 128)),
    "ragged": data((5, 7)),
    "zeros": np.zeros((3, 256), np.float32),
    "below_the_clamp": data((4, 200)) * np.float32(1e-12),
    "float32_subnormals": np.full((2, 128), 1e-41, np.float32),
    "e4m3_subnormals": np.concatenate([[448.0], np.linspace(0, 2.0**-6, 127)]).astype(np.float32)[None],
    "near_overflow": np.float32([[3e38, -3.4e38] * 64]),
    "halfway": np.concatenate([[448.0], np.arange(127) + 16.5]).astype(np.float32)[None],
    "infinite_and_nan": np.where(np.arange(512)[None] == 5, np.inf, np.where(
        np.arange(512)[None] == 300, np.nan, data((2, 512)))).astype(np.float32),
}


@pytest.mark.parametrize("scale", ["float32", "power_of_two"])
@pytest.mark.parametrize("name", SPECIAL)
def test_quantizers_are_bit_equal_to_numpy_under_jit(name, scale):
    x = SPECIAL[name]
    same_bits(tiles(x, scale=scale), oracle(x, 1, scale))
    same_bits(blocks(x, scale=scale), oracle(x, 128, scale))
    along_tokens = tiles(x, scale=scale, axis=-2)
    same_bits([a.T for a in along_tokens], oracle(x.T, 1, scale))


def test_quantizing_bfloat16_is_quantizing_its_float32():
    x = jnp.asarray(data((16, 256)), jnp.bfloat16)
    same_bits(tiles(x), oracle(x, 1))


@settings(max_examples=60)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=256, max_size=256))
def test_any_bit_patterns_quantize_as_in_numpy_and_a_bad_number_spoils_its_tile_alone(bits):
    x = np.array(bits, np.uint32).view(np.float32).reshape(1, 256)

    q = tiles(x)

    same_bits(q, oracle(x, 1))
    bad = np.asarray(~np.isfinite(x)).reshape(2, 128).any(axis=1)
    lost = np.isnan(np.asarray(fp8.dequantize(q)).reshape(2, 128))
    np.testing.assert_array_equal(lost, np.broadcast_to(bad[:, None], lost.shape))


@settings(max_examples=60)
@given(exponent=st.integers(-20, 118), offset=st.integers(-3, 3))
def test_a_power_of_two_scale_is_the_least_that_fits(exponent, offset):
    largest = np.float32(448 * 2.0**exponent)
    largest = np.int32(largest.view(np.int32) + offset).view(np.float32)  # some ulps off the boundary

    scale = float(tiles(np.full((1, 128), largest), scale="power_of_two").scales[0, 0])

    assert np.frexp(scale)[0] == 0.5 and scale >= np.float32(max(largest, 1e-4)) / np.float32(448) > scale / 2


def test_dequantizing_agrees_with_the_one_that_reads_checkpoints():
    w = data((200, 300), seed=3)
    q = blocks(w)
    np.testing.assert_array_equal(fp8.dequantize(q), stored_dequantize(*map(np.asarray, q), np.float32))


def test_a_quantized_array_is_a_pair_and_a_pytree():
    values, scales = q = fp8.quantize_tiles(jnp.ones((2, 130)))
    assert (values.shape, scales.shape) == ((2, 130), (2, 2))
    assert isinstance(jax.tree.map(lambda x: x[:1], q), fp8.Quantized)


def test_powers_of_two_come_back_from_their_exponents():
    scales = np.append(np.ldexp(np.float32(1), np.arange(-126, 128)), np.float32(0))

    exponents = fp8.exponents_of(jnp.asarray(scales))

    assert exponents.dtype == jnp.uint8
    np.testing.assert_array_equal(fp8.powers_of_two(exponents), scales)


def test_the_experts_input_gradient_by_columns_is_bit_equal_to_all_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    shapes = (256, 512), (2, 128, 512), (2, 128, 512), (2, 512, 128), (256, 512)
    *arrays, dy_RD = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    sizes_E = jnp.asarray([128, 128], jnp.int32)

    def gradients():
        return jax.vjp(functools.partial(fp8.swiglu_ffn, sizes=sizes_E), *arrays)[1](dy_RD)

    by_columns = gradients()
    monkeypatch.setattr("deepseek_jax.fp8.ffn.COLUMNS", 3)  # 512 is not a multiple of 3 * 128

    for found, expected in zip(by_columns, gradients()):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


# E5M6: the format in which the input of the attention's output projection is kept.


def e5m6_numbers():
    """All finite numbers of the format that are not negative, from its definition."""
    exponent, mantissa = np.divmod(np.arange(31 * 64), 64)
    return np.where(exponent == 0, mantissa / 64 * 2.0**-14, (1 + mantissa / 64) * 2.0 ** (exponent - 15.0))


def test_e5m6_rounds_to_the_nearest_of_its_numbers_ties_to_even():
    numbers = e5m6_numbers()
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, middles, np.nextafter(middles, 0, dtype=np.float32), -middles]).astype(np.float32)
    x = np.concatenate([x, np.full(-len(x) % 127, 1.0)]).reshape(-1, 127)
    x = np.concatenate([x, np.full((len(x), 1), 65024.0)], axis=1).astype(np.float32)  # every tile's scale is 1

    rounded = np.asarray(jax.jit(lambda x: fp8.from_e5m6(fp8.to_e5m6(x), 128))(x))

    above = np.searchsorted(numbers, np.abs(x).astype(np.float64))
    above = np.minimum(above, len(numbers) - 1)
    below = np.maximum(above - 1, 0)
    up, down = numbers[above] - np.abs(x), np.abs(x) - numbers[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)) | (numbers[above] == np.abs(x)), above, below)
    np.testing.assert_array_equal(rounded, np.sign(x) * numbers[code])


@pytest.mark.parametrize("columns", [128, 200, 33])
def test_e5m6_takes_a_byte_and_a_half_and_is_exact_the_second_time(columns):
    x = data((4, columns), spread=2.0)
    twice = jax.jit(lambda x: (fp8.to_e5m6(x), fp8.to_e5m6(fp8.from_e5m6(fp8.to_e5m6(x), columns))))
    once, again = twice(x)
    assert once.packed.dtype == jnp.uint8 and once.packed.shape[1] == 3 * -(-columns // 2)
    np.testing.assert_array_equal(fp8.from_e5m6(once, columns), fp8.from_e5m6(again, columns))
    np.testing.assert_allclose(fp8.from_e5m6(once, columns), x, rtol=2.0**-7)


# Products and gradients, against float64 of the numbers that the recipe quantizes to.


def quantized64(x, rows=1, axis=1, scale="float32"):
    x = np.asarray(x, np.float32)
    if axis == 0:
        return quantized64(x.T, rows, 1, scale).T
    values, scales = oracle(x, rows, scale)
    spread = np.repeat(np.repeat(scales, rows, 0)[:len(x)], 128, 1)[:, :x.shape[1]]
    return values.astype(np.float64) * spread.astype(np.float64)


def value_and_gradients(f, arguments, cotangent):
    def run(arguments, cotangent):
        y, pull_back = jax.vjp(f, *arguments)
        return y, pull_back(cotangent)

    return jax.jit(run)(arguments, cotangent)


def close(x, expected, tolerance=2e-6):
    expected = np.asarray(expected, np.float64)
    assert np.abs(np.asarray(x, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(130, 300, 200), (128, 128, 256)])
@pytest.mark.parametrize("kept", ["e4m3", "e5m6"])
def test_the_three_products_of_a_linear_are_those_of_the_quantized_numbers(shape, kept):
    (M, N, K), scale = shape, "power_of_two" if kept == "e5m6" else "float32"
    x, w, dy = data((M, K), 1, 1.0), data((N, K), 2, 1.0), data((M, N), 3, 1.0)

    y, (dx, dw) = value_and_gradients(functools.partial(fp8.linear, saved=kept), (x, w), dy)

    q_x, q_w = quantized64(x, scale=scale), quantized64(w, 128)
    close(y, q_x @ q_w.T)
    close(dx, quantized64(dy) @ q_w)
    kept_x = np.asarray(fp8.from_e5m6(fp8.to_e5m6(x), K)) if kept == "e5m6" else q_x
    close(dw, quantized64(dy, axis=0).T @ quantized64(kept_x, axis=0, scale=scale))


def test_a_linear_takes_the_frozen_weights_of_a_checkpoint():
    x, w, dy = data((64, 200), 1, 1.0), data((130, 200), 2, 1.0), data((64, 130), 3, 1.0)
    held = jax.jit(fp8.quantize_blocks)(w)  # as linear does: outside jit, jax 0.7.2 rounds differently

    y, (dx, _) = value_and_gradients(fp8.linear, (x, held), dy)

    np.testing.assert_array_equal(y, jax.jit(fp8.linear)(x, w))
    close(dx, quantized64(dy) @ quantized64(w, 128))


def test_a_linear_keeps_batch_axes_and_dtypes():
    x, w = jnp.ones((2, 3, 128), jnp.bfloat16), jnp.ones((64, 128), jnp.float32)
    y, (dx, dw) = value_and_gradients(fp8.linear, (x, w), jnp.ones((2, 3, 64), jnp.bfloat16))
    assert (y.shape, y.dtype, dx.dtype, dw.dtype) == ((2, 3, 64), jnp.bfloat16, jnp.bfloat16, jnp.float32)


def ffn64(x, gate, up, down, dy, scale):
    """The feed-forward network and its gradients in float64, quantized where the recipe quantizes."""
    silu = lambda g: g / (1 + np.exp(-g))
    q_x = quantized64(x, scale=scale)
    q_gate, q_up, q_down = (quantized64(w, 128) for w in (gate, up, down))
    g, u = q_x @ q_gate.T, q_x @ q_up.T
    y = quantized64(silu(g) * u) @ q_down.T
    g, u = quantized64(g), quantized64(u)
    dact = quantized64(dy, scale=scale) @ q_down
    sigmoid = 1 / (1 + np.exp(-g))
    dg, du = dact * u * sigmoid * (1 + g * (1 - sigmoid)), dact * silu(g)
    turned = quantized64(q_x, axis=0, scale=scale)
    return (y, quantized64(dg) @ q_gate + quantized64(du) @ q_up, quantized64(dg, axis=0).T @ turned,
            quantized64(du, axis=0).T @ turned, quantized64(dy, axis=0).T @ quantized64(silu(g) * u, axis=0))


FFN = [data(shape, seed, 0.5) for seed, shape in enumerate([(96, 160), (96, 160), (160, 96)], 5)]


def test_a_feed_forward_network_is_its_products_of_quantized_numbers():
    x, dy = data((130, 160), 1, 0.5) / 8, data((130, 160), 2, 0.5)

    y, gradients = value_and_gradients(fp8.swiglu_ffn, (x, *FFN), dy)

    # Sums in another order round a few numbers differently: those differ by a step of E4M3, not by an ulp.
    for ours, expected in zip((y, *gradients), ffn64(x, *FFN, dy, "float32")):
        close(ours, expected, 2e-3)


def test_experts_are_feed_forward_networks_of_their_own_rows():
    sizes = np.array([128, 0, 256], np.int32)
    x, dy = data((512, 160), 1, 0.5) / 8, data((512, 160), 2, 0.5)
    x[384:] = 0  # after the last group
    weights = [np.stack([w, 2 * w, -w]) for w in FFN]

    y, (dx, *dw) = value_and_gradients(
        lambda x, *w: fp8.swiglu_ffn(x, *w, sizes=jnp.asarray(sizes)), (x, *weights), dy)

    assert not np.asarray(y)[384:].any()
    for e, rows in ((0, slice(0, 128)), (2, slice(128, 384))):
        expected = ffn64(x[rows], *(w[e] for w in weights), dy[rows], "power_of_two")
        for ours, theirs in zip((y[rows], dx[rows], *(d[e] for d in dw)), expected):
            close(ours, theirs, 2e-3)
    assert not any(np.asarray(d)[1].any() for d in dw)  # an expert without tokens


def test_wgrad_reads_bfloat16_where_that_loses_nothing(monkeypatch):
    """Wgrad kernels read bfloat16; with power-of-two scales (input of o_proj, tokens of experts) that is exact."""
    read, quantize = [], api.quantize
    monkeypatch.setattr(api, "quantize", lambda x, **options: (
        read.append(x.dtype) if options.get("transposed") == "only" else None) or quantize(x, **options))
    x, w = (jnp.asarray(data((128, 128), n, 1.0), jnp.bfloat16) for n in range(2))
    sizes = jnp.array([128])

    jax.vjp(functools.partial(fp8.linear, saved="e5m6"), x, w)[1](x)
    jax.vjp(functools.partial(fp8.swiglu_ffn, sizes=sizes), x, w[None], w[None], w[None])[1](x)

    assert read.count(jnp.bfloat16) == 4 and read.count(jnp.float32) == 3  # dy and x, twice; d gate, d up, act

    wide = data((256, 300), 4)
    for kept in (fp8.dequantize(tiles(wide, scale="power_of_two")), fp8.from_e5m6(fp8.to_e5m6(wide), 300)):
        np.testing.assert_array_equal(kept, kept.astype(jnp.bfloat16).astype(jnp.float32))


# On a mesh: tokens in four parts of 128, and the split dimension of a weight in two.
MESH = MeshConfig(replica=2, local=2, tensor=2)


@pytest.fixture
def products(monkeypatch):
    """The shapes of the left operands of all products."""
    shapes, product = [], api.fp8_matmul
    monkeypatch.setattr(api, "fp8_matmul", lambda a, b, **options: shapes.append(a[0].shape) or product(
        a, b, **options))
    return shapes


def on_a_mesh(f, arguments, dy):
    with jax.set_mesh(make_mesh(MESH)):
        return jax.device_get(value_and_gradients(f, arguments, dy))


@pytest.mark.parametrize("kept", ["e4m3", "e5m6"])
@pytest.mark.parametrize(("names", "parts"), [((None, None), (512, 256)), (("heads", None), (256, 256)),
                                              ((None, "heads"), (512, 128))])
def test_a_device_multiplies_its_own_rows_and_its_part_of_the_weight(names, parts, kept, products):
    x, w, dy = data((512, 256), 1, 1.0), data((512, 256), 2, 1.0), data((512, 512), 3, 1.0)
    alone = value_and_gradients(functools.partial(fp8.linear, saved=kept), (x, w), dy)
    products.clear()

    y, (dx, dw) = on_a_mesh(functools.partial(fp8.linear, saved=kept, names=names), (x, w), dy)

    N, K = parts
    assert products == [(128, K), (128, N), (N, 128)]  # Fprop, Dgrad, Wgrad
    for ours, expected in zip((y, dx, dw), (alone[0], *alone[1]), strict=True):
        close(ours, expected)


def test_a_feed_forward_network_on_a_mesh_is_that_of_one_device(products):
    weights = [data(shape, seed, 0.5) for seed, shape in enumerate([(256, 160), (256, 160), (160, 256)], 5)]
    x, dy = data((512, 160), 1, 0.5) / 8, data((512, 160), 2, 0.5)
    y, gradients = value_and_gradients(fp8.swiglu_ffn, (x, *weights), dy)
    products.clear()

    ours, found = on_a_mesh(fp8.swiglu_ffn, (x, *weights), dy)

    assert {shape[0] for shape in products} == {128, 160} and len(products) == 9
    for a, b in zip((ours, *found), (y, *gradients), strict=True):
        close(a, b)


# The studies of the recipe.


def wgrad_error(**changes):
    """Relative error of dx, averaged over its rows, for data that differ by orders of magnitude."""
    recipe = dataclasses.replace(fp8.RECIPE, implementation="reference", **changes)
    x, w, dy = data((256, 256), 1, 0.1), data((128, 256), 2, 0.1), data((256, 128), 3, 8.0)
    _, (dx, dw) = value_and_gradients(lambda x, w: fp8.linear(x, w, recipe), (x, w), dy)
    error = lambda ours, exact: np.linalg.norm(ours - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return np.mean(error(np.asarray(dx), dy @ w))


def test_coarser_scales_and_fewer_bits_lose_what_the_recipe_keeps():
    fine = wgrad_error()
    assert fine < 0.04
    assert wgrad_error(gradient_format="e5m2") > 1.4 * fine
    assert wgrad_error(gradient_tiles="128x128") > 1.1 * fine
    assert wgrad_error(tiles="tensor") > 2 * fine


def accumulation_error(**changes):
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0, 1, (2, 32, 4096)).astype(np.float32)
    recipe = dataclasses.replace(fp8.RECIPE, implementation="reference", **changes)
    exact = quantized64(x) @ quantized64(w, 128).T
    return np.abs(jax.jit(lambda x, w: fp8.linear(x, w, recipe))(x, w) / exact - 1).max()


def test_promotion_every_128_elements_keeps_what_14_bits_lose():
    exact, promoted, never = (accumulation_error(), accumulation_error(accumulator_bits=14),
                              accumulation_error(accumulator_bits=14, promote_every=None))
    assert exact < 2e-6 < promoted < 3e-4 and never > 10 * promoted


def test_what_only_the_reference_can_study_says_so_elsewhere():
    with pytest.raises(ValueError, match="implementation='reference'"):
        fp8.linear(jnp.ones((1, 128)), jnp.ones((1, 128)),
                   FP8Config(enabled=True, accumulator_bits=14, implementation="hopper"))


# In the model.

SMALL = dict(num_layers=2, mtp_depth=1, vocab_size=256, num_experts=8, num_groups=2, groups_kept=1, experts_per_token=2,
             remat="none")
RECIPE = FP8Config(enabled=True)


def pull_back(cfg, tokens):
    """(hidden states, residuals of their jax.vjp) of a model, only traced."""
    model = DeepSeekV3(cfg)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), logits=False))

    def hidden(params, router, tokens):
        output = model.apply({"params": params, "router": router}, tokens, logits=False)
        return output.hidden_BTD, output.mtp_hidden

    def run(params, router, tokens):
        return jax.vjp(lambda p: hidden(p, router, tokens), params)

    return jax.eval_shape(run, variables["params"], variables["router"], tokens)


def kept_bytes(recipe):
    """Bytes of residuals for the backward pass, including the few bytes of the parameters."""
    _, vjp = pull_back(model_config("tiny", **SMALL, fp8=recipe), jax.ShapeDtypeStruct((8, 256), jnp.int32))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vjp) if x.dtype != jax.dtypes.float0)


def test_the_backward_pass_keeps_40_percent_fewer_bytes():
    assert kept_bytes(RECIPE) < 0.6 * kept_bytes(FP8Config())


def test_swiglu_inputs_are_kept_in_fp8_under_the_reports_remat():
    cfg = model_config("tiny", **SMALL | {"remat": "report"}, fp8=RECIPE)
    _, vjp = pull_back(cfg, jax.ShapeDtypeStruct((4, 256), jnp.int32))
    kept = {(x.dtype.name, x.shape[-2:]) for x in jax.tree.leaves(vjp) if x.ndim > 1}
    tokens, rows = 4 * 256, 2 * 4 * 256 + 8 * 128  # the experts' rows, as `plan` rounds them
    ffn, mtp_projection = {(tokens, 704), (tokens, 128), (rows, 128)}, (tokens, 512)
    assert {shape for dtype, shape in kept if dtype == "float8_e4m3fn"} == ffn | {mtp_projection}
    assert not any(dtype == "bfloat16" and shape[1] in (704, 128) for dtype, shape in kept)


def test_every_linear_of_every_block_runs_in_fp8(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a product in bfloat16")

    monkeypatch.setattr("deepseek_jax.model.layers._linear", refuse)
    monkeypatch.setattr("deepseek_jax.model.experts.grouped_matmul", refuse)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    pull_back(model_config("tiny", **SMALL, fp8=RECIPE), tokens)
    with pytest.raises(AssertionError, match="a product in bfloat16"):
        pull_back(model_config("tiny", **SMALL), tokens)


def test_a_model_in_fp8_is_near_the_one_in_bfloat16_and_not_it():
    dense = SMALL | dict(num_layers=1, num_dense_layers=1, mtp_depth=0)  # no routing, because choices may flip
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, 256)
    variables = jax.jit(DeepSeekV3(model_config("tiny", **dense)).init)(jax.random.key(0), tokens)
    run = lambda recipe: np.asarray(jax.jit(
        DeepSeekV3(model_config("tiny", **dense, fp8=recipe)).apply)(variables, tokens).hidden_BTD, np.float32)
    bf16, ours = run(FP8Config()), run(RECIPE)
    # A product of numbers rounded to 4 bits has an error of some 3.5 %, and several follow each other.
    assert 0.01 < np.linalg.norm(ours - bf16) / np.linalg.norm(bf16) < 0.1


# The section of the config.


def test_the_section_fp8_stands_beside_the_model_in_files_and_inside_it_when_frozen():
    config = default_config("tiny")
    assert "fp8" not in config.model and not config.fp8.enabled
    config.fp8.enabled = True
    frozen = freeze(config)
    assert frozen.model.fp8 == FP8Config(enabled=True)
    assert freeze(as_dict(frozen)) == frozen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(fp8=dict(enable=True)), "unknown config key fp8.enable; did you mean enabled?"),
        (dict(fp8=dict(scale="ue8m0")), "fp8.scale='ue8m0' is unknown; take one of 'float32', 'power_of_two'"),
        (dict(fp8=dict(accumulator_bits=25)), "fp8.accumulator_bits=25 is more than the 24 of float32"),
        (dict(fp8=dict(promote_every=100)), "fp8.promote_every=100 must be a multiple of 32"),
        (dict(fp8=3), "fp8=3 should be a section"),
        (dict(model=dict(fp8=dict(enabled=True))), "say fp8 next to model"),
    ],
)
def test_a_wrong_fp8_section_says_what_would_work(changes, message):
    plain = as_dict(freeze(default_config("tiny")))
    for section, value in changes.items():
        plain[section] = plain[section] | value if isinstance(value, dict) else value
    with pytest.raises(ConfigError) as error:
        freeze(plain)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
