"""Rotary positions with the static YaRN extension (report section 4.3, arXiv 2309.00071).

Adjacent pairs (x0, x1), (x2, x3), ... rotate by position * frequency, as in the released weights. YaRN keeps high
frequencies, divides low ones by `factor`, interpolates between them, and sharpens the softmax by m(mscale_all_dim)^2.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig


def frequencies(cfg: ModelConfig) -> np.ndarray:
    """float64 [rope_head_dim / 2], radians per position."""
    R = cfg.rope_head_dim
    freq = cfg.rope_theta ** (-np.arange(0, R, 2, dtype=np.float64) / R)
    yarn = cfg.yarn
    if yarn is None:
        return freq

    def index_of(rotations):  # the (real) frequency index that makes this many rotations within the original length
        return R * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(index_of(yarn.beta_fast)), 0)
    high = min(math.ceil(index_of(yarn.beta_slow)), R - 1)
    slow = np.clip((np.arange(R // 2) - low) / max(high - low, 0.001), 0, 1)
    return freq * (1 - slow) + freq / yarn.factor * slow


def mscale(factor: float, weight: float) -> float:
    """m(weight) = 0.1 * weight * ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(cfg: ModelConfig) -> float:
    """The factor on attention scores, including YaRN's factor."""
    scale = cfg.qk_head_dim ** -0.5
    return scale if cfg.yarn is None else scale * mscale(cfg.yarn.factor, cfg.yarn.mscale_all_dim) ** 2


def rope_table(cfg: ModelConfig, positions_BT: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """cos and sin of positions * frequencies, [B, T, rope_head_dim / 2], in `dtype` (float32 or float64)."""
    y = cfg.yarn
    amplitude = 1.0 if y is None else mscale(y.factor, y.mscale) / mscale(y.factor, y.mscale_all_dim)
    angle = positions_BT.astype(dtype)[..., None] * frequencies(cfg).astype(dtype)[None, None]
    return amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)


def rotate(x_BTHR: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates adjacent pairs of the last axis: [B, T, H, R]. Computed in the table's dtype, returned in x's.

    Args:
      table: cos and sin of `rope_table`, [B, T, R / 2] each.
    """
    cos, sin = (t[:, :, None] for t in table)
    even, odd = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return pairs.reshape(x_BTHR.shape).astype(x_BTHR.dtype)


def rotate_halves(x_BTHR: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The same for the pairs (x0, x[R/2]), (x1, x[R/2 + 1]), ...: the order in V3.2's indexer."""
    cos, sin = (t[:, :, None] for t in table)
    first, second = jnp.split(x_BTHR, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x_BTHR.dtype)
