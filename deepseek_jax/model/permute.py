"""Sorts token choices by expert, and back (report section 2.1.2): the permutation around the experts' products.

N tokens make N * K choices. They are sorted by expert into R rows, and an expert's group of rows begins at a multiple
of `align`. Both directions are gathers: the gradient of a permutation is the inverse permutation, not a scatter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.layers import add_up, wide
from deepseek_jax.model.router import count_choices


class Permutation(NamedTuple):
    """The row of each choice. R rows hold the N*K choices sorted by expert."""

    choice_R: jax.Array  # int32: the choice n * K + k in this row; N * K if the row is empty
    row_NK: jax.Array  # int32: the row of each choice
    sizes_E: jax.Array  # int32: rows of each expert, including empty ones: multiples of `align`


def sort_by_expert(chosen_NK: jax.Array, num_experts: int, align: int = 1, even: bool = False) -> Permutation:
    """Sorts choices by expert, tokens in order inside each; pads every expert's group to a multiple of `align` rows.

    `even` gives all experts the same number of rows, the mean load plus `align`, unless one of them needs more.
    """
    N, K = chosen_NK.shape
    room = round_up(round_up(N * K, num_experts) // num_experts + align - 1, align)
    rows = num_experts * room if even else round_up(N * K + num_experts * (align - 1), align)  # enough for any routing
    order = jnp.argsort(chosen_NK.reshape(-1), stable=True).astype(jnp.int32)
    counts_E = count_choices(chosen_NK, num_experts)
    sizes_E = round_up(counts_E, align)
    if even:
        sizes_E = jnp.where(counts_E.max() <= room, room, sizes_E)
    start_E, end_E = jnp.cumsum(counts_E) - counts_E, jnp.cumsum(sizes_E)
    row = jnp.arange(rows, dtype=jnp.int32)
    # Unrolled: with an XLA loop a GPU would wait for the host before every product of experts.
    expert_R = jnp.searchsorted(end_E, row, side="right", method="scan_unrolled")
    expert_R = jnp.minimum(expert_R, num_experts - 1).astype(jnp.int32)
    rank_R = row - (end_E - sizes_E)[expert_R]
    filled_R = rank_R < counts_E[expert_R]
    choice_R = jnp.where(filled_R, order[jnp.where(filled_R, start_E[expert_R] + rank_R, 0)], N * K)
    # Position p of the sorted order is in the row p + shift of its expert.
    shift_E = (end_E - sizes_E) - start_E
    position = jnp.argsort(order).astype(jnp.int32)
    row_NK = position.reshape(N, K) + shift_E[chosen_NK].astype(jnp.int32)
    return Permutation(choice_R, row_NK, sizes_E.astype(jnp.int32))


def round_up(n: Any, multiple: int) -> Any:
    """The next multiple of `align`, for a number or for each element of an array."""
    return -(-n // multiple) * multiple


def _rows(x_RD, index_N):
    """x[index], with zeros if the index is past the end."""
    return x_RD.at[index_N].get(mode="fill", fill_value=0)


@jax.custom_vjp
def to_rows(x_ND: jax.Array, permutation: Permutation) -> jax.Array:
    """Copies each token into the rows of its choices; empty rows are zero. [N, D] -> [R, D]."""
    return _rows(x_ND, permutation.choice_R // permutation.row_NK.shape[1])


def _to_rows_bwd(permutation, dx_RD):
    dtype = wide(dx_RD.dtype)
    # One term per choice instead of a sum over an [N, K, D] array: XLA fuses the gathers.
    dx_ND = add_up(dx_RD[row_N].astype(dtype) for row_N in permutation.row_NK.T)
    return dx_ND.astype(dx_RD.dtype), None


to_rows.defvjp(lambda x_ND, permutation: (to_rows(x_ND, permutation), permutation), _to_rows_bwd)


@jax.custom_vjp
def combine(y_RD: jax.Array, gates_NK: jax.Array, permutation: Permutation) -> jax.Array:
    """sum over k of gates[n, k] * y[row of choice k], accumulated in float32. [R, D] -> [N, D]."""
    dtype = wide(y_RD.dtype)
    terms = (gate_N[:, None].astype(dtype) * y_RD[row_N] for gate_N, row_N in zip(gates_NK.T, permutation.row_NK.T))
    return add_up(terms).astype(y_RD.dtype)


def _combine_bwd(residuals, dy_ND):
    y_RD, gates_NK, permutation = residuals
    dtype = wide(y_RD.dtype)
    gate_R1 = _rows(gates_NK.reshape(-1, 1), permutation.choice_R).astype(dtype)
    dy_RD = _rows(dy_ND, permutation.choice_R // gates_NK.shape[1]) * gate_R1
    dgates_NK = jnp.stack([(dy_ND.astype(dtype) * y_RD[row_N]).sum(axis=1) for row_N in permutation.row_NK.T],
                          axis=1)
    return dy_RD.astype(y_RD.dtype), dgates_NK.astype(gates_NK.dtype), None


def _combine_fwd(y_RD, gates_NK, permutation):
    return combine(y_RD, gates_NK, permutation), (y_RD, gates_NK, permutation)


combine.defvjp(_combine_fwd, _combine_bwd)


def truncate(p: Permutation, id_NK: jax.Array, align: int, room: int) -> tuple[Permutation, jax.Array]:
    """Cuts a permutation, whose last group holds choices of experts on other devices, down to `room` rows.

    Args:
      id_NK: int32, counted from 1 among the experts here; 0: none.
    Returns:
      The permutation, and int32 the number of choices of experts here that it keeps. Dropped choices point to the last
      row, which is empty, so their input and output are zero.
    """
    rows = (-(-room // align) + 1) * align
    end_E = jnp.minimum(jnp.cumsum(p.sizes_E[:-1]), rows - align)
    choice_R = jnp.pad(p.choice_R, (0, max(0, rows - p.choice_R.size)), constant_values=id_NK.size)[:rows]
    choice_R = jnp.where(jnp.arange(rows) < end_E[-1], choice_R, id_NK.size)
    kept_NK = (id_NK > 0) & (p.row_NK < end_E[-1])
    sizes_E = jnp.diff(end_E, prepend=0).astype(jnp.int32)
    return Permutation(choice_R, jnp.where(kept_NK, p.row_NK, rows - 1), sizes_E), kept_NK.sum()
