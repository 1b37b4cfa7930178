"""FP8 arrays with a scale for every 128 numbers (report section 3.3.2), and a model of Hopper's accumulation.

    x[m, k] = values[m, k] * scales[m, k // 128]             activations and gradients: 1 x 128 tiles
    w[n, k] = values[n, k] * scales[n // 128, k // 128]      weights: 128 x 128 blocks, [out, in] as in the checkpoints
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.constants import BLOCK

E4M3 = jnp.float8_e4m3fn
E5M2 = jnp.float8_e5m2


class Quantized(NamedTuple):
    """FP8 values and the float32 scales that multiply them.

    scales[..., i, j] belongs to row i (tiles) or to rows 128 i, ... (blocks), and to columns 128 j, ...; the last tile
    of a row or column may be smaller.
    """

    values: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """A model of a tensor core's accumulators (report section 3.3.2).

    Every `group` products are added exactly, their sum is added to a partial sum that is truncated to `bits` bits, and
    every `promote_every` elements of K (0: never) the partial sum is added to a float32 sum.
    """

    bits: int = 14
    promote_every: int = 128
    group: int = 32  # the depth of one FP8 WGMMA


def blocks(size: int) -> int:
    """The number of scales of `size` numbers."""
    return -(-size // BLOCK)


def rows_of_scale(q: Quantized) -> int:
    """1 for tiles, 128 for blocks."""
    values, scales = q
    return 1 if scales.shape[-2] == values.shape[-2] else BLOCK


def check(q: Quantized, name: str, ndim: int) -> None:
    """Checks that `q` has FP8 values and float32 scales of matching shapes.

    Raises:
      ValueError: it does not.
    """
    values, scales = q
    if values.dtype not in (E4M3, E5M2) or scales.dtype != jnp.float32 or values.ndim != ndim:
        raise ValueError(f"{name} must be FP8 values of {ndim} axes with float32 scales, not {values.dtype}"
                         f"{list(values.shape)} with {scales.dtype}; make it with quantize or quantize_blocks.")
    *stack, rows, columns = values.shape
    fits = [(*stack, r, blocks(columns)) for r in (rows, blocks(rows))]
    if scales.shape not in fits:
        raise ValueError(f"{name} has values {list(values.shape)} and scales {list(scales.shape)}; tiles of 1 x 128 "
                         f"have {list(fits[0])}, blocks of 128 x 128 {list(fits[1])}.")
