"""Multi-token prediction (report section 2.2): at depth k each position also predicts the token k + 1 ahead.

    h'_k[i] = M_k [norm(Emb(t[i+k])) ; norm(h_{k-1}[i])]      h_k = norm(block_k(h'_k))      logits = shared head(h_k)

Embedding half first, as in the released weights. h_0 is the main model's output AFTER its final norm, and depth k
hands on its own normed output. The chain is causal: position i sees tokens up to i + k and predicts t[i+k+1].
"""

import flax.linen as nn
import jax.numpy as jnp

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model.layers import RMSNorm, linear, weight


class MTPModule(nn.Module):
    """One depth. Takes h_{k-1} and the embeddings of the tokens k ahead; returns h_k and the block's routing stats."""

    cfg: ModelConfig
    block: type[nn.Module]
    capture: tuple[str, ...] = ()
    mesh: MeshConfig = MeshConfig()

    @nn.compact
    def __call__(self, hidden_BTD, ahead_BTD, bias_E, rope, segment_ids_BT):
        cfg = self.cfg
        x_BTD = join(RMSNorm(cfg, name="embedding_norm")(ahead_BTD), RMSNorm(cfg, name="hidden_norm")(hidden_BTD),
                     weight(self, "projection", (2 * cfg.d_model, cfg.d_model)), cfg.fp8)
        x_BTD, stats = self.block(cfg, moe=True, capture=self.capture, mesh=self.mesh, name="block")(
            x_BTD, bias_E, rope, segment_ids_BT)
        return RMSNorm(cfg, name="norm")(x_BTD), stats


def join(ahead_BTD, hidden_BTD, projection, recipe):
    """What a depth's block reads: both normed inputs side by side, projected to D by the FP8 `recipe` (or without)."""
    return linear(jnp.concatenate([ahead_BTD, hidden_BTD], axis=-1), projection, recipe)


def ahead(x_BT, k):
    """x[:, i + k] at position i. The last k positions hold what must be masked out of the loss."""
    return jnp.roll(x_BT, -k, axis=1)
