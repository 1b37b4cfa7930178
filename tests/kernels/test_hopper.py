"""Hopper's kernels in the GPU interpreter, race detector on, against their twins; with full and partial tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import api
from kernels_pallas.hopper import fp8_grouped_matmul as grouped
from kernels_pallas.hopper import fp8_matmul as matmul
from kernels_pallas.hopper import grouped_matmul as experts
from kernels_pallas.hopper import quantize as quantizers
from kernels_pallas.tools.shapes import Attention, Case, Decode, Grouped
from tests.kernels.interpreter import INTERPRET


def normal(shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(-3, 3, (*shape[:-1], 1)))
    return jnp.asarray(rng.standard_normal(shape) * sizes, dtype)


def same_bits(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def close(ours, theirs, tolerance=2e-6):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("shape", [(128, 256), (72, 136)])
@pytest.mark.parametrize("scale", ["float32", "power_of_two"])
@pytest.mark.parametrize("transposed", [True, "only"])
def test_both_quantized_copies_are_bit_equal_to_the_twin(shape, scale, transposed):
    x = normal(shape, dtype=jnp.bfloat16)
    ours = quantizers.quantize(x, scale=scale, transposed=transposed, interpret=INTERPRET)
    same_bits(ours, jax.jit(lambda x: api.quantize(x, scale=scale, transposed=transposed))(x))


def test_finite_numbers_next_to_an_infinite_one_are_zero_as_in_the_twin():
    x = normal((128, 128), dtype=jnp.bfloat16).at[3, 5].set(jnp.inf)
    ours, theirs = (np.asarray(q.values, np.float32)
                    for q in (quantizers.quantize(x, interpret=INTERPRET), api.quantize(x)))
    assert np.isnan(theirs).sum() == 1 and not np.nan_to_num(theirs[3]).any()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("transposed", "copies"), [(False, 1), ("only", 1), (True, 2)])
def test_a_copy_that_nobody_wants_is_neither_made_nor_written(transposed, copies):
    x = jnp.ones((256, 256), jnp.bfloat16)
    program = str(jax.make_jaxpr(functools.partial(quantizers.quantize, transposed=transposed))(x))
    assert program.count("copy_smem_to_gmem") == 2 * copies  # values and scales
    assert program.count("= div ") == 2 * copies  # a row's scale and its reciprocal: there is no division per number


def test_a_row_is_multiplied_by_its_reciprocal_and_rounded_as_its_quotients_are():
    """Quotients of bfloat16 numbers are often halfway between two numbers of E4M3, where an ulp of 1 / s matters."""
    s = np.float32(np.arange(128, 256)) / np.float32(448)
    high, rest = (np.asarray(x, np.float64) for x in quantizers._reciprocal(jnp.asarray(s)))
    assert np.abs((high + rest) * s - 1).max() < 2.0**-32
    np.testing.assert_array_equal(high.astype(np.float32).view(np.int32) & 0xFFF, 0)
    x = np.float32(np.arange(128, 256))[:, None] / 128
    one = (x * (1 / s)).astype(jnp.float8_e4m3fn)
    assert (one != (x / s).astype(jnp.float8_e4m3fn)).any()  # one factor would round these differently
    np.testing.assert_array_equal((x * np.float32(high) + x * np.float32(rest)).astype(jnp.float8_e4m3fn),
                                  (x / s).astype(jnp.float8_e4m3fn))


quantized = jax.jit(functools.partial(quantizers.quantize, transposed=True, interpret=INTERPRET),
                    static_argnames="scale")


@given(data=st.data(), scale=st.sampled_from(["float32", "power_of_two"]), shape=st.sampled_from([(72, 136), (8, 16)]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_an_infinite_or_nan_element_makes_its_tiles_nan_and_no_other(data, scale, shape):
    place = st.tuples(*(st.integers(0, size - 1) for size in shape))
    strange = data.draw(st.dictionaries(place, st.sampled_from([np.inf, -np.inf, np.nan, -np.nan]), min_size=1,
                                        max_size=4))
    strange[data.draw(place)] = np.nan  # there is always at least one
    x = np.array(normal(shape, dtype=jnp.bfloat16))
    for at, value in strange.items():
        x[at] = value
    both = quantized(jnp.asarray(x), scale=scale)
    for q, lines in zip(both, (strange, [(column, row) for row, column in strange])):
        expected = np.zeros(q.values.shape, bool)
        for line, place in lines:
            expected[line, place // 128 * 128:(place // 128 + 1) * 128] = True
        np.testing.assert_array_equal(np.isnan(np.asarray(api.dequantize(q))), expected)


def test_swiglu_is_quantized_within_a_step_of_e4m3_of_the_twin():
    gate, up = normal((72, 136), 1, jnp.bfloat16), normal((72, 136), 2, jnp.bfloat16)
    ours = quantizers.swiglu_quantize(gate, up, interpret=INTERPRET)
    theirs = jax.jit(api.swiglu_quantize)(gate, up)
    np.testing.assert_allclose(ours.scales, theirs.scales, rtol=1e-6)
    np.testing.assert_allclose(api.dequantize(ours), api.dequantize(theirs), rtol=2.0**-3)


# (M, N, K), rows and columns of warpgroups, stages
DENSE = [((128, 128, 256), "rows", 2), ((200, 136, 400), "rows", 3), ((40, 264, 256), "columns", 2)]


@pytest.mark.parametrize(("tile_n", "split"), [(64, "rows"), (64, "columns"), (16, "columns")])
def test_narrow_tiles_share_their_block_of_scales(tile_n, split):
    a, b = api.quantize(normal((64, 256))), api.quantize_blocks(normal((200, 256), 1))
    config = matmul.TuningConfig(tile_n=tile_n, split=split, stages=2)
    ours = matmul.fp8_matmul(a, b, out_dtype=jnp.float32, config=config, num_sms=2, interpret=INTERPRET)
    close(ours, api.fp8_matmul(a, b, out_dtype=jnp.float32))


@pytest.mark.parametrize("form", ["blocks", "tiles"])
@pytest.mark.parametrize(("shape", "split", "stages"), DENSE)
def test_matmuls_are_their_twins(form, shape, split, stages):
    M, N, K = shape
    a, b = api.quantize(normal((M, K))), normal((N, K), 1)
    b = api.quantize_blocks(b) if form == "blocks" else api.quantize(b)
    config = matmul.TuningConfig(split=split, stages=stages)
    ours = matmul.fp8_matmul(a, b, out_dtype=jnp.float32, config=config, num_sms=2, interpret=INTERPRET)
    close(ours, api.fp8_matmul(a, b, out_dtype=jnp.float32))


# The interpreter gives each of the two SMs a copy of all rows; on the machine each SM loads half of them for both.
@pytest.mark.parametrize(("shape", "form"), [((128, 256, 256), "blocks"), ((200, 300, 400), "tiles")])
def test_two_sms_with_the_same_rows_are_the_twin_too(shape, form):
    M, N, K = shape
    a, b = api.quantize(normal((M, K))), normal((N, K), 1)
    b = api.quantize_blocks(b) if form == "blocks" else api.quantize(b)
    config = matmul.TuningConfig(stages=2, pair=True)
    ours = matmul.fp8_matmul(a, b, out_dtype=jnp.float32, config=config, num_sms=4, interpret=INTERPRET)
    close(ours, api.fp8_matmul(a, b, out_dtype=jnp.float32))


@pytest.mark.parametrize("pair", [False, True])
def test_two_sms_load_for_both_and_wait_for_both_to_have_read_also_at_the_end(pair):
    """Checked in the traced program: in the interpreter no SM writes into another's memory, so it would not notice."""
    a, b = api.quantize(normal((128, 1024))), api.quantize_blocks(normal((256, 1024), 1))
    run = lambda a, b: matmul.fp8_matmul(a, b, config=matmul.TuningConfig(pair=pair))
    program = str(jax.make_jaxpr(run)(a, b))
    assert program.count("copy_gmem_to_smem") == 2  # a and b
    assert program.count("copy_gmem_to_smem[collective_axes=('pair',)]") == pair
    assert ("{cluster_barrier[" in program) == pair
    assert program.count("barrier_wait") == 3  # for a slot that was read, for a full slot, and at the end


@pytest.mark.parametrize(("N", "pair"), [(72, False), (128, False), (136, True), (384, False), (1408, True)])
def test_experts_tiles_are_paired_where_a_column_too_many_costs_less_than_it_saves(N, pair):
    assert matmul.TuningConfig.of_groups(N).pair == pair
    assert not matmul.TuningConfig.of_groups(N, num_sms=1).pair


@pytest.mark.parametrize(("split", "dtype", "stages"), [("rows", "bfloat16", 5), ("rows", "float32", 4),
                                                        ("columns", "bfloat16", 4), ("columns", "float32", 3)])
def test_a_ring_takes_what_the_output_leaves_of_shared_memory(split, dtype, stages):
    assert matmul.TuningConfig(split=split).stages_for(jnp.dtype(dtype)) == stages


@pytest.mark.parametrize(("M", "N", "tile_n", "tiles"), [
    (64, 2112, 16, 66), (64, 4096, 16, 128), (64, 7168, 32, 112), (64, 32768, 128, 128), (128, 2112, 16, 132),
    (128, 4096, 32, 128), (4096, 4096, 128, 1024)])
def test_few_rows_have_narrow_tiles_so_that_all_sms_work(M, N, tile_n, tiles):
    config = matmul.TuningConfig.of_shape(M, N)
    assert config.tile_n == tile_n and -(-M // config.block_m) * -(-N // config.block_n) == tiles
    assert config.pair == (M == 4096)


def test_a_matmul_rounds_once_to_its_output():
    a, b = api.quantize(normal((128, 256))), api.quantize_blocks(normal((128, 256), 1))
    ours = matmul.fp8_matmul(a, b, num_sms=1, interpret=INTERPRET)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, api.fp8_matmul(a, b))), rtol=2.0**-7)


SIZES = jnp.array([128, 0, 256], jnp.int32)


@pytest.mark.parametrize("pair", [False, True])
def test_grouped_products_are_their_twin_and_zero_past_the_last_group(pair):
    a, b = api.quantize(normal((512, 200))), api.quantize_blocks(normal((3, 136, 200), 1))
    config = matmul.TuningConfig(stages=2, pair=pair)
    ours = grouped.fp8_grouped_matmul(a, b, SIZES, out_dtype=jnp.float32, config=config, num_sms=2, interpret=INTERPRET)
    close(ours, api.fp8_grouped_matmul(a, b, SIZES, out_dtype=jnp.float32))
    assert not np.asarray(ours)[384:].any()


@pytest.mark.parametrize("pair", [False, True])
def test_k_grouped_products_are_their_twin_and_zero_for_an_empty_group(pair):
    a, b = api.quantize(normal((136, 512))), api.quantize(normal((72, 512), 1))
    ours = grouped.fp8_grouped_matmul(a, b, SIZES, out_dtype=jnp.float32, config=matmul.TuningConfig(pair=pair),
                                      num_sms=2, interpret=INTERPRET)
    close(ours, api.fp8_grouped_matmul(a, b, SIZES, out_dtype=jnp.float32))
    assert not np.asarray(ours)[1].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: experts.TuningConfig(tile_n=64), "tile_n=64 makes no tile of this kernel; tile_n is 128 or 256."),
        (lambda: experts.grouped_matmul(jnp.ones((8, 64)), jnp.ones((1, 64, 64)), jnp.ones(1, jnp.int32)),
         "multiply bfloat16, not float32; implementation='reference' takes it."),
        (lambda: quantizers.quantize(jnp.ones((8, 128))), "takes bfloat16 matrices"),
        (lambda: quantizers.quantize(jnp.ones((8, 16), jnp.bfloat16), dtype=jnp.float8_e5m2), "makes E4M3, not float8"),
        (lambda: matmul.fp8_matmul(api.quantize(jnp.ones((8, 128)), dtype=jnp.float8_e5m2),
                                   api.quantize_blocks(jnp.ones((8, 128)))), "multiplies E4M3 by E4M3"),
        (lambda: grouped.fp8_grouped_matmul(
            api.quantize(jnp.ones((128, 128))), api.quantize_blocks(jnp.ones((1, 8, 128))), jnp.ones(1, jnp.int32),
            config=matmul.TuningConfig(split="columns")), "config.split must be 'rows'"),
        (lambda: matmul.fp8_matmul(api.quantize(jnp.ones((8, 128))), api.quantize_blocks(jnp.ones((8, 128))),
                                   config=matmul.TuningConfig(pair=True), num_sms=1), "num_sms=1; take pair=False."),
        (lambda: matmul.TuningConfig(tile_n=192), "tile_n=192 and split='rows' make no tile of this kernel; tile_n is"),
        (lambda: matmul.TuningConfig(tile_n=8), "tile_n=8 and split='rows' make no tile"),
        (lambda: matmul.TuningConfig(split="column"), "split 'rows' or 'columns'."),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


# The interpreter accepts any shape; the compiler refuses partial tiles at the end of an array.
@pytest.mark.parametrize("case", [
    Case("quantize", 100, 96), Case("quantize", 100, 90, form="both"),
    Case("quantize", 100, 90, form="only", scale="power_of_two"), Case("swiglu_quantize", 12, 704),
    Case("fp8_matmul", 300, 256, 80), Case("fp8_matmul", 12, 96, 190), Case("fp8_matmul", 250, 300, 80, form="tiles"),
    Case("fp8_grouped_matmul", 512, 200, 90, groups=2),
    Case("fp8_grouped_matmul", 100, 512, 90, groups=2, form="tiles"),
    *(Grouped(101, 90, 76, groups=3, form=form) for form in ("", "transposed", "weights")),
    Attention(2, 100, 2, backward=True, segments=True), Decode(3, 100, 20), Decode(3, 100, 20, page=16, packed=True)],
    ids=lambda case: f"{case.operation}-{case}")
def test_ragged_shapes_lower_for_the_real_machine_too(case):
    jax.jit(case.call("hopper")).trace(*case.arguments()).lower(lowering_platforms=("cuda",))
