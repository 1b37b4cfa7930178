"""Rotary positions: rotations of adjacent pairs, and YaRN's change of their frequencies."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Yarn, model_config
from deepseek_jax.model import rope
from tests.model import naive

V3 = model_config("v3_671b")
RNG = np.random.default_rng(0)


def rotated(cfg, x_TR, positions_T):
    """One row, one head."""
    table = rope.rope_table(cfg, np.asarray(positions_T)[None], jnp.float32)
    return np.asarray(rope.rotate(jnp.asarray(x_TR)[None, :, None], table))[0, :, 0]


def test_yarn_keeps_the_fast_frequencies_of_v3_and_divides_the_slow_ones_by_forty():
    plain = 10000.0 ** (-np.arange(32) / 32)

    change = plain / rope.frequencies(V3)

    np.testing.assert_allclose(change[:11], 1, rtol=1e-12)
    np.testing.assert_allclose(change[23:], 40, rtol=1e-12)
    assert (np.diff(change[10:24]) > 0).all()  # a ramp between, both ends excluded


@pytest.mark.parametrize("theta", [100.0, 10000.0])
@pytest.mark.parametrize("yarn", [None, Yarn(), Yarn(factor=4.0, original_length=32), Yarn(beta_fast=8, beta_slow=2)])
def test_frequencies_are_those_of_the_paper(theta, yarn):
    cfg = naive.tiny(rope_head_dim=16, rope_theta=theta, yarn=yarn)

    np.testing.assert_allclose(rope.frequencies(cfg), naive.frequencies(cfg), rtol=1e-12)


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        (dict(), 0.135234),  # 192^-0.5 * 1.36889^2
        (dict(yarn=None), 0.072169),
        (dict(yarn=Yarn(mscale=0.707, mscale_all_dim=0.707)), 0.114721),  # 192^-0.5 * 1.26080^2
        (dict(yarn=Yarn(factor=1.0)), 0.072169),
    ],
)
def test_yarn_sharpens_the_softmax_of_v3(overrides, scale):
    assert rope.softmax_scale(model_config("v3_671b", **overrides)) == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize(
    ("mscale", "all_dim", "amplitude"), [(1.0, 1.0, 1.0), (0.707, 0.707, 1.0), (1.0, 0.0, 1.36889)])
def test_yarn_scales_cosine_and_sine_by_the_ratio_of_its_two_mscales(mscale, all_dim, amplitude):
    cfg = naive.tiny(yarn=Yarn(mscale=mscale, mscale_all_dim=all_dim))

    cos, sin = rope.rope_table(cfg, np.arange(5)[None], jnp.float32)

    np.testing.assert_allclose(jnp.sqrt(cos**2 + sin**2), np.full(cos.shape, amplitude), rtol=1e-5)


def test_a_rotation_keeps_the_length_of_every_pair():
    x_TR = RNG.standard_normal((9, 8)).astype(np.float32)

    y_TR = rotated(naive.tiny(rope_head_dim=8), x_TR, np.arange(9) * 7)

    lengths = [np.hypot(z[:, 0::2], z[:, 1::2]) for z in (x_TR, y_TR)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert np.abs(y_TR - x_TR)[1:].max() > 0.1 and np.array_equal(y_TR[0], x_TR[0])


@pytest.mark.parametrize("yarn", [None, Yarn(original_length=32)])
def test_a_score_depends_on_the_distance_alone(yarn):
    cfg = naive.tiny(rope_head_dim=8, yarn=yarn)
    q, k = RNG.standard_normal((2, 8)).astype(np.float32)

    scores = [rotated(cfg, q[None], [t]) @ rotated(cfg, k[None], [t - 5]).T for t in (5, 6, 50, 500)]

    np.testing.assert_allclose(scores, np.full((4, 1, 1), scores[0]), rtol=1e-3)
    assert abs(scores[0] - rotated(cfg, q[None], [5]) @ rotated(cfg, k[None], [1]).T) > 1e-2


def test_rotation_is_multiplication_by_a_complex_number_of_the_angle():
    cfg = naive.tiny(rope_head_dim=8)
    x_TR, positions = RNG.standard_normal((4, 8)).astype(np.float32), [0, 1, 3, 100]

    expected = [naive.rotate(cfg, x.astype(np.float64), t) for x, t in zip(x_TR, positions)]

    np.testing.assert_allclose(rotated(cfg, x_TR, positions), expected, atol=1e-5)


def test_adjacent_pairs_are_halves_after_a_permutation():
    cfg, R = naive.tiny(rope_head_dim=8), 8
    x_TR, positions = RNG.standard_normal((5, R)).astype(np.float32), np.arange(5)
    halves_of_pairs = np.r_[0:R:2, 1:R:2]  # pairs first, as transformers lays them out

    turned = naive.frequencies(cfg)[None] * positions[:, None]
    cos, sin = (np.tile(f(turned), 2) for f in (np.cos, np.sin))
    halves_TR = x_TR[:, halves_of_pairs]
    rotate_half = np.concatenate([-halves_TR[:, R // 2:], halves_TR[:, :R // 2]], axis=1)
    expected = halves_TR * cos + rotate_half * sin

    np.testing.assert_allclose(rotated(cfg, x_TR, positions)[:, halves_of_pairs], expected, atol=1e-5)
    assert np.abs(rotated(cfg, x_TR, positions) - expected).max() > 0.1  # and the layouts do differ


def test_the_table_computes_and_the_result_keeps_its_dtype():
    cfg = naive.tiny()
    table = rope.rope_table(cfg, np.array([[1000, 1001]]), jnp.float32)
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)

    y = rope.rotate(x, table)

    assert y.dtype == jnp.bfloat16 and table[0].dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), rope.rotate(x.astype(jnp.float32), table), atol=0.01)


def test_the_indexer_rotates_the_same_pairs_in_another_order():
    cfg, R = naive.tiny(rope_head_dim=8), 8
    x_TR, positions = RNG.standard_normal((5, R)).astype(np.float32), np.arange(5)
    halves_of_pairs = np.r_[0:R:2, 1:R:2]

    table = rope.rope_table(cfg, positions[None], jnp.float32)
    halves_TR = rope.rotate_halves(jnp.asarray(x_TR[:, halves_of_pairs])[None, :, None], table)[0, :, 0]

    np.testing.assert_allclose(halves_TR, rotated(cfg, x_TR, positions)[:, halves_of_pairs], atol=1e-6)
