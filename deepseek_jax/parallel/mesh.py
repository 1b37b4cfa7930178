"""The mesh of a run: devices along the axes of `MeshConfig.sizes` (report section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from deepseek_jax.config import ConfigError, MeshConfig

DATA = ("replica", "node", "local")  # the axes that split a batch into its sequences
CONTEXT = ("context", "context_node")  # those that split sequences into parts
PARTS = (*DATA, *CONTEXT)  # those that split tokens
NODES = ("context_node", "node")  # those that split experts over nodes


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, in the order of their processes, so that neighbours on `tensor` and `local` share a
    host; on TPUs in the order of the torus, so that they share a link.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or not to that of TPU slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = cfg.sizes
    if cfg.devices != len(devices):
        axes = " * ".join(f"{name}={n}" for name, n in sizes.items())
        rest, other = cfg.devices // cfg.local, len(devices) // (cfg.devices // cfg.local)
        fit = (f"mesh.local={other}" if other and rest * other == len(devices) else
               f"sizes whose product is {len(devices)}")
        here = f"{len(devices)} {'is' if len(devices) == 1 else 'are'} here"
        raise ConfigError(f"the mesh {axes} is for {cfg.devices} devices, and {here}; take {fit}, or start "
                          f"{cfg.devices} (on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count={cfg.devices}).")
    arranged = _on_torus(cfg, devices) if devices[0].platform == "tpu" else np.asarray(devices)
    return Mesh(arranged.reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _on_torus(cfg, devices):
    """TPU devices in the shape of the mesh: its axes along those of the torus, slices along `pipe`, then `replica`."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    by_pipe = math.gcd(cfg.pipe, slices)
    by_replica = slices // by_pipe
    if cfg.replica % by_replica:
        raise ConfigError(f"{slices} TPU slices, with a slow network between them, hold whole stages or replicas: "
                          f"mesh.pipe={cfg.pipe} times mesh.replica={cfg.replica} must be a multiple of {slices}.")
    between = tuple({"pipe": by_pipe, "replica": by_replica}.get(axis, 1) for axis in cfg.sizes)
    inside = tuple(n // slices_n for n, slices_n in zip(cfg.sizes.values(), between))
    for split in (False, True):  # a mesh axis over part of a physical one only if there is no other way
        try:
            return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=split) \
                if slices > 1 else mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=split)
        except NotImplementedError:  # jax's error for a torus whose axes cannot be divided like this
            continue
    return np.asarray(devices)  # a torus whose axes are not a product of these


def abstract_mesh(cfg: MeshConfig) -> AbstractMesh:
    """The same without devices: for shardings of machines that are not available."""
    sizes = cfg.sizes
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
