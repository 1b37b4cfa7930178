"""E5M6: the 12-bit format in which the input of the attention's output projection is saved (report section 3.3.3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import api


class E5M6(NamedTuple):
    """12-bit floats, two in three bytes: uint8 [..., M, 3 ceil(K / 2)], and a power-of-two scale per 1 x 128 tile."""

    packed: jax.Array
    scales: jax.Array


def _round_e5m6(x):
    """The nearest number of 5 exponent and 6 mantissa bits, ties to even; |x| is at most 65024. float32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.uint32((1 << 16) - 1) + ((bits >> 17) & 1)
    normal = lax.bitcast_convert_type((bits + half) & jnp.uint32(0xFFFE0000), jnp.float32)
    subnormal = jnp.round(x * 2.0**20) * 2.0**-20
    return jnp.where(jnp.isnan(x), x, jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal))


def to_e5m6(x: jax.Array) -> E5M6:
    """[..., K] in E5M6, in 1 x 128 tiles with power-of-two scales; applying it twice changes nothing."""
    scales = api.tile_scales(x, largest=65024.0)
    y = _round_e5m6(x.astype(jnp.float32) / api.spread(scales, x.shape))
    codes = lax.bitcast_convert_type(y.astype(jnp.float16), jnp.uint16) >> 4  # float16 is E5M10
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    low, high = jnp.split(codes, 2, axis=-1)
    parts = (low & 0xFF, (low >> 8) | ((high & 0xF) << 4), high >> 4)
    return E5M6(jnp.concatenate(parts, axis=-1).astype(jnp.uint8), scales)


def from_e5m6(saved: E5M6, columns: int, dtype: Any = jnp.float32) -> jax.Array:
    """The rounded numbers of `to_e5m6`, [..., columns] in `dtype`."""
    first, middle, last = jnp.split(saved.packed.astype(jnp.uint16), 3, axis=-1)
    codes = jnp.concatenate([first | ((middle & 0xF) << 8), (middle >> 4) | (last << 4)], axis=-1)[..., :columns]
    y = lax.bitcast_convert_type(codes << 4, jnp.float16).astype(jnp.float32)
    return (y * api.spread(saved.scales, y.shape)).astype(dtype)
