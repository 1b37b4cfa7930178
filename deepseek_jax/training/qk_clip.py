"""QK-clip keeps attention logits small by scaling projections after the optimizer (Kimi K2, arXiv 2507.20534).

A head whose largest logit S of the step, max scale q.k over the batch, is above tau is scaled by gamma = tau / S:

    W_UQ (without RoPE) *= sqrt(gamma)    W_UK *= sqrt(gamma)    W_UQ (with RoPE) *= gamma

so that both parts of its logits are multiplied by gamma. The rotary key, which all heads share, is not changed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from deepseek_jax.config import ModelConfig


def largest(logits: dict[str, Any]) -> jax.Array:
    """The largest logit of all heads, a float32 scalar. logits: as in `clip`."""
    return jnp.stack([x.max() for x in jax.tree.leaves(logits)]).max()


def clip(cfg: ModelConfig, params: dict[str, Any], logits: dict[str, Any], tau: float) -> dict[str, Any]:
    """The parameters with the projections of heads above tau scaled down.

    Args:
      logits: for each attention, at its path in params, {"largest": float32 [..., H]} of the step, [L, H] of stacked
        layers (the collection `attention.LOGITS` of the model).
    """
    flat = dict(traverse_util.flatten_dict(params))
    tops: Any = traverse_util.flatten_dict(logits)
    for (*path, _), top_H in tops.items():
        gamma_H = tau / jnp.maximum(top_H, tau)
        query = (*path, "q" if cfg.q_rank is None else "q_b")
        flat[query] = _scaled(flat[query], jnp.sqrt(gamma_H), gamma_H, cfg.nope_head_dim)
        flat[(*path, "kv_b")] = _scaled(flat[(*path, "kv_b")], jnp.sqrt(gamma_H), jnp.ones_like(gamma_H),
                                        cfg.nope_head_dim)
    return traverse_util.unflatten_dict(flat)


def _scaled(w_XHA, first_H, rest_H, size):
    """Scales a weight [..., X, H, A]: the first `size` numbers of a head by one factor, the rest by another; both
    factors are [..., H]."""
    first_XHA, rest_XHA = (w_XHA[..., part] * factor_H[..., None, :, None].astype(w_XHA.dtype)
                           for part, factor_H in ((slice(size), first_H), (slice(size, None), rest_H)))
    return jnp.concatenate([first_XHA, rest_XHA], axis=-1)
