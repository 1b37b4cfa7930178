"""FP8 products with scales along K. The oracle: dequantize to float32, multiply in float32.

`accumulator` replaces float32 by a model of the tensor core's registers, to study the effect of promotion.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from kernels_pallas.formats import Accumulator, Quantized, check
from kernels_pallas.reference.quantize import dequantize


def product(a: Quantized, b: Quantized, accumulator: Accumulator | None = None) -> jax.Array:
    """a[..., M, K] by b[..., N, K] over K in float32, [..., M, N]."""
    x, y = dequantize(a), dequantize(b)
    if accumulator is not None:
        return _accumulated(x, y, accumulator)
    stack = tuple(range(x.ndim - 2))
    contract = ((x.ndim - 1,), (x.ndim - 1,))
    return lax.dot_general(x, y, (contract, (stack, stack)), precision=lax.Precision.HIGHEST)


def _keep(x, bits):
    """The `bits` leading bits of a float32's mantissa; the others are cut off, as the hardware does."""
    mask = jnp.uint32(0xFFFFFFFF ^ ((1 << (24 - bits)) - 1))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & mask, jnp.float32)


def _accumulated(a, b, accumulator):
    K, group = a.shape[-1], accumulator.group
    pad = [(0, 0)] * (a.ndim - 1) + [(0, -K % group)]
    a, b = jnp.pad(a, pad), jnp.pad(b, pad)
    groups_of_promotion = accumulator.promote_every // group

    def step(n, carry):
        total, partial = carry
        part = lambda x: lax.dynamic_slice_in_dim(x, n * group, group, x.ndim - 1)
        terms = jnp.matmul(part(a), jnp.swapaxes(part(b), -1, -2), precision=lax.Precision.HIGHEST)
        partial = _keep(partial + terms, accumulator.bits)
        if not groups_of_promotion:
            return total, partial
        full = (n + 1) % groups_of_promotion == 0
        return jnp.where(full, total + partial, total), jnp.where(full, 0, partial)

    zero = jnp.zeros((*a.shape[:-1], b.shape[-2]), jnp.float32)
    total, partial = lax.fori_loop(0, a.shape[-1] // group, step, (zero, zero))
    return total + partial


def fp8_matmul(a: Quantized, b: Quantized, *, out_dtype: DTypeLike = jnp.bfloat16,
               accumulator: Accumulator | None = None) -> jax.Array:
    """a @ b.T of quantized matrices.

    Args:
      a: Quantized [M, K] in 1 x 128 tiles.
      b: Quantized [N, K] in 128 x 128 blocks (Fprop, Dgrad) or in 1 x 128 tiles (Wgrad), according to the shape of its
        scales.
      out_dtype: of the result; float32 for weight gradients.
    Returns:
      [M, N], accumulated in float32.
    """
    check_matmul(a, b)
    return product(a, b, accumulator).astype(out_dtype)


def check_matmul(a: Quantized, b: Quantized) -> None:
    """Raises ValueError for operands that do not fit each other."""
    check(a, "a", 2)
    check(b, "b", 2)
    if a[0].shape[1] != b[0].shape[1]:
        raise ValueError(f"a has K={a[0].shape[1]} and b has K={b[0].shape[1]}; both operands are K-major.")
    if a[1].shape[0] != a[0].shape[0]:
        raise ValueError(f"a has scales {list(a[1].shape)} for values {list(a[0].shape)}; a needs 1 x 128 tiles.")
