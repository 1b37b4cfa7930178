"""Causal softmax attention as MLA trains it: queries and keys of nope + rope numbers, values of fewer.

    o[t] = softmax over s <= t, same segment, of (q[t] . k[s] * scale) @ v
"""

import jax
import jax.numpy as jnp
from jax import lax


def mla_attention(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT=None, *, scale):
    """Attends causally inside segments.

    Args:
      q_BTHA, k_BTHA: [B, T, H, 192] in V3; v_BTHV: [B, T, H, 128].
      segment_ids_BT: int32; None: one segment.
      scale: of the scores, before the float32 softmax.
    Returns:
      [B, T, H, V] in the dtype of q. Differentiable in q, k and v.
    """
    highest = dict(precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    T = q_BTHA.shape[1]
    s_BHTS = jnp.einsum("BTHA,BSHA->BHTS", q_BTHA, k_BTHA, **highest) * scale
    seen = jnp.tril(jnp.ones((T, T), bool))[None, None]
    if segment_ids_BT is not None:
        seen = seen & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
    p_BHTS = jax.nn.softmax(jnp.where(seen, s_BHTS, -jnp.inf), axis=-1).astype(q_BTHA.dtype)
    return jnp.einsum("BHTS,BSHV->BTHV", p_BHTS, v_BTHV, **highest).astype(q_BTHA.dtype)
