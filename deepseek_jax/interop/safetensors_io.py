"""safetensors files, read and written a few rows at a time.

The format: 8 bytes with the length of a JSON header, the header {name: dtype, shape, offsets}, the bytes. A checkpoint
is one file, or several and an index. Read here with `pread` instead of by mapping, because the pages of a mapped file
count as resident memory; and written here because the library needs all tensors of a file in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax import io
from deepseek_jax.config import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
          "F8_E8M0": ml_dtypes.float8_e8m0fnu}
DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: str
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """All tensors of a checkpoint folder, by name. Reads only headers until `rows` is called.

    Raises:
      ConfigError: no checkpoint there, a shard is missing, truncated or damaged, or the index is wrong.
    """

    def __init__(self, folder: str):
        self.folder = folder
        where: Any = self._index()
        self.files, self.tensors, self.metadata, self._open = {}, {}, {}, {}
        for file in dict.fromkeys(where.values()) if where is not None else [SINGLE]:
            found = self._header(file)
            twice = found.keys() & self.tensors.keys()
            if twice:
                raise ConfigError(f"{folder}: {min(twice)} stands in {self.tensors[min(twice)].file} and in {file}.")
            self.files[file] = sorted(found, key=lambda name: found[name].offset)
            self.tensors |= found
        places: dict[str, str] = where or {}
        absent = [n for n, file in places.items() if n not in self.tensors or self.tensors[n].file != file]
        if absent:
            raise ConfigError(f"{folder}: {INDEX} promises {absent[0]} in {places[absent[0]]}, which does not hold it.")
        self.stacked = {}
        for tensor in [t for t in self.tensors.values() if len(t.shape) == 3 and unstack(t)]:
            self._split(tensor)

    def _split(self, stacked):
        """Replaces a stack of experts by views of its matrices."""
        self.stacked[stacked.name] = self.tensors.pop(stacked.name)
        at = stacked.offset
        for name, shape in unstack(stacked) or ():
            self.tensors[name] = Tensor(name, stacked.dtype, shape, stacked.file, at)
            at += self.tensors[name].nbytes

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop (of a vector: elements) of a tensor."""
        stop = tensor.shape[0] if stop is None else stop
        out = np.empty((stop - start, *tensor.shape[1:]), tensor.dtype)
        row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        view, at = memoryview(out.reshape(-1).view(np.uint8)), tensor.offset + start * row
        while view:
            count = os.preadv(self._open[tensor.file], [view], at)
            if not count:
                raise ConfigError(f"{os.path.join(self.folder, tensor.file)} ends inside of {tensor.name}.")
            view, at = view[count:], at + count
        return out

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _index(self) -> Any:
        """{name: file} of the index; None where there is a single file."""
        path = os.path.join(self.folder, INDEX)
        if not os.path.exists(path):
            if not os.path.exists(os.path.join(self.folder, SINGLE)):
                raise ConfigError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; give the folder of a Hugging "
                                  "Face checkpoint.")
            return None
        try:
            with open(path) as f:
                where = dict(json.load(f)["weight_map"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is not an index of safetensors; fetch it again.") from None
        # Exporting writes files of the same names, so none may be outside this folder.
        for name, file in where.items():
            if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
                raise ConfigError(f"{path} puts {name} into {file!r}, which is no safetensors file of this folder.")
        return where

    def _header(self, file):
        path = os.path.join(self.folder, file)
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as f:
                self._open[file] = os.dup(f.fileno())
                length = int.from_bytes(f.read(8), "little")
                header: Any = json.loads(f.read(length)) if 0 < length < size else None
            self.metadata[file] = header.pop("__metadata__", None)
            found = {name: self._tensor(file, name, 8 + length, **about) for name, about in header.items()}
        except ConfigError:
            raise
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing, but {INDEX} names it; fetch it again.") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(f"{path} has no readable header: it is truncated or damaged; fetch it again.") from None
        end = 8 + length
        for tensor in sorted(found.values(), key=lambda t: (t.offset, t.nbytes)):
            if tensor.offset != end:
                raise ConfigError(f"{path}: {tensor.name} overlaps what lies before it, or leaves a gap; the file is "
                                  "damaged, fetch it again.")
            end += tensor.nbytes
        if end != size:
            raise ConfigError(f"{path} has {size} bytes, and its header says {end}: it is truncated or damaged; fetch "
                              "it again.")
        return found

    def _tensor(self, file, name, base, dtype, shape, data_offsets):
        if dtype not in DTYPES:
            raise ConfigError(f"{os.path.join(self.folder, file)}: {name} has dtype {dtype}; known are "
                              f"{', '.join(DTYPES)}.")
        tensor = Tensor(name, DTYPES[dtype], tuple(shape), file, base + data_offsets[0])
        if data_offsets[1] - data_offsets[0] != tensor.nbytes:
            raise ValueError("offsets do not fit the shape")
        return tensor


def unstack(tensor: Any) -> list[tuple[str, tuple[int, int]]] | None:
    """The experts' own matrices [(name, shape)] inside of a stacked tensor, in the order of its bytes; else None.

    transformers keeps experts as `gate_up_proj` [E, 2 F, D] and `down_proj` [E, D, F], and some files do too.
    """
    root, dot, last = tensor.name.rpartition(".mlp.experts.")
    if not dot or len(tensor.shape) != 3 or last not in ("gate_up_proj", "down_proj"):
        return None
    experts, rows, columns = tensor.shape
    if last == "down_proj":
        return [(f"{root}.mlp.experts.{e}.down_proj.weight", (rows, columns)) for e in range(experts)]
    return [(f"{root}.mlp.experts.{e}.{part}_proj.weight", (rows // 2, columns))
            for e in range(experts) for part in ("gate", "up")]


class Item(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def pack(items: list[Item], limit: int) -> dict[str, list[Item]]:
    """Spreads tensors, in order, over files of at most `limit` bytes: {file: items}."""
    packs, room = [[]], limit
    for item in items:
        if item.nbytes > room and packs[-1]:
            packs.append([])
            room = limit
        packs[-1].append(item)
        room -= item.nbytes
    if len(packs) == 1:
        return {SINGLE: items}
    return {f"model-{n:05d}-of-{len(packs):05d}.safetensors": pack for n, pack in enumerate(packs, 1)}


def write(folder: str, files: dict[str, list[Item]], pieces: Callable[..., Iterable[np.ndarray]],
          metadata: dict[str, Any] | None = None) -> None:
    """Writes the files and, for several, their index.

    Args:
      pieces: Item -> iterable of arrays that together are its bytes.
      metadata: {file: the strings that go with it}.
    """
    for file, items in files.items():
        header, at = {}, 0
        about = (metadata or {}).get(file, {"format": "pt"})
        if about is not None:
            header["__metadata__"] = about
        for item in items:
            header[item.name] = {"dtype": SPELLED[item.dtype], "shape": list(item.shape),
                                 "data_offsets": [at, at + item.nbytes]}
            at += item.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(folder, file), "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for item in items:
                for piece in pieces(item):
                    f.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
            f.flush()
            os.fsync(f.fileno())
            if f.tell() != 8 + len(text) + at:
                raise AssertionError(f"{file} has another size than its header says")
    if list(files) != [SINGLE]:
        total = sum(item.nbytes for items in files.values() for item in items)
        where = {item.name: file for file, items in files.items() for item in items}
        io.write_json(os.path.join(folder, INDEX), {"metadata": {"total_size": total},
                                                    "weight_map": dict(sorted(where.items()))})
