"""FP8 training to the report's recipe (section 3.3): a Linear whose three products all run in E4M3.

    Fprop   y  = Q(x) Q(w).T      x in 1 x 128 tiles, w in 128 x 128 blocks
    Dgrad   dx = Q(dy) Q(w)       dy in 1 x 128 tiles
    Wgrad   dw = Q(dy).T Q(x)     both in 128 x 1 tiles: x is dequantized, transposed and quantized anew; float32

What the backward pass needs is kept in FP8, so that memory really falls: a Linear keeps Q(x), a feed-forward network
its quantized input and the quantized inputs of SwiGLU, whose output is computed again. The input of the attention's
output projection is kept in E5M6. Weights are [out, in], as in the checkpoints. On a mesh every device quantizes and
multiplies its own rows: no tile holds tokens of two devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import FP8Config
from deepseek_jax.parallel.mesh import on_parts, spec
from kernels_pallas import api
from kernels_pallas.api import Accumulator, Quantized, dequantize

__all__ = ["E5M6", "Quantized", "dequantize", "from_e5m6", "linear", "quantize_blocks", "quantize_tiles", "swiglu_ffn",
           "to_e5m6"]

RECIPE = FP8Config(enabled=True)
GROUP_ALIGNMENT = 128  # rows that an expert's group starts at a multiple of: no tile of 128 x 1 crosses into another's
DEFERRED = "deferred"  # the name by which `pipeline.split` knows what W waits with
GRADIENT_FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def quantize_tiles(x_MK, *, scale="float32", axis=-1) -> Quantized:
    """E4M3 in tiles of 128 along `axis`.

    Args:
      x_MK: any float type; the last tile may be ragged.
      scale: "float32": s = max(amax, 1e-4) / 448; "power_of_two": the next power of two.
      axis: -1, a token's 128 channels (1 x 128); -2, a channel's 128 tokens (128 x 1), as Wgrad has them.
    Returns:
      (values [M, K], float32 scales [M, ceil(K / 128)], or [ceil(M / 128), K]). x = values * scales.
    """
    q = api.quantize(x_MK, scale=scale, transposed=False if axis == -1 else "only", implementation="reference")
    return q if axis == -1 else _transposed(q)


def quantize_blocks(w_NK, *, scale="float32") -> Quantized:
    """E4M3 in 128 x 128 blocks: (values [N, K], float32 scales [ceil(N / 128), ceil(K / 128)])."""
    return api.quantize_blocks(w_NK, scale=scale)


class E5M6(NamedTuple):
    """12-bit floats, two in three bytes: uint8 [..., M, 3 ceil(K / 2)], and a power-of-two scale per 1 x 128 tile."""

    packed: jax.Array
    scales: jax.Array


def _round_e5m6(x):
    """The nearest number of 5 exponent and 6 mantissa bits, ties to even; |x| is at most 65024. float32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.uint32((1 << 16) - 1) + ((bits >> 17) & 1)
    normal = lax.bitcast_convert_type((bits + half) & jnp.uint32(0xFFFE0000), jnp.float32)
    subnormal = jnp.round(x * 2.0**20) * 2.0**-20
    return jnp.where(jnp.isnan(x), x, jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal))


def to_e5m6(x) -> E5M6:
    """[..., K] in E5M6, in 1 x 128 tiles with power-of-two scales; exact when it is done twice."""
    scales = api.tile_scales(x, largest=65024.0)
    y = _round_e5m6(x.astype(jnp.float32) / api.spread(scales, x.shape))
    codes = lax.bitcast_convert_type(y.astype(jnp.float16), jnp.uint16) >> 4  # float16 is E5M10
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    low, high = jnp.split(codes, 2, axis=-1)
    parts = (low & 0xFF, (low >> 8) | ((high & 0xF) << 4), high >> 4)
    return E5M6(jnp.concatenate(parts, axis=-1).astype(jnp.uint8), scales)


def from_e5m6(kept: E5M6, columns, dtype=jnp.float32):
    """The numbers that `to_e5m6` rounded to, [..., columns]."""
    first, middle, last = jnp.split(kept.packed.astype(jnp.uint16), 3, axis=-1)
    codes = jnp.concatenate([first | ((middle & 0xF) << 8), (middle >> 4) | (last << 4)], axis=-1)[..., :columns]
    y = lax.bitcast_convert_type(codes << 4, jnp.float16).astype(jnp.float32)
    return (y * api.spread(kept.scales, y.shape)).astype(dtype)


# The products. `sizes` None: one matrix; else int32 [E]: rows sorted by expert, groups at multiples of 128 rows.


def _activation(x, recipe, scale=None, dtype=jnp.float8_e4m3fn, share="tile", transposed=False):
    implementation = recipe.implementation
    if implementation == "auto" and x.dtype != jnp.bfloat16:
        implementation = "reference"  # the kernels read bfloat16; what was dequantized must not be rounded to it first
    return api.quantize(x, scale=scale or recipe.scale, dtype=dtype, transposed=transposed,
                        share="tensor" if recipe.tiles == "tensor" else share, implementation=implementation)


def _gradient(dy, recipe, scale=None, transposed=False):
    return _activation(dy, recipe, scale, GRADIENT_FORMATS[recipe.gradient_format],
                       "block" if recipe.gradient_tiles == "128x128" else "tile", transposed)


def _weight(w, recipe):
    return api.quantize_blocks(w, scale=recipe.scale, share="tensor" if recipe.tiles == "tensor" else "block")


def _transposed(q):
    return Quantized(*(jnp.swapaxes(x, -1, -2) for x in q))


def _product(a, b, sizes, recipe, out_dtype):
    model = None
    if recipe.accumulator_bits:
        model = Accumulator(recipe.accumulator_bits, recipe.promote_every or 0)
    options = dict(out_dtype=out_dtype, accumulator=model, implementation=recipe.implementation)
    if sizes is None:
        return api.fp8_matmul(a, b, **options)
    return api.fp8_grouped_matmul(a, b, sizes, **options)


def _waiting(q):
    """Marks what a put-off weight gradient waits with: quantized, a quarter to a half of what it is made from."""
    return Quantized(*(checkpoint_name(x, DEFERRED) for x in q))


def _along_rows(x, recipe, scale=None):
    """x [M, K], dequantized, as Wgrad reads it: quantized along M."""
    if scale == "power_of_two":
        x = x.astype(jnp.bfloat16)  # loses nothing: E4M3 or E5M6 times a power of two; and it is what the kernel reads
    return _waiting(_activation(x, recipe, scale, transposed="only"))


def _wgrad(dy, x, sizes, recipe):
    """dw [.., N, K], float32, from dy [M, N] and x [M, K], which is quantized along M already."""
    return _product(_waiting(_gradient(dy, recipe, transposed="only")), x, sizes, recipe, jnp.float32)


def linear(x, w, recipe: FP8Config = RECIPE, kept: str = "e4m3", names=(None, None)):
    """x @ w.T in FP8, forward and backward.

    Args:
      x: [..., K], bfloat16 or float32.
      w: [N, K], a master of any float type, quantized here; its gradient has its dtype, from a float32 sum. Or what
        `quantize_blocks` made of one (a checkpoint's weights): frozen, without a gradient.
      recipe: scales, formats, accumulation.
      kept: what the backward pass keeps of x: "e4m3", the forward pass's tiles, or "e5m6" (for o_proj).
      names: of the dimensions N and K, where a mesh splits them (`parallel.mesh.AXES`).
    Returns:
      [..., N] in the dtype of x.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    if isinstance(w, tuple):
        y_MN = _frozen_linear(x_MK, Quantized(*w), recipe)
    else:
        y_MN = _linear(x_MK, w, recipe, kept, names)
    return y_MN.reshape(*x.shape[:-1], -1)


def _specs(names):
    """Where x [M, K], w [N, K] and y [M, N] lie."""
    out, into = names
    return spec("batch", into), spec(out, into), spec("batch", out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _linear(x_MK, w_NK, recipe, kept, names):
    return _linear_fwd(x_MK, w_NK, recipe, kept, names)[0]


def _linear_fwd(x_MK, w_NK, recipe, kept, names):
    def forward(x_MK, w_NK):
        # The report's power-of-two scales for o_proj: turned to 128 x 1, its tiles then lose nothing twice.
        q = _activation(x_MK, recipe, "power_of_two" if kept == "e5m6" else None)
        y_MN = _product(q, _weight(w_NK, recipe), None, recipe, x_MK.dtype)
        return y_MN, to_e5m6(x_MK) if kept == "e5m6" else q

    x, w, y = _specs(names)
    y_MN, held = on_parts(forward, (x, w), (y, x), x_MK, w_NK, summed=(names[1], None))
    return y_MN, (held, w_NK)


def _linear_bwd(recipe, kept, names, residuals, dy_MN):
    def backward(held, w_NK, dy_MN):
        if kept == "e5m6":
            x_MK, scale = from_e5m6(held, w_NK.shape[1]), "power_of_two"
        else:
            x_MK, scale = dequantize(held), None
        dx_MK = _product(_gradient(dy_MN, recipe), _transposed(_weight(w_NK, recipe)), None, recipe, dy_MN.dtype)
        return dx_MK, _wgrad(dy_MN, _along_rows(x_MK, recipe, scale), None, recipe).astype(w_NK.dtype)

    x, w, y = _specs(names)
    return on_parts(backward, (x, w, y), (x, w), *residuals, dy_MN, summed=(names[0], "batch"))


_linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _frozen_linear(x_MK, w, recipe):
    return _product(_activation(x_MK, recipe), w, None, recipe, x_MK.dtype)


def _frozen_bwd(recipe, w, dy_MN):
    dx_MK = _product(_gradient(dy_MN, recipe), _transposed(w), None, recipe, dy_MN.dtype)
    return dx_MK, jax.tree.map(jnp.zeros_like, w)


_frozen_linear.defvjp(lambda x_MK, w, recipe: (_frozen_linear(x_MK, w, recipe), w), _frozen_bwd)


def _swiglu(gate, up):
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(gate) * up


def swiglu_ffn(x_MD, gate_FD, up_FD, down_DF, recipe: FP8Config = RECIPE, sizes=None):
    """down(silu(gate x) * up x) in FP8, of one network or, with `sizes`, of the experts.

    Args:
      x_MD: tokens; or rows sorted by expert, each expert's rows starting at a multiple of 128, empty rows zero.
      gate_FD, up_FD, down_DF: masters [out, in]; with `sizes` [E, out, in].
      sizes: int32 [E], rows of each expert, multiples of 128.
    Returns:
      [M, D] in the dtype of x. Kept for the backward pass: x, gate x and up x in FP8.
    """
    return _swiglu_ffn(x_MD, gate_FD, up_FD, down_DF, sizes, recipe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _swiglu_ffn(x_MD, gate_FD, up_FD, down_DF, sizes, recipe):
    return _swiglu_ffn_fwd(x_MD, gate_FD, up_FD, down_DF, sizes, recipe)[0]


def _exchanged(sizes):
    """The scales of what travels between devices, tokens to experts and gradients back: powers of two."""
    return None if sizes is None else "power_of_two"


# Where x and y, w [F, D], w [D, F] and what is between them lie. Experts come here with each device's own rows.
ROWS, WIDEN, NARROW, WIDE = spec("batch", None), spec("ffn", None), spec(None, "ffn"), spec("batch", "ffn")


def _swiglu_ffn_fwd(x_MD, gate_FD, up_FD, down_DF, sizes, recipe):
    def forward(x_MD, gate_FD, up_FD, down_DF):
        q = _activation(x_MD, recipe, _exchanged(sizes))
        gate_MF, up_MF = (_product(q, _weight(w, recipe), sizes, recipe, x_MD.dtype) for w in (gate_FD, up_FD))
        if recipe.tiles == "fine":
            act = api.swiglu_quantize(gate_MF, up_MF, scale=recipe.scale, implementation=recipe.implementation)
        else:
            act = _activation(_swiglu(gate_MF, up_MF), recipe)
        y_MD = _product(act, _weight(down_DF, recipe), sizes, recipe, x_MD.dtype)
        return y_MD, q, *(_activation(x, recipe) for x in (gate_MF, up_MF))

    y_MD, q, *inputs = on_parts(forward, (ROWS, WIDEN, WIDEN, NARROW), (ROWS, ROWS, WIDE, WIDE), x_MD, gate_FD, up_FD,
                                down_DF, summed=("ffn", None, None, None))
    inputs = jax.tree.map(lambda x: checkpoint_name(x, "ffn_in"), inputs)
    return y_MD, (q, *inputs, gate_FD, up_FD, down_DF, sizes)


def _swiglu_ffn_bwd(recipe, residuals, dy_MD):
    *arrays, sizes = residuals

    def backward(q, gate, up, gate_FD, up_FD, down_DF, dy_MD):
        dtype, scale = dy_MD.dtype, _exchanged(sizes)
        act_MF, pull_back = jax.vjp(_swiglu, dequantize(gate), dequantize(up))
        ddown_DF = _wgrad(dy_MD, _along_rows(act_MF, recipe), sizes, recipe)
        dact_MF = _product(_gradient(dy_MD, recipe, scale), _transposed(_weight(down_DF, recipe)), sizes, recipe,
                           jnp.float32)
        x_MD, dx_MD, dw = _along_rows(dequantize(q), recipe, scale), 0, []
        for d_MF, w_FD in zip(pull_back(dact_MF), (gate_FD, up_FD)):
            dw.append(_wgrad(d_MF, x_MD, sizes, recipe).astype(w_FD.dtype))
            dx_MD += _product(_gradient(d_MF, recipe), _transposed(_weight(w_FD, recipe)), sizes, recipe, jnp.float32)
        return dx_MD.astype(dtype), *dw, ddown_DF.astype(down_DF.dtype)

    gradients = on_parts(backward, (ROWS, WIDE, WIDE, WIDEN, WIDEN, NARROW, ROWS), (ROWS, WIDEN, WIDEN, NARROW),
                         *arrays, dy_MD, summed=("ffn", "batch", "batch", "batch"))
    return *gradients, None


_swiglu_ffn.defvjp(_swiglu_ffn_fwd, _swiglu_ffn_bwd)
