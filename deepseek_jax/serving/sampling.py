"""From logits to a token: temperature, top-k, top-p; draws depend only on (seed, index of the token).

So a continuation depends neither on the rest of its batch nor on how its steps are grouped into calls, as long as the
logits do not: in float32 up to near ties, in bfloat16 if decoding is deterministic (see `tiles`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TOKEN, ACCEPT, DRAFT = range(3)  # the uses of random numbers: no two uses share one


class Sampling(NamedTuple):
    """How each sequence of a batch chooses."""

    temperature_B: jax.Array  # float32; 0: always the likeliest token
    top_k_B: jax.Array  # int32; 0: no limit
    top_p_B: jax.Array  # float32 in (0, 1]; 1: no limit
    seed_B: jax.Array  # uint32
    stream_B: jax.Array  # uint32: distinguishes sequences with the same seed


def keys(sampling: Sampling, index_BT: jax.Array, use: int) -> jax.Array:
    """A key for each token index of each sequence, [B, T]. `use`: TOKEN, ACCEPT or DRAFT."""
    def key(seed, stream, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index), use)

    across = jax.vmap(key, in_axes=(None, None, 0))
    return jax.vmap(across)(sampling.seed_B, sampling.stream_B, index_BT)


def likeliest(logits_BTW: jax.Array) -> jax.Array:
    """int32 [B, T]: the first index of the largest. XLA:CPU finds a maximum eight times as fast as an argmax."""
    W = logits_BTW.shape[-1]
    is_best_BTW = logits_BTW == logits_BTW.max(axis=-1, keepdims=True)
    at_BT = jnp.where(is_best_BTW, jnp.arange(W, dtype=jnp.int32)[None, None], W).min(axis=-1)
    return jnp.minimum(at_BT, W - 1)  # a token of the vocabulary even for NaN


def probabilities(sampling: Sampling, logits_BTW: jax.Array) -> jax.Array:
    """float32 [B, T, W]: softmax at the temperature, among the top k and within the top p; one-hot at temperature 0.

    Top p keeps the likeliest tokens until their sum reaches p, and always at least one.
    """
    B, T, W = logits_BTW.shape
    greedy_B = sampling.temperature_B <= 0
    # Shifted before it is scaled: a tiny temperature must not make infinities.
    logits_BTW = logits_BTW.astype(jnp.float32) - logits_BTW.max(axis=-1, keepdims=True)
    scaled_BTW = logits_BTW / jnp.where(greedy_B, 1, sampling.temperature_B)[:, None, None]

    def limited(x_BTW):
        sorted_BTW = -jnp.sort(-x_BTW, axis=-1)
        k_B = jnp.where(sampling.top_k_B > 0, jnp.minimum(sampling.top_k_B, W), W)
        least_BT1 = jnp.take_along_axis(sorted_BTW, jnp.broadcast_to((k_B - 1)[:, None, None], (B, T, 1)), axis=-1)
        p_BTW = jax.nn.softmax(jnp.where(sorted_BTW >= least_BT1, sorted_BTW, -jnp.inf), axis=-1)
        before_BTW = jnp.cumsum(p_BTW, axis=-1) - p_BTW
        inside_BTW = (before_BTW < sampling.top_p_B[:, None, None]).at[..., 0].set(True)
        least_BT1 = jnp.maximum(least_BT1, jnp.where(inside_BTW, sorted_BTW, jnp.inf).min(axis=-1, keepdims=True))
        return jnp.where(x_BTW >= least_BT1, x_BTW, -jnp.inf)

    any_limit = ((sampling.top_k_B > 0) | (sampling.top_p_B < 1)).any()
    p_BTW = jax.nn.softmax(lax.cond(any_limit, limited, lambda x: x, scaled_BTW), axis=-1)
    one_hot_BTW = jax.nn.one_hot(likeliest(logits_BTW), W, dtype=jnp.float32)
    return jnp.where(greedy_B[:, None, None], one_hot_BTW, p_BTW)


def draw(key_BT: jax.Array, p_BTW: jax.Array) -> jax.Array:
    """int32 [B, T]: one token from each distribution, which need not sum to one."""
    return jax.vmap(jax.vmap(jax.random.categorical))(key_BT, jnp.log(p_BTW)).astype(jnp.int32)
