"""Attention: blocks against the plain softmax, masks, and MLA against `naive.mla`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Yarn
from deepseek_jax.model.attention import MLA
from deepseek_jax.model.blockwise import attend
from deepseek_jax.model.rope import rope_table
from tests.model import naive
from tests.precision import float64

SCALE = 0.4
PACKED = [0, 0, 0, 1, 2, 2, 2, 2, 2, 3]


def allowed(T, segments):
    """[T, S]: whether query t may see key s."""
    ids = np.zeros(T) if segments is None else np.array(segments)
    return np.tril(np.ones((T, T), bool)) & (ids[:, None] == ids[None])


def plain(q_BTHA, k_BTHA, v_BTHV, segments):
    s_BHTS = jnp.einsum("BTHA,BSHA->BHTS", q_BTHA, k_BTHA) * SCALE
    seen = allowed(q_BTHA.shape[1], segments)[None, None]
    return jnp.einsum("BHTS,BSHV->BTHV", jax.nn.softmax(jnp.where(seen, s_BHTS, -jnp.inf)), v_BTHV)


def blockwise(block, segments):
    ids_BT = None if segments is None else np.array([segments] * 2, np.int32)
    return lambda q, k, v: attend(q, k, v, None if ids_BT is None else ids_BT[:q.shape[0]], SCALE, block)


def qkv(T, B=2, H=2, A=6, V=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, T, H, d)) for d in (A, A, V)]


def with_gradients(f, arrays, dtype):
    """The output and its three gradients under a random cotangent."""
    do = np.random.default_rng(1).standard_normal(arrays[0].shape[:3] + arrays[2].shape[3:])

    def run(*arrays):
        o, pull = jax.vjp(f, *arrays)
        return o, *pull(jnp.asarray(do, dtype))

    return jax.jit(run, compiler_options=naive.QUICKLY)(*(jnp.asarray(a, dtype) for a in arrays))


@pytest.mark.parametrize(
    ("T", "block", "segments"),
    [
        (8, 4, None),
        (10, 4, None),  # the last block is padded
        (5, 8, None),  # a block is larger than the sequence
        (1, 4, None),
        (10, 1, PACKED),
        (10, 4, PACKED),
        (10, 5, PACKED),
        (70, 16, None),
    ],
)
def test_attention_in_blocks_is_the_plain_softmax_and_so_are_its_gradients(T, block, segments):
    with float64():
        found = with_gradients(blockwise(block, segments), qkv(T), jnp.float64)
        expected = with_gradients(lambda *x: plain(*x, segments), qkv(T), jnp.float64)

        for name, a, b in zip(("o", "dq", "dk", "dv"), found, expected):
            np.testing.assert_allclose(a, b, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
def test_attention_keeps_its_dtype_and_its_accuracy(dtype, tolerance):
    rounded = [jnp.asarray(a, dtype).astype(jnp.float32) for a in qkv(40)]

    found = with_gradients(blockwise(16, None), rounded, dtype)
    expected = with_gradients(lambda *x: plain(*x, None), rounded, jnp.float32)

    for name, a, b in zip(("o", "dq", "dk", "dv"), found, expected):
        assert a.dtype == dtype, name
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("segments", [None, PACKED])
def test_a_token_sees_its_segment_so_far_and_never_the_future(segments):
    q, k, v = (jnp.asarray(a, jnp.float32) for a in qkv(10, B=1, H=1))

    def gradient(wanted):
        """[T, S]: the gradient of output t by key and value s."""
        jacobians = jax.jacrev(lambda k, v: blockwise(4, segments)(q, k, v)[0, :, 0, wanted], argnums=(0, 1))(k, v)
        return [np.abs(j[:, 0, :, 0]).max(-1) for j in jacobians]

    dk_TS, dv_TS = gradient(1)

    assert np.array_equal(dv_TS > 0, allowed(10, segments))
    # A token alone in its segment has a weight of 1 whatever its key.
    alone = allowed(10, segments).sum(1, keepdims=True) == 1
    assert np.array_equal(dk_TS > 1e-7, allowed(10, segments) & ~alone)


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_extreme_scores_stay_finite_and_pick_the_best_key(magnitude):
    q, k, v = qkv(12, B=1, H=1)

    o, *gradients = with_gradients(blockwise(4, None), (magnitude * q, magnitude * k, v), jnp.float32)

    assert all(np.isfinite(x).all() for x in (o, *gradients))
    scores_TS = np.where(allowed(12, None), q[0, :, 0] @ k[0, :, 0].T, -np.inf)
    np.testing.assert_allclose(o[0, :, 0], v[0, scores_TS.argmax(1), 0], atol=1e-3)


def test_scores_far_below_zero_do_not_vanish_behind_masked_blocks():
    q, k, v = qkv(10, B=1, H=1)
    k = np.abs(k) + 1
    q = -50 * k  # every score is about -1000; masked ones must not count as 0

    o, *_ = with_gradients(blockwise(4, PACKED), (q, k, v), jnp.float32)

    with float64():
        np.testing.assert_allclose(o, plain(q, k, v, PACKED), atol=1e-4)


def test_memory_grows_with_the_sequence_and_not_with_its_square():
    def temporary_bytes(T, f):
        shapes = [jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)] * 3
        compiled = jax.jit(jax.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def growth(f):
        return temporary_bytes(1024, f) / temporary_bytes(512, f)

    assert growth(blockwise(32, None)) < 2.2
    assert growth(lambda *x: plain(*x, None)) > 3  # the figure without it


@pytest.mark.parametrize(
    "overrides",
    [
        dict(),
        dict(q_rank=None),
        dict(latent_norm_eps=0.5, norm_eps=2.0, v_head_dim=14),
        dict(yarn=Yarn(original_length=32), rope_theta=100.0, rope_head_dim=8),
        dict(yarn=Yarn(original_length=32, mscale=0.707, mscale_all_dim=0.5), rope_theta=100.0, rope_head_dim=8),
    ],
    ids=["plain", "no_q_rank", "eps_of_latents", "yarn", "yarn_two_mscales"],
)
def test_mla_is_the_naive_one_in_float64(overrides):
    cfg = naive.tiny(dtype="float64", **overrides)
    rng = np.random.default_rng(2)
    x_BTD = rng.standard_normal((2, 7, cfg.d_model))
    positions = np.stack([np.arange(7), [0, 1, 2, 0, 1, 2, 3]])
    segments = np.array([[0] * 7, [0, 0, 0, 1, 1, 1, 1]])
    with float64():
        rope = jax.tree.map(np.asarray, rope_table(cfg, positions, jnp.float64))
        module = MLA(cfg)
        variables = naive.fill(jax.eval_shape(module.init, jax.random.key(0), x_BTD, rope, segments), np.float64)

        y_BTD = jax.jit(module.apply)(variables, x_BTD, rope, segments)

        expected = [naive.mla(cfg, variables["params"], *row) for row in zip(x_BTD, positions, segments)]
        assert y_BTD.dtype == jnp.float64
        np.testing.assert_allclose(y_BTD, np.stack(expected), atol=1e-12)


def test_query_and_key_value_latents_are_normed_and_the_rotary_key_is_not():
    cfg = naive.tiny()
    x_BTD = np.random.default_rng(3).standard_normal((1, 5, cfg.d_model)).astype(np.float32)
    rope = rope_table(cfg, np.arange(5)[None], jnp.float32)
    module = MLA(cfg)
    variables = naive.fill(jax.eval_shape(module.init, jax.random.key(0), x_BTD, rope, None))
    apply, C = jax.jit(module.apply), cfg.kv_rank

    def change(name, columns):
        """Change of the output when these columns of a down-projection are a thousand times larger."""
        larger = variables["params"][name].copy()
        larger[:, columns] *= 1000
        after = apply({"params": {**variables["params"], name: larger}}, x_BTD, rope, None)
        return np.abs(after - apply(variables, x_BTD, rope, None)).max()

    assert change("q_a", slice(None)) < 1e-4
    assert change("kv_a", slice(C)) < 1e-4
    assert change("kv_a", slice(C, None)) > 1e-2
