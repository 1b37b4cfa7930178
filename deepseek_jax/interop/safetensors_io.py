"""safetensors files, read and written a few rows at a time.

The format: 8 bytes with the length of a JSON header, the header {name: dtype, shape, offsets}, the bytes. A checkpoint
is one file, or several and an index. Read here with `pread` instead of by mapping, because the pages of a mapped file
count as resident memory; and written here because the library needs all tensors of a file in memory.

Headers are not trusted: each is checked in full, against the size of its file, before anything is allocated.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax import io, storage
from deepseek_jax.config import ConfigError, shown
from deepseek_jax.config.model import MOST_EXPERTS

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
          "F8_E8M0": ml_dtypes.float8_e8m0fnu, "I32": "i4", "I64": "i8"}
DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_NAME, _MOST_AXES = 256, 8  # the published ones have up to 63 characters, and 3 axes


class Tensor(NamedTuple):
    """A tensor in a safetensors file: its dtype and shape, and its bytes in the file."""

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

    Args:
      files: the checkpoint to read in a folder that holds two: a .safetensors file, or an index.

    Raises:
      ConfigError: there is no checkpoint, or two; a shard is missing, truncated or damaged, or the index is wrong.
    """

    def __init__(self, folder: str, files: str | None = None):
        self.folder, self.single, self.index = folder, *_start(folder, files)
        self.chosen = files is not None
        self.files, self.tensors, self.metadata, self._open = {}, {}, {}, {}
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            self._read_headers()
            on_error.pop_all()
        self.stacked = {}
        for tensor in [t for t in self.tensors.values() if unstack(t)]:
            self._split(tensor)

    def _read_headers(self):
        where: Any = self._index()
        for file in dict.fromkeys(where.values()) if where is not None else [self.single]:
            found = self._header(file)
            twice = found.keys() & self.tensors.keys()
            if twice:
                raise ConfigError(f"{self.folder}: {min(twice)} is in {self.tensors[min(twice)].file} and in "
                                  f"{file}.")
            self.files[file] = sorted(found, key=lambda name: found[name].offset)
            self.tensors |= found
        places: dict[str, str] = where or {}
        absent = [n for n, file in places.items() if n not in self.tensors or self.tensors[n].file != file]
        if absent:
            raise ConfigError(f"{self.folder}: {self.index} promises {absent[0]} in {places[absent[0]]}, which does "
                              "not hold it.")

    def select(self, named: Callable[[str], str | None]) -> None:
        """Renames every tensor to named(its name), and forgets those whose name that is None.

        Raises ConfigError where two get one name.
        """
        for tensors in (self.tensors, self.stacked):
            for name in list(tensors):
                tensor, new = tensors.pop(name), named(name)
                if new in tensors:
                    raise ConfigError(f"{self.folder} holds {new} twice, once as {name}; fetch the checkpoint again.")
                if new is not None:
                    tensors[new] = tensor._replace(name=new)
        here = {file: [new for name in names if (new := named(name)) is not None] for file, names in self.files.items()}
        self.files = {file: names for file, names in here.items() if names}

    def _split(self, stacked):
        """Replaces a stack of experts by views of its matrices."""
        self.stacked[stacked.name] = self.tensors.pop(stacked.name)
        at = stacked.offset
        for name, shape in unstack(stacked) or ():
            self.tensors[name] = Tensor(name, stacked.dtype, shape, stacked.file, at)
            at += self.tensors[name].nbytes

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop (of a vector: elements) of a tensor, [stop - start, ...] in its dtype; None: to its end."""
        stop = tensor.shape[0] if stop is None else stop
        try:
            out = np.empty((stop - start, *tensor.shape[1:]), tensor.dtype)
        except MemoryError:
            raise ConfigError(f"{os.path.join(self.folder, tensor.file)}: {tensor.name} needs {tensor.nbytes:,} bytes "
                              "of memory, more than there are.") from None
        row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        view, at = memoryview(out.reshape(-1).view(np.uint8)), tensor.offset + start * row
        while view:
            count = storage.read_into(self._open[tensor.file], view, at)
            if not count:
                raise ConfigError(f"{os.path.join(self.folder, tensor.file)} ends inside of {tensor.name}.")
            view, at = view[count:], at + count
        return out

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _index(self) -> Any:
        """{name: file} of the index; None where there is a single file."""
        if self.index is None:
            return None
        path = os.path.join(self.folder, self.index)
        try:
            where = io.read_json(path)["weight_map"]
            names = [_checked_name(name) for name, _ in where.items()]
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path} is not an index of safetensors; fetch it again.") from None
        if not names:
            raise ConfigError(f"{path} names no tensors; fetch it again.")
        # Exporting writes files with the same names, so none may be outside this folder.
        for name, file in where.items():
            if not isinstance(file, str) or os.path.basename(file) != file or not (
                    file.isprintable() and file.endswith(".safetensors")):
                raise ConfigError(f"{path} puts {name} into {shown(file)}, which is no safetensors file of this "
                                  "folder.")
        if not self.chosen and SINGLE not in where.values() and storage.exists(os.path.join(self.folder, SINGLE)):
            raise ConfigError(f"{self.folder} holds two checkpoints, {SINGLE} and the {len(set(where.values()))} files "
                              f"of {INDEX}; convert from-hf takes one of them with --files {SINGLE} or --files "
                              f"{INDEX}.")
        return where

    def _header(self, file):
        """{name: Tensor} of one file; together they cover all of its bytes exactly once."""
        path = os.path.join(self.folder, file)
        try:
            self._open[file] = f = io.open_regular(path)
            size = storage.size(path)
            base, header = _read_header(f, size)
            self.metadata[file] = _metadata(header.pop("__metadata__", None))
            found = {name: self._tensor(file, _checked_name(name), base, **about) for name, about in header.items()}
        except ConfigError:
            raise
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing, but {self.index} names it; fetch it again.") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(f"{path} has no readable header: it is truncated or damaged; fetch it again.") from None
        end = base
        for tensor in sorted(found.values(), key=lambda t: (t.offset, t.nbytes)):
            if tensor.offset != end:
                raise ConfigError(f"{path}: {tensor.name} overlaps what is before it, or leaves a gap; the file is "
                                  "damaged, fetch it again.")
            end += tensor.nbytes
        if end != size:
            raise ConfigError(f"{path} has {size} bytes, and its header says {end}: it is truncated or damaged; fetch "
                              "it again.")
        return found

    def _tensor(self, file, name, base, dtype, shape, data_offsets):
        if dtype not in list(DTYPES):  # a list, since the value may not be hashable
            raise ConfigError(f"{os.path.join(self.folder, file)}: {name} has dtype {shown(dtype)}; known are "
                              f"{', '.join(DTYPES)}.")
        start, stop = data_offsets
        if len(shape) > _MOST_AXES or any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
            raise ValueError("a shape is a few whole numbers, and so are offsets")
        if 0 in shape:  # no published model has such a tensor, and its other sizes could be arbitrary
            raise ConfigError(f"{os.path.join(self.folder, file)}: {name} is {shown(shape)}, which is empty; "
                              "fetch it again.")
        tensor = Tensor(name, DTYPES[dtype], tuple(shape), file, base + start)
        if stop - start != tensor.nbytes:
            raise ValueError("offsets do not fit the shape")
        return tensor


def _start(folder, files) -> tuple[str, str | None]:
    """-> (the single file, the index) that a checkpoint begins with; one of them is "" or None.

    An index that nobody asked for counts before a single file next to it, which `_index` then finds.
    """
    name = files or (INDEX if storage.lexists(os.path.join(folder, INDEX)) else SINGLE)
    if os.path.basename(name) != name or not name.endswith((".safetensors", ".index.json")):
        raise ConfigError(f"--files={shown(name)} is no file name that ends in .safetensors or .index.json; give one "
                          f"of {folder}.")
    if not storage.lexists(os.path.join(folder, name)):
        what = f"no {name}" if files else f"neither {SINGLE} nor {INDEX}"
        raise ConfigError(f"{folder} holds {what}; give the folder of a Hugging Face checkpoint.")
    return (name, None) if name.endswith(".safetensors") else ("", name)


def _read_header(f, size) -> tuple[int, dict]:
    """-> (offset of the first byte after the header, the header). Raises ValueError if there is none."""
    length = int.from_bytes(f.read(8), "little")
    if not 0 < length <= min(size - 8, io.MOST_JSON):
        raise ValueError("the header is as long as nothing there")
    header = io.parse_json(f.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return 8 + length, header


def _metadata(about: Any) -> dict[str, str] | None:
    """A file's metadata, for an export to repeat. Raises ValueError unless all are strings in UTF-8."""
    if about is not None and not all(isinstance(text, str) and text.encode() is not None
                                     for pair in about.items() for text in pair):
        raise ValueError("metadata are strings")
    return about


def _checked_name(name: str) -> str:
    """A tensor's name, checked to be usable in messages and files. Raises ValueError."""
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError("not a name")
    return name


def unstack(tensor: Any) -> list[tuple[str, tuple[int, int]]] | None:
    """The experts' own matrices [(name, shape)] inside a stacked tensor, in the order of its bytes; otherwise None.

    transformers keeps experts as `gate_up_proj` [E, 2 F, D] and `down_proj` [E, D, F], and some files do too.
    """
    root, dot, last = tensor.name.rpartition(".mlp.experts.")
    if not dot or len(tensor.shape) != 3 or last not in ("gate_up_proj", "down_proj"):
        return None
    experts, rows, columns = tensor.shape
    if experts > MOST_EXPERTS:
        return None
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
    """Distributes tensors, in order, over files of at most `limit` bytes: {file: items}."""
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


def header(items: list[Item], about: dict[str, str] | None) -> bytes:
    """The beginning of a file with these tensors: the length of the header, and the header. about: metadata strings;
    None: none."""
    found: dict[str, Any] = {} if about is None else {"__metadata__": about}
    at = 0
    for item in items:
        found[item.name] = {"dtype": SPELLED[item.dtype], "shape": list(item.shape),
                            "data_offsets": [at, at + item.nbytes]}
        at += item.nbytes
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(folder: str, files: dict[str, list[Item]], pieces: Callable[..., Iterable[np.ndarray]],
          metadata: dict[str, Any] | None = None) -> None:
    """Writes the files and, for several, their index.

    Args:
      pieces: Item -> iterable of arrays whose concatenation is its bytes.
      metadata: {file: its metadata strings}.
    """
    for file, items in files.items():
        text = header(items, (metadata or {}).get(file, {"format": "pt"}))
        path = os.path.join(folder, file)
        # Objects are uploaded from files, one at a time.
        place = io.replacing(path) if storage.is_remote(path) else contextlib.nullcontext(path)
        with place as target, open(target, "wb") as f:
            f.write(text)
            for item in items:
                for piece in pieces(item):
                    f.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
            f.flush()
            os.fsync(f.fileno())
            if f.tell() != len(text) + sum(item.nbytes for item in items):
                raise AssertionError(f"{file} has another size than its header says")
    if list(files) != [SINGLE]:
        write_index(folder, files)


def write_index(folder: str, files: dict[str, list[Item]]) -> None:
    """Writes the index of several files."""
    total = sum(item.nbytes for items in files.values() for item in items)
    where = {item.name: file for file, items in files.items() for item in items}
    io.write_json(os.path.join(folder, INDEX), {"metadata": {"total_size": total},
                                                "weight_map": dict(sorted(where.items()))})
