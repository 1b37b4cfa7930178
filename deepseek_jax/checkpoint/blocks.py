"""Leaves of a checkpoint for a model that keeps them in FP8: E4M3 in blocks of 128 x 128."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.arrays import FP8, dequantize, quantize, transposed
from kernels_pallas.constants import BLOCK

# Weights that released checkpoints hold in FP8, with their numbers of input and output axes: heads and head dims are
# separate axes here and one side of the matrix there.
MATRICES = {**dict.fromkeys(("q_a", "kv_a", "wk", "gate", "up", "down"), (1, 1)),
            **dict.fromkeys(("q", "q_b", "kv_b", "wq_b"), (1, 2)), "o": (2, 1)}


class InBlocks:
    """A leaf rounded to FP8, read in parts like `checkpoint.arrays.Stored`.

    leaf: of all weights. A leaf that its checkpoint keeps in FP8 stays bit-identical. inputs, outputs: how many of its
    last axes are inputs, and then outputs.
    """

    scales = None

    def __init__(self, leaf: Any, inputs: int, outputs: int):
        self.leaf, self.shape, self.dtype = leaf, tuple(leaf.shape), leaf.dtype
        self.inputs, self.stack = inputs, len(self.shape) - inputs - outputs
        self.matrix = functools.lru_cache(maxsize=1)(self._matrix)  # the matrix is read in strips, too

    def _matrix(self, place: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """float8_e4m3fn [inputs, outputs] and the float32 scales of its blocks; place: layer, or layer and expert.
        """
        if self.leaf.scales is not None:
            values, scales = (x[place].read().result() for x in (self.leaf.values, self.leaf.scales))
            return transposed(values), scales.astype(np.float32).T
        rest = self.shape[self.stack:]
        w = self.leaf[(*(slice(i, i + 1) for i in place), *[slice(None)] * len(rest))]
        return quantize(np.asarray(w).reshape(math.prod(rest[:self.inputs]), -1))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """NumPy array of the part that a tuple of slices (one an axis, step 1) cuts out."""
        return self.of_matrices(index, self.dtype, lambda place: dequantize(*self.matrix(place), self.dtype))

    def of_matrices(self, index: tuple[slice, ...], dtype: Any, read: Callable[[tuple[int, ...]], np.ndarray],
                    ) -> np.ndarray:
        """The part in `dtype` that `index` cuts out, of the shape of its slices.

        read: from the place of a matrix in the stack, the complete matrix.
        """
        bounds = [range(n)[part] for n, part in zip(self.shape, index, strict=True)]
        out, lead = np.empty([len(b) for b in bounds], dtype), bounds[:self.stack]
        for at, place in zip(np.ndindex(*map(len, lead)), itertools.product(*lead)):
            out[at] = read(place).reshape(self.shape[self.stack:])[index[self.stack:]]
        return out


class Values:
    """The float8_e4m3fn values of an InBlocks, read in parts.

    scales: float32 [..., blocks of inputs, blocks of outputs], of the matrices that parts were read of.
    """

    def __init__(self, leaf: InBlocks):
        rest = leaf.shape[leaf.stack:]
        sides = math.prod(rest[:leaf.inputs]), math.prod(rest[leaf.inputs:])
        self.leaf, self.shape = leaf, leaf.shape
        self.scales = np.zeros((*leaf.shape[:leaf.stack], *(-(-side // BLOCK) for side in sides)), np.float32)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.leaf.of_matrices(index, FP8, self._matrix)

    def _matrix(self, place):
        values, self.scales[place] = self.leaf.matrix(place)
        return values


def in_blocks(leaves: dict[str, Any]) -> dict[str, Any]:
    """{path: leaf}, with those leaves in FP8 that released checkpoints hold in FP8; an InBlocks is kept."""
    def held(path, leaf):
        name = path.rsplit("/", 1)[-1]
        return leaf if name not in MATRICES or isinstance(leaf, InBlocks) else InBlocks(leaf, *MATRICES[name])

    return {path: held(path, leaf) for path, leaf in leaves.items()}
