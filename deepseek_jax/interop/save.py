"""Writing Hugging Face checkpoints, a few rows of one tensor at a time.

If a layout is known (`hf_layout.json` of a converted checkpoint) every tensor gets its original name, dtype and file;
otherwise tensors are written in the order of the layers, in files of at most 5 GB.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from deepseek_jax import io, storage
from deepseek_jax.checkpoint.arrays import FP8, quantize
from deepseek_jax.config import ConfigError
from deepseek_jax.interop import hf_config, safetensors_io, tensor_map
from deepseek_jax.interop.tensor_map import SCALE
from kernels_pallas.constants import BLOCK

SHARD = 5 * 10**9  # bytes a file


class Held:
    """A leaf in memory, with the interface of `checkpoint.arrays.Stored`."""

    def __init__(self, values, scales=None):
        self.values, self.scales, self.dtype, self.shape = values, scales, np.dtype(values.dtype), values.shape

    def __getitem__(self, index):
        return np.asarray(self.values)[index]  # on a CPU a view; slicing a jax.Array would compile for every shape


def in_memory(variables: dict[str, Any]) -> dict[str, Held]:
    """{path: leaf} of nested dicts; {"values", "scales"} is one leaf."""
    found = {}

    def visit(node, path):
        if hasattr(node, "keys") and node.keys() == {"values", "scales"}:
            found[path] = Held(node["values"], node["scales"])
        elif hasattr(node, "items"):
            for name, child in node.items():
                visit(child, f"{path}/{name}" if path else name)
        else:
            found[path] = Held(node)

    visit(variables, "")
    return found


def _read(array, index):
    """A NumPy array of a part of a NumPy, JAX or TensorStore array."""
    return array[index].read().result() if hasattr(array, "read") else np.asarray(array)[index]


def _check_leaves(shapes, leaves):
    """Checks names and shapes: otherwise layers beyond the config's would be dropped silently."""
    missing, unknown = shapes.keys() - leaves.keys(), leaves.keys() - shapes.keys()
    if missing or unknown:
        raise ConfigError(f"the variables do not fit the model; missing: "
                          f"{tensor_map.listed(missing) or 'none'}, unknown: "
                          f"{tensor_map.listed(unknown) or 'none'}.")
    for path, shape in shapes.items():
        if leaves[path].scales is None and tuple(leaves[path].shape) != tuple(shape):
            raise ConfigError(f"the variables do not fit the model: {path} is {list(leaves[path].shape)}, and the "
                              f"config asks for {list(shape)}.")


class Export:
    """The files of an export, and the source of each tensor in them.

    Args:
      leaves: {our path: Held or Stored}.
      fp8: quantize weights that are FP8 in released checkpoints, unless they already are.
      layout: the `hf_layout.json` of the checkpoint that this was converted from, or None.
      power_of_two: weights quantized by `fp8` get scales that are powers of two.
      dtype: of weights not in FP8, and of all weights without `fp8`; None: as in the layout, or as stored. Routing
        biases are always float32, as in the released checkpoints.

    Raises:
      ConfigError: the leaves are not those of `cfg`, in name or shape.
    """

    def __init__(self, cfg, leaves, fp8=False, layout=None, dtype=None, power_of_two=False):
        _check_leaves(tensor_map.leaves(cfg), leaves)
        self.cfg, self.leaves, self.fp8, self.layout, self.power_of_two = cfg, leaves, fp8, layout, power_of_two
        self.dtype = None if dtype is None else np.dtype(dtype)
        self.entries = tensor_map.entries(cfg)
        self.raw = None if layout is None else layout["config"]
        self.halves = 0 if layout is None else hf_config.halves(layout["config"], cfg)
        self._scales = {}  # scales of quantized tensors, until they are written

    def files(self) -> dict[str, list[safetensors_io.Item]]:
        """The files to write and the tensors in them, in order."""
        if self.layout is None:
            items = [item for entry in self.entries.values() for item in self._items(entry)]
            return safetensors_io.pack(items, SHARD)
        files = {}
        for file, tensors in self.layout["files"].items():
            files[file] = [item for name, dtype, shape in tensors
                           for item in self._as_before(name, safetensors_io.DTYPES[dtype], tuple(shape))]
        return files

    def quantized(self) -> bool:
        return any(item.dtype == FP8 for items in self.files().values() for item in items)

    def pieces(self, item: Any) -> Iterator[np.ndarray]:
        """Arrays whose concatenation is the bytes of `item`."""
        if item.name.endswith(SCALE):
            yield self._scale(self.entries[item.name.removesuffix(SCALE)]).astype(item.dtype, copy=False)
            return
        for name, _ in safetensors_io.unstack(item) or [(item.name, item.shape)]:
            entry = self.entries[name]
            if self._kept(entry):
                yield _read(self.leaves[entry.path].values, entry.index)
            elif item.dtype == FP8:
                yield from self._quantized(entry)
            else:
                for piece in self._rows(entry):
                    yield piece.astype(item.dtype, copy=False)

    def _kept(self, entry):
        """Whether its FP8 values are exported unchanged."""
        return self.leaves[entry.path].scales is not None and (self.dtype is None or self.fp8)

    def _items(self, entry, before=None):
        """The tensor of one entry, and its scales. `before`: its dtype in the checkpoint it once came from."""
        held = self.leaves[entry.path].dtype
        if not self._kept(entry) and not (self.fp8 and entry.fp8):
            # Tensors that were widened when read get their dtype back; narrowed ones stay as stored.
            if self.dtype is not None:
                held = np.dtype(np.float32) if entry.path.startswith("router/") else self.dtype
            elif before is not None and before != FP8 and np.can_cast(before, held):
                held = before
            return [safetensors_io.Item(entry.name, held, entry.shape)]
        blocks = tuple(-(-n // BLOCK) for n in entry.shape)
        scales = np.dtype(self.leaves[entry.path].scales.dtype.name if self._kept(entry) else np.float32)
        return [safetensors_io.Item(entry.name, FP8, entry.shape),
                safetensors_io.Item(entry.name + SCALE, scales, blocks)]

    def _as_before(self, name, dtype, shape):
        """A tensor of the layout, as it can be written now."""
        before = safetensors_io.Item(name, dtype, shape)
        stacked = safetensors_io.unstack(before)
        if name.endswith(SCALE):
            weight = self.entries[name.removesuffix(SCALE)]
            return [item for item in self._items(weight, FP8) if item.name == name]
        if stacked:
            items = [item for part, _ in stacked for item in self._items(self.entries[part], dtype)]
            whole = len(items) == len(stacked)  # scales have no place in a stack
            return [safetensors_io.Item(name, items[0].dtype, shape)] if whole else items
        items = self._items(self.entries[name], dtype)
        return items[:1] if dtype == FP8 else items

    def _rows(self, entry):
        """Their rows, one piece at a time, in the stored dtype."""
        leaf, transform = self.leaves[entry.path], entry.transform
        end, step = entry.slice_shape[transform.axis], entry.steps(leaf.dtype.itemsize)
        for start in range(0, end, step):
            cut = [slice(None)] * len(entry.slice_shape)
            cut[transform.axis] = slice(start, min(start + step, end))
            part = leaf[(*(slice(i, i + 1) for i in entry.index), *cut)]
            yield transform.to_theirs(part[(0,) * len(entry.index)], entry.slice_shape, self.halves)

    def _quantized(self, entry):
        values, scales = zip(*(quantize(rows, self.power_of_two) for rows in self._rows(entry)))
        self._scales[entry.name] = np.concatenate(scales)
        yield from values

    def _scale(self, entry):
        if self._kept(entry):
            return _read(self.leaves[entry.path].scales, entry.index)
        if entry.name not in self._scales:  # its file comes before that of the values
            for _ in self._quantized(entry):
                pass
        return self._scales.pop(entry.name)


def export(folder: str, source: Export, special: dict[str, int] | None = None,
           progress: Callable[[int], Any] = lambda count: None) -> None:
    """Writes the safetensors files and, last, config.json into `folder`.

    Args:
      special: bos_token_id and eos_token_id for config.json.
      progress: called with the bytes of every piece.
    """
    layout, dtype = source.layout, (source.dtype or source.leaves["params/embedding"].dtype).name
    if layout is None:
        raw = hf_config.write(source.cfg, dtype, source.quantized(), special)
    else:
        raw = hf_config.again(layout["config"])
        narrowed = (raw.get("dtype") or raw.get("torch_dtype")) == "float16" and dtype == "bfloat16"
        if source.dtype is not None or narrowed:
            raw |= {name: dtype for name in ("dtype", "torch_dtype") if name in raw} or {"torch_dtype": dtype}
        before = raw.pop("quantization_config", None) or {}
        if source.quantized():
            raw["quantization_config"] = before if before.get("quant_method") == "fp8" else hf_config.QUANTIZATION
    if source.power_of_two and source.quantized():
        raw["quantization_config"] = raw["quantization_config"] | hf_config.POWER_OF_TWO

    def pieces(item):
        for piece in source.pieces(item):
            progress(piece.nbytes)
            yield piece

    safetensors_io.write(folder, source.files(), pieces, layout and layout["metadata"])
    io.write_json(os.path.join(folder, "config.json"), raw)


@contextlib.contextmanager
def building(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary folder that is renamed to `path` at the end, and removed after an error. In a bucket it is `path`
    itself: the caller writes last the file that commits it.

    Raises:
      ConfigError: `path` exists, cannot be made, or the disk is full.
    """
    path = storage.absolute(path)
    if storage.lexists(path):
        raise ConfigError(f"{path} exists already; take another destination, or remove it first.")
    if storage.is_remote(path):
        storage.check_writable(path)
        try:
            yield path
        except BaseException:
            with contextlib.suppress(storage.StorageError):
                storage.remove(path)
            raise
        return
    try:
        with io.building(path) as partial:
            yield partial
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "no space left on the disk" if full else error.strerror or str(error)
        raise ConfigError(f"{path} could not be written: {why}; nothing is left there.") from error
