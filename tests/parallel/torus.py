"""Absent TPU devices: the attributes that jax reads when it arranges devices."""

import math
from typing import NamedTuple


class Chip(NamedTuple):
    """A chip of a v5p; `slice_index` is set as on a TPU of several slices."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"


def chips(x, y, z, slices=1):
    """Machines of 2 x 2 x 1 chips, in the order of jax.devices(): process by process."""
    made = []
    machines = [(s, px, py, pz) for s in range(slices) for pz in range(z) for py in range(0, y, 2)
                for px in range(0, x, 2)]
    for process, (s, px, py, pz) in enumerate(machines):
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            made.append(Chip(len(made), process, (px + dx, py + dy, pz), s))
    return made


def hops(a, b, sizes):
    """Links between two chips of a torus."""
    return sum(min(abs(p - q), n - abs(p - q)) for p, q, n in zip(a.coords, b.coords, sizes, strict=True))


def ring(devices, sizes):
    """The maximum number of links between neighbours of a row, whose ends are neighbours too."""
    return max(hops(a, b, sizes) for a, b in zip(devices, [*devices[1:], devices[0]])) if math.prod(sizes) > 1 else 0
