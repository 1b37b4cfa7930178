"""Grouped products of each expert's rows with its own weights (report section 2.1.2), in four implementations.

    y[r] = x[r] @ w[expert of r]     "reference": the oracle    "cpu": equal groups or tiles    "ragged": the device's
                                     own kernel, or lax.ragged_dot    "xla": lax.ragged_dot
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax import fp8
from deepseek_jax.model.layers import LowRank, Weight, matmul, transpose, wide, with_frozen
from kernels_pallas import api


def row_alignment(implementation: str, rows: int, num_experts: int) -> int:
    """The number of rows that an expert's group is padded to a multiple of: at most half of the mean load, so that
    groups have room for 1.5 times the mean."""
    if implementation != "cpu":
        return 1
    half = max(rows // num_experts // 2, 1)
    return max(1 << (half.bit_length() - 1), 8)


def _reference(x_RD, w_EDF, sizes_E, align):
    """Every row by every expert, with all except its own masked. The oracle: E times the work."""
    row_R1 = jnp.arange(x_RD.shape[0])[:, None]
    end_1E = jnp.cumsum(sizes_E)[None]
    mine_RE = (row_R1 < end_1E) & (row_R1 >= end_1E - sizes_E[None])
    y_ERF = jnp.einsum("RD,EDF->ERF", x_RD, w_EDF.astype(x_RD.dtype), preferred_element_type=wide(x_RD.dtype))
    return jnp.einsum("ERF,RE->RF", y_ERF, mine_RE.astype(y_ERF.dtype)).astype(x_RD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged(x_RD, w_EDF, sizes_E, align, kernel="auto"):
    """kernel: the implementation of kernels_pallas.api."""
    return api.grouped_matmul(x_RD, w_EDF.astype(x_RD.dtype), sizes_E, implementation=kernel)


def _ragged_fwd(x_RD, w_EDF, sizes_E, align, kernel):
    return _ragged(x_RD, w_EDF, sizes_E, align, kernel), (x_RD, w_EDF, sizes_E)


def _ragged_bwd(align, kernel, residuals, dy_RF):
    x_RD, w_EDF, sizes_E = residuals
    dx_RD = api.grouped_matmul(dy_RF, w_EDF.astype(dy_RF.dtype), sizes_E, transposed=True, implementation=kernel)
    dw_EDF = api.grouped_matmul_weights(x_RD, dy_RF, sizes_E, implementation=kernel)
    return dx_RD.astype(x_RD.dtype), dw_EDF.astype(w_EDF.dtype), None


_ragged.defvjp(_ragged_fwd, _ragged_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _batched(x_RD, w_EDF, sizes_E, align):
    """A batched product over experts if all have the same number of rows, otherwise over equal tiles of rows.

    XLA:CPU has no fast ragged product. Tiles are exact and not affected by skew, but each needs a copy of its expert's
    weights; the first form needs no copies, and loads in training are nearly balanced.
    """
    def product(x_TMD, w_TDF, expert_T):
        return matmul(x_TMD, w_TDF).reshape(x_RD.shape[0], -1)

    return _by_expert_or_tile(product, sizes_E, align, (x_RD,), w_EDF.astype(x_RD.dtype))


def _batched_fwd(x_RD, w_EDF, sizes_E, align):
    return _batched(x_RD, w_EDF, sizes_E, align), (x_RD, w_EDF, sizes_E)


def _batched_bwd(align, residuals, dy_RF):
    x_RD, w_EDF, sizes_E = residuals

    def product(x_TMD, dy_TMF, w_TFD, expert_T):
        dw_TDF = matmul(transpose(x_TMD), dy_TMF, wide(x_RD.dtype))
        if expert_T is not None:
            dw_TDF = jax.ops.segment_sum(dw_TDF, expert_T, w_EDF.shape[0], indices_are_sorted=True)
        return matmul(dy_TMF, w_TFD, x_RD.dtype).reshape(x_RD.shape), dw_TDF

    dx_RD, dw_EDF = _by_expert_or_tile(product, sizes_E, align, (x_RD, dy_RF), transpose(w_EDF.astype(dy_RF.dtype)))
    return dx_RD, dw_EDF.astype(w_EDF.dtype), None


_batched.defvjp(_batched_fwd, _batched_bwd)


def _by_expert_or_tile(product, sizes_E, align, rows, w_EXY):
    """product(*rows [T, M, ...], weights [T, ...], expert_T): T experts if their groups are equal, else T tiles."""
    E, R = len(sizes_E), rows[0].shape[0]

    def cut(count):
        return [a.reshape(count, -1, a.shape[1]) for a in rows]

    def by_tile():
        expert_T = _expert_of_tile(sizes_E, align, R // align)
        return product(*cut(R // align), jnp.asarray(w_EXY)[expert_T], expert_T)

    if R % E:
        return by_tile()
    return lax.cond(jnp.all(sizes_E == R // E), lambda: product(*cut(E), w_EXY, None), by_tile)


def _expert_of_tile(sizes_E, align, tiles):
    """The expert of each tile. Tiles after the last group use the last expert: their rows are zero, and so are the
    products."""
    end_E = jnp.cumsum(sizes_E) // align
    return jnp.minimum(jnp.searchsorted(end_E, jnp.arange(tiles), side="right"), sizes_E.shape[0] - 1)


IMPLEMENTATIONS = {"reference": _reference, "cpu": _batched, "ragged": _ragged,
                   "xla": functools.partial(_ragged, kernel="reference")}


def implementation_here(asked: str = "auto") -> str:
    """The member of IMPLEMENTATIONS for the devices that a program is compiled for: "auto" and "xla" mean tiles on a
    CPU, and a ragged product elsewhere."""
    if asked in ("auto", "xla") and api.device_here().platform == "cpu":
        return "cpu"
    return "ragged" if asked == "auto" else asked


def grouped_matmul(x_RD: jax.Array, w_EDF: Weight, sizes_E: jax.Array, align: int,
                   implementation: str = "auto") -> jax.Array:
    """Multiplies each expert's rows by its weights: y[r] = x[r] @ w[expert of r].

    Args:
      x_RD: rows sorted by expert, empty rows zero, as from `permute.to_rows`.
      w_EDF: the experts' weights, float32 masters: the product runs in x's dtype, their gradient stays float32. A
        LowRank has adapters for each expert; Blocks are frozen.
      sizes_E: int32, rows of each expert, multiples of `align`; rows after their sum give zero.
      align: alignment of the groups. "cpu" makes tiles of that many rows.
      implementation: "auto", or one of IMPLEMENTATIONS.
    Returns:
      [R, F] in the dtype of x, accumulated in float32.
    """
    name = implementation_here() if implementation == "auto" else implementation
    if isinstance(w_EDF, LowRank):
        product = functools.partial(grouped_matmul, sizes_E=sizes_E, align=align, implementation=name)
        return product(x_RD, w_EDF.w_IO) + product(product(x_RD, w_EDF.a_IR), w_EDF.b_RO)
    if isinstance(w_EDF, fp8.Blocks):
        return with_frozen(lambda x, w: IMPLEMENTATIONS[name](x, w, sizes_E, align), x_RD, w_EDF)
    return IMPLEMENTATIONS[name](x_RD, w_EDF, sizes_E, align)
