"""A state as zarr chunks: each is a part of an array, as plain bytes in a file or in an object of a bucket.

    checkpoints/STEP/meta.json   state-ID/params.embedding/zarr.json  c.0.0  c.1.0 ...   manifest.json, written last

Every process writes the chunks that its devices hold and computes their checksums while writing; process 0 joins the
lists and reads nothing back. Each attempt to save has a new ID: a request of an attempt that timed out may still reach
a store after the next attempt has finished. States on the machines themselves (`local`) have one ID per start.

Orbax's OCDBT is not used: it has checksums of its index only, and returns a value with a flipped bit without an error.
Orbax does not write s3:// either.
"""

from __future__ import annotations

import collections
import functools
import math
import pathlib
import uuid
from typing import Any

import jax
import numpy as np

from deepseek_jax import io, storage
from deepseek_jax.checkpoint.arrays import Writer
from deepseek_jax.checkpoint.exchange import Incoming, Pairs
from deepseek_jax.parallel.coordinator import wait_for_all

CHUNK = 64 << 20  # maximum bytes of an object, unless a row is larger: several are uploaded at once


class Save:
    """The part of a state that this process writes. It is copied to the host here, so that its buffers may be donated.

    Args:
      folder: of the checkpoint, or its address.
      state: name of the arrays' folder in it; the same in all processes, and in a bucket a new one for each attempt.
      arrays: {name: jax.Array or NumPy array}, none of them empty.
      alone: this process writes everything that its devices hold, independently of the others.
    """

    def __init__(self, folder: pathlib.Path, state: str, arrays: dict[str, Any], alone: bool = False):
        self.folder, self.state, self.alone = folder, state, alone or jax.process_count() == 1
        self.held = {_place(state, name): (array.shape, array.dtype, _chunk(array), _parts(array, alone))
                     for name, array in arrays.items()}

    def of_neighbour(self, folder: pathlib.Path, arrays: dict[str, Any], pairs: Pairs) -> Save:
        """The same for the devices of another process: in each pair the second process gets the first one's data. All
        processes call this, and each of them is in two pairs.

        arrays: as for this process.
        """
        giver = {taker: giver for giver, taker in pairs}[jax.process_index()]
        layouts = {_place(self.state, name): _layout(array.sharding, array.shape) for name, array in arrays.items()
                   if _is_spread(array)}
        held = {place: (shape, dtype, chunk, [(start, np.empty(size, dtype)) for start, size in layouts[place][giver]])
                if place in layouts else (shape, dtype, chunk, parts)
                for place, (shape, dtype, chunk, parts) in self.held.items()}
        spread = (array for array in arrays.values() if _is_spread(array))
        most = _most(tuple((array.sharding, array.shape, array.dtype) for array in spread))
        given = lambda held: (_bytes(part) for place in layouts for _, part in held[place][-1])
        incoming = Incoming(pairs, most, given(self.held))
        for buffer in given(held):
            incoming.fill(buffer)
        incoming.finish()
        copy = Save(folder, self.state, {}, alone=True)
        copy.held = held
        return copy

    def write(self, name: str) -> dict[str, list[int]] | None:
        """Writes it. Returns {file: [length, CRC32]}: with `alone` of this process's files; otherwise in process 0 of
        all files, and None in the others.

        name: of this attempt, the same in all processes and new each time.
        """
        first, prints = self.alone or jax.process_index() == 0, {}
        own = [(place, *about) for place, about in self.held.items() if first or about[-1]]
        open_ = lambda place, shape, dtype, chunk: Writer(str(self.folder), place, shape, chunk, dtype, prints, first)
        writers = storage.in_parallel(lambda about: open_(*about[:-1]), own)
        storage.in_parallel(lambda job: job[0].write(*job[1:]), [
            (writer, index, piece) for writer, (*_, chunk, parts) in zip(writers, own)
            for start, part in parts for index, piece in _cut(start, part, chunk)])
        if self.alone:
            return prints
        lists = self.folder / f"{self.state}.prints"
        storage.make_folder(lists)
        io.write_json(lists / f"{jax.process_index()}.json", prints, indent=None)
        wait_for_all(name)
        if not first:
            return None
        for found in storage.in_parallel(io.read_json, [lists / f"{i}.json" for i in range(jax.process_count())]):
            prints |= found
        storage.remove(lists)
        return prints


def new_state() -> str:
    """A name for the arrays of an attempt to save."""
    return f"state-{uuid.uuid4().hex[:12]}"


def describe(state: str, leaves: dict[str, dict[str, Any]], arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: the leaf's entry in meta.json, with its array's folder}. Raises ValueError if names collide."""
    places = {name: _place(state, name) for name in arrays}
    if len(set(places.values())) != len(places):
        raise ValueError("two leaves of the state have the same name with dots for slashes; rename one.")
    return {name: leaf | ({"zarr": places[name], "exact": True} if name in places else {})
            for name, leaf in leaves.items()}


def _place(state, name):
    return f"{state}/{name.replace('/', '.')}"


def _parts(array, alone) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """[(first index, copy)] of the parts of an array that this process writes: with `alone` every part on its devices,
    otherwise each part is written by one process only."""
    if not alone and jax.process_index() and not _is_spread(array):
        return []
    if not isinstance(array, jax.Array):
        return [((0,) * array.ndim, np.array(array))]
    own = {_begin(shard.index): shard for shard in array.addressable_shards if alone or shard.replica_id == 0}
    for shard in own.values():
        shard.data.copy_to_host_async()
    return [(start, np.array(own[start].data)) for start in sorted(own)]


def _is_spread(array):
    """Whether other processes hold the array too, or other parts of it."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def _begin(index):
    return tuple(part.start or 0 for part in index)


@functools.cache
def _layout(sharding, shape) -> dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """{process: [(first index, shape)] of the parts that its devices hold, in the order of `_parts`}."""
    size, found = sharding.shard_shape(shape), {}
    for device, index in sharding.devices_indices_map(shape).items():
        found.setdefault(device.process_index, set()).add(_begin(index))
    return {process: [(start, size) for start in sorted(starts)] for process, starts in found.items()}


@functools.cache
def _most(spread) -> int:
    """Bytes of the process whose devices hold the most. spread: sharding, shape and dtype of each array."""
    held: collections.Counter[int] = collections.Counter()
    for sharding, shape, dtype in spread:
        for process, parts in _layout(sharding, shape).items():
            held[process] += sum(math.prod(size) for _, size in parts) * dtype.itemsize
    return max(held.values(), default=0)


def _bytes(part):
    return part.reshape(-1).view(np.uint8)


def _chunk(array) -> tuple[int, ...]:
    """The shape of an array's chunks: a device's part, or a piece of it of at most CHUNK bytes."""
    chunk = list(array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape)
    for axis, length in enumerate(chunk):
        pieces = -(-int(np.prod(chunk, dtype=np.int64)) * array.dtype.itemsize // CHUNK)
        if pieces <= 1:
            break
        chunk[axis] = length // next((n for n in range(pieces, length) if length % n == 0), length)
    return tuple(chunk)


def _cut(start, part, chunk):
    """(index of a chunk, its content) for a part that begins at `start`, which is a chunk boundary."""
    for at in np.ndindex(*(length // size for length, size in zip(part.shape, chunk))):
        piece = part[tuple(slice(i * size, (i + 1) * size) for i, size in zip(at, chunk))]
        yield tuple(first // size + i for first, i, size in zip(start, at, chunk)), piece
