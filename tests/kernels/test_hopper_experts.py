"""The experts' bfloat16 products for Hopper in the GPU interpreter, race detector on, against their twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.hopper import grouped_matmul as experts
from kernels_pallas.reference import grouped_matmul as reference_experts
from tests.kernels.interpreter import INTERPRET


def close(ours, theirs, tolerance=2e-6):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


# Groups that begin and end inside tiles and inside their 8 rows, an empty group, and rows of no group.
UNEVEN = jnp.array([69, 0, 5, 150], jnp.int32)
FEW = dict(config=experts.TuningConfig(tile_n=128, stages=2), num_sms=2, interpret=INTERPRET)


def bfloat16(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_products_are_their_twin_and_zero_past_the_last_group(transposed):
    x_RD, w_EDF = bfloat16(260, 72), bfloat16(4, *((136, 72) if transposed else (72, 136)), seed=1)
    x_RD = x_RD.at[224:].set(jnp.nan)  # rows of no expert may have any value
    ours = experts.grouped_matmul(x_RD, w_EDF, UNEVEN, transposed=transposed, **FEW)
    theirs = reference_experts.grouped_matmul(x_RD.at[224:].set(0), w_EDF, UNEVEN, transposed=transposed)
    assert ours.dtype == jnp.bfloat16
    close(ours, theirs, 2.0**-8)
    assert not np.asarray(ours)[224:].any()


def test_the_gradient_of_experts_is_its_twin_and_zero_for_an_empty_group():
    x_RD, dy_RF = bfloat16(260, 72), bfloat16(260, 136, seed=1)
    x_RD = x_RD.at[224:].set(jnp.nan)
    ours = experts.weights(x_RD, dy_RF, UNEVEN, **FEW)
    close(ours, reference_experts.weights(x_RD.at[224:].set(0), dy_RF, UNEVEN))
    assert ours.dtype == jnp.float32 and not np.asarray(ours)[1].any()


tiles_of_groups = jax.jit(experts.tiles_of_groups, static_argnums=(1, 2))


@given(ends=st.lists(st.integers(0, 500), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_tiles_hold_every_row_once_under_its_expert(ends):
    E, R, sizes = 4, 500, np.diff([0, *sorted(ends)])
    tiles = (R + (E + 1) * (experts.ROWS + experts.ALIGN - 2)) // experts.ROWS
    found = np.full(R, -1)
    for expert, row, begin, end in zip(*map(np.asarray, tiles_of_groups(jnp.asarray(sizes), R, tiles))):
        assert row % experts.ALIGN == 0
        assert (found[row + begin:row + end] == -1).all()
        found[row + begin:row + end] = expert
    np.testing.assert_array_equal(found, np.repeat(np.arange(E + 1), [*sizes, R - sizes.sum()]))
