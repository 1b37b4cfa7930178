"""The FP8 Linear: forward pass and both gradients in E4M3 (report section 3.3.1)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.config import FP8Config
from deepseek_jax.fp8.e5m6 import from_e5m6, to_e5m6
from deepseek_jax.fp8.products import (
    RECIPE,
    product,
    quantize_activation,
    quantize_along_rows,
    quantize_gradient,
    quantize_weight,
    transposed,
    weight_gradient,
)
from deepseek_jax.parallel.sharding import on_shards, spec
from kernels_pallas.api import Quantized, dequantize


def linear(x: jax.Array, w: jax.Array | tuple[jax.Array, jax.Array], recipe: FP8Config = RECIPE, saved: str = "e4m3",
           names: tuple[str | None, str | None] = (None, None)) -> jax.Array:
    """x @ w.T in FP8, forward and backward.

    Args:
      x: [..., K], bfloat16 or float32.
      w: [N, K], a master of any float type, quantized here; its gradient has its dtype, from a float32 sum. Or the
        result of `quantize_blocks` (a checkpoint's weights): frozen, without a gradient.
      recipe: scales, formats, accumulation.
      saved: the format in which x is saved for the backward pass: "e4m3", the forward pass's tiles, or "e5m6" (for
        o_proj).
      names: of the dimensions N and K, if a mesh splits them (`parallel.sharding.AXES`).
    Returns:
      [..., N] in the dtype of x.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    if isinstance(w, tuple):
        y_MN = _frozen_linear(x_MK, Quantized(*w), recipe)
    else:
        y_MN = _linear(x_MK, w, recipe, saved, names)
    return y_MN.reshape(*x.shape[:-1], -1)


def _specs(names):
    """How x [M, K], w [N, K] and y [M, N] are split."""
    out, into = names
    return spec("batch", into), spec(out, into), spec("batch", out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _linear(x_MK, w_NK, recipe, saved, names):
    return _linear_fwd(x_MK, w_NK, recipe, saved, names)[0]


def _linear_fwd(x_MK, w_NK, recipe, saved, names):
    def forward(x_MK, w_NK):
        # The report's power-of-two scales for o_proj: converting its tiles to 128 x 1 then does not round a second
        # time.
        q = quantize_activation(x_MK, recipe, "power_of_two" if saved == "e5m6" else None)
        y_MN = product(q, quantize_weight(w_NK, recipe), None, recipe, x_MK.dtype)
        return y_MN, to_e5m6(x_MK) if saved == "e5m6" else q

    x, w, y = _specs(names)
    y_MN, residual = on_shards(forward, (x, w), (y, x), x_MK, w_NK, summed=(names[1], None))
    return y_MN, (residual, w_NK)


def _linear_bwd(recipe, saved, names, residuals, dy_MN):
    def backward(residual, w_NK, dy_MN):
        if saved == "e5m6":
            x_MK, scale = from_e5m6(residual, w_NK.shape[1]), "power_of_two"
        else:
            x_MK, scale = dequantize(residual), None
        dx_MK = product(quantize_gradient(dy_MN, recipe), transposed(quantize_weight(w_NK, recipe)), None, recipe,
                        dy_MN.dtype)
        return dx_MK, weight_gradient(dy_MN, quantize_along_rows(x_MK, recipe, scale), None, recipe).astype(w_NK.dtype)

    x, w, y = _specs(names)
    return on_shards(backward, (x, w, y), (x, w), *residuals, dy_MN, summed=(names[0], "batch"))


_linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _frozen_linear(x_MK, w, recipe):
    return product(quantize_activation(x_MK, recipe), w, None, recipe, x_MK.dtype)


def _frozen_bwd(recipe, w, dy_MN):
    dx_MK = product(quantize_gradient(dy_MN, recipe), transposed(w), None, recipe, dy_MN.dtype)
    return dx_MK, jax.tree.map(jnp.zeros_like, w)


_frozen_linear.defvjp(lambda x_MK, w, recipe: (_frozen_linear(x_MK, w, recipe), w), _frozen_bwd)
