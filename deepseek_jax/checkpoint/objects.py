"""A state as objects in a bucket: each array in zarr chunks, each chunk one object, no object written twice.

    checkpoints/STEP/meta.json   state-ID/params.embedding/zarr.json  c.0.0  c.1.0 ...   manifest.json, the last one

ID is another one for each attempt to save: a request of an attempt that timed out may still reach the store when the
next one is done. Every process writes the chunks that its devices hold and takes their checksums as it does; process 0
joins the lists. Orbax writes no s3://, and both stores are written alike.
"""

from __future__ import annotations

import pathlib
import uuid
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepseek_jax import io, storage
from deepseek_jax.checkpoint.arrays import Writer

CHUNK = 64 << 20  # bytes of an object at most, unless a row is larger: several are on their way at once
LONGEST_WAIT = 24 * 3600  # seconds, of a process for the slowest


class Save:
    """What this process writes of a state. It is copied to the host here, so that its buffers may be donated.

    state: the folder of this attempt. That of process 0 is the one that counts, and meta.json names it to the others.

    Args:
      address: of the checkpoint.
      arrays: {name: jax.Array or NumPy array}, none of them empty.
      leaves: {name: what meta.json says of it}, which this adds to.
    """

    def __init__(self, address: pathlib.Path, arrays: dict[str, Any], leaves: dict[str, dict[str, Any]]):
        self.address, self.state, self.held = address, f"state-{uuid.uuid4().hex[:12]}", {}
        for name, array in arrays.items():
            folder = name.replace("/", ".")
            leaves[name] |= {"zarr": f"{self.state}/{folder}", "exact": True}
            self.held[folder] = array.shape, array.dtype, _chunk(array), _own_parts(array)

    def write(self, name: str) -> dict[str, list[int]] | None:
        """Writes it, once process 0 has written meta.json. In process 0: {file: [length, CRC32]} of what all of them
        wrote; None in the others.

        name: of this attempt, the same in all processes and another one each time.
        """
        first, prints, jobs = jax.process_index() == 0, {}, []
        state = self.state if first else io.read_json(self.address / "meta.json")["state"]
        for folder, (shape, dtype, chunk, parts) in self.held.items():
            if not first and not parts:
                continue
            writer = Writer(str(self.address), f"{state}/{folder}", shape, chunk, dtype, prints, describes=first)
            jobs += [(writer, index, piece) for start, part in parts for index, piece in _cut(start, part, chunk)]
        storage.in_parallel(lambda job: job[0].write(*job[1:]), jobs)
        if jax.process_count() == 1:
            return prints
        lists = self.address / f"{state}.prints"
        io.write_json(lists / f"{jax.process_index()}.json", prints, indent=None)
        wait_for_all(name)
        if not first:
            return None
        for found in storage.in_parallel(io.read_json, [lists / f"{i}.json" for i in range(jax.process_count())]):
            prints |= found
        storage.remove(lists)
        return prints


def wait_for_all(name: str) -> None:
    """Returns once every process has called this with the name."""
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_WAIT * 1000)


def _own_parts(array) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """[(first index, copy)] of the parts of an array that this process writes: each one is written once."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        if jax.process_index():
            return []
        if not isinstance(array, jax.Array):
            return [((0,) * array.ndim, np.array(array))]
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    for shard in own:
        shard.data.copy_to_host_async()
    return [(tuple(part.start or 0 for part in shard.index), np.array(shard.data)) for shard in own]


def _chunk(array) -> tuple[int, ...]:
    """The shape of an array's chunks: the part of a device, or a part of that which is at most CHUNK bytes."""
    chunk = list(array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape)
    for axis, length in enumerate(chunk):
        pieces = -(-int(np.prod(chunk, dtype=np.int64)) * array.dtype.itemsize // CHUNK)
        if pieces <= 1:
            break
        chunk[axis] = length // next((n for n in range(pieces, length) if length % n == 0), length)
    return tuple(chunk)


def _cut(start, part, chunk):
    """(index of a chunk, its content) of a part that begins at `start`, and at a chunk."""
    for at in np.ndindex(*(length // size for length, size in zip(part.shape, chunk))):
        piece = part[tuple(slice(i * size, (i + 1) * size) for i, size in zip(at, chunk))]
        yield tuple(first // size + i for first, i, size in zip(start, at, chunk)), piece
