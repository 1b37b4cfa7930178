"""The mesh of a run: devices along the axes pipe, replica, node, local and tensor (report section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from deepseek_jax.config import ConfigError, MeshConfig

DATA = ("replica", "node", "local")  # the axes that split a batch


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, in the order of their processes: neighbours on `tensor` and `local` share a host.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(cfg)
    if cfg.devices != len(devices):
        axes = " * ".join(f"{name}={n}" for name, n in sizes.items())
        rest, other = cfg.devices // cfg.local, len(devices) // (cfg.devices // cfg.local)
        fit = (f"mesh.local={other}" if other and rest * other == len(devices) else
               f"sizes whose product is {len(devices)}")
        here = f"{len(devices)} {'is' if len(devices) == 1 else 'are'} here"
        raise ConfigError(f"the mesh {axes} is for {cfg.devices} devices, and {here}; take {fit}, or start "
                          f"{cfg.devices} (on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count={cfg.devices}).")
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * 5)


def abstract_mesh(cfg: MeshConfig) -> AbstractMesh:
    """The same without devices: for shardings of machines that are not here."""
    sizes = mesh_sizes(cfg)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 5)


def mesh_sizes(cfg: MeshConfig) -> dict[str, int]:
    """{axis: devices along it}, slowest first."""
    return {name: getattr(cfg, name) for name in ("pipe", *DATA, "tensor")}
