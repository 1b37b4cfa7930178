"""Weights of four bits, as compressed-tensors packs them (`pack-quantized`, symmetric, in groups along the input).

Such a weight is three tensors: `weight_packed` int32 [out, in / 8], whose nibbles from the lowest on are value + 8;
`weight_scale` [out, in / 32], one for each group; `weight_shape`, which is [out, in]. The weight is value * scale.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.interop.safetensors_io import Reader, Tensor

GROUP = 32  # values that share a scale
DTYPE = np.dtype(ml_dtypes.int4)  # of the tensor that stands for the three
_PER_WORD = 8
_PACKED, _SCALE, _SHAPE = "_packed", "_scale", "_shape"


class Packed(NamedTuple):
    """The tensors of one weight."""

    values: Tensor
    scales: Tensor


def take(reader: Reader) -> dict[str, Packed]:
    """Replaces the three tensors of each packed weight by one of DTYPE, under the name of the weight.

    Returns:
      {name of the weight: its tensors}.

    Raises:
      ConfigError: one of three is missing, or they do not fit each other.
    """
    found = {}
    for name in [n for n in reader.tensors if n.endswith(f".weight{_PACKED}")]:
        weight = name.removesuffix(_PACKED)
        if weight in reader.tensors:
            raise ConfigError(f"{reader.folder} holds {weight} twice, also as {name}; fetch the checkpoint again.")
        values, scales, shape = (reader.tensors.pop(weight + part, None) for part in (_PACKED, _SCALE, _SHAPE))
        if scales is None or shape is None:
            raise ConfigError(f"{reader.folder}: {name} is without {weight}{_SCALE if scales is None else _SHAPE}; "
                              "fetch the checkpoint again.")
        whole = _shape(reader, values, scales, shape)
        reader.tensors[weight] = Tensor(weight, DTYPE, whole, values.file, values.offset)
        found[weight] = Packed(values, scales)
    parts = {weight + part for weight in found for part in (_SCALE, _SHAPE)}
    whole = {weight + _PACKED: weight for weight in found}
    reader.files = {file: [whole.get(n, n) for n in names if n not in parts] for file, names in reader.files.items()}
    return found


def _shape(reader, values, scales, shape):
    """[out, in] of a weight, as all three of its tensors say."""
    place = f"{os.path.join(reader.folder, values.file)}: {values.name} is {list(values.shape)} in {values.dtype}"
    if values.dtype != np.int32 or len(values.shape) != 2 or values.shape[1] * _PER_WORD % GROUP:
        raise ConfigError(f"{place}, and int4 is packed as [out, in / 8] in int32, with in a multiple of {GROUP}.")
    whole = values.shape[0], values.shape[1] * _PER_WORD
    if scales.shape != (whole[0], whole[1] // GROUP) or scales.dtype.itemsize < 2 or scales.dtype.kind in "iu":
        raise ConfigError(f"{place}, but {scales.name} is {list(scales.shape)} in {scales.dtype}; one scale for each "
                          f"{GROUP} values is [{whole[0]}, {whole[1] // GROUP}].")
    if shape.dtype.kind != "i" or shape.shape != (2,) or tuple(reader.rows(shape).tolist()) != whole:
        raise ConfigError(f"{place}, but {shape.name} does not say {list(whole)}; fetch the checkpoint again.")
    return whole


def unpack(words: np.ndarray, scales: np.ndarray, dtype: Any) -> np.ndarray:
    """Rows of a weight.

    Args:
      words: int32 [rows, in / 8].
      scales: any float type, [rows, in / GROUP].
    Returns:
      [rows, in] in `dtype`: the exact product, rounded once.
    """
    nibbles = np.ascontiguousarray(words, "<i4").view(np.uint8)  # the first value is the low half of the first byte
    values = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(len(words), -1, GROUP).astype(np.float32) - 8
    values *= scales.astype(np.float32)[..., None]
    return values.reshape(len(words), -1).astype(dtype)
