"""Multi-head latent attention, training form (report section 2.1.1).

Keys and values of all heads are up-projected from one normed latent c of kv_rank numbers per token; a single rotary
key k_pe is shared by the heads. Queries come from a latent of their own. Only c and k_pe would ever be cached.

    q = [q_nope | rope(q_pe)]    k_h = [W_UK_h c | rope(k_pe)]    v_h = W_UV_h c    o = W_O softmax(q k / scale) v
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax import fp8
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import RMSNorm, linear, matmul, row_major, transpose, weight, wide
from deepseek_jax.model.rope import rotate, softmax_scale
from deepseek_jax.parallel.mesh import constrain, on_parts, spec
from kernels_pallas import api

HEADS_OUT, HEADS_IN = ("heads", None), (None, "heads")  # which dimension of a weight a mesh splits


class MLA(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, rope, segment_ids_BT):
        cfg = self.cfg
        D, H, Q, C = cfg.d_model, cfg.num_heads, cfg.q_rank, cfg.kv_rank
        N, R, V = cfg.nope_head_dim, cfg.rope_head_dim, cfg.v_head_dim
        if Q is None:
            w = {"q": weight(self, "q", (D, H, N + R))}
        else:
            w = {"q_a": weight(self, "q_a", (D, Q)), "q_b": weight(self, "q_b", (Q, H, N + R))}
        w["kv_a"] = weight(self, "kv_a", (D, C + R))
        q_norm = None if Q is None else RMSNorm(cfg, name="q_norm")
        q_BTHA, c_BTC, k_pe_BTR = project(cfg, x_BTD, rope, w, q_norm, RMSNorm(cfg, name="kv_norm"))
        split = functools.partial(constrain, names=("batch", None, "heads", None))
        kv_BTHX = linear(c_BTC, weight(self, "kv_b", (C, H, N + V)), cfg.fp8, names=HEADS_OUT)
        q_BTHA, kv_BTHX = split(q_BTHA), split(kv_BTHX)
        k_pe_BTHR = jnp.broadcast_to(k_pe_BTR[:, :, None], kv_BTHX.shape[:3] + (R,))
        k_BTHA = jnp.concatenate([kv_BTHX[..., :N], k_pe_BTHR], axis=-1)
        o_BTHV = attend(q_BTHA, k_BTHA, kv_BTHX[..., N:], segment_ids_BT, softmax_scale(cfg), cfg.attention_block,
                        "e5m6" if cfg.fp8.enabled else None)
        w_HVD = weight(self, "o", (H, V, D))
        return linear(o_BTHV.reshape(o_BTHV.shape[:2] + (H * V,)), w_HVD.reshape(H * V, D), cfg.fp8, kept="e5m6",
                      names=HEADS_IN)


def project(cfg: ModelConfig, x_BTD, rope, w, q_norm, kv_norm):
    """What both forms of MLA start from.

    Args:
      w: the weights by name, "q" or "q_a" and "q_b", and "kv_a".
      q_norm, kv_norm: RMSNorm of the query latent and of the key-value latent.
    Returns:
      queries [B, T, H, N + R], rotated; the normed latent c [B, T, C]; the rotated key k_pe [B, T, R] of all heads.
      The last two are what a cache holds.
    """
    N, C = cfg.nope_head_dim, cfg.kv_rank
    if cfg.q_rank is None:
        q_BTHA = linear(x_BTD, w["q"], cfg.fp8, names=HEADS_OUT)
    else:
        q_BTQ = checkpoint_name(linear(x_BTD, w["q_a"], cfg.fp8), "latent")
        q_BTHA = linear(q_norm(q_BTQ), w["q_b"], cfg.fp8, names=HEADS_OUT)
    q_BTHA = jnp.concatenate([q_BTHA[..., :N], rotate(q_BTHA[..., N:], rope)], axis=-1)
    kv_BTX = checkpoint_name(linear(x_BTD, w["kv_a"], cfg.fp8), "latent")
    return q_BTHA, kv_norm(kv_BTX[..., :C]), rotate(kv_BTX[..., None, C:], rope)[:, :, 0]


def attend(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale, block, kept=None):
    """Causal softmax attention in blocks: memory grows with T, not with T * T.

    Args:
      segment_ids_BT: int32, attention stays inside equal ids; None: one segment.
      scale: of the scores, before the softmax (which is float32).
      block: rows of queries and of keys whose scores exist at once. A kernel takes its own.
      kept: "e5m6" rounds the output to what is then kept of it for the backward pass.
    Returns:
      [B, T, H, V] in the dtype of q.
    """
    if _has_kernel(q_BTHA, v_BTHV):
        return _by_kernel(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale, kept)
    B, T, H, _ = q_BTHA.shape
    block = min(block, T)
    pad = -T % block
    heads_first = [row_major(jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2))
                   for x in (q_BTHA, k_BTHA, v_BTHV)]
    segments = None
    if segment_ids_BT is not None:
        segments = jnp.pad(segment_ids_BT, ((0, 0), (0, pad)), constant_values=-1)
    o_BHTV = _attend(*heads_first, segments, scale, block, kept)
    return o_BHTV.swapaxes(1, 2)[:, :T]


def _has_kernel(q_BTHA, v_BTHV):
    """Whether the device's own kernel does this attention: heads of the published models."""
    heads = q_BTHA.dtype == jnp.bfloat16 and (q_BTHA.shape[-1], v_BTHV.shape[-1]) == (192, 128)
    return heads and api.chosen_here("mla_attention") == "hopper"


WIDE, LONG, IDS = spec("batch", None, "heads", None), spec("batch", "heads", None), spec("batch", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_kernel(q, k, v, segments, scale, kept):
    return _by_kernel_fwd(q, k, v, segments, scale, kept)[0]


def _by_kernel_fwd(q, k, v, segments, scale, kept):
    forward = functools.partial(api.mla_attention_forward, scale=scale)
    o, lse = on_parts(forward, (WIDE, WIDE, WIDE, IDS), (WIDE, LONG), q, k, v, segments)
    held, lse = _hold(o, lse, kept)
    return _held_output(held, v), (q, k, v, segments, held, lse)


def _by_kernel_bwd(scale, kept, residuals, do):
    q, k, v, segments, held, lse = residuals
    backward = functools.partial(api.mla_attention_backward, scale=scale)
    return *on_parts(backward, (WIDE, WIDE, WIDE, IDS, WIDE, LONG, WIDE), (WIDE, WIDE, WIDE), q, k, v, segments,
                     _held_output(held, v), lse, do), None


_by_kernel.defvjp(_by_kernel_fwd, _by_kernel_bwd)


def _hold(o, lse, kept):
    """What the backward pass keeps of the output and of the log-sum-exps, by the name that "report" knows."""
    held = fp8.to_e5m6(o) if kept == "e5m6" else o
    return jax.tree.map(lambda x: checkpoint_name(x, "attention"), (held, lse))


def _held_output(held, v):
    return fp8.from_e5m6(held, v.shape[-1], v.dtype) if isinstance(held, fp8.E5M6) else held


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


def _place(x, part, n, block, axis):
    return lax.dynamic_update_slice_in_dim(x, part, n * block, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, segments, scale, block, kept):
    return _attend_fwd(q, k, v, segments, scale, block, kept)[0]


def _attend_fwd(q, k, v, segments, scale, block, kept):
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
        return (_place(top, new_top, i, block, 2), _place(total, new_total, i, block, 2),
                _place(oT, new_o, i, block, 3))

    carry = (jnp.full((B, H, T), -jnp.inf, f32), jnp.zeros((B, H, T), f32), jnp.zeros((B, H, v.shape[3], T), f32))
    top, total, oT = lax.fori_loop(0, len(pairs), step, carry)
    o = transpose((oT / total[:, :, None]).astype(q.dtype))
    held, lse = _hold(o, top + jnp.log(total), kept)
    return _held_output(held, v), (q, k, v, segments, held, lse)


def _attend_bwd(scale, block, kept, residuals, do):
    q, k, v, segments, held, lse = residuals
    o = _held_output(held, v)
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
        return _place(dqT, new_dqT, i, block, 3), _place(dk, new_dk, j, block, 2), _place(dv, new_dv, j, block, 2)

    carry = (jnp.zeros(qT.shape, f32), jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32))
    dqT, dk, dv = lax.fori_loop(0, len(pairs), step, carry)
    # The barrier keeps XLA:CPU from folding the transpose into a bfloat16 product that it then cannot run.
    dq = transpose(lax.optimization_barrier(dqT))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
