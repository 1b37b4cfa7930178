"""Causal attention for TPU: jax's splash attention. Twin: reference/mla_attention.py.

Scores stay on the chip, forward and backward; blocks above the diagonal are not computed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES, BLOCK = 128, 512


def mla_attention(q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array, segment_ids_BT: jax.Array | None = None, *,
                  scale: float, block: int = BLOCK, interpret: bool = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.mla_attention.mla_attention].

    The kernel has no scale argument: the queries are multiplied by it, and rounded to their dtype once more.

    For gradients the output and the log-sum-exps are saved, under the name "attention" (for jax.checkpoint's policies).

    Args:
      block: of queries and of keys; a multiple of 128.
    """
    T, H = q_BTHA.shape[1:3]
    block = min(block, -(-T // LANES) * LANES)
    pad = -T % block
    scaled = (q_BTHA.astype(jnp.float32) * scale).astype(q_BTHA.dtype)
    # Padded keys come after all others, and the mask is causal: no query of the sequence sees them.
    heads_first = [jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in (scaled, k_BTHA, v_BTHV)]
    segments = None
    if segment_ids_BT is not None:
        ids_BT = jnp.pad(segment_ids_BT.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=-1)
        segments = splash.SegmentIds(ids_BT, ids_BT)
    kernel = _kernel(T + pad, H, block, interpret)
    o_BHTV: Any = jax.vmap(kernel)(*heads_first, segments)  # without the log-sum-exps, which it may also return
    return o_BHTV.swapaxes(1, 2)[:, :T]


def _kernel(T, H, block, interpret):
    blocks = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * H)
    return splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1,
                                  residual_checkpoint_name="attention", interpret=interpret)
