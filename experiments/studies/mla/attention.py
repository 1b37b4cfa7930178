"""The attention for comparison with MLA: query heads that share fewer key-value heads.

As many key-value heads as query heads is MHA, one is MQA. The first rope_head_dim numbers of a head are rotated.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.blockwise import attend
from deepseek_jax.model.layers import linear, weight
from deepseek_jax.model.rope import rotate

# arm -> (heads of keys and values, width of a head); MLA is the model's own.
VARIANTS = {"MHA": (4, 16), "GQA": (2, 20), "MQA": (1, 24)}


class GroupedAttention(nn.Module):
    """Replaces MLA, with the same arguments and result."""

    cfg: ModelConfig
    kv_heads: int
    width: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array],
                 segment_ids_BT: jax.Array | None) -> jax.Array:
        D, H, A, R = self.cfg.d_model, self.cfg.num_heads, self.width, self.cfg.rope_head_dim
        turned = lambda x_BTHA: jnp.concatenate([rotate(x_BTHA[..., :R], rope), x_BTHA[..., R:]], axis=-1)
        q_BTHA = turned(linear(x_BTD, weight(self, "q", (D, H, A))))
        k_BTGA = turned(linear(x_BTD, weight(self, "k", (D, self.kv_heads, A))))
        v_BTGA = linear(x_BTD, weight(self, "v", (D, self.kv_heads, A)))
        k_BTHA, v_BTHA = (jnp.repeat(x, H // self.kv_heads, axis=2) for x in (k_BTGA, v_BTGA))
        o_BTHA = attend(q_BTHA, k_BTHA, v_BTHA, segment_ids_BT, A ** -0.5, self.cfg.attention_block)
        return linear(o_BTHA.reshape(*o_BTHA.shape[:2], H * A), weight(self, "o", (H * A, D)))


MHA, GQA, MQA = (functools.partial(GroupedAttention, kv_heads=kv_heads, width=width)
                 for kv_heads, width in VARIANTS.values())


def attention_of(arm: str) -> dict[str, str]:
    """The config keys of the arm's attention."""
    return {"model.attention": f"{__name__}:{arm}"} if arm in VARIANTS else {}
