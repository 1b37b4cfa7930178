"""Bytes of the parameters on each device of a mesh, by group."""

import fnmatch
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from deepseek_jax.parallel.sharding import leaf_sharding, paths

GROUPS = (  # (group, pattern of paths); the first match wins
    ("mtp", "*/mtp_*"), ("experts", "*/layers/ffn/gate"), ("experts", "*/layers/ffn/up"),
    ("experts", "*/layers/ffn/down"), ("shared experts", "*/shared/*"), ("router", "*/router/*"),
    ("norms", "*/scale"), ("norms", "*/k_norm/bias"), ("attention", "*/attention/*"),
    ("dense ffn", "*/dense_layers/ffn/*"), ("embedding and head", "*"))


def parameter_bytes(params: Any, mesh: Mesh | AbstractMesh) -> dict[str, dict[str, int]]:
    """{group: {"compute", "storage"}}: bytes on one device of the weights that a step computes with, and of the
    masters.

    Each moment in float32, and the moving average, takes as much as the masters. In a pipeline a rank computes one
    stage of the MoE layers (two with "dualpipe").
    """
    table, ranks = {}, mesh.shape["pipe"]
    for path, leaf in zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params)):
        group = next(name for name, pattern in GROUPS if fnmatch.fnmatchcase(f"/{path}", pattern))
        row = table.setdefault(group, {"compute": 0, "storage": 0})
        for kind, where in leaf_sharding(path, leaf.shape, mesh)._asdict().items():
            part = NamedSharding(mesh, where).shard_shape(leaf.shape)
            if kind == "compute" and path.startswith("layers/"):
                part = (-(-part[0] // ranks), *part[1:])
            row[kind] += math.prod(part) * leaf.dtype.itemsize
    return table
