"""Loading a Hugging Face checkpoint, and saving one.

`Checkpoint` matches every tensor of the files to `tensor_map`, checks all of it before a byte of a weight is
used, and then reads rows of any tensor in any dtype, dequantized if needed. Conversion streams through it too.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import fp8
from deepseek_jax.checkpoint.arrays import FP8, dequantize, transposed
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.interop import hf_config, int4, safetensors_io, save, tensor_map
from deepseek_jax.interop.selection import Selection
from deepseek_jax.interop.tensor_map import SCALE
from kernels_pallas.constants import BLOCK

COMPARED = 64 * 2**20  # bytes of a copy that are compared at once


class Checkpoint:
    """A Hugging Face checkpoint folder as our model.

    Args:
      without_mtp: leave its MTP modules out.
      files: which checkpoint, where the folder holds two (see `safetensors_io.Reader`).

    Attributes:
      raw: its config.json, of the language model. cfg: the model, with as many MTP modules as the files hold.
      leaves: {our path: its entries}. shapes: {our path: shape}.
      notes: lines for the user: what was left out, and what the config promised and the files lack.

    Raises:
      ConfigError: anything that keeps it from being read completely and exactly; one line.
    """

    def __init__(self, folder: str, without_mtp: bool = False, files: str | None = None):
        self.raw = hf_config.text_config(hf_config.load(folder))
        hf_config.read(self.raw)  # errors of the config are reported before those of the files
        selection = Selection(self.raw["num_hidden_layers"] if without_mtp else None)
        if without_mtp and self.raw.get("num_nextn_predict_layers"):
            self.raw |= {"num_nextn_predict_layers": 0}
        self.reader = safetensors_io.Reader(folder, files)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.reader.close)
            self.notes = selection.notes(folder, (name for held in self.reader.files.values() for name in held))
            self.reader.select(selection.named)
            self.packed = int4.take(self.reader)
            self._match()
            on_error.pop_all()
        self.leaves = {path: [] for path in self.shapes}
        for entry in self.entries.values():
            if entry.copy_of is None:
                self.leaves[entry.path].append(entry)
        promised = self.raw.get("num_nextn_predict_layers") or 0
        if promised > self.cfg.mtp_depth:
            self.notes.append(f"{folder}: config.json promises {promised} MTP module(s), the files hold "
                              f"{self.cfg.mtp_depth}; going on with {self.cfg.mtp_depth}.")

    def _match(self):
        """Finds a place for every tensor, and a tensor for every place."""
        self.tensors = self.reader.tensors
        self.cfg = hf_config.read(self.raw, self._mtp_depth())
        self.halves = hf_config.halves(self.raw, self.cfg)
        self.shapes = tensor_map.leaves(self.cfg)
        self.entries = tensor_map.entries(self.cfg)
        self._check_names()
        self._check_shapes()
        self._check_copies()

    def is_fp8(self, entry: tensor_map.Entry) -> bool:
        return self.tensors[entry.name].dtype == FP8

    def keeps_fp8(self, path: str) -> bool:
        """Whether a leaf can be kept as FP8 values and scales: all of it is stored so."""
        return all(entry.fp8 and self.is_fp8(entry) for entry in self.leaves[path])

    def dtype_of(self, path: str, asked: Any = None) -> np.dtype:
        """The dtype of a leaf: `asked`, or that of the files (bfloat16 for FP8, int4 and float16); routing is always
        float32."""
        if path.startswith("router/") or path.endswith("router/weight"):
            return np.dtype(np.float32)
        as_bfloat16 = (FP8, int4.DTYPE, np.float16)
        dtypes = (self.tensors[entry.name].dtype for entry in self.leaves[path])
        stored = (jnp.bfloat16 if dtype in as_bfloat16 else dtype for dtype in dtypes)
        return functools.reduce(np.promote_types, map(np.dtype, {asked} if asked is not None else stored))

    def rounding(self, asked: Any = None) -> list[str]:
        """A line for the user if float16 values lose bits when they are read."""
        count = sum(tensor.dtype == np.float16 for tensor in self.tensors.values())
        if not count or (asked is not None and np.dtype(asked) == np.float32):
            return []
        return [f"{self.reader.folder}: {count:,} tensors in float16, in which this model does not compute, are "
                "rounded to bfloat16 as by transformers with dtype=bfloat16; --dtype float32 keeps every bit."]

    def rows(self, entry: tensor_map.Entry, start: int, stop: int, dtype: Any) -> np.ndarray:
        """Rows start..stop of a tensor, [stop - start, ...] in the layout of the file, dequantized and in `dtype`."""
        if entry.name in self.packed:
            words, scales = (self.reader.rows(tensor, start, stop) for tensor in self.packed[entry.name])
            return int4.unpack(words, scales, dtype)
        x = self.reader.rows(self.tensors[entry.name], start, stop)
        if x.dtype == FP8:
            return dequantize(x, self.scales(entry), dtype, start)
        return x.astype(dtype, copy=False)

    def scales(self, entry: tensor_map.Entry) -> np.ndarray:
        return self.reader.rows(self.tensors[entry.name + SCALE])

    def piece(self, entry: tensor_map.Entry, start: int, stop: int, dtype: Any) -> np.ndarray:
        """start..stop along `entry.transform.axis` of our slice of a leaf, in our layout and in `dtype`."""
        unit = entry.transform.unit(entry.slice_shape)
        if self.is_fp8(entry) and entry.fp8 and not self.halves:  # bytes are transposed faster than wider numbers
            values = transposed(self.reader.rows(self.tensors[entry.name], start * unit, stop * unit))
            ours = dequantize(values, self.scales(entry).T, dtype, 0, start * unit)
            return ours.reshape(entry.transform.piece_shape(entry.slice_shape))
        theirs = self.rows(entry, start * unit, stop * unit, dtype)
        return entry.transform.to_ours(theirs, entry.slice_shape, self.halves)

    def part(self, path: str, index: tuple[Any, ...], dtype: Any) -> np.ndarray:
        """The part of a leaf that slices, one an axis, cut out, in `dtype`; reads the rows that it needs."""
        bounds = [range(n)[part] for n, part in zip(self.shapes[path], index, strict=True)]
        out = np.empty([len(b) for b in bounds], dtype)
        for entry in self.leaves[path]:
            stack, rest = bounds[:len(entry.index)], bounds[len(entry.index):]
            if all(i in b for i, b in zip(entry.index, stack)):
                place = tuple(i - b.start for i, b in zip(entry.index, stack))
                out[place] = self._cut(entry, rest, dtype)
        return out

    def kept_part(self, path: str, which: str, index: tuple[Any, ...]) -> np.ndarray:
        """The same of a leaf's FP8 "values" or "scales", as stored: [stack..., rows, columns]."""
        parts = []
        *stack, rows, columns = [range(n)[part] for n, part in zip(self.kept_shape(path, which), index, strict=True)]
        for entry in self.leaves[path]:
            if all(i in b for i, b in zip(entry.index, stack)):
                tensor = self.tensors[entry.name + (SCALE if which == "scales" else "")]
                parts.append(self.reader.rows(tensor, rows.start, rows.stop)[:, columns.start:columns.stop])
        return np.stack(parts).reshape(*map(len, stack), len(rows), len(columns))

    def kept_shape(self, path: str, which: str) -> tuple[int, ...]:
        """The shape of a matrix as it is stored: stacked over layers and experts; which: "values" or "scales"."""
        first = self.leaves[path][0]
        stack = self.shapes[path][:len(first.index)]
        return (*stack, *self.tensors[first.name + (SCALE if which == "scales" else "")].shape)

    def _cut(self, entry, bounds, dtype):
        axis = entry.transform.axis
        along = bounds[axis]
        if self.halves and entry.transform.rope == "matrix":  # all of its rows are reordered together
            along = range(entry.slice_shape[axis])
        piece = self.piece(entry, along.start, along.stop, dtype)
        cut = [slice(b.start, b.stop) for b in bounds]
        cut[axis] = slice(bounds[axis].start - along.start, bounds[axis].stop - along.start)
        return piece[tuple(cut)]

    def _mtp_depth(self):
        """Number of consecutive layers after the main ones with a tensor that only MTP modules have."""
        first = depth = self.raw["num_hidden_layers"]
        own = ("eh_proj", "enorm", "hnorm")
        while any(f"model.layers.{depth}.{name}.weight" in self.tensors for name in own):
            depth += 1
        return depth - first

    def _check_names(self):
        expected = {name for name, entry in self.entries.items() if entry.copy_of is None}
        scales = {name for name in self.tensors if name.endswith(SCALE)}
        lonely = {name for name in scales if name.removesuffix(SCALE) not in self.tensors
                  or self.tensors[name.removesuffix(SCALE)].dtype != FP8}
        bare = {name for name, t in self.tensors.items() if t.dtype == FP8 and name + SCALE not in self.tensors}
        unknown = self.tensors.keys() - self.entries.keys() - scales
        problems = [f"{what}: {tensor_map.listed(which)}" for what, which in (
            ("unknown tensors", unknown), ("missing", expected - self.tensors.keys()),
            ("scales without an FP8 weight", lonely), ("FP8 weights without scales", bare)) if which]
        if problems:
            raise ConfigError(f"{self.reader.folder} does not fit its config.json; {'; '.join(problems)}.")

    def _check_shapes(self):
        for name, tensor in self.tensors.items():
            if name.endswith(SCALE):
                weight = self.tensors[name.removesuffix(SCALE)]
                wanted = tuple(-(-n // BLOCK) for n in weight.shape)
                why = f"the {list(weight.shape)} weight has {list(wanted)} blocks of {BLOCK} x {BLOCK}"
            else:
                wanted = self.entries[name].shape
                why = f"config.json asks for {list(wanted)}"
                if tensor.dtype.kind in "iu":
                    raise ConfigError(f"{os.path.join(self.reader.folder, tensor.file)}: {name} is in {tensor.dtype}, "
                                      "which no weight is; fetch it again.")
            if tensor.dtype == FP8 and len(tensor.shape) != 2:
                raise ConfigError(f"{os.path.join(self.reader.folder, tensor.file)}: {name} is in FP8, but no matrix; "
                                  f"blocks of {BLOCK} x {BLOCK} need one.")
            if tensor.shape != wanted:
                raise ConfigError(f"{os.path.join(self.reader.folder, tensor.file)}: {name} is {list(tensor.shape)}, "
                                  f"but {why}.")

    def _check_copies(self):
        """An MTP module's copies of embedding and head must be the main ones: here they are shared."""
        for name, entry in self.entries.items():
            if entry.copy_of is None or name not in self.tensors:
                continue
            original, rows = self.entries[entry.copy_of], entry.shape[0]
            step = max(COMPARED // (entry.shape[1] * 4), 1)
            for start in range(0, rows, step):
                here, there = (self.rows(e, start, min(start + step, rows), np.float32) for e in (entry, original))
                if not np.array_equal(here, there):
                    raise ConfigError(f"{self.reader.folder}: {name} differs from {entry.copy_of}; this model shares "
                                      "them. Leave the MTP module out: convert from-hf with --without-mtp.")


def load_hf(path: str, dtype: Any = None, mesh: Any = None, keep_fp8: bool = False, sharding: Any = None,
            without_mtp: bool = False) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a Hugging Face checkpoint of DeepSeek-V3, V2, or a model that computes as they do.

    Args:
      path: the folder with config.json and the safetensors files.
      dtype: of parameters and activations, bfloat16 or float32; None: that of the files, bfloat16 for FP8,
        int4 and float16. Routing stays float32.
      mesh: None: the default device. Else every parameter is replicated over it, unless `sharding` says otherwise;
        each device reads its rows only.
      keep_fp8: FP8 weights become {"values": float8_e4m3fn [..., out, in], "scales"} instead of arrays; `dequantized`
        turns them into what the model takes.
      sharding: (path such as "params/layers/ffn/gate", shape) -> jax.sharding.Sharding.
      without_mtp: leave MTP modules out.

    Returns:
      (cfg, {"params", "router"}).

    Raises:
      ConfigError: what is wrong with the checkpoint, in one line.
    """
    if dtype is not None and str(getattr(dtype, "__name__", dtype)) not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype={dtype!r}: parameters are held in bfloat16 or float32.")
    if sharding is None and mesh is not None:
        sharding = lambda path, shape: NamedSharding(mesh, PartitionSpec())
    source = Checkpoint(path, without_mtp)
    with contextlib.closing(source.reader):
        for note in source.notes + source.rounding(dtype):
            print(note, flush=True)
        if keep_fp8 and source.halves:
            raise ConfigError("rope_interleave=false needs rows in another order, so FP8 blocks cannot be kept as "
                              "stored.")
        tree = _read_leaves(source, dtype, keep_fp8, sharding)
    dtype = source.dtype_of("params/embedding", dtype)
    return hf_config.read(source.raw, source.cfg.mtp_depth, "float32" if dtype.itemsize > 2 else "bfloat16"), tree


def _read_leaves(source, dtype, keep_fp8, sharding):
    tree = {"params": {}, "router": {}}
    for leaf in source.shapes:
        if keep_fp8 and source.keeps_fp8(leaf):
            for which in ("values", "scales"):
                read = functools.partial(source.kept_part, leaf, which)
                _put(tree, f"{leaf}/{which}", _array(f"{leaf}/{which}", source.kept_shape(leaf, which), read, sharding))
        else:
            read = functools.partial(source.part, leaf, dtype=source.dtype_of(leaf, dtype))
            _put(tree, leaf, _array(leaf, source.shapes[leaf], read, sharding))
    return tree


def _array(path, shape, read, sharding):
    if sharding is None:  # uncommitted: goes with any mesh
        return jnp.asarray(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding(path, shape), read)


def _put(tree, path, value):
    *parents, key = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[key] = value


def dequantized(cfg: ModelConfig, variables: dict[str, Any], dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Variables with FP8 leaves {"values", "scales"} turned into arrays of `dtype` that the model takes."""
    out = {"params": {}, "router": {}}
    held = save.in_memory(variables)
    for path, shape in tensor_map.leaves(cfg).items():
        leaf = held[path]
        if leaf.scales is not None:
            quantized = fp8.Quantized(jnp.asarray(leaf.values), jnp.asarray(leaf.scales, jnp.float32))
            matrix = fp8.dequantize(quantized, dtype)
            _put(out, path, jnp.swapaxes(matrix, -1, -2).reshape(shape))
        else:
            _put(out, path, leaf.values)
    return out


def save_hf(path: str, cfg: ModelConfig, variables: dict[str, Any], fp8: bool = False) -> None:
    """Writes `variables` as a Hugging Face checkpoint that transformers loads: safetensors, index, config.json.

    Args:
      path: a folder that does not exist yet; it is committed atomically.
      variables: {"params", "router"}; FP8 leaves {"values", "scales"} are written as they are.
      fp8: quantizes, in blocks of 128 x 128, what the released checkpoints hold in FP8.

    Raises:
      ConfigError: the folder exists, no space is left, the variables are not those of `cfg`, or no published model
        family has what it has.
    """
    with save.building(path) as partial:
        save.export(partial, save.Export(cfg, save.in_memory(variables), fp8))
