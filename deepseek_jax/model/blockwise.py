"""Causal attention in blocks, and the bridge to the device's own kernel: memory grows with T, not with T * T.

The blockwise form is an online softmax over pairs of query and key blocks; its backward pass computes the scores again
from each query's log-sum-exp. What a kernel can do it does instead, with the same residuals.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax import fp8
from deepseek_jax.config.model import KERNEL_HEADS
from deepseek_jax.model.layers import matmul, row_major, transpose, wide
from deepseek_jax.parallel.sharding import on_shards, spec
from kernels_pallas import api


def attend(q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array, segment_ids_BT: jax.Array | None, scale: float,
           block: int, saved: str | None = None) -> jax.Array:
    """Causal softmax attention.

    Args:
      segment_ids_BT: int32, attention stays inside equal ids; None: one segment.
      scale: of the scores, before the softmax (which is float32).
      block: rows of queries and of keys whose scores exist at once. A kernel takes its own.
      saved: "e5m6" rounds the output to the format that the backward pass saves it in.
    Returns:
      [B, T, H, V] in the dtype of q.
    """
    kernel = _kernel_here(q_BTHA, v_BTHV, saved)
    if kernel == "hopper":
        return _by_kernel(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale, saved)
    if kernel == "tpu":
        return on_shards(functools.partial(api.mla_attention, scale=scale), (WIDE, WIDE, WIDE, IDS), WIDE,
                         q_BTHA, k_BTHA, v_BTHV, segment_ids_BT)
    B, T, H, _ = q_BTHA.shape
    block = min(block, T)
    pad = -T % block
    heads_first = [row_major(jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2))
                   for x in (q_BTHA, k_BTHA, v_BTHV)]
    segments = None
    if segment_ids_BT is not None:
        segments = jnp.pad(segment_ids_BT, ((0, 0), (0, pad)), constant_values=-1)
    o_BHTV = _attend(*heads_first, segments, scale, block, saved)
    return o_BHTV.swapaxes(1, 2)[:, :T]


def _kernel_here(q_BTHA, v_BTHV, saved):
    """The device's own kernel for this attention, "hopper" or "tpu"; None where it has none for such heads."""
    if q_BTHA.dtype != jnp.bfloat16:
        return None
    heads, here = (q_BTHA.shape[-1], v_BTHV.shape[-1]), api.chosen_here("mla_attention")
    # The TPU's keeps its own residuals, and stores values of whole vectors.
    runs = {"hopper": heads == KERNEL_HEADS, "tpu": saved is None and heads[1] % 128 == 0}
    return here if runs.get(here) else None


WIDE, LONG, IDS = spec("batch", None, "heads", None), spec("batch", "heads", None), spec("batch", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_kernel(q, k, v, segments, scale, saved):
    return _by_kernel_fwd(q, k, v, segments, scale, saved)[0]


def _by_kernel_fwd(q, k, v, segments, scale, saved):
    forward = functools.partial(api.mla_attention_forward, scale=scale)
    o, lse = on_shards(forward, (WIDE, WIDE, WIDE, IDS), (WIDE, LONG), q, k, v, segments)
    output, lse = _save(o, lse, saved)
    return _saved_output(output, v), (q, k, v, segments, output, lse)


def _by_kernel_bwd(scale, saved, residuals, do):
    q, k, v, segments, output, lse = residuals
    backward = functools.partial(api.mla_attention_backward, scale=scale)
    return *on_shards(backward, (WIDE, WIDE, WIDE, IDS, WIDE, LONG, WIDE), (WIDE, WIDE, WIDE), q, k, v, segments,
                     _saved_output(output, v), lse, do), None


_by_kernel.defvjp(_by_kernel_fwd, _by_kernel_bwd)


def _save(o, lse, saved):
    """What the backward pass saves of the output and of the log-sum-exps, under the name that remat "report" keeps."""
    output = fp8.to_e5m6(o) if saved == "e5m6" else o
    return jax.tree.map(lambda x: checkpoint_name(x, "attention"), (output, lse))


def _saved_output(output, v):
    return fp8.from_e5m6(output, v.shape[-1], v.dtype) if isinstance(output, fp8.E5M6) else output


def _causal_pairs(blocks):
    """int32 [pairs, 2]: every (query block, key block) with something to see, key blocks of a query in order."""
    return np.array([(i, j) for i in range(blocks) for j in range(i + 1)], np.int32)


def _scores(qT, k, segments, i, j, scale):
    """float32 scores[s, t] of key block j by query block i; transposed, so that no product needs a strided operand."""
    block = k.shape[2]
    s = jnp.matmul(k, qT, preferred_element_type=wide(k.dtype)) * scale
    seen = (j * block + jnp.arange(block))[:, None] <= (i * block + jnp.arange(block))[None]
    seen = seen[None, None]
    if segments is not None:
        key, query = (lax.dynamic_slice_in_dim(segments, n * block, block, 1) for n in (j, i))
        seen = seen & (key[:, None, :, None] == query[:, None, None, :])
    return jnp.where(seen, s, -jnp.inf)


def _part(x, n, block, axis):
    return lax.dynamic_slice_in_dim(x, n * block, block, axis)


def _put(x, part, n, block, axis):
    return lax.dynamic_update_slice_in_dim(x, part, n * block, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, segments, scale, block, saved):
    return _attend_fwd(q, k, v, segments, scale, block, saved)[0]


def _attend_fwd(q, k, v, segments, scale, block, saved):
    """Online softmax over causal pairs of blocks; keeps the output and each query's log-sum-exp."""
    B, H, T, _ = q.shape
    f32 = wide(q.dtype)
    qT, vT, pairs = transpose(q), transpose(v), jnp.asarray(_causal_pairs(T // block))

    def step(n, carry):
        top, total, oT = carry
        i, j = pairs[n, 0], pairs[n, 1]
        s = _scores(_part(qT, i, block, 3), _part(k, j, block, 2), segments, i, j, scale)
        old_top = _part(top, i, block, 2)
        new_top = jnp.maximum(old_top, s.max(axis=2))
        # A query may see nothing in the blocks so far: keep exp's argument finite.
        base = jnp.where(jnp.isneginf(new_top), 0, new_top)
        p = jnp.exp(s - base[:, :, None])
        shrink = jnp.exp(old_top - base)
        new_total = _part(total, i, block, 2) * shrink + p.sum(axis=2)
        values = jnp.matmul(_part(vT, j, block, 3), p.astype(q.dtype), preferred_element_type=f32)
        new_o = _part(oT, i, block, 3) * shrink[:, :, None] + values
        return (_put(top, new_top, i, block, 2), _put(total, new_total, i, block, 2),
                _put(oT, new_o, i, block, 3))

    carry = (jnp.full((B, H, T), -jnp.inf, f32), jnp.zeros((B, H, T), f32), jnp.zeros((B, H, v.shape[3], T), f32))
    top, total, oT = lax.fori_loop(0, len(pairs), step, carry)
    o = transpose((oT / total[:, :, None]).astype(q.dtype))
    output, lse = _save(o, top + jnp.log(total), saved)
    return _saved_output(output, v), (q, k, v, segments, output, lse)


def _attend_bwd(scale, block, saved, residuals, do):
    q, k, v, segments, output, lse = residuals
    o = _saved_output(output, v)
    f32 = wide(q.dtype)
    do = row_major(do)
    qT, kT, doT = transpose(q), transpose(k), transpose(do)
    delta = jnp.sum(do.astype(f32) * o.astype(f32), axis=-1)
    pairs = jnp.asarray(_causal_pairs(q.shape[2] // block))

    def step(n, carry):
        dqT, dk, dv = carry
        i, j = pairs[n, 0], pairs[n, 1]
        s = _scores(_part(qT, i, block, 3), _part(k, j, block, 2), segments, i, j, scale)
        p = jnp.exp(s - _part(lse, i, block, 2)[:, :, None])
        dp = jnp.matmul(_part(v, j, block, 2), _part(doT, i, block, 3), preferred_element_type=f32)
        ds = (p * (dp - _part(delta, i, block, 2)[:, :, None]) * scale).astype(q.dtype)
        new_dv = _part(dv, j, block, 2) + matmul(p.astype(q.dtype), _part(do, i, block, 2), f32)
        new_dk = _part(dk, j, block, 2) + matmul(ds, _part(q, i, block, 2), f32)
        new_dqT = _part(dqT, i, block, 3) + matmul(_part(kT, j, block, 3), ds, f32)
        return _put(dqT, new_dqT, i, block, 3), _put(dk, new_dk, j, block, 2), _put(dv, new_dv, j, block, 2)

    carry = (jnp.zeros(qT.shape, f32), jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32))
    dqT, dk, dv = lax.fori_loop(0, len(pairs), step, carry)
    # The barrier keeps XLA:CPU from folding the transpose into a bfloat16 product that it then cannot run.
    dq = transpose(lax.optimization_barrier(dqT))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
