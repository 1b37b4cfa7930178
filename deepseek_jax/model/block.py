"""How a transformer block and an MTP module are put together, stated once (report sections 2 and 2.2).

Pure functions of callables: the training modules, the stages of a pipeline and the decoder hand in their own norms,
attention and feed-forward networks, which differ in what else they read and return, apart from hidden states.

    block:  x = x + attention(norm(x))    x = x + ffn(norm(x))
    MTP:    x = M [norm(Emb(t[i+k])) ; norm(h_{k-1}[i])]    h_k = norm(block_k(x))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.parallel.sharding import constrain

Norm = Callable[[jax.Array], jax.Array]
# Normed hidden states -> (what is added to the residual stream, anything else), both of attention and of an FFN.
Part = Callable[[jax.Array], tuple[jax.Array, Any]]


def residual_block(x_BTD: jax.Array, attention_norm: Norm, attention: Part, ffn_norm: Norm,
                   ffn: Part) -> tuple[jax.Array, Any, Any]:
    """One block. Returns x [B, T, D], and what else attention and the feed-forward network returned."""
    y_BTD, of_attention = attention(attention_norm(x_BTD))
    x_BTD = checkpoint_name(constrain(x_BTD + y_BTD, ("batch", None, None)), "residual")
    y_BTD, of_ffn = ffn(constrain(ffn_norm(x_BTD), ("batch", None, None)))
    return constrain(x_BTD + y_BTD, ("batch", None, None)), of_attention, of_ffn


def mtp_block(hidden_BTD: jax.Array, ahead_BTD: jax.Array, hidden_norm: Norm, embedding_norm: Norm, project: Norm,
              block: Part, norm: Norm) -> tuple[jax.Array, Any]:
    """MTP module k. Returns h_k [B, T, D] after its norm, and what else `block` returned.

    Args:
      hidden_BTD: h_{k-1}; h_0 is the main model's output AFTER its final norm.
      ahead_BTD: embeddings of the tokens k ahead. Their half comes first, as in the released weights.
      project: [B, T, 2D] -> [B, T, D].
    """
    x_BTD = project(jnp.concatenate([embedding_norm(ahead_BTD), hidden_norm(hidden_BTD)], axis=-1))
    x_BTD, other = block(x_BTD)
    return norm(x_BTD), other
