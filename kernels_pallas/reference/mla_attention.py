"""Causal softmax attention for training MLA: queries and keys have nope + rope dims, values fewer.

    o[t] = softmax over s <= t, same segment, of (q[t] . k[s] * scale) @ v
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST: dict[str, Any] = dict(precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def mla_attention(q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array, segment_ids_BT: jax.Array | None = None, *,
                  scale: float) -> jax.Array:
    """Attends causally inside segments.

    Args:
      q_BTHA, k_BTHA: [B, T, H, 192] in V3; v_BTHV: [B, T, H, 128].
      segment_ids_BT: int32; None: one segment.
      scale: of the scores, before the float32 softmax.
    Returns:
      [B, T, H, V] in the dtype of q. Differentiable in q, k and v.
    """
    return forward(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale=scale)[0]


def forward(q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array, segment_ids_BT: jax.Array | None = None, *,
            scale: float) -> tuple[jax.Array, jax.Array]:
    """The same, and the log-sum-exp of every query's scores: float32 [B, H, T]."""
    s_BHTS = _scores(q_BTHA, k_BTHA, segment_ids_BT, scale)
    p_BHTS = jax.nn.softmax(s_BHTS, axis=-1).astype(q_BTHA.dtype)
    o_BTHV = jnp.einsum("BHTS,BSHV->BTHV", p_BHTS, v_BTHV, **HIGHEST).astype(q_BTHA.dtype)
    return o_BTHV, jax.nn.logsumexp(s_BHTS, axis=-1)


def backward(q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array, segment_ids_BT: jax.Array | None,
             o_BTHV: jax.Array, lse_BHT: jax.Array, do_BTHV: jax.Array, *,
             scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, in their shapes and dtypes, from `forward`'s results and the output's gradient."""
    p_BHTS = jnp.exp(_scores(q_BTHA, k_BTHA, segment_ids_BT, scale) - lse_BHT[..., None])
    dp_BHTS = jnp.einsum("BTHV,BSHV->BHTS", do_BTHV, v_BTHV, **HIGHEST)
    delta_BHT = jnp.einsum("BTHV,BTHV->BHT", o_BTHV, do_BTHV, **HIGHEST)
    ds_BHTS = (p_BHTS * (dp_BHTS - delta_BHT[..., None]) * scale).astype(q_BTHA.dtype)
    dq_BTHA = jnp.einsum("BHTS,BSHA->BTHA", ds_BHTS, k_BTHA, **HIGHEST)
    dk_BSHA = jnp.einsum("BHTS,BTHA->BSHA", ds_BHTS, q_BTHA, **HIGHEST)
    dv_BSHV = jnp.einsum("BHTS,BTHV->BSHV", p_BHTS.astype(q_BTHA.dtype), do_BTHV, **HIGHEST)
    return dq_BTHA.astype(q_BTHA.dtype), dk_BSHA.astype(k_BTHA.dtype), dv_BSHV.astype(v_BTHV.dtype)


def _scores(q_BTHA, k_BTHA, segment_ids_BT, scale):
    """float32 [B, H, T, S]; -inf where a query sees nothing."""
    T = q_BTHA.shape[1]
    seen = jnp.tril(jnp.ones((T, T), bool))[None, None]
    if segment_ids_BT is not None:
        seen = seen & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
    return jnp.where(seen, jnp.einsum("BTHA,BSHA->BHTS", q_BTHA, k_BTHA, **HIGHEST) * scale, -jnp.inf)
