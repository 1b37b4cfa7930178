"""The experts' FP8 products for Hopper. Twin: reference/fp8_grouped_matmul.py. The loop is that of fp8_matmul.py.

    rows sorted by expert (Fprop, Dgrad)               K-grouped (Wgrad)

      a [R, K]            b [E, N, K]                    a [M, R]  = |  e 0  | e 1 |    e 2    |
      +--------+ 0        matrix of tile 0               b [N, R]  = |       |     |           |
      | e 0    |          ...                                        0      256   384         768
      +--------+ 256      a tile of 128 rows lies        out[e] = a[:, rows of e] @ b[:, rows of e].T
      | e 1    |          in one group: a table on       how many slices of 128 to add is read
      +--------+ 384      the device says in which       from a table on the device

Nothing is padded to equal groups, and no size leaves the device.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.formats import BLOCK, E4M3, Quantized, blocks
from kernels_pallas.hopper.fp8_matmul import Tile, TuningConfig, k_blocks, k_major, scaled_matmul
from kernels_pallas.reference.fp8_grouped_matmul import check_grouped, expert_of_tile


def fp8_grouped_matmul(a: Quantized, b: Quantized, sizes_E: jax.Array, *, out_dtype: DTypeLike = jnp.bfloat16,
                       config: TuningConfig | None = None, num_sms: int = 132, interpret: bool = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.fp8_grouped_matmul.fp8_grouped_matmul].

    Rows past the last group are written as zeros, and so are the gradients of experts without rows. Raises ValueError
    for E5M2.
    """
    check_grouped(a, b, sizes_E)
    if a[0].dtype != E4M3 or b[0].dtype != E4M3:
        raise ValueError(f"hopper multiplies E4M3 by E4M3, not {a[0].dtype} by {b[0].dtype}; "
                         "implementation='reference' takes E5M2 too.")
    config = config or TuningConfig.of_groups(b[0].shape[-2], num_sms)
    if config.block_m != BLOCK:
        raise ValueError("config.split must be 'rows': a tile of 128 rows lies in one group.")
    form = _k_grouped if b[0].ndim == 2 else _grouped
    return form(a, b, sizes_E.astype(jnp.int32), out_dtype, config, dict(num_sms=num_sms, interpret=interpret))


def _grouped(a, b, sizes_E, out_dtype, config, options):
    (R, K), (E, N, _) = a[0].shape, b[0].shape
    grid = (R // BLOCK, -(-N // config.columns))
    expert_T = expert_of_tile(sizes_E, grid[0])

    def locate(tables, index):
        # Tiles of a group are consecutive: its matrix is read from memory once, and then from the L2 cache.
        i, j = plgpu.planar_snake(index, grid, 0, min(config.snake, grid[0]))
        expert = tables[0][i]
        steps = jnp.where(expert < E, blocks(K), 0)
        return Tile(jnp.minimum(expert, E - 1), 0, i * BLOCK, j * config.columns, 0, steps)

    out_type = jax.ShapeDtypeStruct((1, R, N), out_dtype)
    return scaled_matmul(k_major(a, BLOCK), k_blocks(b), (expert_T,), locate, grid[0] * grid[1], out_type, config,
                         **options)[0]


def _k_grouped(a, b, sizes_E, out_dtype, config, options):
    M, N, E = a[0].shape[0], b[0].shape[0], sizes_E.shape[0]
    grid = (-(-M // BLOCK), -(-N // config.columns))
    steps_E = sizes_E // BLOCK
    first_E = jnp.cumsum(steps_E) - steps_E

    def locate(tables, index):
        expert, place = index // (grid[0] * grid[1]), index % (grid[0] * grid[1])
        i, j = plgpu.planar_snake(place, grid, 0, min(config.snake, grid[0]))
        return Tile(0, expert, i * BLOCK, j * config.columns, tables[0][expert], tables[1][expert])

    values, scales = k_major(b, config.columns)
    out_type = jax.ShapeDtypeStruct((E, M, N), out_dtype)
    return scaled_matmul(k_major(a, BLOCK), (values[None], scales), (first_E, steps_E), locate, E * grid[0] * grid[1],
                         out_type, config, **options)
