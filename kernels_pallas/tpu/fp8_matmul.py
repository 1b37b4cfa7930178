"""FP8 matmul for TPU: a [M, K] @ b [N, K].T with scales along K. Twin: reference/fp8_matmul.py.

    grid (rows, columns, K)            a step takes up to 8 slices of 128 of K:

      a [block_m, slices * 128]          total += (a_slice @ b_slice.T) * scale_a[row] * scale_b[column]
      b [block_n, slices * 128]        in float32; the total stays in VMEM until K is through

Blocks of b are scaled by column too, so there is one form for both. A chip without FP8 (v5p, v6e) widens the operands
before its matrix unit and still reads FP8 from memory. Rows and columns past the edge have arbitrary values, and are
not written.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.formats import BLOCK, Quantized, blocks, rows_of_scale
from kernels_pallas.reference.fp8_matmul import check_matmul


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the output is cut up.

    block_m, block_n: of the output that a step adds to; multiples of 128; a total of 512 x 512 is 1 MiB of VMEM.
    slices: of 128 along K in a step, at most 8; reduced to a divisor of K's slices.
    """

    block_m: int = 512
    block_n: int = 512
    slices: int = 8


def scaled_product(a_ref: Any, sa_ref: Any, b_ref: Any, sb_ref: Any) -> Any:
    """float32 [m, n] of one step: a [m, slices * 128], sa [slices, m], b [n, slices * 128], sb [slices, n]."""
    total, sa = 0, sa_ref[...].T  # short rows would be padded to 128 in memory
    for k in range(sb_ref.shape[0]):
        part = lax.dot_general(a_ref[:, k * BLOCK:(k + 1) * BLOCK], b_ref[:, k * BLOCK:(k + 1) * BLOCK],
                               (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        total += part * sa[:, k:k + 1] * sb_ref[k:k + 1, :]
    return total


def accumulate(first: Any, last: Any, product: Callable[[], jax.Array], total_ref: Any, out_ref: Any) -> None:
    """Adds a step's product, a float32 tile, to the total; `first` and `last` mark the begin and end of an output."""
    @pl.when(first)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    total_ref[...] += product()

    @pl.when(last)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def slices_of(K: int, most: int) -> int:
    """The largest number of slices up to `most` that divides K's."""
    return max(n for n in range(1, most + 1) if blocks(K) % n == 0)


def whole_slices(values: jax.Array) -> jax.Array:
    """[..., K] with K padded by zeros to complete slices of 128."""
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % BLOCK)])


def by_slice(q: Quantized, slices: int) -> jax.Array:
    """Scales of either operand, in blocks or tiles, as [..., steps, slices, rows]."""
    values, scales = q
    if rows_of_scale(q) == BLOCK:
        scales = jnp.repeat(scales, BLOCK, axis=-2)[..., :values.shape[-2], :]
    *stack, N, count = scales.shape
    return jnp.moveaxis(scales, -1, -2).reshape(*stack, count // slices, slices, N)


def fp8_matmul(a: Quantized, b: Quantized, *, out_dtype: DTypeLike = jnp.bfloat16, config: TuningConfig | None = None,
               interpret: bool = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.fp8_matmul.fp8_matmul].

    E4M3 or E5M2; K, M and N need not divide the blocks.
    """
    check_matmul(a, b)
    config = config or TuningConfig()
    (M, K), N = a[0].shape, b[0].shape[0]
    slices = slices_of(K, config.slices)
    block_m, block_n = (min(block, -(-size // BLOCK) * BLOCK) for block, size in
                        ((config.block_m, M), (config.block_n, N)))
    steps = blocks(K) // slices

    def kernel(a_ref, sa_ref, b_ref, sb_ref, out_ref, total_ref):
        k = pl.program_id(2)
        accumulate(k == 0, k == steps - 1, lambda: scaled_product(a_ref, sa_ref, b_ref, sb_ref), total_ref, out_ref)

    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((M, N), out_dtype),
        grid=(pl.cdiv(M, block_m), pl.cdiv(N, block_n), steps),
        in_specs=[pl.BlockSpec((block_m, slices * BLOCK), lambda i, j, k: (i, k)),
                  pl.BlockSpec((None, slices, block_m), lambda i, j, k: (k, 0, i)),
                  pl.BlockSpec((block_n, slices * BLOCK), lambda i, j, k: (j, k)),
                  pl.BlockSpec((None, slices, block_n), lambda i, j, k: (k, 0, j))],
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(whole_slices(a[0]), by_slice(a, slices), whole_slices(b[0]), by_slice(b, slices))
