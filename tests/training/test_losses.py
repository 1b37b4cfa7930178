"""Losses: chunks against optax, masks, and that the logits of all tokens never exist at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import BalanceConfig
from deepseek_jax.model import Output
from deepseek_jax.training import losses
from deepseek_jax.training.losses import cross_entropy, objective, shifted_targets, token_losses
from deepseek_jax.training.types import Batch, Normalizers, TokenLosses
from tests.precision import float64

N, D, W = 24, 8, 67


def example(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden_ND, head_DW = (rng.standard_normal(s).astype(np.float32) for s in ((N, D), (D, W)))
    targets_N = rng.integers(0, W, N).astype(np.int32)
    weights_N = np.where(np.arange(N) % 5 == 0, 0, rng.uniform(0.2, 1, N)).astype(np.float32)
    return jnp.asarray(hidden_ND, dtype), head_DW, targets_N, weights_N


def whole(hidden_ND, head_DW, targets_N, weights_N):
    logits_NW = hidden_ND.astype(head_DW.dtype) @ head_DW
    return (optax.softmax_cross_entropy_with_integer_labels(logits_NW, targets_N) * weights_N).sum()


def value_and_gradients(loss, arrays):
    return jax.jit(jax.value_and_grad(lambda h, w, *rest: 3 * loss(h, w, *rest), argnums=(0, 1)))(*arrays)


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 100])
def test_the_loss_in_chunks_is_that_of_optax_and_so_are_its_gradients(chunk):
    found = value_and_gradients(lambda *x: cross_entropy(*x, chunk), example())
    expected = value_and_gradients(whole, example())

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_the_loss_is_the_same_without_a_gradient():
    found = jax.jit(lambda *x: cross_entropy(*x, 7))(*example())

    np.testing.assert_allclose(found, whole(*example()), rtol=1e-5)


def test_the_loss_of_a_bfloat16_model_is_float32_and_close():
    (loss, (dhidden_ND, dhead_DW)) = value_and_gradients(lambda *x: cross_entropy(*x, 8), example(jnp.bfloat16))
    exact, (dhidden, dhead) = value_and_gradients(whole, example())

    assert (loss.dtype, dhidden_ND.dtype, dhead_DW.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(loss, exact, rtol=0.01)
    for a, b in ((dhidden_ND.astype(jnp.float32), dhidden), (dhead_DW, dhead)):
        assert jnp.linalg.norm(a - b) / jnp.linalg.norm(b) < 0.02


def test_a_token_of_weight_zero_changes_nothing():
    hidden_ND, head_DW, targets_N, weights_N = example()
    left_out = weights_N == 0
    other = jnp.where(left_out[:, None], 100.0, hidden_ND), head_DW, np.where(left_out, 3, targets_N), weights_N

    found, expected = (value_and_gradients(lambda *x: cross_entropy(*x, 8), a)
                       for a in (other, (hidden_ND, head_DW, targets_N, weights_N)))

    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not np.asarray(found[1][0])[left_out].any()


@pytest.mark.parametrize("chunk", [8, 24])
def test_devices_that_share_the_vocabulary_share_its_loss_and_gradients(chunk):
    hidden_ND, head_DW, targets_N, weights_N = example()
    head_DW, targets_N = head_DW[:, :66], targets_N % 66
    mesh = Mesh(np.array(jax.devices()[:3]), ("pipe",))

    def of_one_device(hidden_ND, head_DW):
        loss = lambda h, w: 3 * cross_entropy(h, w, targets_N, weights_N, chunk, "pipe")
        loss, (dhidden_ND, dhead_DW) = jax.value_and_grad(loss, argnums=(0, 1))(hidden_ND, head_DW)
        return jax.lax.psum((loss, dhidden_ND), "pipe"), dhead_DW

    split = jax.shard_map(of_one_device, mesh=mesh, in_specs=(P(), P(None, "pipe")),
                          out_specs=(P(), P(None, "pipe")), check_vma=False)
    (loss, dhidden_ND), dhead_DW = jax.jit(split)(hidden_ND, head_DW)

    expected = value_and_gradients(whole, (hidden_ND, head_DW, targets_N, weights_N))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 (loss, (dhidden_ND, dhead_DW)), expected)


def test_logits_of_all_tokens_never_exist_at_once():
    def sizes(chunk):
        """Elements of every float array of the compiled program."""
        run = jax.jit(jax.value_and_grad(lambda *x: cross_entropy(*x, chunk), argnums=(0, 1)))
        text = run.lower(*example()).compile().as_text()
        shapes = {part.split("]")[0] for part in text.split("f32[")[1:]}
        return {int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes}

    assert max(sizes(8)) < N * W
    assert max(sizes(24)) >= N * W  # so the figure is meaningful


@pytest.mark.parametrize("k", [0, 1, 2, 5])
@pytest.mark.parametrize("segments", [None, [[0, 0, 0, 1, 1, 2], [0] * 6]])
def test_depth_k_predicts_k_further_inside_the_row_and_the_segment(segments, k):
    rng = np.random.default_rng(1)
    targets_BT, weights_BT = rng.integers(0, 99, (2, 6)), rng.uniform(0.5, 1, (2, 6)).astype(np.float32)
    ids = np.zeros((2, 6), int) if segments is None else np.array(segments)

    found_BT, weights_found_BT = shifted_targets(
        jnp.asarray(targets_BT), jnp.asarray(weights_BT), None if segments is None else jnp.asarray(ids), k)

    for b, i in np.ndindex(2, 6):
        if i + k < 6 and ids[b, i + k] == ids[b, i]:
            assert found_BT[b, i] == targets_BT[b, i + k] and weights_found_BT[b, i] == weights_BT[b, i + k]
        else:
            assert weights_found_BT[b, i] == 0


def output(hidden_BTD, *mtp_hidden):
    return Output(None, hidden_BTD, (), mtp_hidden, {}, None, jnp.float32(5), jnp.float32(7), {})


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_token_losses_are_sums_over_what_counts_at_each_depth(depth):
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((depth + 1, 2, 6, D)).astype(np.float32)
    _, head_DW, *_ = example()
    targets_BT, weights_BT = rng.integers(0, W, (2, 6)), np.array([[1] * 6, [1, 1, 0, 0, 1, 1]], np.float32)
    targets = jnp.asarray(targets_BT)
    batch = Batch(targets, targets, jnp.asarray(weights_BT), segment_ids_BT=None, positions_BT=None)

    main, count, mtp_D, mtp_count_D = token_losses(output(*hidden), head_DW, batch, 5)

    found, counts = [main, *mtp_D], [count, *mtp_count_D]
    for k in range(depth + 1):
        expected = whole(hidden[k, :, :6 - k].reshape(-1, D), head_DW, targets_BT[:, k:].reshape(-1),
                         weights_BT[:, k:].reshape(-1))
        np.testing.assert_allclose(found[k], expected, rtol=1e-5)
        assert counts[k] == weights_BT[:, k:].sum()
    assert mtp_D.shape == mtp_count_D.shape == (depth,)


@pytest.mark.parametrize(
    ("mtp", "alpha", "aux", "expected"),
    [
        ([], 0.0, 0.0, 12 / 4),
        ([6.0], 0.0, 0.0, 3 + 0.3 * 6 / 2),
        ([6.0, 12.0], 0.0, 0.0, 3 + 0.3 * (6 / 2 + 12 / 3) / 2),  # (lambda / D) * sum over depths
        ([], 0.01, 0.0, 3 + 0.01 * 0.5 * 5),
        ([], 0.0, 0.1, 3 + 0.1 * 0.5 * 7),
        ([6.0], 0.01, 0.1, 3 + 0.9 + 0.025 + 0.35),
    ],
)
def test_the_objective_adds_mtp_and_balance_in_their_shares(mtp, alpha, aux, expected):
    balance = BalanceConfig(sequence_loss_weight=alpha, aux_loss_weight=aux)

    losses = TokenLosses(jnp.float32(12), jnp.float32(4), jnp.array(mtp), jnp.arange(len(mtp)) + 2.0)
    normalizers = Normalizers(jnp.float32(4), jnp.arange(len(mtp)) + 2.0, mtp_lambda=0.3, share=0.5)

    found = objective(output(None), losses, normalizers, balance)

    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_accelerators_subtract_the_targets_as_a_cpu_does_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    with float64():
        p_MW = jnp.asarray(rng.random((9, 33)), dtype)
        targets_M = jnp.asarray(rng.integers(0, 33, 9), jnp.int32)
        weights_M = jnp.asarray(rng.random(9), dtype).at[4].set(0)
        found = losses._compared(p_MW, targets_M, weights_M)
        np.testing.assert_array_equal(found, losses._scattered(p_MW, targets_M, weights_M))
        assert found.dtype == dtype and not np.array_equal(found, p_MW)
