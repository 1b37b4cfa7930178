"""Causal attention with wide keys and narrow values for Hopper, forward and backward. Twin: reference/mla_attention.py.

    forward      128 queries a block of threads, 64 a warpgroup; keys and values pass by; softmax online, in base 2
    backward     keys, values:  128 of them stay, queries pass by     dv = p.T do      dk = ds.T q
                 queries:       128 of them stay, keys pass by        dq = ds k        ds = p (do v.T - delta)

            keys passing by ->                  p = exp2(s - lse) is computed again in both; nothing of T x T leaves
          +-------+-------+-------+             the chip. delta[t] = o[t] . do[t].
      64  | group 0       |  \\    |
          +  -  -  -  -  -  -  \\ -+             Blocks above the diagonal are not visited; those on it are masked, and
      64  | group 1       |     \\ |             with segment ids all are.
          +-------+-------+-------+

A third warpgroup only moves memory and keeps `stages` blocks in flight. Probabilities go from registers directly into
the second product. TMA loads rows past the edge as zeros and does not store them.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.hopper.ring import BF16, COMPUTE, LOWEST, Ring, multiply, multiply_add, roles, rows, swizzled

ROWS = 64 * COMPUTE  # queries (in dk and dv: keys) per thread block
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """The sizes of the streamed blocks, and how many of them are in flight.

    stages: forward, blocks of 128 keys: 48 + 32 KiB each, next to 48 KiB of queries. Scores take 64 registers, their
      bfloat16 copy 32, the output 64.
    dq_keys, dq_stages: dq takes 96 registers, s and dp 32 each at 64 keys; at 128 it spills.
    dkv_queries, dkv_stages: dk and dv take 96 + 64 registers; s and dp 16 each at 32 queries; at 64 it spills.
    """

    stages: int = 2
    dq_keys: int = 64
    dq_stages: int = 3
    dkv_queries: int = 32
    dkv_stages: int = 4


def mla_attention(q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array, segment_ids_BT: jax.Array | None = None, *,
                  scale: float, config: TuningConfig | None = None, interpret: bool = False) -> jax.Array:
    """See [the twin][kernels_pallas.reference.mla_attention.mla_attention].

    bfloat16, A and V multiples of 64, A up to 256; T need not divide the blocks. Raises ValueError for anything else.
    """
    return _attention(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale, config, interpret)


def forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None, *, scale: float,
            config: TuningConfig | None = None, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """See [the twin][kernels_pallas.reference.mla_attention.forward].

    q, k bfloat16 [B, T, H, A], v [B, T, H, V], segments int32 [B, T]. Raises ValueError as `mla_attention`.
    """
    _check(q, k, v, segments)
    T = q.shape[1]
    o, lse2 = _forward(*_tall(q, k, v), _padded(segments), scale, config or TuningConfig(), interpret)  # pyright: ignore[reportCallIssue] (lengths)
    return o[:, :T], lse2[..., :T] * math.log(2)


# One kernel and all that it names, read top down.
def backward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, o: jax.Array, lse: jax.Array,
             do: jax.Array, *, scale: float, config: TuningConfig | None = None,
             interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See [the twin][kernels_pallas.reference.mla_attention.backward].

    Operands and results of `forward`; o, do bfloat16 [B, T, H, V], lse float32 [B, H, T].
    """
    delta = jnp.einsum("BTHV,BTHV->BHT", o, do, preferred_element_type=jnp.float32)
    # Queries and gradients past the edge are zero too, so their contributions are zero.
    lse2, delta = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % ROWS))) for x in (lse * math.log2(math.e), delta))
    args = (*_tall(q, k, v, do), lse2, delta, _padded(segments), scale, config or TuningConfig(), interpret)
    return tuple(x[:, :q.shape[1]] for x in (_backward_q(*args), *_backward_kv(*args)))  # pyright: ignore[reportCallIssue] (lengths)


def _check(q, k, v, segments):
    if any(x.dtype != jnp.bfloat16 or x.ndim != 4 for x in (q, k, v)):
        raise ValueError(f"hopper's mla_attention takes bfloat16 of 4 axes, not {q.dtype}{list(q.shape)}, {k.dtype}"
                         f"{list(k.shape)}, {v.dtype}{list(v.shape)}; cast, or take implementation='reference'.")
    if q.shape != k.shape or q.shape[:3] != v.shape[:3] or (segments is not None and segments.shape != q.shape[:2]):
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} and segment ids "
                         f"{'None' if segments is None else list(segments.shape)} do not fit each other; they are "
                         "[B, T, H, A] twice, [B, T, H, V] and [B, T].")
    if q.shape[-1] % 64 or v.shape[-1] % 64 or q.shape[-1] > 256:
        raise ValueError(f"hopper's mla_attention takes heads of whole 64 numbers up to 256, not {q.shape[-1]} and "
                         f"{v.shape[-1]}; pad them with zeros, or take implementation='reference'.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, segments, scale, config, interpret):
    return _attention_fwd(q, k, v, segments, scale, config, interpret)[0]


def _attention_fwd(q, k, v, segments, scale, config, interpret):
    o, lse = forward(q, k, v, segments, scale=scale, config=config, interpret=interpret)
    return o, (q, k, v, segments, o, lse)


def _attention_bwd(scale, config, interpret, kept, do):
    return *backward(*kept, do, scale=scale, config=config, interpret=interpret), None  # pyright: ignore[reportCallIssue] (lengths)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _tall(*arrays):
    """[B, T, H, A] with T padded to a multiple of 8, for TMA."""
    return [jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in arrays]


def _whole(T):
    return -(-T // ROWS) * ROWS


def _padded(segments):
    """int32 [B, T] padded to complete tiles, or None; positions past the end do not affect the result."""
    if segments is None:
        return None
    return jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, -segments.shape[1] % ROWS)), constant_values=-1)


def _mask(s, other, query, key, segments_ref, batch, transposed=False):
    """s, or `other` where a query may not see a key; [queries, keys], or transposed, starting at these positions."""
    q_axis = 1 if transposed else 0
    iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=WGMMA)
    seen = iota(q_axis) + (query - key) >= iota(1 - q_axis)
    if segments_ref is not None:
        def ids(start, axis):
            part = plgpu.load(segments_ref.at[batch, pl.ds(start, s.shape[axis])], layout=WGMMA.reduce(1 - axis),
                              optimized=False)
            return lax.broadcast_in_dim(part, s.shape, (axis,))

        seen = seen & (ids(query, q_axis) == ids(key, 1 - q_axis))
    return jnp.where(seen, s, other)


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


# One kernel and all that it names, read top down.
def _forward(q, k, v, segments, scale, config, interpret):
    B, T, H, A = q.shape
    V, tiles = v.shape[-1], _whole(T) // ROWS
    scale2 = scale * math.log2(math.e)

    # One kernel and all that it names, read top down.
    def attention_forward(q_ref, k_ref, v_ref, *refs):
        segments_ref = refs[0] if segments is not None else None
        o_ref, lse_ref, q_smem, lse_smem, q_full, done, turn, k_ring, v_ring = refs[-9:]
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        tile = tiles - 1 - lax.axis_index("tile")  # the longest rows first

        def load():
            @pl.loop(0, tile + 1)
            def _(n):
                at = (batch, pl.ds(n * ROWS, ROWS), head)
                k_ring.fill(n, k_ref.at[at])
                v_ring.fill(n, v_ref.at[at])

            k_ring.drain(tile + 1)
            v_ring.drain(tile + 1)

        def compute(group):
            first = tile * ROWS + group * 64
            mine = (batch, pl.ds(first, 64), head)
            plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[group], q_full.at[group])
            plgpu.barrier_wait(q_full.at[group])

            def meet():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            # The groups alternate: one uses the tensor core while the other computes its softmax.
            pl.when(group == 1)(meet)

            def attend(n, carry, masked):
                o, top, total = carry
                with_k = lambda k_smem: multiply(q_smem.at[group], k_smem.transpose((1, 0)))
                s = k_ring.use(n, with_k) * scale2
                meet()
                if masked:
                    s = _mask(s, -jnp.inf, first, n * ROWS, segments_ref, batch)
                new_top = jnp.maximum(top, s.max(axis=1))
                shrink = jnp.exp2(top - new_top)
                p = jnp.exp2(s - rows(new_top, s.shape))
                total = total * shrink + p.sum(axis=1)
                o = o * rows(shrink, o.shape)
                meet()
                o = v_ring.use(n, lambda v_smem: multiply_add(o, p.astype(jnp.bfloat16), v_smem, interpret))
                return o, new_top, total

            column = lambda value: plgpu.layout_cast(jnp.full((64,), value, jnp.float32), WGMMA.reduce(1))
            carry = _zeros((64, V)), column(LOWEST), column(0)
            free = tile if segments is None else 0  # blocks that need no mask
            carry = lax.fori_loop(0, free, functools.partial(attend, masked=False), carry)
            o, top, total = lax.fori_loop(free, tile + 1, functools.partial(attend, masked=True), carry)
            pl.when(group == 0)(meet)
            # The output is stored through a slot of values, when both groups have finished with it.
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            o_smem = v_ring.slots[0].at[0, pl.ds(group * 64, 64)]
            o_smem[...] = (o / rows(total, o.shape)).astype(jnp.bfloat16)
            lse_smem[group] = top + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem, o_ref.at[mine])
            plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_ref.at[batch, head, pl.ds(first, 64)])
            plgpu.wait_smem_to_gmem(0)

        roles(load, compute)

    return _launch(
        attention_forward, (q, k, v, segments), (H, tiles, B), interpret,
        [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct((B, H, _whole(T)), jnp.float32)],
        [plgpu.SMEM((COMPUTE, 64, A), jnp.bfloat16, transforms=BF16), plgpu.SMEM((COMPUTE, 64), jnp.float32),
         plgpu.Barrier(num_barriers=COMPUTE), plgpu.Barrier(num_arrivals=COMPUTE), plgpu.Barrier(num_arrivals=COMPUTE),
         Ring.of(config.stages, (ROWS, A)), Ring.of(config.stages, (ROWS, V))])


def _launch(kernel, operands, grid, interpret, out_type, scratch_types):
    """Runs `kernel` with two warpgroups that compute and one that loads; operands that are None are left out."""
    return plgpu.kernel(
        kernel, out_type=out_type, scratch_types=scratch_types, grid=grid, grid_names=("head", "tile", "batch"),
        num_threads=COMPUTE + 1, thread_name="group", compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret)(*(x for x in operands if x is not None))


# One kernel and all that it names, read top down.
def _backward_q(q, k, v, do, lse, delta, segments, scale, config, interpret):
    B, T, H, A = q.shape
    V, tiles, width = v.shape[-1], _whole(T) // ROWS, config.dq_keys
    scale2, swizzle = scale * math.log2(math.e), swizzled(min(64, width))

    def attention_dq(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs):
        segments_ref = refs[0] if segments is not None else None
        dq_ref, q_smem, do_smem, full, k_ring, v_ring = refs[-6:]
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        tile = tiles - 1 - lax.axis_index("tile")
        steps, free = (tile + 1) * (ROWS // width), tile * (ROWS // width) if segments is None else 0

        def load():
            @pl.loop(0, steps)
            def _(n):
                at = (batch, pl.ds(n * width, width), head)
                k_ring.fill(n, k_ref.at[at])
                v_ring.fill(n, v_ref.at[at])

            k_ring.drain(steps)
            v_ring.drain(steps)

        def compute(group):
            first = tile * ROWS + group * 64
            mine = (batch, pl.ds(first, 64), head)
            plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[group], full.at[group])
            plgpu.copy_gmem_to_smem(do_ref.at[mine], do_smem.at[group], full.at[group])
            lse, delta = (plgpu.load(ref.at[batch, head, pl.ds(first, 64)], layout=WGMMA.reduce(1), optimized=False)
                          for ref in (lse_ref, delta_ref))
            plgpu.barrier_wait(full.at[group])

            def add(n, dq, masked):
                def with_k(k_smem):
                    s = multiply(q_smem.at[group], k_smem.transpose((1, 0))) * scale2
                    p = jnp.exp2(s - rows(lse, s.shape))
                    if masked:
                        p = _mask(p, 0.0, first, n * width, segments_ref, batch)
                    dp = v_ring.use(n, lambda v_smem: multiply(do_smem.at[group], v_smem.transpose((1, 0))))
                    ds = p * (dp - rows(delta, s.shape))
                    return multiply_add(dq, ds.astype(jnp.bfloat16), k_smem, interpret)

                return k_ring.use(n, with_k)

            dq = lax.fori_loop(0, free, functools.partial(add, masked=False), _zeros((64, A)))
            dq = lax.fori_loop(free, steps, functools.partial(add, masked=True), dq)
            q_smem[group] = (dq * scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[group], dq_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

        roles(load, compute)

    return _launch(
        attention_dq, (q, k, v, do, lse, delta, segments), (H, tiles, B), interpret,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [plgpu.SMEM((COMPUTE, 64, A), jnp.bfloat16, transforms=swizzle),
         plgpu.SMEM((COMPUTE, 64, V), jnp.bfloat16, transforms=swizzle),
         plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
         Ring.of(config.dq_stages, (width, A), transforms=swizzle),
         Ring.of(config.dq_stages, (width, V), transforms=swizzle)])


# One kernel and all that it names, read top down.
def _backward_kv(q, k, v, do, lse, delta, segments, scale, config, interpret):
    B, T, H, A = q.shape
    V, tiles, width = v.shape[-1], _whole(T) // ROWS, config.dkv_queries
    scale2, swizzle = scale * math.log2(math.e), swizzled(min(64, width))

    def attention_dkv(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs):
        segments_ref = refs[0] if segments is not None else None
        dk_ref, dv_ref, k_smem, v_smem, full, ring = refs[-6:]
        batch, head, tile = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        start = tile * (ROWS // width)  # earlier blocks of queries see none of these keys
        steps = -(-T // width) - start

        def load():
            @pl.loop(0, steps)
            def _(n):
                at = (batch, pl.ds((start + n) * width, width), head)
                ring.fill(n, q_ref.at[at], do_ref.at[at])

            ring.drain(steps)

        def compute(group):
            first = tile * ROWS + group * 64
            mine = (batch, pl.ds(first, 64), head)
            plgpu.copy_gmem_to_smem(k_ref.at[mine], k_smem.at[group], full.at[group])
            plgpu.copy_gmem_to_smem(v_ref.at[mine], v_smem.at[group], full.at[group])
            plgpu.barrier_wait(full.at[group])

            def add(n, carry):
                dk, dv = carry
                query = (start + n) * width
                columns = lambda ref: lax.broadcast_in_dim(
                    plgpu.load(ref.at[batch, head, pl.ds(query, width)], layout=WGMMA.reduce(0), optimized=False),
                    (64, width), (1,))
                lse, delta = columns(lse_ref), columns(delta_ref)  # both before the wait, which hides their latency

                def with_queries(q_slot, do_slot):
                    s = multiply(k_smem.at[group], q_slot.transpose((1, 0))) * scale2
                    # All blocks are masked: a second loop without masks would spill.
                    p = _mask(jnp.exp2(s - lse), 0.0, query, first, segments_ref, batch, transposed=True)
                    # In this order the bfloat16 copy of p is no longer needed when dp is computed.
                    new_dv = multiply_add(dv, p.astype(jnp.bfloat16), do_slot, interpret)
                    ds = p * (multiply(v_smem.at[group], do_slot.transpose((1, 0))) - delta)
                    return multiply_add(dk, ds.astype(jnp.bfloat16), q_slot, interpret), new_dv

                return ring.use(n, with_queries)

            carry = _zeros((64, A)), _zeros((64, V))
            dk, dv = lax.fori_loop(0, steps, add, carry)
            k_smem[group] = (dk * scale).astype(jnp.bfloat16)
            v_smem[group] = dv.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem.at[group], dk_ref.at[mine])
            plgpu.copy_smem_to_gmem(v_smem.at[group], dv_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

        roles(load, compute)

    return _launch(
        attention_dkv, (q, k, v, do, lse, delta, segments), (H, tiles, B), interpret,
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        [plgpu.SMEM((COMPUTE, 64, A), jnp.bfloat16, transforms=swizzle),
         plgpu.SMEM((COMPUTE, 64, V), jnp.bfloat16, transforms=swizzle),
         plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
         Ring.of(config.dkv_stages, (width, A), (width, V), transforms=swizzle)])
