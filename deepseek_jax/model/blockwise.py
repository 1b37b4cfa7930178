"""Causal attention in blocks, and the bridge to the device's kernel: memory grows with T, not with T * T.

The blockwise form is an online softmax over pairs of query and key blocks; its backward pass recomputes the scores from
each query's log-sum-exp. If a kernel supports the inputs, it is used instead, with the same residuals.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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
           block: int, saved: str | None = None, implementation: str = "auto") -> jax.Array:
    """Causal softmax attention.

    Args:
      segment_ids_BT: int32, attention stays inside equal ids; None: one segment.
      scale: factor on the scores, before the softmax (which is float32).
      block: rows of queries and of keys whose scores exist at once. A kernel has its own block sizes.
      saved: "e5m6" rounds the output to the format in which it is saved for the backward pass.
      implementation: "auto" takes the device's kernel if there is one; "xla": never.
    Returns:
      [B, T, H, V] in the dtype of q.
    """
    kernel = _kernel_here(q_BTHA, v_BTHV, saved) if implementation == "auto" else None
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
    """The device's kernel for this attention, "hopper" or "tpu"; None if there is none for such heads."""
    if q_BTHA.dtype != jnp.bfloat16:
        return None
    heads, here = (q_BTHA.shape[-1], v_BTHV.shape[-1]), api.chosen_here("mla_attention")
    # The TPU kernel keeps its own residuals, and needs value dimensions that are multiples of a vector.
    runs = {"hopper": heads == KERNEL_HEADS, "tpu": saved is None and heads[1] % 128 == 0}
    return here if runs.get(here) else None


WIDE, LONG, IDS = spec("batch", None, "heads", None), spec("batch", "heads", None), spec("batch", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_kernel(q, k, v, segments, scale, saved):
    return _by_kernel_fwd(q, k, v, segments, scale, saved)[0]


def _by_kernel_fwd(q, k, v, segments, scale, saved):
    forward = functools.partial(api.mla_attention_forward, scale=scale)
    o, lse = on_shards(forward, (WIDE, WIDE, WIDE, IDS), (WIDE, LONG), q, k, v, segments)
    output, lse = save(o, lse, saved)
    return saved_output(output, v), (q, k, v, segments, output, lse)


def _by_kernel_bwd(scale, saved, residuals, do):
    q, k, v, segments, output, lse = residuals
    backward = functools.partial(api.mla_attention_backward, scale=scale)
    return *on_shards(backward, (WIDE, WIDE, WIDE, IDS, WIDE, LONG, WIDE), (WIDE, WIDE, WIDE), q, k, v, segments,
                     saved_output(output, v), lse, do), None


_by_kernel.defvjp(_by_kernel_fwd, _by_kernel_bwd)


def save(o: jax.Array, lse: jax.Array, saved: str | None) -> tuple[jax.Array | fp8.E5M6, jax.Array]:
    """The residuals for the backward pass, under the name that remat "report" keeps.

    Args:
      o: the output, [B, T, H, V]. lse: float32 log-sum-exps, one for each query and head; kept as they are.
      saved: "e5m6" packs the output (12 bits a number); None keeps it.
    """
    output = fp8.to_e5m6(o) if saved == "e5m6" else o
    return jax.tree.map(lambda x: checkpoint_name(x, "attention"), (output, lse))


def saved_output(output: jax.Array | fp8.E5M6, v: jax.Array) -> jax.Array:
    """The output from the residuals of `save`, as an array with the last dimension and dtype of v."""
    return fp8.from_e5m6(output, v.shape[-1], v.dtype) if isinstance(output, fp8.E5M6) else output


def causal_pairs(blocks: int) -> np.ndarray:
    """int32 [pairs, 2]: every (query block, key block) that is not fully masked, key blocks of a query in order."""
    return np.array([(i, j) for i in range(blocks) for j in range(i + 1)], np.int32)


class Blocks(NamedTuple):
    """The pairs of query and key blocks that are computed.

    size: rows of a block. pairs: int32 [pairs, 2], (query block, key block). causal: a key is seen by the query in the
    same row and by later ones; otherwise by all queries.
    """

    size: int
    pairs: jax.Array
    causal: bool = True


def _scores(qT, k, segments, i, j, scale, causal):
    """float32 scores[s, t] of key block j by query block i; transposed, so that no product needs a strided operand."""
    block = k.shape[2]
    s = jnp.matmul(k, qT, preferred_element_type=wide(k.dtype)) * scale
    seen = (j * block + jnp.arange(block))[:, None] <= (i * block + jnp.arange(block))[None]
    seen = seen[None, None] | (not causal)
    if segments is not None:
        query, key = (_part(ids, n, block, 1) for ids, n in zip(segments, (i, j)))
        seen = seen & (key[:, None, :, None] == query[:, None, None, :])
    return jnp.where(seen, s, -jnp.inf)


def _part(x, n, block, axis):
    return lax.dynamic_slice_in_dim(x, n * block, block, axis)


def _put(x, part, n, block, axis):
    return lax.dynamic_update_slice_in_dim(x, part, n * block, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, segments, scale, block, saved):
    return _attend_fwd(q, k, v, segments, scale, block, saved)[0]


def _causal_blocks(q, block):
    return Blocks(block, jnp.asarray(causal_pairs(q.shape[2] // block)))


def _both(segments):
    """Segment ids of the queries and of the keys, which are the same."""
    return None if segments is None else (segments, segments)


def _attend_fwd(q, k, v, segments, scale, block, saved):
    softmax = add_blocks(no_softmax(q, v), q, k, v, _both(segments), scale, _causal_blocks(q, block))
    output, lse = save(*softmax.finished(q.dtype), saved)
    return saved_output(output, v), (q, k, v, segments, output, lse)


class Softmax(NamedTuple):
    """An online softmax over the keys so far: maxima of scores, sums of exponentials [B, H, T], output [B, H, V, T]."""

    top: jax.Array
    total: jax.Array
    oT: jax.Array

    def finished(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The output [B, H, T, V] and each query's log-sum-exp [B, H, T]."""
        return transpose((self.oT / self.total[:, :, None]).astype(dtype)), self.top + jnp.log(self.total)


def no_softmax(q: jax.Array, v: jax.Array) -> Softmax:
    """The initial state, without keys, for queries [B, H, T, A] and values [B, H, S, V]."""
    B, H, T, _ = q.shape
    f32 = wide(q.dtype)
    return Softmax(jnp.full((B, H, T), -jnp.inf, f32), jnp.zeros((B, H, T), f32),
                   jnp.zeros((B, H, v.shape[3], T), f32))


def add_blocks(softmax: Softmax, q: jax.Array, k: jax.Array, v: jax.Array,
               segments: tuple[jax.Array, jax.Array] | None, scale: float, blocks: Blocks) -> Softmax:
    """The softmax after adding the keys of `blocks`.

    Args:
      q [B, H, T, A], k [B, H, S, A], v [B, H, S, V]. segments: int32 ids of queries and keys, [B, T] and [B, S].
    """
    f32 = wide(q.dtype)
    block, pairs, causal = blocks
    qT, vT = transpose(q), transpose(v)

    def step(n, carry):
        top, total, oT = carry
        i, j = pairs[n, 0], pairs[n, 1]
        s = _scores(_part(qT, i, block, 3), _part(k, j, block, 2), segments, i, j, scale, causal)
        old_top = _part(top, i, block, 2)
        new_top = jnp.maximum(old_top, s.max(axis=2))
        # A query may see no keys in the blocks so far: keep exp's argument finite.
        base = jnp.where(jnp.isneginf(new_top), 0, new_top)
        p = jnp.exp(s - base[:, :, None])
        shrink = jnp.exp(old_top - base)
        new_total = _part(total, i, block, 2) * shrink + p.sum(axis=2)
        values = jnp.matmul(_part(vT, j, block, 3), p.astype(q.dtype), preferred_element_type=f32)
        new_o = _part(oT, i, block, 3) * shrink[:, :, None] + values
        return Softmax(_put(top, new_top, i, block, 2), _put(total, new_total, i, block, 2),
                       _put(oT, new_o, i, block, 3))

    return lax.fori_loop(0, len(pairs), step, softmax)


def largest_logits(q_BTHA: jax.Array, k_BTHA: jax.Array, segment_ids_BT: jax.Array | None, scale: float,
                   block: int) -> jax.Array:
    """float32 [H]: for each head the largest score in the softmax of `attend`, over the batch; no gradient.

    It is a separate product, since kernels do not return it: one block of scores at a time, as in `attend`.
    """
    block = min(block, q_BTHA.shape[1])
    pad = ((0, 0), (0, -q_BTHA.shape[1] % block))
    # Padding with copies of the last row adds no new scores.
    q, k = (lax.stop_gradient(jnp.pad(x, (*pad, (0, 0), (0, 0)), mode="edge")).swapaxes(1, 2) for x in (q_BTHA, k_BTHA))
    segments = None if segment_ids_BT is None else _both(jnp.pad(segment_ids_BT, pad, mode="edge"))
    qT, (_, pairs, causal) = transpose(q), _causal_blocks(q, block)

    def step(n, top_H):
        i, j = pairs[n, 0], pairs[n, 1]
        s = _scores(_part(qT, i, block, 3), _part(k, j, block, 2), segments, i, j, scale, causal)
        return jnp.maximum(top_H, s.max(axis=(0, 2, 3)))

    return lax.fori_loop(0, len(pairs), step, jnp.full(q.shape[1], -jnp.inf, wide(q.dtype)))


class Queries(NamedTuple):
    """The queries' arrays for gradients: q [B, H, T, A]; the gradient of their output [B, H, T, V]; the log-sum-exp,
    and delta, the product of output and gradient, [B, H, T]."""

    q: jax.Array
    do: jax.Array
    lse: jax.Array
    delta: jax.Array


def queries(q: jax.Array, o: jax.Array, do: jax.Array, lse: jax.Array) -> Queries:
    """All [B, H, T, ...]; o: the output of the forward pass."""
    f32, do = wide(q.dtype), row_major(do)
    return Queries(q, do, lse, jnp.sum(do.astype(f32) * o.astype(f32), axis=-1))


def _attend_bwd(scale, block, saved, residuals, do):
    q, k, v, segments, output, lse = residuals
    of = queries(q, saved_output(output, v), do, lse)
    dqT, dk, dv = gradients(jnp.zeros(q.shape[:2] + q.shape[:1:-1], wide(q.dtype)), of, k, v, _both(segments), scale,
                            _causal_blocks(q, block))
    return query_gradient(dqT, q.dtype), dk, dv, None


def query_gradient(dqT: jax.Array, dtype: Any) -> jax.Array:
    """The transpose of [B, H, A, T], the layout in which `gradients` accumulates, to [B, H, T, A]."""
    # The barrier keeps XLA:CPU from folding the transpose into a bfloat16 product that it cannot run.
    return transpose(lax.optimization_barrier(dqT)).astype(dtype)


def gradients(dqT: jax.Array, of: Queries, k: jax.Array, v: jax.Array, segments: tuple[jax.Array, jax.Array] | None,
              scale: float, blocks: Blocks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dqT [B, H, A, T] after adding the contribution of `blocks`, float32; dk and dv of these blocks only, in k's
    dtype.

    Arguments as in `add_blocks`.
    """
    (q, do, lse, delta), (block, pairs, causal), f32 = of, blocks, wide(k.dtype)
    qT, kT, doT = transpose(q), transpose(k), transpose(do)

    def step(n, carry):
        dqT, dk, dv = carry
        i, j = pairs[n, 0], pairs[n, 1]
        s = _scores(_part(qT, i, block, 3), _part(k, j, block, 2), segments, i, j, scale, causal)
        p = jnp.exp(s - _part(lse, i, block, 2)[:, :, None])
        dp = jnp.matmul(_part(v, j, block, 2), _part(doT, i, block, 3), preferred_element_type=f32)
        ds = (p * (dp - _part(delta, i, block, 2)[:, :, None]) * scale).astype(q.dtype)
        new_dv = _part(dv, j, block, 2) + matmul(p.astype(q.dtype), _part(do, i, block, 2), f32)
        new_dk = _part(dk, j, block, 2) + matmul(ds, _part(q, i, block, 2), f32)
        new_dqT = _part(dqT, i, block, 3) + matmul(_part(kT, j, block, 3), ds, f32)
        return _put(dqT, new_dqT, i, block, 3), _put(dk, new_dk, j, block, 2), _put(dv, new_dv, j, block, 2)

    carry = (dqT, jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32))
    dqT, dk, dv = lax.fori_loop(0, len(pairs), step, carry)
    return dqT, dk.astype(k.dtype), dv.astype(v.dtype)


_attend.defvjp(_attend_fwd, _attend_bwd)
