"""Decoding over a paged latent cache for Hopper: every head reads the same keys. Twin: reference/mla_decode.py.

A block of threads takes 64 heads of a sequence and a share of its tokens, 64 at a time. The latent is key and value at
once and crosses memory once for both:

              32 tokens  32 tokens             the group's half of the scores      p [64 heads, 64 tokens]
            +----------+----------+            maxima, then p are exchanged        lies in shared memory
    64      | group 0  | group 1  |  scores
    heads   +----------+----------+
            +---------------------+---------------------+
            | group 0: o[:, :256] | group 1: o[:, 256:] |   o = o * shrink + p @ c, each its half of the latent
            +---------------------+---------------------+

The shares of a sequence are put together afterwards, by their log-sum-exps. Tokens past the length may hold anything:
their rows are zeroed in shared memory.
"""

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.hopper.ring import COMPUTE, LOWEST, Ring, multiply, multiply_add, roles, rows, swizzled

HEADS, TOKENS = 64, 64
HALF = TOKENS // COMPUTE
LAID = swizzled(HALF)  # a group's half of p is then a column of whole tiles
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a batch fills the chip.

    splits: shares that a sequence's tokens are cut into; None: as many as give each of 132 SMs a block of threads.
    stages: blocks of 64 tokens on the way, 72 KiB each, beside 72 KiB of queries: two is what fits.
    """

    splits: int | None = None
    stages: int = 2


def mla_decode(q_BHX, cache, page_table_BP, lengths_B, *, scale, rank=None, config: TuningConfig | None = None,
               interpret=False):
    """See the twin. bfloat16 queries and cache; pages of 8, 16, 32 or a multiple of 64 tokens; H need not be whole."""
    (B, H, X), config = q_BHX.shape, config or TuningConfig()
    rank = X - 64 if rank is None else rank
    _check(q_BHX, cache, rank)
    blocks = -(-page_table_BP.shape[1] * cache.shape[1] // TOKENS)
    tiles = -(-H // HEADS)
    splits = config.splits or max(1, min(blocks, 132 // (B * tiles)))
    o_BSHC, lse_BSH = _shares(q_BHX, cache, page_table_BP, lengths_B, scale, rank, splits, tiles, config.stages,
                              interpret)
    weights_BSH = jnp.exp2(lse_BSH - lse_BSH.max(axis=1, keepdims=True))
    weights_BSH /= weights_BSH.sum(axis=1, keepdims=True)
    return (o_BSHC * weights_BSH[..., None]).sum(axis=1)[:, :H].astype(q_BHX.dtype)


def _check(q, cache, rank):
    if q.dtype != jnp.bfloat16 or cache.dtype != jnp.bfloat16 or cache.shape[-1] != q.shape[-1]:
        raise ValueError(f"hopper's mla_decode takes bfloat16 queries and a bfloat16 cache of one width, not {q.dtype}"
                         f"{list(q.shape)} and {cache.dtype}{list(cache.shape)}; the reference takes others.")
    if rank % (64 * COMPUTE) or rank > 512 or q.shape[-1] % 64:
        raise ValueError(f"hopper's mla_decode takes latents of a multiple of 128 up to 512 and 64 numbers for the "
                         f"position, not {rank} of {q.shape[-1]}; take implementation='reference'.")
    page = cache.shape[1]
    if page % TOKENS and page not in (8, 16, 32):
        raise ValueError(f"hopper's mla_decode reads pages of 8, 16, 32 or a multiple of 64 tokens, not {page}.")


def _shares(q, cache, table, lengths, scale, rank, splits, tiles, stages, interpret):
    """([B, splits, heads, C] float32, log-sum-exps in base 2 [B, splits, heads]), heads in whole tiles of 64."""
    B, _, X = q.shape
    page, scale2, part = cache.shape[1], scale * math.log2(math.e), rank // COMPUTE
    copied = min(page, TOKENS)  # tokens of one copy
    copies = TOKENS // copied

    def decode(q_ref, cache_ref, table_ref, lengths_ref, o_ref, lse_ref, q_smem, p_smem, ring, q_full, met, said_smem):
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
                    # What lies past the length is not looked up: the last token's page stands in.
                    token = jnp.minimum((start + n) * TOKENS + copy * copied, length - 1)
                    first = lax.div(lax.rem(token, page), copied) * copied
                    sources.append(cache_ref.at[table_ref[b, lax.div(token, page)], pl.ds(first, copied)])
                ring.fill_rows(n, sources, copied)

        def compute(group):
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
                def with_tokens(c_smem):
                    o, top, total = carry
                    first = (start + n) * TOKENS

                    @pl.when(first + TOKENS > length)
                    def _():
                        _zero_rows(c_smem, length - first, group)
                        plgpu.commit_smem()
                        meet()

                    s = multiply(q_smem, c_smem.at[pl.ds(group * HALF, HALF)].transpose((1, 0))) * scale2
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

                return ring.use(n, with_tokens)

            column = lambda value: plgpu.layout_cast(jnp.full((HEADS,), value, jnp.float32), WGMMA.reduce(1))
            o = plgpu.layout_cast(jnp.zeros((HEADS, part), jnp.float32), WGMMA)
            o, top, total = lax.fori_loop(0, steps, attend, (o, column(LOWEST), column(0)))
            said_smem[group] = total
            meet()
            total = sum(both(said_smem))
            # A share without tokens has a sum of zero and weighs nothing.
            o_ref[b, split, heads, pl.ds(group * part, part)] = o / rows(jnp.maximum(total, 1e-30), o.shape)

            @pl.when(group == 0)
            def _():
                lse_ref[b, split, heads] = top + jnp.log2(total)

        roles(load, compute, registers=(40, 232))  # looking pages up takes more than 24

    outs = [jax.ShapeDtypeStruct((B, splits, tiles * HEADS, rank), jnp.float32),
            jax.ShapeDtypeStruct((B, splits, tiles * HEADS), jnp.float32)]
    return plgpu.kernel(
        decode, out_type=outs, grid=(tiles, splits, B), grid_names=("tile", "split", "sequence"),
        num_threads=COMPUTE + 1, thread_name="group", interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types=[plgpu.SMEM((HEADS, X), jnp.bfloat16, transforms=LAID),
                       plgpu.SMEM((HEADS, TOKENS), jnp.bfloat16, transforms=LAID),
                       Ring.of(stages, (TOKENS, X), transforms=LAID, copies=copies), plgpu.Barrier(),
                       plgpu.Barrier(num_arrivals=COMPUTE), plgpu.SMEM((COMPUTE, HEADS), jnp.float32)],
    )(q, cache, table, lengths)


def _zero_rows(c_smem, count, group):
    """Zeroes the rows from `count` on, each group every second panel of 64 columns."""
    for panel in range(c_smem.shape[1] // 64):
        @pl.when(group == panel % COMPUTE)
        def _(part=c_smem.at[:, panel * 64:(panel + 1) * 64]):
            held = plgpu.load(part, layout=WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, held.shape, 0, layout=WGMMA)
            part[...] = jnp.where(row < count, held, jnp.zeros_like(held))
