"""Multi-token prediction (report section 2.2): at depth k each position also predicts the token k + 1 ahead.

    h'_k[i] = M_k [norm(Emb(t[i+k])) ; norm(h_{k-1}[i])]      h_k = norm(block_k(h'_k))      logits = shared head(h_k)

h_0 is the main model's output after its final norm, and depth k passes on its own normed output. The chain is causal:
position i sees tokens up to i + k and predicts t[i+k+1].
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import mtp_block
from deepseek_jax.model.layers import RMSNorm, linear, weight
from deepseek_jax.model.types import BlockStats, TokenContext


class MTPModule(nn.Module):
    """One MTP module. `block` makes its transformer block."""

    cfg: ModelConfig
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array, ahead_BTD: jax.Array, bias_E: jax.Array | None,
                 context: TokenContext) -> tuple[jax.Array, BlockStats]:
        """Takes h_{k-1} and the embeddings of the tokens k ahead; returns h_k and the block's statistics."""
        cfg = self.cfg
        embedding_norm, hidden_norm = RMSNorm(cfg, name="embedding_norm"), RMSNorm(cfg, name="hidden_norm")
        projection = weight(self, "projection", (2 * cfg.d_model, cfg.d_model))
        block = self.block(name="block")
        return mtp_block(hidden_BTD, ahead_BTD, hidden_norm, embedding_norm,
                         lambda x_BTX: linear(x_BTX, projection, cfg.fp8),
                         lambda x_BTD: block(x_BTD, bias_E, context), RMSNorm(cfg, name="norm"))


def ahead(x_BT: jax.Array, k: int) -> jax.Array:
    """x[:, i + k] at position i of complete sequences. The loss must mask the last k positions."""
    return jnp.roll(x_BT, -k, axis=1)
