"""The experts' FP8 products: rows sorted by expert, every group starting at a multiple of 128 rows.

    Fprop, Dgrad    y[r] = x[r] @ w[expert of r].T            x [R, K], w [E, N, K]  ->  [R, N]
    Wgrad           dw[e] = sum over e's rows of dy.T x       dy.T [N, R], x.T [K, R] ->  [E, N, K]
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.formats import BLOCK, Accumulator, Quantized, blocks, check
from kernels_pallas.reference.fp8_matmul import product


def expert_of_tile(sizes_E: jax.Array, tiles: int) -> jax.Array:
    """int32 [tiles]: the group of tile t of 128 rows; past the last group, E."""
    end_E = jnp.cumsum(sizes_E) // BLOCK
    # Compared with all groups: a binary search would be an XLA loop before every grouped product.
    return jnp.searchsorted(end_E, jnp.arange(tiles), side="right", method="compare_all").astype(jnp.int32)


def fp8_grouped_matmul(a: Quantized, b: Quantized, sizes_E: jax.Array, *, out_dtype: DTypeLike = jnp.bfloat16,
                       accumulator: Accumulator | None = None) -> jax.Array:
    """Multiplies each group by its own matrix, or, if both operands are matrices, sums each group over its rows.

    Args:
      a: Quantized in 1 x 128 tiles: rows [R, K], or K-grouped [M, R].
      b: Quantized [E, N, K] in 128 x 128 blocks, or K-grouped [N, R] in 1 x 128 tiles.
      sizes_E: int32, rows of each group: multiples of 128 (not checked: they are on the device).
    Returns:
      [R, N], zero in rows past the last group; or K-grouped [E, M, N], zero for empty groups.
    """
    check_grouped(a, b, sizes_E)
    form = _k_grouped if b[0].ndim == 2 else _grouped
    return form(a, b, sizes_E, accumulator).astype(out_dtype)


def _grouped(a, b, sizes_E, accumulator):
    R, K = a[0].shape
    tiles = R // BLOCK
    expert_T = expert_of_tile(sizes_E, tiles)
    a = Quantized(a[0].reshape(tiles, BLOCK, K), a[1].reshape(tiles, BLOCK, -1))
    b = Quantized(*(x[jnp.minimum(expert_T, len(sizes_E) - 1)] for x in b))
    y_TMN = product(a, b, accumulator)
    return jnp.where((expert_T < len(sizes_E))[:, None, None], y_TMN, 0).reshape(R, -1)


def _k_grouped(a, b, sizes_E, accumulator):
    tiles = a[0].shape[1] // BLOCK
    split = lambda x, width: jnp.swapaxes(x.reshape(x.shape[0], tiles, width), 0, 1)
    a, b = (Quantized(split(x[0], BLOCK), split(x[1], 1)) for x in (a, b))
    expert_T = expert_of_tile(sizes_E, tiles)
    # Tiles past the last group have an index past the end, and are left out.
    return jax.ops.segment_sum(product(a, b, accumulator), expert_T, len(sizes_E), indices_are_sorted=True)


def check_grouped(a: Quantized, b: Quantized, sizes_E: jax.Array) -> None:
    """Raises ValueError for operands that do not fit each other."""
    check(a, "a", 2)
    check(b, "b", 2 if b[0].ndim == 2 else 3)
    k_grouped = b[0].ndim == 2
    rows = a[0].shape[1 if k_grouped else 0]
    if rows % BLOCK:
        raise ValueError(f"a has {rows} grouped rows; pad them to a multiple of {BLOCK}, where groups may start.")
    if a[0].shape[1] != b[0].shape[-1]:
        raise ValueError(f"a has K={a[0].shape[1]} and b has K={b[0].shape[-1]}; both operands are K-major.")
    tiles = [("a", a)] + ([("b", b)] if k_grouped else [])
    for name, q in tiles:
        if q[1].shape[0] != q[0].shape[0]:
            raise ValueError(f"{name} needs 1 x 128 tiles; its scales are {list(q[1].shape)} for {list(q[0].shape)}.")
    if not k_grouped and (sizes_E.shape[0] != b[0].shape[0] or b[1].shape[1] != blocks(b[0].shape[1])):
        raise ValueError(f"b holds {b[0].shape[0]} matrices with scales {list(b[1].shape)} for {sizes_E.shape[0]} "
                         "groups; it needs one matrix a group, in blocks of 128 x 128.")
