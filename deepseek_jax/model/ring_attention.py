"""Causal attention over sequences that are split over devices (`parallel.context`): ring attention over MLA's latents.

Each device keeps its queries. The latents [c | k_pe] are sent around the ring, kv_rank + rope_head_dim numbers per
token, instead of the heads' keys and values, which are num_heads * (A + V) numbers. Each device computes the keys and
values of the part that has arrived, adds them to an online softmax, and discards them. The backward pass sends the
latents around again, followed by their gradients, which return to their owner with the contributions of all devices.

    hop 0: the own part, causal    then, of what comes from before: its first half, seen by all queries
                                         of what comes from after: all of it, seen by the second half of the queries

so all devices compute the same number of block pairs in every hop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.blockwise import (
    IDS,
    LONG,
    WIDE,
    Blocks,
    add_blocks,
    causal_pairs,
    gradients,
    no_softmax,
    queries,
    query_gradient,
    save,
    saved_output,
)
from deepseek_jax.model.layers import row_major, wide
from deepseek_jax.model.rope import softmax_scale
from deepseek_jax.parallel.mesh import CONTEXT
from deepseek_jax.parallel.sharding import on_shards, spec

# (latents [B, S, C + R], W_UKV [C, H, N + V]) -> keys [B, S, H, N + R], values [B, S, H, V]
Up = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
ROWS, UP = spec("batch", None, None), spec(None, "heads", None)


def ring_attention(cfg: ModelConfig, up: Up, q_BTHA: jax.Array, latent_BTX: jax.Array, w_CHX: jax.Array,
                   segment_ids_BT: jax.Array | None) -> jax.Array:
    """The result of `blockwise.attend` for the complete sequences, [B, T, H, V]: the parts of each device.

    Args:
      q_BTHA, latent_BTX, segment_ids_BT: parts, as `parallel.context.in_parts` cuts them.
      up: computes keys and values.
    """
    return _ring(cfg, up, q_BTHA, latent_BTX, w_CHX, segment_ids_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(cfg, up, q, latent, w, segments):
    return _ring_fwd(cfg, up, q, latent, w, segments)[0]


def _ring_fwd(cfg, up, q, latent, w, segments):
    forward = functools.partial(_forward, cfg, up)
    o, lse = on_shards(forward, (WIDE, ROWS, UP, IDS), (WIDE, LONG), q, latent, w, segments)
    output, lse = save(o, lse, "e5m6" if cfg.fp8.enabled else None)
    return saved_output(output, o), (q, latent, w, segments, output, lse)


def _ring_bwd(cfg, up, residuals, do):
    *arrays, output, lse = residuals
    backward = functools.partial(_backward, cfg, up)
    dq, dlatent, dw = on_shards(backward, (WIDE, ROWS, UP, IDS, WIDE, LONG, WIDE), (WIDE, ROWS, UP), *arrays,
                                saved_output(output, do), lse, do, summed=(None, "heads", "batch"))
    return dq, dlatent, dw, None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _forward(cfg, up, q_BTHA, latent_BTX, w, segments):
    """Output [B, T, H, V] and log-sum-exps [B, H, T] of this device's queries."""
    q = _heads_first(q_BTHA)

    def add(blocks, travels, softmax):
        latent, ids = travels
        k, v = map(_heads_first, up(latent, w))
        softmax = no_softmax(q, v) if softmax is None else softmax
        return add_blocks(softmax, q, k, v, _pair(segments, ids), softmax_scale(cfg), blocks)

    o, lse = _around(cfg, add, (latent_BTX, segments)).finished(q.dtype)
    return o.swapaxes(1, 2), lse


# The residuals of the forward pass, and the gradient.
def _backward(cfg, up, q_BTHA, latent_BTX, w, segments, o_BTHV, lse, do_BTHV):
    """Gradients of this device's queries and latents, and its part of the gradient of w."""
    of = queries(_heads_first(q_BTHA), _heads_first(o_BTHV), _heads_first(do_BTHV), lse)
    f32 = wide(q_BTHA.dtype)
    dqT = jnp.zeros(of.q.shape[:2] + of.q.shape[:1:-1], f32)

    def add(blocks, travels, sums):
        latent, ids = travels
        (k, v), pull_back = jax.vjp(up, latent, w)
        # The gradient of a part follows it around the ring, one hop behind.
        dqT_so_far, dw, dlatent = (dqT, 0, 0) if sums is None else (sums[0], sums[1], _onward(sums[2]))
        dqT_so_far, dk, dv = gradients(dqT_so_far, of, _heads_first(k), _heads_first(v), _pair(segments, ids),
                                       softmax_scale(cfg), blocks)
        dlatent_here, dw_here = pull_back((dk.swapaxes(1, 2), dv.swapaxes(1, 2)))
        return dqT_so_far, dw + dw_here, dlatent + dlatent_here.astype(f32)

    dqT, dw, dlatent = _around(cfg, add, (latent_BTX, segments))
    return query_gradient(dqT, q_BTHA.dtype).swapaxes(1, 2), _onward(dlatent).astype(latent_BTX.dtype), dw


def _around(cfg: ModelConfig, add: Callable[[Blocks, Any, Any], Any], travels: Any) -> Any:
    """Calls add(blocks, the part that has arrived, sums) -> sums for every part, its own first (whose sums are None).

    A part is sent on while the device computes with it.
    """
    parts, rows = lax.axis_size(CONTEXT), jax.tree.leaves(travels)[0].shape[1]
    size, (own, before, after) = hop_pairs(rows, cfg.attention_block)
    arriving = _onward(travels)
    sums = add(Blocks(size, jnp.asarray(own)), travels, None)

    def next_sums(hop, arrived, sums):
        pairs = jnp.where(hop <= lax.axis_index(CONTEXT), before, after)
        return add(Blocks(size, pairs, False), arrived, sums)

    def step(state, hop):
        arrived, sums = state
        return (_onward(arrived), next_sums(hop, arrived, sums)), None

    (arrived, sums), _ = lax.scan(step, (arriving, sums), jnp.arange(1, parts - 1))
    return next_sums(parts - 1, arrived, sums)


def hop_pairs(rows: int, block: int) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The block size, and the block pairs for a part of `rows` tokens, by the origin of the keys: the same part, an
    earlier one in the ring, a later one.

    block: the maximum size; the largest divisor of half a part is used.
    """
    half = rows // 2
    size = next(n for n in range(min(block, half), 0, -1) if half % n == 0)
    first, second = range(half // size), range(half // size, 2 * half // size)
    every = (*first, *second)
    pairs = lambda of, seen: np.array([(i, j) for i in of for j in seen], np.int32)
    return size, (causal_pairs(len(every)), pairs(every, first), pairs(second, every))


def _onward(tree):
    """Sends arrays to the next device of the ring."""
    parts = lax.axis_size(CONTEXT)
    if jax.sharding.get_abstract_mesh().shape.get("pipe", 1) > 1:
        return jax.tree.map(lambda x: _onward_by_pairs(x, parts), tree)
    return jax.tree.map(lambda x: lax.ppermute(x, CONTEXT, [(n, (n + 1) % parts) for n in range(parts)]), tree)


def _onward_by_pairs(x, parts):
    """The same in a pipeline: on XLA:CPU a permutation waits for the devices of all stages, which are at different
    ticks; two exchanges within pairs wait only for the pairs, but send twice as much."""
    def from_even_or_odd(first):
        pairs = [[n, (n + 1) % parts] for n in range(first, parts, 2)]
        return lax.all_gather(x, CONTEXT, axis_index_groups=pairs)[0]

    return jnp.where(lax.axis_index(CONTEXT) % 2 == 1, from_even_or_odd(0), from_even_or_odd(1))


def _heads_first(x_BTHX):
    return row_major(x_BTHX.swapaxes(1, 2))


def _pair(query_ids, key_ids):
    return None if query_ids is None else (query_ids, key_ids)
