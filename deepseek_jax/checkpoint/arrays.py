"""Arrays of checkpoints: zarr (version 3) folders whose chunks are plain bytes.

In a run, a chunk is the part of an array on one device, or a part of that (`chunks`); in a conversion it is one matrix
of one layer and expert, or some rows of it, so that it is written in one pass without a stacked array in memory. Any
part of an array can be read from either. `meta.json` names the folder of such a leaf:

    {"shape", "dtype", "zarr": folder}        or, kept in FP8,        {..., "zarr": values, "scales": folder, "inputs"}

FP8 values stay [..., out, in] as in released checkpoints, with a scale for each block of 128 x 128; they are
dequantized, transposed and split into our axes as they are read. `inputs` is the number of our axes that form the
checkpoint's `in`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import tensorstore

from deepseek_jax import io, storage
from deepseek_jax.checkpoint.manifest import read_checked
from deepseek_jax.config import ConfigError
from kernels_pallas.constants import BLOCK

if TYPE_CHECKING:
    import jax

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT_OF_BYTE = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def dequantize(values: np.ndarray, scales: np.ndarray, dtype: Any, first_row: int = 0,
               first_column: int = 0) -> np.ndarray:
    """values[r, c] * scales[block of r, block of c], multiplied in float32, rounded once.

    Args:
      values: float8_e4m3fn [rows, columns], a part of a matrix that begins at (first_row, first_column).
      scales: of the complete matrix, any float type; blocks at its right and lower edge may be smaller.
    """
    out = np.empty(values.shape, dtype)
    columns = (first_column + np.arange(values.shape[1])) // BLOCK
    start = 0
    while start < len(out):
        block = (first_row + start) // BLOCK
        stop = min((block + 1) * BLOCK - first_row, len(out))
        strip = np.empty((stop - start, values.shape[1]), np.float32)
        np.take(_FLOAT_OF_BYTE, values[start:stop].view(np.uint8), out=strip, mode="clip")  # a faster mode
        strip *= scales[block].astype(np.float32)[columns][None]
        out[start:stop] = strip
        start = stop
    return out


def quantize(w: np.ndarray, power_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 blocks of 128 x 128 (report section 3.3.2): scale = amax / 448, with amax at least 1e-4.

    Args:
      w: [rows, columns], any float type; edge blocks may be ragged.
      power_of_two: round the scale up to a power of two, as in V3.1 (`scale_fmt: ue8m0`).
    Returns:
      float8_e4m3fn values, float32 scales [ceil(rows / 128), ceil(columns / 128)] that multiply.
    """
    rows, columns = w.shape
    padded = np.zeros((-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK), np.float32)
    padded[:rows, :columns] = w
    blocks = padded.reshape(len(padded) // BLOCK, BLOCK, -1, BLOCK)
    scales = np.maximum(np.abs(blocks).max(axis=(1, 3)), np.float32(1e-4)) / np.float32(448)
    if power_of_two:
        fraction, exponent = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    values = (blocks / scales[:, None, :, None]).astype(FP8)
    return values.reshape(padded.shape)[:rows, :columns], scales


def transposed(x: np.ndarray) -> np.ndarray:
    """A contiguous transpose [N, M] of a matrix [M, N] of any dtype, by strips of rows that fit the cache."""
    bits = x.view(f"u{x.itemsize}")
    out = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), BLOCK):
        out[:, start:start + BLOCK] = bits[start:start + BLOCK].T
    return out.view(x.dtype)


class Writer:
    """Writes the chunks of one array, in any order and from any thread.

    Args:
      folder: of this array, inside of `root`, which may be an address.
      prints: {file relative to root: [length, CRC32]}, extended by every file, for `manifest.commit`.
      describes: write zarr.json, as one of several writers of an array does.
    """

    # Seven parameters: an array's path and description, and where its checksums go.
    def __init__(self, root, folder, shape, chunk, dtype, prints, describes=True):
        self.root, self.folder, self.chunk, self.dtype, self.prints = root, folder, chunk, np.dtype(dtype), prints
        grid = {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}
        endian = {"configuration": {"endian": "little"}} if self.dtype.itemsize > 1 else {}
        if not storage.is_remote(root):
            os.makedirs(os.path.join(root, folder), exist_ok=True)  # by each of the array's writers
        if not describes:
            return
        self._file("zarr.json", json.dumps({
            "zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": self.dtype.name,
            "chunk_grid": grid, "fill_value": np.zeros((), self.dtype).item(),
            # One folder per array: nested ones would mean a folder per chunk.
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", **endian}]}).encode())

    def write(self, index: tuple[Any, ...], data: np.ndarray) -> None:
        """Writes chunk `index`; `data` may be shorter than a chunk along one axis, at the array's edge."""
        if data.shape != self.chunk:  # on disk every chunk has the full size
            whole = np.zeros(self.chunk, self.dtype)
            whole[tuple(map(slice, data.shape))] = data
            data = whole
        self._file(".".join(["c", *map(str, index)]), np.ascontiguousarray(data).reshape(-1).view(np.uint8))

    def _file(self, name, data):
        name = os.path.join(self.folder, name)
        self.prints[name] = [len(data), zlib.crc32(data)]
        if storage.is_remote(self.root):
            storage.put(os.path.join(self.root, name), data)
            return
        with open(os.path.join(self.root, name), "wb", buffering=0) as f:
            view = memoryview(data)
            while view:
                view = view[f.write(view):]
            os.fsync(f.fileno())


class Stored:
    """A leaf of a checkpoint, converted or trained; slices are read on demand, and verified as they are read.

    Args:
      path: of the checkpoint.
      leaf: the leaf's entry in meta.json.
      files: `manifest.files_of` the checkpoint.
      name: of the leaf, as in Orbax.
    Raises:
      DamagedError: here or in reading, for a file that differs from what was written. Orbax's files are not checked.
    """

    def __init__(self, path, leaf, files, name):
        self.shape, self.dtype = tuple(leaf["shape"]), np.dtype(leaf["dtype"])
        self.values = _open_orbax(path, name) if "orbax" in leaf else _open(path, leaf["zarr"], files)
        self.scales = _open(path, leaf["scales"], files) if "scales" in leaf else None
        self.inputs = leaf.get("inputs", 0)

    def __getitem__(self, index):
        """NumPy array of the part that a tuple of slices (one an axis, step 1) cuts out."""
        bounds = [range(n)[part] for n, part in zip(self.shape, index, strict=True)]
        if self.scales is None:
            return self.values[tuple(slice(b.start, b.stop) for b in bounds)].read().result()
        stack = self.values.rank - 2
        parts = [self._dequantized(place, bounds[stack:]) for place in itertools.product(*bounds[:stack])]
        return np.stack(parts).reshape([len(b) for b in bounds])

    def _dequantized(self, place, bounds):
        """The part `bounds`, in our axes, of the matrix at `place` in the stack."""
        shape = self.shape[len(place):]
        assert self.scales is not None
        ours, theirs = [], []  # per side (in, out): the cut from the values read, and the range to read
        for low, high in ((0, self.inputs), (self.inputs, len(shape))):
            inner = math.prod(shape[low + 1:high])  # the outermost axis is cut while reading, the others afterwards
            theirs.append((bounds[low].start * inner, bounds[low].stop * inner))
            ours += [slice(None), *(slice(b.start, b.stop) for b in bounds[low + 1:high])]
        (c0, c1), (r0, r1) = theirs
        values = self.values[(*place, slice(r0, r1), slice(c0, c1))].read().result()
        scales = self.scales[place].read().result()
        matrix = dequantize(transposed(values), scales.T, self.dtype, c0, r0)  # transposing bytes is faster
        outer: dict[int, int] = {0: len(bounds[0]), self.inputs: len(bounds[self.inputs])}
        return matrix.reshape([outer.get(axis, int(n)) for axis, n in enumerate(shape)])[tuple(ours)]


def _open(path, folder, files):
    """An array that `Writer` wrote. Chunks are read completely, since a checksum covers all of a chunk's bytes."""
    about = io.parse_json(read_checked(path, os.path.join(folder, "zarr.json"), files))
    chunk, dtype = about["chunk_grid"]["configuration"]["chunk_shape"], np.dtype(about["data_type"])

    def read(domain, out, _):
        index = [first // size for first, size in zip(domain.inclusive_min, chunk)]
        data = read_checked(path, os.path.join(folder, ".".join(map(str, ["c", *index]))), files)
        begins = [first - i * size for first, i, size in zip(domain.inclusive_min, index, chunk)]
        part = tuple(slice(begin, begin + length) for begin, length in zip(begins, domain.shape))
        out[...] = np.frombuffer(data, dtype).reshape(chunk)[part]

    return tensorstore.virtual_chunked(
        read, dtype=dtype, shape=about["shape"], chunk_layout=tensorstore.ChunkLayout(read_chunk_shape=chunk),
        context=tensorstore.Context({"data_copy_concurrency": {"limit": storage.THREADS}}))


def check_on_disk(path: str | os.PathLike[str]) -> None:
    """Raises ConfigError for the address of a checkpoint that Orbax wrote, before format 2."""
    if storage.is_remote(path):
        raise ConfigError(f"{os.fspath(path)} was written by Orbax, and is read from disks alone; copy the run to one.")


def _open_orbax(path, name):
    """Opens Orbax's array, which has a chunk for each device that wrote it; chunks stay cached between parts."""
    check_on_disk(path)
    base = "file://" + os.path.join(os.fspath(path), "state", "")
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
            "recheck_cached_data": False, "context": {"cache_pool": {"total_bytes_limit": 2**30}}}
    return tensorstore.open(spec, read=True).result()


def as_numpy(read: Callable[..., Any]) -> Callable[..., Any]:
    """`read`, whose arrays are NumPy arrays in the host's memory; no accelerator ever holds them."""
    import jax

    def on_host(*args):
        try:
            host = jax.default_device(jax.local_devices(backend="cpu")[0])
        except RuntimeError:  # JAX_PLATFORMS names only the accelerator
            host = contextlib.nullcontext()
        with host:
            return jax.device_get(read(*args))

    return on_host


def restore(stored: Any, wanted: Any) -> jax.Array:
    """The jax.Array that `wanted` (jax.ShapeDtypeStruct) describes, cast to its dtype; each device reads its part.

    stored: a Stored, or an object with a shape that can be sliced like a NumPy array.
    """
    import jax
    import jax.numpy as jnp

    parts = {}

    def part(index):
        place = tuple((cut.start, cut.stop) for cut in index)
        if place not in parts:  # if several devices hold the same part
            parts[place] = stored[index].astype(wanted.dtype, copy=False)
        return parts[place]

    sharding = getattr(wanted, "sharding", None)
    if sharding is None:  # uncommitted: can be used with any mesh
        return jnp.asarray(part((slice(None),) * len(stored.shape)))
    return jax.make_array_from_callback(stored.shape, sharding, part)
