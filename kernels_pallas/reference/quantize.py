"""Quantizing to FP8, online: a tile's scale is its largest magnitude over the largest number of the format.

    s = max(amax, 1e-4) / 448        values = E4M3(x / s)        power of two: 2^ceil(log2 s), from the bits of amax

An infinite or NaN element makes only its own tile NaN: the scale becomes infinite or NaN.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.formats import BLOCK, E4M3, Quantized, rows_of_scale

SMALLEST_AMAX = 1e-4


def power_of_two(amax: jax.Array, largest: float) -> jax.Array:
    """The smallest power of two that is not below amax / largest, for normal float32; infinities and NaN are kept.

    It is computed from the bits: an accelerator's division is within 2 ulp, and one ulp too much would give the next
    power.
    """
    mantissa, exponent = math.frexp(largest)
    bits = lax.bitcast_convert_type(amax, jnp.int32) + (2**24 - 1 - int(mantissa * 2**24))
    up = lax.bitcast_convert_type((bits & -(2**23)) - ((exponent - 1) << 23), jnp.float32)
    return jnp.where(jnp.isfinite(amax), up, amax)


def scales_of(amax: jax.Array, largest: float, scale: str = "float32") -> jax.Array:
    """float32 scales, in the shape of `amax`, of tiles of magnitudes up to it, in a format that ends at `largest`.

    scale: "float32", or "power_of_two" (rounded up). amax counts as 1e-4 at least.
    """
    amax = jnp.maximum(amax, SMALLEST_AMAX)
    if scale == "power_of_two":
        return power_of_two(amax, largest)
    # An array behind a barrier: otherwise XLA multiplies by 1 / 448, and half of the scales would be an ulp off.
    return amax / lax.optimization_barrier(jnp.full_like(amax, largest))


def tile_amax(x: jax.Array, rows: int = 1, columns: int = BLOCK) -> jax.Array:
    """The largest magnitude of every tile of `rows` x `columns` over the last two axes: float32
    [..., ceil(M / rows), ceil(K / columns)]; NaN if there is one.

    Magnitudes are compared as integers, whose order is the same: XLA:CPU's float reduction may lose a NaN.
    """
    *stack, M, K = x.shape
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    pad = [(0, 0)] * len(stack) + [(0, -M % rows), (0, -K % columns)]
    tiles = jnp.pad(bits, pad).reshape(*stack, -(-M // rows), rows, -(-K // columns), columns)
    return lax.bitcast_convert_type(tiles.max(axis=(-3, -1)), jnp.float32)


def tile_scales(x: jax.Array, largest: float, scale: str = "power_of_two") -> jax.Array:
    """The scales of x [..., M, K] in 1 x 128 tiles, of a format of magnitudes up to `largest`:
    float32 [..., M, ceil(K / 128)]."""
    return scales_of(tile_amax(x), largest, scale)


def spread(scales: jax.Array, shape: tuple[int, ...], rows: int = 1, columns: int = BLOCK) -> jax.Array:
    """scales[..., i, j] for every element of a `shape` that they cut into tiles of `rows` x `columns`."""
    out = jnp.repeat(scales, columns, axis=-1)[..., :shape[-1]] if columns > 1 else scales
    return jnp.repeat(out, rows, axis=-2)[..., :shape[-2], :] if rows > 1 else out


def _shared(amax, share):
    """Shares amax between tiles: the largest of 128 rows, or of all, in the shape of the tiles."""
    if share == "tensor":
        return jnp.broadcast_to(amax.max(axis=(-2, -1), keepdims=True), amax.shape)
    if share == "block":
        M, width = amax.shape[-2:]
        return spread(tile_amax(jnp.repeat(amax, BLOCK, axis=-1), BLOCK), (M, width * BLOCK), BLOCK)[..., ::BLOCK]
    return amax


def with_scales(x: jax.Array, scales: jax.Array, rows: int = 1, dtype: DTypeLike = E4M3,
                columns: int = BLOCK) -> Quantized:
    """x / scales in `dtype`, for given scales: x [..., M, K], one scale per `rows` x `columns` tile."""
    x = x.astype(jnp.float32)
    # XLA would multiply by the reciprocal of a broadcast array, or by 448 / amax. The select prevents this and changes
    # nothing (NaN / NaN is NaN).
    divisor = jnp.where(jnp.isnan(x), x, spread(scales, x.shape, rows, columns))
    return Quantized((x / divisor).astype(dtype), scales)


def quantize(x: jax.Array, *, scale: str = "float32", dtype: DTypeLike = E4M3, transposed: bool | str = False,
             share: str = "tile") -> Any:
    """Quantizes activations or gradients in 1 x 128 tiles, over the last two axes.

    Args:
      x: [..., M, K], any float type.
      scale: "float32", or "power_of_two" (rounded up, so that nothing overflows).
      transposed: also x.T in tiles of its own (128 x 1 tiles of x), [..., K, M]: the operand of the weight gradient.
        "only": that alone.
      share: "tile"; to study the effect of fine scales, "block" takes the amax of 128 x 128 and "tensor" that of all.
    Returns:
      Quantized, values in `dtype` and scales [..., M, ceil(K / 128)]; with transposed=True a pair of them.
    """
    largest = float(jnp.finfo(dtype).max)

    def along_rows():
        amax = _shared(tile_amax(x), share)
        return with_scales(x, scales_of(amax, largest, scale), dtype=dtype)

    def along_columns():
        amax_T = _shared(jnp.swapaxes(tile_amax(x, BLOCK, 1), -1, -2), share)
        scales = jnp.swapaxes(scales_of(amax_T, largest, scale), -1, -2)
        # Quantized first, then transposed as bytes: XLA:CPU is fast at both, but slow at transposing FP8.
        values = with_scales(x, scales, BLOCK, dtype, 1).values
        bytes_T = jnp.swapaxes(lax.bitcast_convert_type(values, jnp.uint8), -1, -2)
        return Quantized(lax.bitcast_convert_type(bytes_T, dtype), jnp.swapaxes(scales, -1, -2))

    return {False: along_rows, "only": along_columns, True: lambda: (along_rows(), along_columns())}[transposed]()


def quantize_blocks(w: jax.Array, *, scale: str = "float32", dtype: DTypeLike = E4M3,
                    share: str = "block") -> Quantized:
    """Quantizes weights [..., N, K] in 128 x 128 blocks: scales [..., ceil(N / 128), ceil(K / 128)]."""
    amax = _shared(tile_amax(w, BLOCK), "tile" if share == "block" else share)
    return with_scales(w, scales_of(amax, float(jnp.finfo(dtype).max), scale), BLOCK, dtype)


def swiglu_quantize(gate: jax.Array, up: jax.Array, *, scale: str = "float32", dtype: DTypeLike = E4M3) -> Quantized:
    """quantize(silu(gate) * up), computed in float32 and rounded once: [M, F] and [M, F] to Quantized [M, F]."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return quantize(jax.nn.silu(gate) * up, scale=scale, dtype=dtype)


def dequantize(q: Quantized, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """values * scales in the shape of the values, multiplied in float32, rounded once to `dtype`."""
    values, scales = q
    return (values.astype(jnp.float32) * spread(scales, values.shape, rows_of_scale(q))).astype(dtype)
