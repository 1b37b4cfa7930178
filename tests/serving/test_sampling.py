"""Sampling: the distribution at a temperature, its limits, and samples that depend only on seed and position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.serving import sampling
from deepseek_jax.serving.sampling import Sampling

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32)) + 7


def one(temperature=1.0, top_k=0, top_p=1.0, seed=0, stream=0):
    return Sampling(*(jnp.array([x], dtype) for x, dtype in ((temperature, jnp.float32), (top_k, jnp.int32),
                                                              (top_p, jnp.float32), (seed, jnp.uint32),
                                                              (stream, jnp.uint32))))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (dict(), [0.5, 0.25, 0.15, 0.1]),
        (dict(temperature=0.0), [1, 0, 0, 0]),
        (dict(temperature=1e-30), [1, 0, 0, 0]),
        (dict(temperature=0.5), np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
        (dict(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (dict(top_k=9), [0.5, 0.25, 0.15, 0.1]),
        (dict(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (dict(top_p=0.5), [1, 0, 0, 0]),
        (dict(top_p=1e-6), [1, 0, 0, 0]),
        (dict(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),  # of the mass left by top k: 5/9, 5/18, ...
    ])
def test_probabilities(how, expected):
    found = jax.jit(sampling.probabilities)(one(**how), jnp.asarray(LOGITS)[None, None])[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_greedy_sequence_does_not_make_the_others_greedy():
    both = jax.tree.map(lambda *x: jnp.concatenate(x), one(temperature=0.0), one(top_k=2))
    found = sampling.probabilities(both, jnp.stack([jnp.asarray(LOGITS)[None]] * 2))
    np.testing.assert_allclose(found[:, 0], [[1, 0, 0, 0], [2 / 3, 1 / 3, 0, 0]], atol=1e-6)


def test_draws_differ_by_seed_stream_index_and_use_and_by_nothing_else():
    key = lambda use=0, index=3, **how: tuple(
        np.asarray(jax.random.key_data(sampling.keys(one(**how), jnp.array([[index]]), use))).ravel().tolist())

    keys = [key(), key(use=1), key(index=4), key(seed=1), key(stream=1)]
    assert len(set(keys)) == len(keys) and key(temperature=0.3, top_k=5) == key()


def test_draws_follow_the_distribution():
    n = 10_000
    p_W = jnp.array([0.6, 0.3, 0.1, 0.0]) * 3  # they need not sum to one
    key_BT = sampling.keys(one(seed=5), jnp.arange(n)[None], sampling.TOKEN)
    counts = np.bincount(sampling.draw(key_BT, jnp.broadcast_to(p_W, (1, n, 4)))[0], minlength=4)

    assert counts[3] == 0
    assert ((counts[:3] - n * p_W[:3] / 3) ** 2 / (n * p_W[:3] / 3)).sum() < 16  # chi squared, 2 degrees: 1 in 3000


def test_the_likeliest_is_the_first_of_the_largest_and_always_a_token():
    logits = jnp.array([[[1.0, 3.0, 3.0, 2.0], [-jnp.inf, -5.0, -jnp.inf, -7.0], [jnp.nan, 1.0, 2.0, 3.0]]])
    found = sampling.likeliest(logits)[0].tolist()
    assert found[:2] == [1, 1] and 0 <= found[2] < 4
