"""The experts' products in the dtype of their operands, and the gradient of their weights (report section 2.1.2).

    y[r] = x[r] @ w[e]    dw[e] = sum over its rows of x[r] dy[r]    e = expert of row r; sums are float32
"""

import jax
import jax.numpy as jnp
from jax import lax


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, transposed: bool = False) -> jax.Array:
    """Multiplies each expert's rows by its matrix.

    Args:
      x_RD: rows sorted by expert; w_EDF: in the same dtype. sizes_E: int32, rows of each expert, at most R in all.
      transposed: w is [E, F, D].
    Returns:
      [R, F] in the dtype of x; rows past the last group are zero.
    """
    if transposed:
        w_EDF = jnp.swapaxes(w_EDF, 1, 2)
    return lax.ragged_dot(x_RD, w_EDF, sizes_E, preferred_element_type=_wide(x_RD)).astype(x_RD.dtype)


def weights(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The gradient of the matrices: float32 [E, D, F], zero for experts without rows."""
    over_rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0],
                                              rhs_group_dimensions=[])
    return lax.ragged_dot_general(x_RD, dy_RF, sizes_E, over_rows, preferred_element_type=_wide(x_RD))


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)
