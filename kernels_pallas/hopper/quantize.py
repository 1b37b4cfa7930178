"""Quantizing to E4M3 on Hopper, in one pass over memory. Twin: reference/quantize.py.

Scales that are powers of two are the twin's bit for bit, and so are their values: no division is involved. The chip
divides within 2 ulp, so float32 scales may differ from the twin's by that much, and values by one step of E4M3. A row
has one reciprocal instead of a division for each number. It comes in two parts: one product with 1 / s would round five
values of ten thousand otherwise, since quotients of bfloat16 numbers often lie between two values of E4M3.

Each thread block takes a tile of 128 x 128 and reads it once. Two warpgroups share it: each quantizes 64 rows, or, for
the transposed copy, 64 columns, or both. Several blocks share an SM, and hide each other's latency. There is nothing to
tune: 128 x 128 is the smallest size with complete tiles in both directions.

             128 columns                    rows:     amax along the row     -> values [M, K],  scales [K / 128, M]
          +--------+--------+               columns:  amax along the column  -> values [K, M],  scales [M / 128, K]
      64  | group 0         |
          +  -  -  -  -  -  +               Scales leave transposed, so that a tile's 128 lie together, as fp8_matmul
      64  | group 1         |               wants them; the wrapper turns them, which XLA undoes where it can.
          +--------+--------+
            g 0       g 1                   The SwiGLU form reads gate and up, and quantizes silu(gate) * up.
"""

# The stubs of Mosaic's transforms and ACC are wrong, and lengths of unpacked lists are not known.
# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false, reportCallIssue=false
import functools
import operator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.formats import BLOCK, E4M3, Quantized, blocks
from kernels_pallas.hopper.tiles import tiled_shape, whole_tiles
from kernels_pallas.reference.quantize import SMALLEST_AMAX

HALF = BLOCK // 2
WGMMA = plgpu.Layout.WGMMA


def _reciprocal(s):
    """1 / s in two parts: 12 bits, by which the product of a bfloat16 is exact, and the rest, of which little is left.

    What the division is off by, the rest has too.
    """
    top = lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -4096, jnp.float32)
    near = 1 / s
    high, upper = top(near), top(s)
    rest = (1 - high * upper - high * (s - upper)) * near
    return high, jnp.where(s < jnp.inf, rest, near)


def _scales(amax, scale):
    """(scales, what x is multiplied by: the summands of a factor)."""
    amax = jnp.maximum(amax, SMALLEST_AMAX)
    if scale == "float32":
        # With a barrier, as in the twin: a product with 1 / 448 differs from the quotient.
        s = amax / lax.optimization_barrier(jnp.full_like(amax, 448))
        return s, _reciprocal(s)
    from_bits = lambda bits: lax.bitcast_convert_type(bits, jnp.float32)
    # 448 = 1.75 * 2^8: a larger mantissa needs the next power. The reciprocal of a power of two negates its exponent.
    s = ((lax.bitcast_convert_type(amax, jnp.int32) + 0x1FFFFF) & -0x800000) - (8 << 23)
    inverse = jnp.where(amax == jnp.inf, 0.0, jnp.where(amax < jnp.inf, from_bits((254 << 23) - s), amax))
    return jnp.where(amax < jnp.inf, from_bits(s), amax), (inverse,)


def _amax(parts, interpret):
    """The largest magnitude of each row; NaN if there is one, as in the twin."""
    if not interpret:  # max.NaN.f32, which the report of compiled kernels checks
        return functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x), axis=1) for x in parts))
    # The interpreter's maximum skips NaN. As integers, magnitudes have the same order; on the chip this costs 11
    # registers.
    bits = (lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF for x in parts)
    return lax.bitcast_convert_type(functools.reduce(jnp.maximum, (jnp.max(b, axis=1) for b in bits)), jnp.float32)


def _store(parts, scale, half, values_smem, scales_smem, interpret):
    """Quantizes 64 rows of 128 numbers, which are given in parts of some columns, into shared memory."""
    s, factors = _scales(_amax(parts, interpret), scale)
    each = lambda row: lax.broadcast_in_dim(row, (HALF, BLOCK // len(parts)), (0,))
    for n, x in enumerate(parts):
        scaled = functools.reduce(operator.add, (x * each(factor) for factor in factors))
        values_smem[half, :, n * x.shape[1]:(n + 1) * x.shape[1]] = scaled.astype(E4M3)
    scales_smem[half] = s


# One kernel and all that it names, read top down.
def _quantize(inputs, prepare, scale, transposed, interpret) -> Any:
    """inputs: arrays [M, K], from which `prepare` makes float32 tiles. Scales are returned as [K / 128, M]."""
    M, K = inputs[0].shape
    copies = {False: (False,), True: (False, True), "only": (True,)}[transposed]  # is a copy turned?
    sizes = [(K, M) if turned else (M, K) for turned in copies]
    inputs = [whole_tiles(x) for x in inputs]
    # A row is read in parts: with complete rows of both operands, SwiGLU used all registers, and one block filled an
    # SM.
    count = 2 if len(inputs) == 1 else 4
    wide = BLOCK // count
    bf16 = (plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(2 * wide))
    fp8 = (plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(wide))
    outs = [out for m, k in sizes
            for out in (jax.ShapeDtypeStruct(tiled_shape((m, k), E4M3), E4M3),
                        jax.ShapeDtypeStruct((blocks(k), blocks(m) * BLOCK), jnp.float32))]

    def quantizer(*refs):
        sources, targets = refs[:len(inputs)], refs[len(inputs):len(inputs) + len(outs)]
        x_smem, *held, arrived = refs[len(inputs) + len(outs):]
        group, i, j = lax.axis_index("group"), lax.axis_index("row"), lax.axis_index("column")
        rows, columns = pl.ds(i * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK)  # in the branch, ptxas took 48 registers more

        @pl.when(group == 0)
        def _():
            for k in range(count):
                for n, source in enumerate(sources):
                    source_part = source.at[rows, pl.ds(j * BLOCK + k * wide, wide)]
                    plgpu.copy_gmem_to_smem(source_part, x_smem.at[k, n], arrived.at[k])

        def part(k, half, turned=False):
            refs = [x_smem.at[k, n, pl.ds(half * HALF, HALF)] for n in range(len(inputs))]
            return prepare(*(plgpu.load(ref.transpose((1, 0)) if turned else ref, layout=WGMMA) for ref in refs))

        def arriving(k):
            plgpu.barrier_wait(arrived.at[k])  # this also keeps ptxas from loading all parts first
            return part(k, group)

        def of_columns():  # of one input: a part is a group's columns, and its halves the parts of their rows
            if transposed == "only":
                plgpu.barrier_wait(arrived.at[group])
            return [part(group, half, turned=True) for half in range(2)]

        for n, turned in enumerate(copies):
            parts = of_columns() if turned else [arriving(k) for k in range(count)]
            _store(parts, scale, group, *held[2 * n:2 * n + 2], interpret)
        plgpu.commit_smem()
        for n, turned in enumerate(copies):
            across, along = (j, i) if turned else (i, j)
            mine = pl.ds(across * BLOCK + group * HALF, HALF)
            places = (mine, rows if turned else columns), (along, mine)
            for smem, target, place in zip(held[2 * n:], targets[2 * n:2 * n + 2], places):
                plgpu.copy_smem_to_gmem(smem.at[group], target.at[place])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    held = [plgpu.SMEM((2, HALF, BLOCK), E4M3, transforms=fp8), plgpu.SMEM((2, HALF), jnp.float32)]
    made = plgpu.kernel(
        quantizer, out_type=outs, grid=(blocks(M), blocks(K)), grid_names=("row", "column"), num_threads=2,
        thread_name="group", interpret=interpret,
        scratch_types=[plgpu.SMEM((count, len(inputs), BLOCK, wide), jnp.bfloat16, transforms=bf16),
                       *held * len(copies), plgpu.Barrier(num_arrivals=len(inputs), num_barriers=count)],
    )(*inputs)
    # In the other direction a tile may include rows past the edge: zeros, which do not change amax.
    qs = [Quantized(made[2 * n][:m, :k], made[2 * n + 1][:, :m].T) for n, (m, k) in enumerate(sizes)]
    return tuple(qs) if transposed is True else qs[0]


def _check(name, *inputs):
    for x in inputs:
        if x.ndim != 2 or x.dtype != jnp.bfloat16 or x.shape != inputs[0].shape:
            raise ValueError(f"hopper's {name} takes bfloat16 matrices of one shape, not {x.dtype}{list(x.shape)}; "
                             "cast, or take implementation='reference'.")


def quantize(x: jax.Array, *, scale: str = "float32", dtype: DTypeLike = E4M3, transposed: bool | str = False,
             interpret: bool = False) -> Any:
    """See [the twin][kernels_pallas.reference.quantize.quantize]. bfloat16 [M, K] of any size, to E4M3.

    Raises ValueError for another dtype or other axes.
    """
    _check("quantize", x)
    if dtype != E4M3:
        raise ValueError(f"hopper's quantize makes E4M3, not {jnp.dtype(dtype).name}; implementation='reference' does.")
    return _quantize((x,), lambda x: x.astype(jnp.float32), scale, transposed, interpret)


def swiglu_quantize(gate: jax.Array, up: jax.Array, *, scale: str = "float32", dtype: DTypeLike = E4M3,
                    interpret: bool = False) -> Quantized:
    """See [the twin][kernels_pallas.reference.quantize.swiglu_quantize]: within one step of E4M3 of it.

    The exponential function differs. Two bfloat16 [M, F]; raises ValueError for anything else.
    """
    _check("swiglu_quantize", gate, up)
    if dtype != E4M3:
        raise ValueError(f"hopper's swiglu_quantize makes E4M3, not {jnp.dtype(dtype).name}; "
                         "implementation='reference' does.")

    def prepare(gate, up):
        gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
        return gate / (1 + jnp.exp(-gate)) * up

    return _quantize((gate, up), prepare, scale, False, interpret)
