"""The operations of FP8 training: quantizing activations, gradients and weights by a recipe, and their products.

`sizes` of a product: None for one matrix; otherwise int32 [E], for rows sorted by expert in groups at multiples of 128
rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ConfigError, FP8Config
from kernels_pallas import api
from kernels_pallas.api import Accumulator, Quantized
from kernels_pallas.constants import BLOCK

RECIPE = FP8Config(enabled=True)
GROUP_ALIGNMENT = BLOCK  # an expert's group of rows starts at a multiple of this: no 128 x 1 tile spans two groups
DEFERRED = "deferred"  # the checkpoint name by which `pipeline.split` finds the arrays that a deferred W saves
GRADIENT_FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def quantize_tiles(x_MK: jax.Array, *, scale: str = "float32", axis: int = -1) -> Quantized:
    """E4M3 in tiles of 128 along `axis`.

    Args:
      x_MK: any float type; the last tile may be ragged.
      scale: "float32": s = max(amax, 1e-4) / 448; "power_of_two": the next power of two.
      axis: -1, a token's 128 channels (1 x 128); -2, a channel's 128 tokens (128 x 1), for Wgrad.
    Returns:
      (values [M, K], float32 scales [M, ceil(K / 128)], or [ceil(M / 128), K]). x = values * scales.
    """
    q = api.quantize(x_MK, scale=scale, transposed=False if axis == -1 else "only", implementation="reference")
    return q if axis == -1 else transposed(q)


def quantize_blocks(w_NK: jax.Array, *, scale: str = "float32") -> Quantized:
    """E4M3 in 128 x 128 blocks: (values [N, K], float32 scales [ceil(N / 128), ceil(K / 128)])."""
    return api.quantize_blocks(w_NK, scale=scale)


def exponents_of(scales: jax.Array) -> jax.Array:
    """The biased exponents of float32 powers of two, or zeros: uint8 of the same shape, a quarter of the bytes."""
    return (lax.bitcast_convert_type(scales, jnp.uint32) >> 23).astype(jnp.uint8)


def powers_of_two(exponents: jax.Array) -> jax.Array:
    """The inverse of `exponents_of`: float32 of the same shape."""
    return lax.bitcast_convert_type(exponents.astype(jnp.uint32) << 23, jnp.float32)


def quantize_activation(x: jax.Array, recipe: FP8Config, scale: str | None = None, dtype: Any = jnp.float8_e4m3fn,
                        share: str = "tile", transposed: bool | str = False) -> Any:
    """x [M, K] in 1 x 128 tiles; with transposed="only" in 128 x 1 tiles, as [K, M] (see `api.quantize`)."""
    implementation = of_quantizers(recipe)
    if implementation == "auto" and x.dtype != jnp.bfloat16:
        implementation = "reference"  # the kernels read bfloat16; dequantized values must not be rounded to it first
    return api.quantize(x, scale=scale or recipe.scale, dtype=dtype, transposed=transposed,
                        share="tensor" if recipe.tiles == "tensor" else share, implementation=implementation)


def of_quantizers(recipe: FP8Config) -> str:
    """The recipe's implementation, or "auto" if that has only products, as on a TPU."""
    return recipe.implementation if recipe.implementation in ("reference", "hopper") else "auto"


def check_here(recipe: FP8Config) -> None:
    """Raises ConfigError for kernels that this device or this version of jax does not have."""
    try:
        if recipe.enabled:
            api.check_here("fp8_matmul", recipe.implementation, "fp8.implementation")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def quantize_gradient(dy: jax.Array, recipe: FP8Config, scale: str | None = None,
                      transposed: bool | str = False) -> Any:
    """dy [M, N] in the recipe's format and tiles for gradients."""
    return quantize_activation(dy, recipe, scale, GRADIENT_FORMATS[recipe.gradient_format],
                       "block" if recipe.gradient_tiles == "128x128" else "tile", transposed)


def quantize_weight(w: jax.Array, recipe: FP8Config) -> Quantized:
    """w [..., N, K] in 128 x 128 blocks."""
    return api.quantize_blocks(w, scale=recipe.scale, share="tensor" if recipe.tiles == "tensor" else "block")


def transposed(q: Quantized) -> Quantized:
    """Values and scales with the last two axes swapped."""
    return Quantized(*(jnp.swapaxes(x, -1, -2) for x in q))


def product(a: Quantized, b: Quantized, sizes: jax.Array | None, recipe: FP8Config, out_dtype: Any) -> jax.Array:
    """a [M, K] by b [N, K], or by each expert's b [E, N, K]: [M, N] in `out_dtype`."""
    model = None
    if recipe.accumulator_bits:
        model = Accumulator(recipe.accumulator_bits, recipe.promote_every or 0)
    options = dict(out_dtype=out_dtype, accumulator=model, implementation=recipe.implementation)
    if sizes is None:
        return api.fp8_matmul(a, b, **options)
    return api.fp8_grouped_matmul(a, b, sizes, **options)


def mark_deferred(q: Quantized) -> Quantized:
    """Names the arrays that a deferred weight gradient saves: quantized, a quarter to a half of the bytes of their
    source."""
    return Quantized(*(checkpoint_name(x, DEFERRED) for x in q))


def quantize_along_rows(x: jax.Array, recipe: FP8Config, scale: str | None = None) -> Quantized:
    """x [M, K], dequantized and quantized along M, for Wgrad."""
    if scale == "power_of_two":
        x = x.astype(jnp.bfloat16)  # exact: E4M3 or E5M6 times a power of two; and the kernel reads this dtype
    return mark_deferred(quantize_activation(x, recipe, scale, transposed="only"))


def weight_gradient(dy: jax.Array, x: Quantized, sizes: jax.Array | None, recipe: FP8Config) -> jax.Array:
    """dw [.., N, K], float32, from dy [M, N] and x [M, K], which is quantized along M already."""
    return product(mark_deferred(quantize_gradient(dy, recipe, transposed="only")), x, sizes, recipe, jnp.float32)
