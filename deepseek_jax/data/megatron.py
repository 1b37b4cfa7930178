"""Token ids as Megatron-LM's preprocess_data.py writes them: NAME.idx, an index, and NAME.bin, the ids (no jax here).

    "MMIDIDX\\0\\0"  version uint64 = 1  code of the ids' dtype uint8  sequences uint64  documents + 1 uint64
    int32 [sequences] lengths    int64 [sequences] bytes before each in NAME.bin
    int64 [documents + 1] sequences before each document

All little-endian; a document has one or more sequences (sentences, if --split-sentences was given).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.config import ConfigError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats


class Index(NamedTuple):
    """The arrays of an index, mapped. dtype: of the ids."""

    dtype: np.dtype
    lengths_S: np.ndarray
    pointers_S: np.ndarray
    first_D: np.ndarray  # first sequence of each document, and the total


def ids_file(path: str) -> str:
    """NAME.bin of NAME.idx."""
    return path.removesuffix(".idx") + ".bin"


def index_of(path: str) -> str | None:
    """The index of a source given as NAME.bin, or as NAME like Megatron-LM's --data-path; None: neither."""
    if path.endswith(".bin"):
        path = path.removesuffix(".bin")
    elif os.path.lexists(path):
        return None
    return path + ".idx" if os.path.isfile(path + ".idx") else None


def read_index(path: str) -> Index:
    """Raises ValueError for a file that is not such an index, ConfigError if it is damaged or lacks its NAME.bin."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        head = f.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError("is not an index of Megatron-LM (MMIDIDX)")  # other programs use this extension too
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise ConfigError(f"{path} has version {version} and dtype code {code}; this program reads version 1 and ids "
                          f"of codes {', '.join(map(str, _DTYPES))}.")
    ends = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * documents]).tolist()
    if size < ends[-1] or not documents:
        raise ConfigError(f"{path} is cut off: {size:,} bytes, and its {sequences:,} sequences take {ends[-1]:,}.")
    arrays = [np.memmap(path, dtype, "r", offset, count) if count else np.zeros(0, dtype)
              for dtype, offset, count in zip(("<i4", "<i8", "<i8"), ends, (sequences, sequences, documents))]
    index = Index(np.dtype(_DTYPES[code]), *arrays)
    _check(path, index, sequences)
    return index


def _check(path, index, sequences):
    ids = ids_file(path)
    if not os.path.isfile(ids):
        raise ConfigError(f"there is no {ids}, which {path} is the index of; put it there.")
    end = sequences and int(index.pointers_S[-1]) + int(index.lengths_S[-1]) * index.dtype.itemsize
    if os.path.getsize(ids) < end:
        raise ConfigError(f"{ids} is cut off: {os.path.getsize(ids):,} bytes of the {end:,} that its index has.")
    if int(index.first_D[0]) != 0 or int(index.first_D[-1]) > sequences:
        raise ConfigError(f"{path} has documents of sequences {index.first_D[0]} to {index.first_D[-1]}, and there are "
                          f"{sequences}; write it again.")


def read_ids(path: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(number, ids) of the documents from `start` to `stop`. Raises as `read_index` does."""
    index = read_index(path)
    file = ids_file(path)
    ids = np.memmap(file, index.dtype, "r") if os.path.getsize(file) else np.zeros(0, index.dtype)
    for document in range(start, len(index.first_D) - 1 if stop is None else stop):
        first, end = index.first_D[document:document + 2].tolist()
        if not 0 <= first <= end:
            raise ConfigError(f"{path} has a document of sequences {first} to {end}; write it again.")
        begins = index.pointers_S[first:end] // index.dtype.itemsize
        parts = [ids[b:b + n] for b, n in zip(begins.tolist(), index.lengths_S[first:end].tolist())]
        if [len(part) for part in parts] != index.lengths_S[first:end].tolist():
            raise ConfigError(f"{path} has sequences that are not in {file}; write both again.")
        yield document, np.concatenate([*parts, np.zeros(0, index.dtype)]).astype(np.int64)
