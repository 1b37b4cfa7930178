"""A policy for sampling as on an FP8 server: with the weights that an FP8 checkpoint of it would hold.

The trainer keeps its own precision, so the two disagree in the same way as with a separate, faster sampler.
"""

import math
from typing import Any

import jax

from deepseek_jax import fp8
from deepseek_jax.checkpoint.blocks import MATRICES


@jax.jit
def as_fp8(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables, with the matrices of all blocks rounded to E4M3 with a scale for each 128 x 128 tile.

    Embedding, head, norms, routers and the MTP projection are not changed, and neither are dtypes.
    """
    def rounded(path, w):
        inputs, outputs = MATRICES.get(path[-1].key, (0, 0))
        if not inputs:
            return w
        stack, rest = w.shape[:w.ndim - inputs - outputs], w.shape[w.ndim - inputs - outputs:]
        matrix = w.reshape(*stack, math.prod(rest[:inputs]), math.prod(rest[inputs:]))
        return fp8.dequantize(fp8.quantize_blocks(matrix), w.dtype).reshape(w.shape)

    return jax.tree_util.tree_map_with_path(rounded, variables)
