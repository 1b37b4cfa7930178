"""The experts' products for TPU: jax's megablox kernels. Twin: reference/grouped_matmul.py.

A tile of rows may hold rows of several experts and is processed once for each. Rows past the last group are not
processed, so their memory is replaced by zeros here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

LANES = 128


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """Largest tile sizes: rows, summed axis, and columns."""

    rows: int = 512
    depth: int = 1024
    columns: int = 1024

    def tiling(self, R: int, D: int, F: int) -> tuple[int, int, int]:
        """Tile sizes for a product of these sizes. R must be padded with `padded`."""
        return self.tile_of_rows(R), min(self.depth, _round_up(D)), min(self.columns, _round_up(F))

    def tile_of_rows(self, R: int) -> int:
        return min(self.rows, _round_up(R))


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, transposed: bool = False,
                   config: TuningConfig | None = None, interpret: bool = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.grouped_matmul.grouped_matmul]: [R, F] in the dtype of x."""
    config = config or TuningConfig()
    (R, D), F = x_RD.shape, w_EDF.shape[1 if transposed else 2]
    (x_RD,) = _whole_tiles(config, x_RD)
    y_RF = gmm(x_RD, w_EDF, sizes_E.astype(jnp.int32), x_RD.dtype, config.tiling(len(x_RD), D, F),
               transpose_rhs=transposed, interpret=interpret)[:R]
    return jnp.where(jnp.arange(R)[:, None] < sizes_E.sum(), y_RF, 0)


def weights(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, *, config: TuningConfig | None = None,
            interpret: bool = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.grouped_matmul.weights]: float32 [E, D, F]."""
    # A tile of the output is float32 and stored three times: with 1024 columns, more than the 16 MiB that a kernel may
    # use.
    config = config or TuningConfig(columns=512)
    D, F = x_RD.shape[1], dy_RF.shape[1]
    x_RD, dy_RF = _whole_tiles(config, x_RD, dy_RF)
    return tgmm(x_RD.swapaxes(0, 1), dy_RF, sizes_E.astype(jnp.int32), jnp.float32, config.tiling(len(x_RD), D, F),
                interpret=interpret)


def _whole_tiles(config, *rows):
    """Padded with zeros to a multiple of the tile."""
    R = len(rows[0])
    return [jnp.pad(x, ((0, -R % config.tile_of_rows(R)), (0, 0))) for x in rows]


def _round_up(size):
    return -(-size // LANES) * LANES
