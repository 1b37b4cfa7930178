"""Padding for TMA, which moves swizzled tiles of 8 rows of 128 bytes: the compiler requires complete tiles."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

ROWS, BYTES = 8, 128


def tiled_shape(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[int, ...]:
    """The shape with its last two dimensions rounded up to complete tiles."""
    *stack, rows, columns = shape
    wide = BYTES // jnp.dtype(dtype).itemsize
    return (*stack, -(-rows // ROWS) * ROWS, -(-columns // wide) * wide)


def whole_tiles(x: jax.Array) -> jax.Array:
    """x [..., rows, columns] padded with zeros to complete tiles; x itself if none are missing, as for V3."""
    return jnp.pad(x, [(0, whole - size) for whole, size in zip(tiled_shape(x.shape, x.dtype), x.shape)])
