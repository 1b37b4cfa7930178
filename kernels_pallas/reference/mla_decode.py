"""One decoding step of absorbed MLA over a paged cache of latents: every head reads the same key.

    o[h] = softmax over the sequence of (q[h] . [c | k_pe] * scale) @ c        q[h] = [q_nope W_UK | rope(q_pe)]

A page holds `page` tokens of one sequence; a token is its normed latent c and its rotated k_pe, either in bfloat16 (576
numbers in V3) or in the 656 bytes of FlashMLA's FP8 layout: 512 E4M3 values of c, four float32 scales (one for every
128), 64 bfloat16 of k_pe, for which FP8 is too imprecise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.formats import E4M3, Quantized, blocks
from kernels_pallas.reference.quantize import dequantize, quantize


def pack_fp8(tokens_X: jax.Array, rope_dim: int) -> jax.Array:
    """[..., C + R] of any float type to uint8 [..., C + 4 ceil(C / 128) + 2 R]."""
    rank = tokens_X.shape[-1] - rope_dim
    c, k_pe = tokens_X[..., :rank], tokens_X[..., rank:]
    q = quantize(c)
    parts = (q.values, q.scales, k_pe.astype(jnp.bfloat16))
    as_bytes = [lax.bitcast_convert_type(x, jnp.uint8).reshape(*tokens_X.shape[:-1], -1) for x in parts]
    return jnp.concatenate(as_bytes, axis=-1)


def unpack_fp8(packed_Y: jax.Array, rank: int, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """The inverse, up to FP8's rounding: [..., C + R]."""
    values, scales, k_pe = jnp.split(packed_Y, [rank, rank + 4 * blocks(rank)], axis=-1)
    view = lambda x, dtype, width: lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, width), dtype)
    c = dequantize(Quantized(lax.bitcast_convert_type(values, E4M3), view(scales, jnp.float32, 4)), dtype)
    return jnp.concatenate([c, view(k_pe, jnp.bfloat16, 2).astype(dtype)], axis=-1)


def packed_width(rank: int, rope_dim: int) -> int:
    """Bytes of a token in the FP8 cache: 656 for 512 + 64."""
    return rank + 4 * blocks(rank) + 2 * rope_dim


def mla_decode(q_BHX: jax.Array, cache: jax.Array, page_table_BP: jax.Array, lengths_B: jax.Array, *, scale: float,
               rank: int | None = None) -> jax.Array:
    """Attends from one query a sequence and head to the sequence's cached latents.

    Args:
      q_BHX: [B, H, C + R], absorbed and rotated.
      cache: bfloat16 [pages, page, C + R], or uint8 [pages, page, C + 4 C / 128 + 2 R].
      page_table_BP: int32, the pages of each sequence in order; entries past the length are not read.
      lengths_B: int32, tokens of each sequence, at least 1.
      scale: of the scores, before the float32 softmax.
      rank: C; None: the width less 64, as in every published model.
    Returns:
      [B, H, C] in the dtype of q, still to be multiplied by W_UV.
    Raises:
      ValueError: the width of the cache does not fit the queries and `rank`.
    """
    X = q_BHX.shape[-1]
    rank = X - 64 if rank is None else rank
    width = X if cache.dtype != jnp.uint8 else packed_width(rank, X - rank)
    if cache.shape[-1] != width:
        raise ValueError(f"the {cache.dtype} cache holds {cache.shape[-1]} numbers a token; queries of {X} with rank "
                         f"{rank} need {width}.")
    tokens_BPpY = cache[page_table_BP]
    tokens_BSY = tokens_BPpY.reshape(len(q_BHX), -1, width)
    tokens_BSX = unpack_fp8(tokens_BSY, rank) if cache.dtype == jnp.uint8 else tokens_BSY
    highest: dict[str, Any] = dict(precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    s_BHS = jnp.einsum("BHX,BSX->BHS", q_BHX, tokens_BSX, **highest) * scale
    there = jnp.arange(s_BHS.shape[-1])[None, None] < lengths_B[:, None, None]
    p_BHS = jax.nn.softmax(jnp.where(there, s_BHS, -jnp.inf), axis=-1)
    c_BSC = jnp.where(there[:, 0, :, None], tokens_BSX[..., :rank], 0)  # unwritten rows may be NaN
    return jnp.einsum("BHS,BSC->BHC", p_BHS.astype(q_BHX.dtype), c_BSC, **highest).astype(q_BHX.dtype)
