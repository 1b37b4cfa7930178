"""Frozen weights that are kept in FP8 as in released checkpoints, and read in the dtype of the model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from kernels_pallas.api import Quantized, dequantize
from kernels_pallas.constants import BLOCK


class Blocks(NamedTuple):
    """A weight [..., I, ..., O, ...] in E4M3, with a scale for each block of 128 x 128 of its matrix of inputs and
    outputs. It replaces a frozen weight in the parameters.

    values: float8_e4m3fn, in the weight's own axes. scales: float32 [..., ceil(inputs / 128), ceil(outputs / 128)],
    after the axes of layers and experts.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantized(self, dtype: Any, inputs: int = 1) -> jax.Array:
        """The weight in `dtype`, multiplied in float32 and rounded once. inputs: its number of input axes."""
        stack = self.scales.ndim - 2
        lead, rest = self.shape[:stack], self.shape[stack:]
        matrix = self.values.reshape(*lead, math.prod(rest[:inputs]), math.prod(rest[inputs:]))
        return dequantize(Quantized(matrix, self.scales), dtype).reshape(self.shape)


def shape_of_scales(shape: tuple[int, ...], inputs: int, outputs: int) -> tuple[int, ...]:
    """The matrix of a weight of `shape`, whose last axes are that many input and output axes."""
    stack = len(shape) - inputs - outputs
    sides = math.prod(shape[stack:stack + inputs]), math.prod(shape[stack + inputs:])
    return *shape[:stack], *(-(-side // BLOCK) for side in sides)
