"""The components of every block: RMSNorm, the linear product, SwiGLU, the dense feed-forward network.

Parameters are float32 masters of shape [in, out]; products run in `cfg.dtype` and accumulate in float32; norms and
softmaxes run in float32. With x64 enabled and dtype float64 all of them are float64.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from deepseek_jax import fp8
from deepseek_jax.config import FP8Config, ModelConfig
from deepseek_jax.config.model import RECOMPUTABLE
from deepseek_jax.parallel.sharding import constrain

# The values saved for the backward pass under remat="report" (report section 3.2.3): the residual stream, the
# compressed latents, the attention output, the scores, the rows received by the experts and the inputs of SwiGLU.
# Norms, MLA up-projections and SwiGLU are recomputed; so are the experts' outputs, which only the gradient of the gates
# needs. Names instead of "report" recompute some of these too (`config.model.RECOMPUTABLE`). The plan of dispatch is
# small and always saved: recomputing it would take an exchange of sizes.
SAVED_NAMES = (*RECOMPUTABLE.values(), "hops")


def save_ffn_input(x: jax.Array) -> jax.Array:
    """Marks a SwiGLU input, of any shape, as saved for the backward pass under remat="report" (3.2.3); returns it."""
    return checkpoint_name(x, "ffn_in")


def wide(dtype: Any) -> jnp.dtype:
    """The accumulation dtype for `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def row_major(x: jax.Array) -> jax.Array:
    """On a CPU, stores `x`, of any shape and dtype, row-major in memory; elsewhere does nothing.

    XLA:CPU turns a transpose into a stride, and its bfloat16 product of a strided operand is 2-3 times slower than
    the product plus the copy.
    """
    def stored(x):
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, cpu=stored, default=lambda x: x)


def transpose(x: jax.Array) -> jax.Array:
    """[..., M, N] -> [..., N, M], copied in memory if that is faster."""
    return row_major(jnp.swapaxes(x, -1, -2))


def matmul(a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """[..., M, K] by [..., K, N] -> [..., M, N] in `dtype` (default: that of `a`), accumulated wide and rounded
    once."""
    return jnp.matmul(a, b, preferred_element_type=dtype or a.dtype)


@jax.custom_vjp
def _linear(x_MI, w_IO):
    return matmul(x_MI, w_IO.astype(x_MI.dtype))


def _linear_fwd(x_MI, w_IO):
    return _linear(x_MI, w_IO), (x_MI, w_IO)


def _linear_bwd(residuals, dy_MO):
    x_MI, w_IO = residuals
    dx_MI = matmul(dy_MO, transpose(w_IO.astype(dy_MO.dtype)), x_MI.dtype)
    dw_IO = matmul(transpose(x_MI), dy_MO, w_IO.dtype)  # the gradient of a float32 master stays float32
    return dx_MI, dw_IO


_linear.defvjp(_linear_fwd, _linear_bwd)


class LowRank(NamedTuple):
    """A weight and a low-rank product added to it, which is never materialized: x W + (x A) B (arXiv 2106.09685).

    w_IO [..., I, ..., O, ...]: any weight, after the axes of layers and experts. a_IR, b_RO: its adapters, with the
    same leading axes. It replaces a weight in the parameters (`model.lora.attach`).
    """

    w_IO: jax.Array | fp8.Blocks
    a_IR: jax.Array
    b_RO: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w_IO.shape


Weight = jax.Array | fp8.Blocks | LowRank


def with_frozen(product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, w: fp8.Blocks) -> jax.Array:
    """product(x, w) with w dequantized to x's dtype, again in the backward pass: only the FP8 values are kept.

    Args:
      product: such as `linear`; x [..., I] and w [I, ...] in x's dtype -> [..., ...].
    """
    return jax.checkpoint(lambda x, w: product(x, w.dequantized(x.dtype)))(x, w)


def linear(x: jax.Array, w: Weight, recipe: FP8Config | None = None, saved: str = "e4m3",
           names: tuple[str | None, str | None] = (None, None)) -> jax.Array:
    """x[..., I] by w[I, ...] -> [..., ...] in x's dtype. The weight's gradient has the weight's dtype.

    `recipe`: if it is enabled, the products run in FP8, `saved` is the format in which x is saved for the backward
    pass, and `names` are those of the dimensions of the output and of I (see `fp8.linear`).
    """
    if isinstance(w, LowRank):
        return linear(x, w.w_IO, recipe, saved, names) + linear(linear(x, w.a_IR), w.b_RO)
    if isinstance(w, fp8.Blocks):
        return with_frozen(linear, x, w)
    w_IO = w.reshape(w.shape[0], -1)
    if recipe is not None and recipe.enabled:
        y = fp8.linear(x, w_IO.T, recipe, saved, names)
    else:
        y = _linear(x.reshape(-1, x.shape[-1]), w_IO)
    return y.reshape(x.shape[:-1] + w.shape[1:])


def add_up(terms: Iterable[jax.Array]) -> jax.Array:
    """The sum of one or more arrays of the same shape and dtype, in their order."""
    return functools.reduce(operator.add, terms)


def head_logits(hidden: jax.Array, head_DW: jax.Array) -> jax.Array:
    """hidden[..., D] by head[D, W], in float32: the product runs in hidden's dtype and is not rounded to it."""
    return matmul(hidden, head_DW.astype(hidden.dtype), wide(hidden.dtype))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32, returned in x's dtype. x [..., D], scale [D]."""
    y = x.astype(wide(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean(x)) / std(x) * scale + bias over the last axis, computed in float32, returned in x's dtype.

    x [..., D]; scale, bias [D]. Only the indexer of V3.2 has one.
    """
    y = x.astype(wide(x.dtype))
    variance = y.var(axis=-1, keepdims=True)
    y = (y - y.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(variance + eps)
    scale, bias = (w.reshape((1,) * (x.ndim - 1) + (-1,)) for w in (scale, bias))
    return (y * scale + bias).astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise, computed in float32, returned in the inputs' dtype; both [..., F]."""
    dtype = wide(gate.dtype)
    return (jax.nn.silu(gate.astype(dtype)) * up.astype(dtype)).astype(gate.dtype)


def ffn(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """down(silu(gate x) * up x): [B, T, D] in the dtype of x."""
    split = functools.partial(constrain, names=("batch", None, "ffn"))
    gate_BTF, up_BTF = save_ffn_input(split(linear(x_BTD, gate_DF))), save_ffn_input(split(linear(x_BTD, up_DF)))
    return linear(swiglu(gate_BTF, up_BTF), down_FD)


def with_flat_inputs(w_XYO: Weight) -> Any:
    """A weight [X, Y, ...] with two input axes, reshaped to [X Y, ...] with a single one."""
    if isinstance(w_XYO, LowRank):
        return w_XYO._replace(w_IO=with_flat_inputs(w_XYO.w_IO), a_IR=with_flat_inputs(w_XYO.a_IR))
    if isinstance(w_XYO, fp8.Blocks):
        return w_XYO._replace(values=with_flat_inputs(w_XYO.values))
    return w_XYO.reshape(-1, *w_XYO.shape[2:])


def weight(module: Any, name: str, shape: tuple[int, ...]) -> Any:
    """Declares a normal(0, init_std) weight, float32 (float64 for a float64 model). Also accepts a LowRank or Blocks in
    its place."""
    if isinstance(held := module.get_variable("params", name), LowRank | fp8.Blocks):
        return held
    init = nn.initializers.normal(module.cfg.init_std)
    return module.param(name, init, shape, wide(module.cfg.dtype))


class RMSNorm(nn.Module):
    """Declares the scale of `rms_norm`. eps: None: the config's."""

    cfg: ModelConfig
    eps: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), wide(self.cfg.dtype))
        return rms_norm(x, scale, self.cfg.norm_eps if self.eps is None else self.eps)


class LayerNorm(nn.Module):
    """Declares scale and bias [dim] of `layer_norm`, and returns them."""

    cfg: ModelConfig
    dim: int

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        shape, dtype = (self.dim,), wide(self.cfg.dtype)
        return {"scale": self.param("scale", nn.initializers.ones, shape, dtype),
                "bias": self.param("bias", nn.initializers.zeros, shape, dtype)}


class FFN(nn.Module):
    """down(silu(gate x) * up x): the dense layers and the shared expert."""

    cfg: ModelConfig
    ffn_dim: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F = self.cfg.d_model, self.ffn_dim
        gate_DF, up_DF, down_FD = weight(self, "gate", (D, F)), weight(self, "up", (D, F)), weight(self, "down", (F, D))
        if self.cfg.fp8.enabled:
            y_MD = fp8.swiglu_ffn(x_BTD.reshape(-1, D), gate_DF.T, up_DF.T, down_FD.T, self.cfg.fp8)
            return y_MD.reshape(x_BTD.shape)
        return ffn(x_BTD, gate_DF, up_DF, down_FD)
