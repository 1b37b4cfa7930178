"""The composition of a transformer block and of an MTP module, stated once (report sections 2 and 2.2).

Pure functions of callables: the training modules, the stages of a pipeline and the decoder pass their own norms,
attention and feed-forward networks, which apart from hidden states have different inputs and results.

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
# Normed hidden states -> (contribution to the residual stream, anything else), for attention and for an FFN.
Part = Callable[[jax.Array], tuple[jax.Array, Any]]


def residual_block(x_BTD: jax.Array, attention_norm: Norm, attention: Part, ffn_norm: Norm,
                   ffn: Part) -> tuple[jax.Array, Any, Any]:
    """One block. Returns x [B, T, D], and the other results of attention and of the feed-forward network."""
    y_BTD, of_attention = attention(attention_norm(x_BTD))
    x_BTD = checkpoint_name(constrain(x_BTD + y_BTD, ("batch", None, None)), "residual")
    y_BTD, of_ffn = ffn(constrain(ffn_norm(x_BTD), ("batch", None, None)))
    return constrain(x_BTD + y_BTD, ("batch", None, None)), of_attention, of_ffn


def mtp_block(hidden_BTD: jax.Array, ahead_BTD: jax.Array, hidden_norm: Norm, embedding_norm: Norm, project: Norm,
              block: Part, norm: Norm) -> tuple[jax.Array, Any]:
    """MTP module k. Returns h_k [B, T, D] after its norm, and the other results of `block`.

    Args:
      hidden_BTD: h_{k-1}; h_0 is the main model's output AFTER its final norm.
      ahead_BTD: embeddings of the tokens k ahead. They are the first half of the concatenation, as in the released
        weights.
      project: [B, T, 2D] -> [B, T, D].
    """
    x_BTD = project(jnp.concatenate([embedding_norm(ahead_BTD), hidden_norm(hidden_BTD)], axis=-1))
    x_BTD, other = block(x_BTD)
    return norm(x_BTD), other
