"""The FP8 feed-forward network: gate, up and down products, SwiGLU recomputed (report sections 3.3.1, 3.3.3)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import FP8Config
from deepseek_jax.fp8.products import (
    RECIPE,
    of_quantizers,
    product,
    quantize_activation,
    quantize_along_rows,
    quantize_gradient,
    quantize_weight,
    transposed,
    weight_gradient,
)
from deepseek_jax.parallel.sharding import on_shards, spec
from kernels_pallas import api
from kernels_pallas.api import dequantize
from kernels_pallas.constants import BLOCK


def _swiglu(gate, up):
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(gate) * up


def swiglu_ffn(x_MD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array,
               recipe: FP8Config = RECIPE, sizes: jax.Array | None = None) -> jax.Array:
    """down(silu(gate x) * up x) in FP8, for one network or, with `sizes`, for the experts.

    Args:
      x_MD: tokens; or rows sorted by expert, each expert's rows starting at a multiple of 128, empty rows zero.
      gate_FD, up_FD, down_DF: masters [out, in]; with `sizes` [E, out, in].
      sizes: int32 [E], rows of each expert, multiples of 128.
    Returns:
      [M, D] in the dtype of x. The backward pass saves x, gate x and up x in FP8.
    """
    return _swiglu_ffn(x_MD, gate_FD, up_FD, down_DF, sizes, recipe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _swiglu_ffn(x_MD, gate_FD, up_FD, down_DF, sizes, recipe):
    return _swiglu_ffn_fwd(x_MD, gate_FD, up_FD, down_DF, sizes, recipe)[0]


def _exchanged(sizes):
    """The scales of values sent between devices, tokens to experts and gradients back: powers of two."""
    return None if sizes is None else "power_of_two"


# The specs of x and y, w [F, D], w [D, F] and the intermediate arrays. Experts have each device's own rows.
ROWS, WIDEN, NARROW, WIDE = spec("batch", None), spec("ffn", None), spec(None, "ffn"), spec("batch", "ffn")


def _swiglu_ffn_fwd(x_MD, gate_FD, up_FD, down_DF, sizes, recipe):
    def forward(x_MD, gate_FD, up_FD, down_DF):
        q = quantize_activation(x_MD, recipe, _exchanged(sizes))
        gate_MF, up_MF = (product(q, quantize_weight(w, recipe), sizes, recipe, x_MD.dtype) for w in (gate_FD, up_FD))
        if recipe.tiles == "fine":
            act = api.swiglu_quantize(gate_MF, up_MF, scale=recipe.scale, implementation=of_quantizers(recipe))
        else:
            act = quantize_activation(_swiglu(gate_MF, up_MF), recipe)
        y_MD = product(act, quantize_weight(down_DF, recipe), sizes, recipe, x_MD.dtype)
        return y_MD, q, *(quantize_activation(x, recipe) for x in (gate_MF, up_MF))

    y_MD, q, *inputs = on_shards(forward, (ROWS, WIDEN, WIDEN, NARROW), (ROWS, ROWS, WIDE, WIDE), x_MD, gate_FD, up_FD,
                                down_DF, summed=("ffn", None, None, None))
    inputs = jax.tree.map(lambda x: checkpoint_name(x, "ffn_in"), inputs)
    return y_MD, (q, *inputs, gate_FD, up_FD, down_DF, sizes)


COLUMNS = 4  # parts in which the gradient of the experts' rows is computed


def _input_gradient(gradients, weights, sizes, recipe, dtype):
    """The sum of d [M, F] @ w [F, D] over pairs of both, added in float32: [M, D] in `dtype`.

    For the experts, a quarter of the columns at a time: otherwise two float32 arrays of all rows would be the largest
    temporaries of a step. Columns are independent, so the results are the same.
    """
    gradients = [quantize_gradient(d, recipe) for d in gradients]
    weights = [quantize_weight(w, recipe) for w in weights]

    def columns(weights):
        parts = [product(d, transposed(w), sizes, recipe, jnp.float32) for d, w in zip(gradients, weights)]
        return functools.reduce(jnp.add, parts).astype(dtype)

    if sizes is None or weights[0].values.shape[-1] % (COLUMNS * BLOCK) or recipe.tiles == "tensor":
        return columns(weights)

    def part(c):
        width = lambda a: a.shape[-1] // COLUMNS
        return columns(jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, c * width(a), width(a), axis=-1), weights))

    y_CMX = lax.map(part, jnp.arange(COLUMNS))
    return jnp.swapaxes(y_CMX, 0, 1).reshape(y_CMX.shape[1], -1)


def _swiglu_ffn_bwd(recipe, residuals, dy_MD):
    *arrays, sizes = residuals

    def backward(q, gate, up, gate_FD, up_FD, down_DF, dy_MD):
        dtype, scale = dy_MD.dtype, _exchanged(sizes)
        act_MF, pull_back = jax.vjp(_swiglu, dequantize(gate), dequantize(up))
        ddown_DF = weight_gradient(dy_MD, quantize_along_rows(act_MF, recipe), sizes, recipe)
        dact_MF = product(quantize_gradient(dy_MD, recipe, scale), transposed(quantize_weight(down_DF, recipe)), sizes,
                          recipe, jnp.float32)
        x_MD, between = quantize_along_rows(dequantize(q), recipe, scale), pull_back(dact_MF)
        dw = [weight_gradient(d_MF, x_MD, sizes, recipe).astype(w_FD.dtype)
              for d_MF, w_FD in zip(between, (gate_FD, up_FD))]
        return (_input_gradient(between, (gate_FD, up_FD), sizes, recipe, dtype), *dw,
                ddown_DF.astype(down_DF.dtype))

    gradients = on_shards(backward, (ROWS, WIDE, WIDE, WIDEN, WIDEN, NARROW, ROWS), (ROWS, WIDEN, WIDEN, NARROW),
                         *arrays, dy_MD, summed=("ffn", "batch", "batch", "batch"))
    return *gradients, None


_swiglu_ffn.defvjp(_swiglu_ffn_fwd, _swiglu_ffn_bwd)
