"""Bytes from process to process over the network of the devices, in pieces: no port is opened, no disk is shared.

    pairs (0, 2), (1, 3):   piece after piece, each device of 0 sends to one of 2, while those of 1 send to 3

All processes of a run call these functions together, in the thread that dispatches its steps: devices must execute all
exchanges in the same order.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PIECE = 16 << 20  # bytes per device in one exchange; a device holds two pieces to send and two received ones

Pairs = tuple[tuple[int, int], ...]  # (sender, receiver): each process is at most once a sender, and once a receiver


class Incoming:
    """The bytes that this process receives in an exchange, to be taken in order; zeros if it is not a receiver.

    Args:
      pairs: the same in all processes.
      most: the largest number of bytes that any process sends; the same in all processes.
      outgoing: the bytes that this process sends, in uint8 arrays of one dimension.
    """

    def __init__(self, pairs: Pairs, most: int, outgoing: Iterable[np.ndarray] = ()):
        self._pieces, self._left = _exchanged(pairs, most, outgoing), np.empty(0, np.uint8)

    def fill(self, buffer: np.ndarray) -> None:
        """Fills a uint8 array of one dimension."""
        done = 0
        while done < len(buffer):
            if not len(self._left):
                self._left = next(self._pieces)
            part = self._left[:len(buffer) - done]
            buffer[done:done + len(part)] = part
            done, self._left = done + len(part), self._left[len(part):]

    def take(self, length: int) -> np.ndarray:
        """The next bytes, in a uint8 array of one dimension."""
        buffer = np.empty(length, np.uint8)
        self.fill(buffer)
        return buffer

    def finish(self) -> None:
        """Takes part in the rest of the exchange, which the other processes need."""
        for _ in self._pieces:
            pass


def _exchanged(pairs, most, outgoing) -> Iterator[np.ndarray]:
    by_process = collections.defaultdict(list)
    for device in sorted(jax.devices(), key=lambda device: device.id):
        by_process[device.process_index].append(device)
    width = min(map(len, by_process.values()))
    piece = min(PIECE, 1 << (-(-most // width) - 1).bit_length())  # few lengths, since each is compiled
    devices = tuple(tuple(by_process[i][:width]) for i in sorted(by_process))
    move, where = _program(pairs, devices)
    own, coming = _cut(outgoing, width * piece), None
    for _ in range(-(-most // (width * piece))):
        here = next(own, np.zeros(width * piece, np.uint8))
        before, coming = coming, move(jax.make_array_from_process_local_data(where, here[None]))
        for shard in coming.addressable_shards:
            shard.data.copy_to_host_async()
        if before is not None:
            yield _joined(before)
    if coming is not None:
        yield _joined(coming)


@functools.cache
def _program(pairs, devices):
    mesh, split = Mesh(np.array(devices), ("process", "device")), PartitionSpec("process", "device")
    move = jax.shard_map(lambda x: jax.lax.ppermute(x, "process", pairs), mesh=mesh, in_specs=split, out_specs=split)
    return jax.jit(move), NamedSharding(mesh, split)


def _cut(arrays, length):
    """Pieces of `length` from the concatenation of the arrays, the last one padded with zeros."""
    piece, filled = np.zeros(length, np.uint8), 0
    for array in arrays:
        while len(array):
            part = array[:length - filled]
            piece[filled:filled + len(part)] = part
            array, filled = array[len(part):], filled + len(part)
            if filled == length:
                yield piece
                piece, filled = np.zeros(length, np.uint8), 0  # a new buffer: CPU devices use it without a copy
    if filled:
        yield piece


def _joined(array):
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[1].start or 0)
    return np.concatenate([np.asarray(shard.data)[0] for shard in shards])
