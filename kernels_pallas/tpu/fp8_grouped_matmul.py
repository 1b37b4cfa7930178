"""The experts' FP8 products for TPU. Twin: reference/fp8_grouped_matmul.py. The step is that of fp8_matmul.py.

    rows sorted by expert     a tile of 128 rows is in one group, whose number is read ahead of the step (scalar
                              prefetch) and selects the matrix of b
    K-grouped                 128 of the summed rows are a step; where the expert changes, an output ends
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.formats import BLOCK, Quantized, blocks
from kernels_pallas.reference.fp8_grouped_matmul import check_grouped, expert_of_tile
from kernels_pallas.tpu.fp8_matmul import (
    TuningConfig,
    accumulate,
    by_slice,
    scaled_product,
    slices_of,
    whole_slices,
)


def fp8_grouped_matmul(a: Quantized, b: Quantized, sizes_E: jax.Array, *, out_dtype: DTypeLike = jnp.bfloat16,
                       config: TuningConfig | None = None, interpret: bool = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.fp8_grouped_matmul.fp8_grouped_matmul].

    Rows past the last group are written as zeros, and so are the gradients of experts without rows.
    """
    check_grouped(a, b, sizes_E)
    form = _k_grouped if b[0].ndim == 2 else _grouped
    return form(a, b, sizes_E.astype(jnp.int32), out_dtype, config or TuningConfig(), interpret)


def _grouped(a, b, sizes_E, out_dtype, config, interpret):
    (R, K), (E, N, _) = a[0].shape, b[0].shape
    slices = slices_of(K, config.slices)
    steps, block_n = blocks(K) // slices, min(config.block_n, -(-N // BLOCK) * BLOCK)

    def kernel(expert_T, a_ref, sa_ref, b_ref, sb_ref, out_ref, total_ref):
        k = pl.program_id(2)

        def product():
            # Rows of no expert may hold NaN: they are selected away, not multiplied by zero.
            return jnp.where(expert_T[pl.program_id(0)] < E, scaled_product(a_ref, sa_ref, b_ref, sb_ref), 0)

        accumulate(k == 0, k == steps - 1, product, total_ref, out_ref)

    whose = lambda expert_T, i: jnp.minimum(expert_T[i], E - 1)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(R // BLOCK, pl.cdiv(N, block_n), steps),
        in_specs=[pl.BlockSpec((BLOCK, slices * BLOCK), lambda i, j, k, expert_T: (i, k)),
                  pl.BlockSpec((None, slices, BLOCK), lambda i, j, k, expert_T: (k, 0, i)),
                  pl.BlockSpec((None, block_n, slices * BLOCK), lambda i, j, k, expert_T: (whose(expert_T, i), j, k)),
                  pl.BlockSpec((None, None, slices, block_n),
                               lambda i, j, k, expert_T: (whose(expert_T, i), k, 0, j))],
        out_specs=pl.BlockSpec((BLOCK, block_n), lambda i, j, k, expert_T: (i, j)),
        scratch_shapes=[pltpu.VMEM((BLOCK, block_n), jnp.float32)])
    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((R, N), out_dtype), grid_spec=grid_spec, interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(expert_of_tile(sizes_E, R // BLOCK), whole_slices(a[0]), by_slice(a, slices), whole_slices(b[0]),
      by_slice(b, slices))


def _k_grouped(a, b, sizes_E, out_dtype, config, interpret):
    (M, R), N, E = a[0].shape, b[0].shape[0], sizes_E.shape[0]
    tiles = R // BLOCK
    block_m, block_n = (min(block, -(-size // BLOCK) * BLOCK) for block, size in
                        ((config.block_m, M), (config.block_n, N)))

    def kernel(expert_T, a_ref, sa_ref, b_ref, sb_ref, out_ref, total_ref):
        t = pl.program_id(2)
        mine = expert_T[t]
        first = (t == 0) | (mine != expert_T[jnp.maximum(t - 1, 0)])
        last = (t == tiles - 1) | (mine != expert_T[jnp.minimum(t + 1, tiles - 1)])

        @pl.when(mine < E)
        def _():
            accumulate(first, last, lambda: scaled_product(a_ref, sa_ref, b_ref, sb_ref), total_ref, out_ref)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(pl.cdiv(M, block_m), pl.cdiv(N, block_n), tiles),
        in_specs=[pl.BlockSpec((block_m, BLOCK), lambda i, j, t, expert_T: (i, t)),
                  pl.BlockSpec((None, 1, block_m), lambda i, j, t, expert_T: (t, 0, i)),
                  pl.BlockSpec((block_n, BLOCK), lambda i, j, t, expert_T: (j, t)),
                  pl.BlockSpec((None, 1, block_n), lambda i, j, t, expert_T: (t, 0, j))],
        out_specs=pl.BlockSpec((None, block_m, block_n),
                               lambda i, j, t, expert_T: (jnp.minimum(expert_T[t], E - 1), i, j)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)])
    dw_EMN = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((E, M, N), out_dtype), grid_spec=grid_spec, interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(expert_of_tile(sizes_E, tiles), a[0], by_slice(a, 1), b[0], by_slice(b, 1))
    # An expert without rows has no step that writes its output.
    return jnp.where((sizes_E > 0)[:, None, None], dw_EMN, 0)
