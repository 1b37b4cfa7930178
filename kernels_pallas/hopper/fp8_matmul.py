"""FP8 matmul for Hopper: a [M, K] @ b [N, K].T with scales along K. Twin: reference/fp8_matmul.py.

A thread block owns an SM and iterates over output tiles. One warpgroup only moves memory: it keeps `stages` slices of
both operands and their scales in flight, across tile boundaries, so the pipeline never drains. Two warpgroups multiply,
each its own 64 rows (or, for few rows, its own columns), so that one scales and adds its partial sum while the other
uses the tensor core:

            tile_n = 128                        every 128 of K:
          +-----------+                           part  = a_slice @ b_slice.T   4 WGMMAs, in the tensor core's registers
      64  | group 0   |  <- a rows  0..63         total += part * scale_a[row] * scale_b[block or column]   in float32
          +-----------+                         at the end:
      64  | group 1   |  <- a rows 64..127        total -> out dtype -> shared memory -> TMA
          +-----------+

With `pair` the two SMs of a cluster take adjacent tiles. They need the same slices of a, of which each loads half for
both (TMA multicast): the L2 cache then delivers a quarter less. A slot is refilled when both SMs have read it.

TMA loads rows and columns past the edge as zeros and does not store them.
"""

# The stubs of Mosaic's transforms and ACC are wrong.
# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.formats import BLOCK, E4M3, Quantized, blocks, rows_of_scale
from kernels_pallas.hopper.tiles import tiled_shape, whole_tiles
from kernels_pallas.reference.fp8_matmul import check_matmul

COMPUTE, MEMORY = 2, 1  # warpgroups
WIDTHS = (BLOCK, 64, 32, 16)  # of a warpgroup's tile
SHARED_BYTES = 223 * 1024  # of a block's 227 KiB: the rest is for barriers, alignment and Mosaic itself


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the output is cut up.

    tile_n: columns of a warpgroup's tile of 64 rows, 16 to 128. 128: the sum in float32 and the partial sum take 64
      registers each of the 232 there are; 64 x 256 spills.
    stages: slices of 128 of K in flight, 32 KiB each (40 with split="columns"); None: as many as leave room for the
      output in the available 227 KiB: 5 with bfloat16 and 4 with float32; by columns 4 and 3.
    split: "rows", both warpgroups share b's slice; "columns", they share a's: for M <= 64, where half of a would be
      zeros.
    snake: tiles of M that are processed together, so that a's rows stay in the L2 cache while b's are streamed.
    pair: two SMs share the slices of a.
    """

    tile_n: int = 128
    stages: int | None = None
    split: str = "rows"
    snake: int = 8
    pair: bool = False

    def __post_init__(self):
        # A tile is inside one block of 128 x 128 with one scale, and is stored in swizzled rows of 128 bytes.
        if self.tile_n not in WIDTHS or self.split not in ("rows", "columns"):
            raise ValueError(f"tile_n={self.tile_n} and split={self.split!r} make no tile of this kernel; tile_n is "
                             f"{', '.join(map(str, WIDTHS))}, so that a tile lies in one block of scales, and split "
                             "'rows' or 'columns'.")

    @classmethod
    def of_shape(cls, M: int, N: int, num_sms: int = 132) -> TuningConfig:
        """The tiles that minimize the loads of the busiest SM: narrow for few rows, so that all SMs are used."""
        configs = [cls(tile_n=width, split=split) for width in WIDTHS for split in ("rows", "columns")]
        configs += [cls(pair=True)] * (num_sms > 1)

        def loaded(config):
            tiles = -(-M // config.block_m) * -(-N // config.columns)
            return -(-tiles // (num_sms // config.sms)) * (config.block_m // config.sms + config.block_n)

        return min(configs, key=loaded)

    @classmethod
    def of_groups(cls, N: int, num_sms: int = 132) -> TuningConfig:
        """Tiles of 128 x 128, in pairs if an extra column costs less than pairs save."""
        def loaded(config):
            return -(-N // config.columns) * (config.block_m + config.columns)

        return min([cls(), *[cls(pair=True)] * (num_sms > 1)], key=loaded)

    @property
    def block_m(self) -> int:
        return 64 * (COMPUTE if self.split == "rows" else 1)

    @property
    def block_n(self) -> int:
        return self.tile_n * (COMPUTE if self.split == "columns" else 1)

    @property
    def sms(self) -> int:
        """The number of SMs that share a tile of a."""
        return 2 if self.pair else 1

    @property
    def columns(self) -> int:
        """The number of columns that the SMs of a cluster process at once."""
        return self.sms * self.block_n

    def stages_for(self, out_dtype: jnp.dtype) -> int:
        """The number of blocks of both operands in flight: as many as fit in addition to the output's tiles."""
        left = SHARED_BYTES - COMPUTE * 64 * self.tile_n * out_dtype.itemsize
        return self.stages or left // ((self.block_m + self.block_n) * BLOCK)


class Tile(NamedTuple):
    """One output tile, or two adjacent ones: the matrix of b and of the output, rows and first column, slices of K."""

    b: jax.Array | int
    out: jax.Array | int
    row: jax.Array
    column: jax.Array
    first: jax.Array | int
    steps: jax.Array | int


# One kernel and all that it names, read top down.
def scaled_matmul(a: Any, b: Any, tables: Any, locate: Callable, tiles: Any, out_type: jax.ShapeDtypeStruct,
                  config: TuningConfig, num_sms: int = 132, interpret: bool = False) -> jax.Array:
    """The loop shared by dense and grouped products.

    Args:
      a: E4M3 [M, K] with scales [K / 128, whole tiles of M].
      b: E4M3 [E, N, K] with scales [E, N / 128, K / 128] (blocks) or [K / 128, whole tiles of N] (tiles, E = 1).
      tables: int32 arrays in device memory that `locate` reads.
      locate: (refs of the tables, number of a tile) -> Tile.
      tiles: their number, or the number of pairs.
      out_type: jax.ShapeDtypeStruct [E', M, N].
    Raises:
      ValueError: there are fewer SMs than needed to share a tile.
    """
    if num_sms < config.sms:
        raise ValueError(f"pair=True shares rows between two SMs, and num_sms={num_sms}; take pair=False.")
    out = jax.ShapeDtypeStruct(tiled_shape(out_type.shape, out_type.dtype), out_type.dtype)
    (a_MK, as_KM), (b_ENK, bs) = a, b
    by_column = bs.ndim == 2
    block_m, block_n, tile_n = config.block_m, config.block_n, config.tile_n
    stages = config.stages_for(out_type.dtype)
    swizzled = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK))
    out_bytes = min(BLOCK, tile_n * out_type.dtype.itemsize)  # bytes of a row that is swizzled as a unit
    out_swizzle = (plgpu.TilingTransform((8, out_bytes // out_type.dtype.itemsize)), plgpu.SwizzleTransform(out_bytes))

    # One kernel and all that it names, read top down.
    def fp8_products(a_gmem, as_gmem, b_gmem, bs_gmem, *refs):
        table_refs, (o_gmem, a_smem, b_smem, o_smem, full, empty) = refs[:len(tables)], refs[len(tables):]
        group = lax.axis_index("group")
        mine_m, mine_n = (group * 64, 0) if config.split == "rows" else (0, group * tile_n)

        def over_tiles(visit):
            @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
            def last(loop, carry):
                tile = locate(table_refs, loop.index[0])
                if config.pair:
                    tile = tile._replace(column=tile.column + lax.axis_index("pair") * block_n)
                return visit(tile, carry)

            return last

        @pl.when(group == COMPUTE)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            @over_tiles
            def steps(tile, step):
                rows, columns = pl.ds(tile.row, block_m), pl.ds(tile.column, block_n)

                def load(k, step):
                    slot = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    ks = pl.ds(k * BLOCK, BLOCK)
                    plgpu.copy_gmem_to_smem(a_gmem.at[rows, ks], a_smem.at[slot], full.at[slot],
                                            collective_axes="pair" if config.pair else None)
                    plgpu.copy_gmem_to_smem(b_gmem.at[tile.b, columns, ks], b_smem.at[slot], full.at[slot])
                    return step + 1

                return lax.fori_loop(tile.first, tile.first + tile.steps, load, step)

            # The other SM of a pair may still read shared slots, and signals this here. (See also Ring.drain.)
            @pl.loop(0, stages)
            def _(n):
                @pl.when(steps + n >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[lax.rem(steps + n, stages)])

        @pl.when(group < COMPUTE)
        def _():
            plgpu.set_max_registers(232, action="increase")
            @over_tiles
            def _(tile, step):
                first_column = tile.column + mine_n
                mine_rows, mine_columns = pl.ds(tile.row + mine_m, 64), pl.ds(first_column, tile_n)

                def scales(k):
                    k = jnp.minimum(k, as_gmem.shape[0] - 1)  # past the last slice: loaded, not used
                    scale_a = plgpu.load(as_gmem.at[k, mine_rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                    if by_column:
                        return scale_a, plgpu.load(bs_gmem.at[k, mine_columns], layout=plgpu.Layout.WGMMA.reduce(0),
                                                   optimized=False)
                    # A tile past the edge has no scale block, and needs none.
                    return scale_a, bs_gmem[tile.b, jnp.minimum(lax.div(first_column, BLOCK), bs.shape[1] - 1), k]

                def add(k, carry):
                    step, total, (scale_a, scale_b) = carry
                    slot = lax.rem(step, stages)
                    # Loaded a slice ahead and used only then, so the tensor core never waits for device memory.
                    ahead = scales(k + 1)
                    plgpu.barrier_wait(full.at[slot])

                    def multiply(part):
                        plgpu.wgmma(part, a_smem.at[slot, pl.ds(mine_m, 64)],
                                    b_smem.at[slot, pl.ds(mine_n, tile_n)].transpose((1, 0)))
                        plgpu.wgmma_wait(0)
                        return part[...]

                    part = pl.run_scoped(multiply, plgpu.ACC((64, tile_n), jnp.float32))
                    plgpu.barrier_arrive(empty.at[slot])
                    if by_column:
                        part *= lax.broadcast_in_dim(scale_b, (64, tile_n), (1,))
                    else:
                        scale_a *= scale_b
                    return step + 1, total + part * lax.broadcast_in_dim(scale_a, (64, tile_n), (0,)), ahead

                zero = plgpu.layout_cast(jnp.zeros((64, tile_n), jnp.float32), plgpu.Layout.WGMMA)
                start = step, zero, scales(tile.first)
                step, total, _ = lax.fori_loop(tile.first, tile.first + tile.steps, add, start)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_smem[group] = total.astype(out_type.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_smem.at[group], o_gmem.at[tile.out, mine_rows, mine_columns])
                return step

            plgpu.wait_smem_to_gmem(0)

    read_barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("pair",)) if config.pair else plgpu.Barrier
    cluster: dict[str, Any] = dict(cluster=(2,), cluster_names=("pair",)) if config.pair else {}
    return plgpu.kernel(
        fp8_products, out_type=out, grid=(num_sms // config.sms,), grid_names=("sm",), num_threads=COMPUTE + MEMORY,
        thread_name="group", interpret=interpret, **cluster,
        scratch_types=[plgpu.SMEM((stages, block_m, BLOCK), E4M3, transforms=swizzled),
                       plgpu.SMEM((stages, block_n, BLOCK), E4M3, transforms=swizzled),
                       plgpu.SMEM((COMPUTE, 64, tile_n), out_type.dtype, transforms=out_swizzle),
                       plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                       read_barrier(num_arrivals=COMPUTE, num_barriers=stages)],
    )(a_MK, as_KM, b_ENK, bs, *tables)[:, :out_type.shape[1], :out_type.shape[2]]


def k_major(q: Quantized, block: int) -> Any:
    """(values [M, K], scales [K / 128, M]): values in whole tiles, scales for whole tiles of `block` rows."""
    values, scales = q
    return whole_tiles(values), jnp.pad(scales, ((0, -scales.shape[0] % block), (0, 0))).T


def k_blocks(q: Quantized) -> Any:
    """(values [E, N, K], scales [E, N / 128, K / 128]), values in whole tiles."""
    return whole_tiles(q[0]), q[1]


def fp8_matmul(a: Quantized, b: Quantized, *, out_dtype: DTypeLike = jnp.bfloat16, config: TuningConfig | None = None,
               num_sms: int = 132, interpret: bool = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.fp8_matmul.fp8_matmul].

    `b` in blocks or in tiles; K, M and N need not divide the tiles. Raises ValueError for E5M2.
    """
    check_matmul(a, b)
    if a[0].dtype != E4M3 or b[0].dtype != E4M3:
        raise ValueError(f"hopper multiplies E4M3 by E4M3, not {a[0].dtype} by {b[0].dtype}; "
                         "implementation='reference' takes E5M2 too.")
    (M, K), N = a[0].shape, b[0].shape[0]
    config = config or TuningConfig.of_shape(M, N, num_sms)
    grid = (-(-M // config.block_m), -(-N // config.columns))
    steps = blocks(K)

    def locate(_, index):
        i, j = plgpu.planar_snake(index, grid, 0, min(config.snake, grid[0]))
        return Tile(0, 0, i * config.block_m, j * config.columns, 0, steps)

    if rows_of_scale(b) == 1 and N > 1:
        values, scales = k_major(b, config.columns)
        right = values[None], scales
    else:
        right = k_blocks(Quantized(b[0][None], b[1][None]))
    run = functools.partial(scaled_matmul, tables=(), locate=locate, tiles=grid[0] * grid[1], config=config,
                            num_sms=num_sms, interpret=interpret)
    return run(k_major(a, config.block_m), right, out_type=jax.ShapeDtypeStruct((1, M, N), out_dtype))[0]
