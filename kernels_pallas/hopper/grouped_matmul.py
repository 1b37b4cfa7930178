"""The experts' bfloat16 products for Hopper. Twin: reference/grouped_matmul.py.

    rows sorted by expert                  a group's first tile of 128 rows starts at the multiple of 8 before it, which
     0       100  137      227    300      is where TMA can; a tile stores the rows of its own group alone:
     |  e 0   |e 1 |  e 3   | none |
     [tile 0       )                       rows   0 to  99, by e 0
             [tile 1        )              rows 100 to 136, by e 1, of the tile that starts at  96
                  [tile 2        )         rows 137 to 226, by e 3, of the tile that starts at 136
                           [tile 3         rows 227 to 299, zeros

Sizes stay on the device, where tables hold the expert of each tile. One warpgroup loads and two multiply; a tile's sum
stays in the tensor core's registers over all of K. The gradient of the weights sums over rows, 64 at a time: rows of
neighbouring groups in the first and the last 64 of a group are zeroed before they are multiplied.
"""

# The stubs of Mosaic's transforms and ACC are wrong.
# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.hopper.ring import COMPUTE, Ring, roles, swizzled
from kernels_pallas.hopper.tiles import tiled_shape, whole_tiles

ROWS = 64 * COMPUTE  # of a tile, 64 to a warpgroup
SLICE = 64  # depth of a slice of the summed axis: 128 bytes, and four WGMMAs
ALIGN = 8  # rows of a swizzled tile in shared memory: TMA fills whole ones
PART = 128  # columns of a tile that are stored at once
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the output is cut up.

    tile_n: columns of a tile: 128, or 256, whose sums take 128 of a thread's 232 registers.
    stages: slices in flight, 48 KiB each with 256 columns.
    snake: tiles of rows that are processed together, so that their rows stay in the L2 cache while the weights are
    streamed.
    """

    tile_n: int = 256
    stages: int = 3
    snake: int = 8

    def __post_init__(self):
        if self.tile_n not in (PART, 2 * PART):
            raise ValueError(f"tile_n={self.tile_n} makes no tile of this kernel; tile_n is {PART} or {2 * PART}.")


class Tile(NamedTuple):
    """An output tile: whose it is, where its operands' rows start, its own first row and column, and slices to add.

    begin, end: which rows from `source` on are the expert's.
    """

    expert: Any
    source: Any
    row: Any
    column: Any
    begin: Any
    end: Any
    steps: Any


class Form(NamedTuple):
    """The differences between the two products.

    locate(tables, number) -> Tile. sources(a, b, tile, k): what slice k reads, of shapes `slots`.
    operands(a slot, b slot, group, tile, k): a warpgroup's two, in shared memory. store(stages, part, out, group, tile,
    columns): writes a warpgroup's part of the tile, [64, PART].
    """

    locate: Callable
    sources: Callable
    operands: Callable
    store: Callable
    slots: tuple[tuple[int, int], tuple[int, int]]


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, transposed: bool = False,
                   config: TuningConfig | None = None, num_sms: int = 132, interpret: Any = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.grouped_matmul.grouped_matmul].

    Groups may end anywhere and are not padded.

    Raises:
      ValueError: the operands are not bfloat16.
    """
    _check(x_RD, w_EDF)
    config = config or TuningConfig()
    (R, D), E, F = x_RD.shape, len(w_EDF), w_EDF.shape[1 if transposed else 2]
    grid = ((R + (E + 1) * (ROWS + ALIGN - 2)) // ROWS, -(-F // config.tile_n))  # no sizes need more tiles

    def locate(tables, number):
        # Tiles of a group are consecutive: its matrix is read from memory once, and then from the L2 cache.
        i, j = plgpu.planar_snake(number, grid, 0, min(config.snake, grid[0]))
        expert, row, begin, end = (table[i] for table in tables)
        row = pl.multiple_of(row, ALIGN)
        steps = jnp.where((expert < E) & (begin < end), -(-D // SLICE), 0)
        return Tile(jnp.minimum(expert, E - 1), row, row, j * config.tile_n, begin, end, steps)

    def sources(x, w, tile, k):
        depth, columns = pl.ds(k * SLICE, SLICE), pl.ds(tile.column, config.tile_n)
        of_w = (columns, depth) if transposed else (depth, columns)
        return x.at[pl.ds(tile.source, ROWS), depth], w.at[tile.expert, *of_w]

    def operands(x, w, group, tile, k):
        return x.at[pl.ds(group * 64, 64)], w.transpose((1, 0)) if transposed else w

    slots = (ROWS, SLICE), (config.tile_n, SLICE) if transposed else (SLICE, config.tile_n)
    form = Form(locate, sources, operands, _store_rows, slots)
    out = jax.ShapeDtypeStruct((R, F), jnp.bfloat16)
    return _products(x_RD, w_EDF, tiles_of_groups(sizes_E, R, grid[0]), grid[0] * grid[1], form, out, config, num_sms,
                     interpret)


def weights(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, *, config: TuningConfig | None = None,
            num_sms: int = 132, interpret: Any = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.grouped_matmul.weights].

    dy must be finite, even in rows of no expert: a tile multiplies those that it reads by zero.

    Raises:
      ValueError: the operands are not bfloat16.
    """
    _check(x_RD, dy_RF)
    config = config or TuningConfig()
    D, F, E = x_RD.shape[1], dy_RF.shape[1], len(sizes_E)
    grid = (-(-D // ROWS), -(-F // config.tile_n))
    sizes = sizes_E.astype(jnp.int32)

    def locate(tables, number):
        expert, place = number // (grid[0] * grid[1]), number % (grid[0] * grid[1])
        i, j = plgpu.planar_snake(place, grid, 0, min(config.snake, grid[0]))
        start, size = (table[expert] for table in tables)
        begin = start % ALIGN
        steps = jnp.where(size > 0, (begin + size + SLICE - 1) // SLICE, 0)
        source = pl.multiple_of(start - begin, ALIGN)
        return Tile(expert, source, i * ROWS, j * config.tile_n, begin, begin + size, steps)

    def sources(x, dy, tile, k):
        rows = pl.ds(tile.source + k * SLICE, SLICE)
        return x.at[rows, pl.ds(tile.row, ROWS)], dy.at[rows, pl.ds(tile.column, config.tile_n)]

    def operands(x, dy, group, tile, k):
        mine, begin, end = x.at[:, pl.ds(group * 64, 64)], tile.begin - k * SLICE, tile.end - k * SLICE

        @pl.when((begin > 0) | (end < SLICE))
        def _():  # rows of other experts
            row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (SLICE, 64), 0), WGMMA)
            own = (row >= begin) & (row < end)
            mine[...] = jnp.where(own, plgpu.load(mine, layout=WGMMA), jnp.bfloat16(0))
            plgpu.commit_smem()

        return mine.transpose((1, 0)), dy

    def store(stages, part, out, group, tile, columns):
        stages[0][group] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stages[0].at[group], out.at[tile.expert, pl.ds(tile.row + group * 64, 64), columns])

    form = Form(locate, sources, operands, store, ((SLICE, ROWS), (SLICE, config.tile_n)))
    out = jax.ShapeDtypeStruct((E, D, F), jnp.float32)
    return _products(x_RD, dy_RF, (jnp.cumsum(sizes) - sizes, sizes), E * grid[0] * grid[1], form, out, config, num_sms,
                     interpret)


def tiles_of_groups(sizes_E: jax.Array, R: int, tiles: int) -> tuple[jax.Array, ...]:
    """int32 [tiles] each: a tile's expert (E: none), its first row, and the begin and end of the expert's rows in it.

    Rows past the last group form a separate group. An unused tile has no rows.
    """
    sizes = jnp.append(sizes_E, R - sizes_E.sum()).astype(jnp.int32)
    start_G = jnp.cumsum(sizes) - sizes
    first_G = start_G // ALIGN * ALIGN
    tiles_G = jnp.where(sizes > 0, -(-(start_G + sizes - first_G) // ROWS), 0)
    end_G, index = jnp.cumsum(tiles_G), jnp.arange(tiles, dtype=jnp.int32)
    # Compared with all groups: a binary search would be an XLA loop before every product.
    group = jnp.searchsorted(end_G, index, side="right", method="compare_all").astype(jnp.int32)
    of_group = lambda table: table[jnp.minimum(group, len(sizes) - 1)]
    row = of_group(first_G) + (index - of_group(end_G - tiles_G)) * ROWS
    own = lambda edge_G: jnp.clip(of_group(edge_G) - row, 0, ROWS)
    return group, row, own(start_G), own(start_G + sizes)


def _store_rows(stages, part, out, group, tile, columns):
    """Stores those of a warpgroup's 64 rows that belong to the expert."""
    whole, pieces = stages
    begin, end = (jnp.clip(edge - group * 64, 0, 64) for edge in (tile.begin, tile.end))
    first, count = tile.row + group * 64, end - begin

    @pl.when(count == 64)
    def _():
        whole[group] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(whole.at[group], out.at[pl.ds(first, 64), columns])

    @pl.when((count > 0) & (count < 64))
    def _():
        pieces[group] = part
        plgpu.commit_smem()

        def leave(size):
            at = begin + (count & -(2 * size))  # larger pieces were stored before
            plgpu.copy_smem_to_gmem(pieces.at[group, pl.ds(at, size)], out.at[pl.ds(first + at, size), columns])

        for size in (32, 16, 8, 4, 2, 1):  # TMA moves fixed numbers of rows: one copy for each set bit of the count
            pl.when(count & size != 0)(functools.partial(leave, size))


# One kernel and all that it names, read top down.
def _products(a, b, tables, tiles, form: Form, out: jax.ShapeDtypeStruct, config: TuningConfig, num_sms, interpret):
    """The loop over tiles, shared by both products."""
    stages, tile_n = config.stages, config.tile_n
    out_swizzle = plgpu.TilingTransform((8, 128 // out.dtype.itemsize)), plgpu.SwizzleTransform(128)

    def experts_products(a_gmem, b_gmem, *refs):
        table_refs, (o_gmem, ring, *held) = refs[:len(tables)], refs[len(tables):]

        def over_tiles(visit):
            @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
            def last(loop, carry):
                return visit(form.locate(table_refs, loop.index[0]), carry)

            return last

        def load():
            @over_tiles
            def steps(tile, n):
                def ask(k, n):
                    ring.fill(n, *form.sources(a_gmem, b_gmem, tile, k))
                    return n + 1

                return lax.fori_loop(0, tile.steps, ask, n)

            ring.drain(steps)

        def compute(group):
            @over_tiles
            def _(tile, n):
                total = pl.run_scoped(lambda acc: accumulate(acc, group, tile, n),
                                      plgpu.ACC((64, tile_n), jnp.float32))
                for column in range(0, tile_n, PART):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    form.store(held, total[:, column:column + PART].astype(out.dtype), o_gmem, group, tile,
                               pl.ds(tile.column + column, PART))
                return n + tile.steps

            plgpu.wait_smem_to_gmem(0)

        def accumulate(acc, group, tile, n):
            def add(k, _):
                slot = lax.rem(n + k, stages)
                plgpu.barrier_wait(ring.full.at[slot])
                lhs, rhs = form.operands(*(held.at[slot] for held in ring.slots), group, tile, k)
                plgpu.wgmma(acc, lhs, rhs)
                plgpu.wgmma_wait(1)  # the previous slice's slot is free while this one is multiplied

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(ring.empty.at[lax.rem(n + k - 1, stages)])

            lax.fori_loop(0, tile.steps, add, None)
            plgpu.wgmma_wait(0)

            @pl.when(tile.steps > 0)
            def _():
                plgpu.barrier_arrive(ring.empty.at[lax.rem(n + tile.steps - 1, stages)])

            return acc[...]

        roles(load, compute, (40, 232))

    ring = Ring.holding(stages, *((shape, jnp.bfloat16, swizzled(64)) for shape in form.slots))
    held = [plgpu.SMEM((COMPUTE, 64, PART), out.dtype, transforms=out_swizzle)]
    held += [plgpu.SMEM((COMPUTE, 64, PART), out.dtype)] if form.store is _store_rows else []
    made = plgpu.kernel(
        experts_products, out_type=jax.ShapeDtypeStruct(tiled_shape(out.shape, out.dtype), out.dtype),
        grid=(num_sms,), grid_names=("sm",), num_threads=COMPUTE + 1, thread_name="group", interpret=interpret,
        scratch_types=[ring, *held])(whole_tiles(a), whole_tiles(b), *tables)
    return made[tuple(slice(size) for size in out.shape)]


def _check(*operands):
    for x in operands:
        if x.dtype != jnp.bfloat16:
            raise ValueError(f"hopper's experts multiply bfloat16, not {x.dtype}; implementation='reference' takes it.")
