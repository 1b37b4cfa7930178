"""FP8 training to the report's recipe (section 3.3): a Linear whose three products all run in E4M3.

    Fprop   y  = Q(x) Q(w).T      x in 1 x 128 tiles, w in 128 x 128 blocks
    Dgrad   dx = Q(dy) Q(w)       dy in 1 x 128 tiles
    Wgrad   dw = Q(dy).T Q(x)     both in 128 x 1 tiles: x is dequantized, transposed and quantized again; float32

The residuals of the backward pass are FP8 too, which saves memory: a Linear saves Q(x), a feed-forward network its
quantized input and the quantized inputs of SwiGLU, whose output is recomputed. The input of the attention's output
projection is saved in E5M6. Weights are [out, in], as in the checkpoints. On a mesh every device quantizes and
multiplies its own rows: no tile holds tokens of two devices.
"""

from deepseek_jax.fp8.blocks import Blocks, shape_of_scales
from deepseek_jax.fp8.e5m6 import E5M6, from_e5m6, to_e5m6
from deepseek_jax.fp8.ffn import swiglu_ffn
from deepseek_jax.fp8.linear import linear
from deepseek_jax.fp8.products import (
    DEFERRED,
    GROUP_ALIGNMENT,
    RECIPE,
    check_here,
    exponents_of,
    powers_of_two,
    quantize_blocks,
    quantize_tiles,
)
from kernels_pallas.api import Quantized, dequantize

__all__ = ["DEFERRED", "E5M6", "GROUP_ALIGNMENT", "RECIPE", "Blocks", "Quantized", "check_here", "dequantize",
           "exponents_of", "from_e5m6", "linear", "powers_of_two", "quantize_blocks", "quantize_tiles",
           "shape_of_scales", "swiglu_ffn", "to_e5m6"]
