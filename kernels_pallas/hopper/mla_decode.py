"""Decoding over a paged latent cache for Hopper: every head reads the same keys. Twin: reference/mla_decode.py.

A block of threads takes 64 heads of a sequence and a share of its tokens, 64 at a time. The latent is key and value at
once and crosses memory once for both:

              32 tokens  32 tokens             the group's half of the scores      p [64 heads, 64 tokens]
            +----------+----------+            maxima, then p are exchanged        is in shared memory
    64      | group 0  | group 1  |  scores
    heads   +----------+----------+
            +---------------------+---------------------+
            | group 0: o[:, :256] | group 1: o[:, 256:] |   o = o * shrink + p @ c, each its half of the latent
            +---------------------+---------------------+

The shares of a sequence are put together afterwards, by their log-sum-exps. A share without tokens writes only minus
infinity there. Tokens past the length may hold anything: their rows are zeroed in shared memory.

A token in 656 bytes crosses memory as it is, in three pieces, and becomes bfloat16 on the chip, each group turning half
of the latent; from then on nothing differs. One block is on the way while the one before, dequantized, is multiplied.
"""

# The stubs of Mosaic's transforms are wrong, and lengths of unpacked lists are not known.
# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false, reportCallIssue=false
import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.formats import BLOCK, E4M3
from kernels_pallas.hopper.ring import COMPUTE, LOWEST, Ring, multiply, multiply_add, roles, rows, swizzled
from kernels_pallas.reference.mla_decode import packed_width

HEADS, TOKENS = 64, 64
HALF = TOKENS // COMPUTE
LAID = swizzled(HALF)  # a group's half of p is then a column of whole tiles
PANEL = 64  # columns that a group dequantizes at a time: 32 registers in addition to the output's 128
FP8 = (plgpu.TilingTransform((8, 16)),)  # 16 is the tile width that divides 656
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a batch fills the chip.

    splits: shares that a sequence's tokens are cut into; None: as many as give each of 132 SMs a block of threads.
    stages: blocks of 64 tokens on the way, 72 KiB each, next to 72 KiB of queries: two is what fits.
    packed_stages: the same of 42 KiB each in FP8, next to queries and a dequantized block.
    """

    splits: int | None = None
    stages: int = 2
    packed_stages: int = 1


def mla_decode(q_BHX: jax.Array, cache: jax.Array, page_table_BP: jax.Array, lengths_B: jax.Array, *, scale: float,
               rank: int | None = None, config: TuningConfig | None = None, interpret: bool = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.mla_decode.mla_decode].

    bfloat16 queries; a cache of bfloat16, or of 656 bytes a token; pages of 8, 16, 32 or a multiple
    of 64 tokens; any number of heads. Raises ValueError for anything else.
    """
    (B, H, X), config = q_BHX.shape, config or TuningConfig()
    rank = X - 64 if rank is None else rank
    _check(q_BHX, cache, rank)
    blocks = -(-page_table_BP.shape[1] * cache.shape[1] // TOKENS)
    tiles = -(-H // HEADS)
    splits = config.splits or max(1, min(blocks, 132 // (B * tiles)))
    o_BSHC, lse_BSH = _shares(jnp.pad(q_BHX, ((0, 0), (0, -H % 8), (0, 0))), cache, page_table_BP, lengths_B, scale,
                              rank, splits, tiles, config, interpret)  # TMA moves 8 heads at a time
    weights_BSH = jnp.exp2(lse_BSH - lse_BSH.max(axis=1, keepdims=True))
    weights_BSH /= weights_BSH.sum(axis=1, keepdims=True)
    # The output of a share without tokens was never written. A weight that is NaN stays.
    o_BHC = jnp.where(weights_BSH[..., None] == 0, 0, o_BSHC * weights_BSH[..., None]).sum(axis=1)
    return o_BHC[:, :H].astype(q_BHX.dtype)


def _check(q, cache, rank):
    packed = cache.dtype == jnp.uint8
    width = packed_width(rank, q.shape[-1] - rank) if packed else q.shape[-1]
    if q.dtype != jnp.bfloat16 or cache.dtype not in (jnp.bfloat16, jnp.uint8) or cache.shape[-1] != width:
        raise ValueError(f"hopper's mla_decode takes bfloat16 queries and a cache of as many bfloat16 numbers, or of "
                         f"the uint8 that pack_fp8 makes of them, not {q.dtype}{list(q.shape)} and {cache.dtype}"
                         f"{list(cache.shape)}; the reference takes others.")
    if rank % (64 * COMPUTE) or rank > 512 or q.shape[-1] % 64:
        raise ValueError(f"hopper's mla_decode takes latents of a multiple of 128 up to 512 and 64 numbers for the "
                         f"position, not {rank} of {q.shape[-1]}; take implementation='reference'.")
    if packed and (rank, q.shape[-1]) != (512, 576):
        raise ValueError(f"hopper's mla_decode takes tokens of 656 bytes, rank 512 and 64 numbers of position, not "
                         f"{rank} of {q.shape[-1]}; take implementation='reference'.")
    page = cache.shape[1]
    if page % TOKENS and page not in (8, 16, 32):
        raise ValueError(f"hopper's mla_decode reads pages of 8, 16, 32 or a multiple of 64 tokens, not {page}.")


def _pieces(cache, rank):
    """The pieces of a token's copy: (array [pages, page, ...], first column, columns, layout in shared memory).

    The arrays of an FP8 cache are the same bytes, each with another dtype.
    """
    if cache.dtype == jnp.bfloat16:
        return [(cache, 0, cache.shape[-1], LAID)]
    of = lambda dtype, size: lax.bitcast_convert_type(cache.reshape(*cache.shape[:2], -1, size), dtype)
    first = rank + 4 * (rank // BLOCK)  # k_pe begins at no multiple of a swizzled tile: it comes as it is
    return [(lax.bitcast_convert_type(cache, E4M3), 0, rank, FP8),
            (of(jnp.int16, 2), rank // 2, 2 * (rank // BLOCK), ()),
            (of(jnp.bfloat16, 2), first // 2, (cache.shape[-1] - first) // 2, ())]


# One kernel and all that it names, read top down.
def _shares(q, cache, table, lengths, scale, rank, splits, tiles, config, interpret):
    """([B, splits, heads, C] float32, log-sum-exps in base 2 [B, splits, heads]), heads in whole tiles of 64."""
    B, _, X = q.shape
    page, scale2, part = cache.shape[1], scale * math.log2(math.e), rank // COMPUTE
    copied = min(page, TOKENS)  # tokens of one copy
    copies = TOKENS // copied
    pieces, packed = _pieces(cache, rank), cache.dtype == jnp.uint8

    # One kernel and all that it names, read top down.
    def decode(q_ref, table_ref, lengths_ref, *refs):
        piece_refs, (o_ref, lse_ref) = refs[:len(pieces)], refs[len(pieces):len(pieces) + 2]
        q_smem, p_smem, ring, q_full, met, said_smem, *block_smem = refs[len(pieces) + 2:]
        b, tile, split = (lax.axis_index(name) for name in ("sequence", "tile", "split"))
        length = lengths_ref[b]
        blocks = lax.div(length + TOKENS - 1, TOKENS)
        share = lax.div(blocks + splits - 1, splits)
        start = split * share
        steps = jnp.clip(blocks - start, 0, share)
        heads = pl.ds(tile * HEADS, HEADS)

        def load():
            @pl.loop(0, steps)
            def _(n):
                sources = []
                for copy in range(copies):
                    # Positions after the end are not looked up: the last token's page is read instead.
                    token = jnp.minimum((start + n) * TOKENS + copy * copied, length - 1)
                    first = lax.div(lax.rem(token, page), copied) * copied
                    here = table_ref[b, lax.div(token, page)], pl.ds(first, copied)
                    sources.append([ref.at[*here, pl.ds(column, width)]
                                    for ref, (_, column, width, _) in zip(piece_refs, pieces)])
                ring.fill_rows(n, sources, copied)

            ring.drain(steps)

        def compute(group):
            @pl.when(steps > 0)
            def _():
                attend_all(group)

            @pl.when((steps == 0) & (group == 0))
            def _():
                lse_ref[b, split, heads] = column(-jnp.inf)

        column = lambda value: plgpu.layout_cast(jnp.full((HEADS,), value, jnp.float32), WGMMA.reduce(1))

        # One kernel and all that it names, read top down.
        def attend_all(group):
            @pl.when(group == 0)
            def _():
                plgpu.copy_gmem_to_smem(q_ref.at[b, heads], q_smem, q_full)

            plgpu.barrier_wait(q_full)

            def meet():
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)

            def both(smem):
                return [plgpu.load(smem.at[g], layout=WGMMA.reduce(1)) for g in range(COMPUTE)]

            def attend(n, carry):
                first = (start + n) * TOKENS

                def with_tokens(c_smem):
                    o, top, total = carry
                    s = multiply(q_smem, c_smem.at[pl.ds(group * HALF, HALF)].transpose((1, 0)), interpret) * scale2
                    token = first + group * HALF + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=WGMMA)
                    s = jnp.where(token < length, s, -jnp.inf)
                    said_smem[group] = s.max(axis=1)
                    meet()
                    new_top = jnp.maximum(top, jnp.maximum(*both(said_smem)))
                    shrink = jnp.exp2(top - new_top)
                    p = jnp.exp2(s - rows(new_top, s.shape))
                    p_smem[:, pl.ds(group * HALF, HALF)] = p.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    meet()
                    values = c_smem.at[:, pl.ds(group * part, part)]
                    o = multiply_add(o * rows(shrink, o.shape), p_smem, values, interpret)
                    return o, new_top, total * shrink + p.sum(axis=1)

                def without_the_rest(c_smem):
                    @pl.when(first + TOKENS > length)
                    def _():
                        _zero_rows(c_smem, length - first, group)
                        plgpu.commit_smem()
                        meet()

                    return with_tokens(c_smem)

                if not packed:
                    return ring.use(n, without_the_rest)
                # Nobody reads there: p is multiplied by a group's own half, and queries by all before the maxima meet.
                ring.use(n, lambda *held: _dequantize(*held, block_smem[0], length - first, group))
                meet()
                return with_tokens(block_smem[0])

            o = plgpu.layout_cast(jnp.zeros((HEADS, part), jnp.float32), WGMMA)
            o, top, total = lax.fori_loop(0, steps, attend, (o, column(LOWEST), column(0)))
            said_smem[group] = total
            meet()
            total = sum(both(said_smem))
            o_ref[b, split, heads, pl.ds(group * part, part)] = o * rows(1 / total, o.shape)  # pyright: ignore[reportArgumentType]

            @pl.when(group == 0)
            def _():
                lse_ref[b, split, heads] = top + jnp.log2(total)

        roles(load, compute, registers=(40, 232))  # looking pages up takes more than 24

    outs = [jax.ShapeDtypeStruct((B, splits, tiles * HEADS, rank), jnp.float32),
            jax.ShapeDtypeStruct((B, splits, tiles * HEADS), jnp.float32)]
    # The last axis runs fastest: the tiles of a sequence's heads are neighbours, and read its tokens from the L2 cache.
    return plgpu.kernel(
        decode, out_type=outs, grid=(B, splits, tiles), grid_names=("sequence", "split", "tile"),
        num_threads=COMPUTE + 1, thread_name="group", interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types=[plgpu.SMEM((HEADS, X), jnp.bfloat16, transforms=LAID),
                       plgpu.SMEM((HEADS, TOKENS), jnp.bfloat16, transforms=LAID),
                       Ring.holding(config.packed_stages if packed else config.stages,
                                    *(((TOKENS, width), array.dtype, laid) for array, _, width, laid in pieces),
                                    parts=copies),
                       plgpu.Barrier(), plgpu.Barrier(num_arrivals=COMPUTE), plgpu.SMEM((COMPUTE, HEADS), jnp.float32),
                       *[plgpu.SMEM((TOKENS, X), jnp.bfloat16, transforms=LAID)] * packed],
    )(q, table, lengths, *(array for array, *_ in pieces))


def _dequantize(values_smem, scales_smem, k_pe_smem, block_smem, count, group):
    """A block in bfloat16, rows from `count` on zero, half of its columns by each group."""
    rank, positions = values_smem.shape[1], k_pe_smem.shape[1] // COMPUTE
    # A column of scales cannot be loaded by itself, and four float32 are narrower than a tile: halves are put together.
    halves = plgpu.load(scales_smem, layout=WGMMA, optimized=False).astype(jnp.int32) & 0xFFFF
    column = plgpu.broadcasted_iota(jnp.int32, halves.shape, 1, layout=WGMMA)
    halves = jnp.where(column % 2 == 0, halves, halves << 16)

    @pl.loop(0, rank // PANEL // COMPUTE)  # unrolled it spills
    def _(panel):
        number = group * (rank // PANEL // COMPUTE) + panel
        mine = pl.ds(number * PANEL, PANEL)
        values = plgpu.load(values_smem.at[:, mine], layout=WGMMA).astype(jnp.float32)
        here = lax.div(column, 2) == lax.div(number, BLOCK // PANEL)
        scale = lax.bitcast_convert_type(jnp.where(here, halves, 0).sum(axis=1), jnp.float32)
        row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=WGMMA)
        c = jnp.where(row < count, values * rows(scale, values.shape), 0.0)
        block_smem[:, mine] = c.astype(jnp.bfloat16)

    # Scores of rows from `count` on are not looked at.
    k_pe = plgpu.load(k_pe_smem.at[:, pl.ds(group * positions, positions)], layout=WGMMA, optimized=False)
    block_smem[:, pl.ds(rank + group * positions, positions)] = k_pe
    plgpu.commit_smem()


def _zero_rows(c_smem, count, group):
    """Zeroes the rows from `count` on, each group every second panel of 64 columns."""
    for panel in range(c_smem.shape[1] // 64):
        @pl.when(group == panel % COMPUTE)
        def _(part=c_smem.at[:, panel * 64:(panel + 1) * 64]):
            held = plgpu.load(part, layout=WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, held.shape, 0, layout=WGMMA)
            part[...] = jnp.where(row < count, held, jnp.zeros_like(held))
