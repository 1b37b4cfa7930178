"""The indexer of DeepSeek-V3.2's sparse attention, which chooses the tokens to attend to (V3.2 report, section 2.1).

A few small query heads j share one key per token; a token attends to the topk tokens with the highest scores

    I[t, s] = sum_j w[t, j] / sqrt(J) * relu(q[t, j] k[s] / sqrt(I))        q = W_q c_q   k = norm(W_k x)   w = W_w x

c_q is the normed query latent of MLA. RoPE rotates the first rope_head_dim dims of q and k, pairing the first half with
the second. The released code also rotates both by a Hadamard matrix, which cancels in the product and only helps its
FP8 kernel.

In names of arrays J is a head of the indexer and I a dimension of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import LayerNorm, layer_norm, linear, weight, wide
from deepseek_jax.model.rope import rotate_halves

K_NORM_EPS = 1e-6


class IndexTerms(NamedTuple):
    """The terms of the scores: q_BTJI and k_BTI in the model's dtype, weight_BTJ in float32.

    Only k needs to be cached.
    """

    q_BTJI: jax.Array
    k_BTI: jax.Array
    weight_BTJ: jax.Array


class Indexer(nn.Module):
    """Declares the weights of `index_terms`, with the names of the released ones."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, latent_BTQ: jax.Array, rope: tuple[jax.Array, jax.Array]) -> IndexTerms:
        cfg = self.cfg
        assert cfg.q_rank is not None  # the config checks it
        D, Q, J, I = cfg.d_model, cfg.q_rank, cfg.index_heads, cfg.index_head_dim
        w = {"wq_b": weight(self, "wq_b", (Q, J, I)), "wk": weight(self, "wk", (D, I)),
             "weights_proj": weight(self, "weights_proj", (D, J)),
             "k_norm": LayerNorm(cfg, I, name="k_norm")()}
        return index_terms(cfg, x_BTD, latent_BTQ, rope, w)


def index_terms(cfg: ModelConfig, x_BTD: jax.Array, latent_BTQ: jax.Array, rope: tuple[jax.Array, jax.Array],
                w: dict[str, Any]) -> IndexTerms:
    """Queries, keys and head weights of these tokens.

    Args:
      x_BTD: the input of attention. latent_BTQ: the normed query latent.
      rope: cos and sin of `rope.rope_table`, [B, T, R / 2] each.
      w: the weights by name; "k_norm" is {"scale", "bias"}.
    """
    R = cfg.rope_head_dim
    turn = lambda x_BTJI: jnp.concatenate([rotate_halves(x_BTJI[..., :R], rope), x_BTJI[..., R:]], axis=-1)
    k_BTI = layer_norm(linear(x_BTD, w["wk"]), w["k_norm"]["scale"], w["k_norm"]["bias"], K_NORM_EPS)
    # In float32, as in the released code: the weights decide between close scores.
    weight_BTJ = linear(x_BTD.astype(wide(cfg.dtype)), w["weights_proj"])
    return IndexTerms(turn(linear(latent_BTQ, w["wq_b"])), turn(k_BTI[:, :, None])[:, :, 0], weight_BTJ)


def index_scores(q_BTJI: jax.Array, weight_BTJ: jax.Array, k_BSI: jax.Array) -> jax.Array:
    """I[t, s] of every query and key, float32 [B, T, S]; the caller applies the mask."""
    J, I = q_BTJI.shape[2:]
    s_BTJS = jnp.einsum("BTJI,BSI->BTJS", q_BTJI, k_BSI, preferred_element_type=weight_BTJ.dtype)
    score_BTS = jnp.einsum("BTJ,BTJS->BTS", weight_BTJ * J ** -0.5, jax.nn.relu(s_BTJS * I ** -0.5))
    return jnp.where(score_BTS == 0, 0, score_BTS)  # a sort would put 0.0 before -0.0, and both are common


def chosen_mask(score_BTS: jax.Array, topk: int) -> jax.Array:
    """bool [B, T, S]: the topk highest of each row (all, if there are fewer); ties go to the first.

    These are the elements of `lax.top_k`: all above the last one that it lists, and those equal to that one up to its
    place.
    """
    if topk >= score_BTS.shape[-1]:
        return jnp.ones(score_BTS.shape, bool)
    least_BT1, last_BT1 = (x_BTK[..., -1:] for x_BTK in lax.top_k(score_BTS, topk))
    at_BTS = lax.broadcasted_iota(jnp.int32, score_BTS.shape, score_BTS.ndim - 1)
    return (score_BTS > least_BT1) | ((score_BTS == least_BT1) & (at_BTS <= last_BT1))
