"""What lies on which device: one table of names for every array, one of mesh axes for every name.

    parameter path -> names of its dimensions -> mesh axes        "layers/attention/q_b" -> q_rank, heads -> -, tensor

Batches are split over (replica, node, local), experts over (node, local), heads, dense feed-forward networks and the
vocabulary over tensor. Master weights, moments and averages are split over pipe and the data axes as well (ZeRO-1);
a step gathers the weights it computes with once and scatters their gradients back. A parameter without a rule is an
error.
"""

import fnmatch
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import ConfigError, MeshConfig

DATA = ("replica", "node", "local")
AXES = {  # name of a dimension -> the mesh axes that split it
    "batch": DATA,
    "tokens": (*DATA, "tensor"),  # around the experts, where the ranks of `tensor` share the tokens of a row
    "experts": ("node", "local"),
    "heads": ("tensor",), "ffn": ("tensor",), "vocab": ("tensor",),
    "layers": (), "model": (), "q_rank": (), "kv_rank": (), "head_dim": (), "expert_ffn": (), "scored": (), "norm": (),
}

# The end of a leaf's path -> the names of its last dimensions; stacked layers stand before them. First match wins.
PARAMETERS = {
    "embedding": "vocab model",
    "head": "model vocab",
    "attention/q": "model heads head_dim",
    "attention/q_a": "model q_rank",
    "attention/q_b": "q_rank heads head_dim",
    "attention/kv_a": "model kv_rank",
    "attention/kv_b": "kv_rank heads head_dim",
    "attention/o": "heads head_dim model",
    "router/weight": "model scored",
    "shared/gate": "model ffn", "shared/up": "model ffn", "shared/down": "ffn model",
    "dense_layers/ffn/gate": "model ffn", "dense_layers/ffn/up": "model ffn", "dense_layers/ffn/down": "ffn model",
    "ffn/gate": "experts model expert_ffn", "ffn/up": "experts model expert_ffn",
    "ffn/down": "experts expert_ffn model",
    "projection": "model model",
    "scale": "norm",
}
# Leaves of a training state that every device has whole.
REPLICATED = {"router/bias": "layers scored", "router/mtp_bias": "layers scored", "step": "", "rng": "", "count": ""}


class Placed(NamedTuple):
    """One leaf: where its working copy lies, and where its master copy and moments do."""

    compute: PartitionSpec
    master: PartitionSpec


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
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
        raise ConfigError(f"the mesh {axes} is for {cfg.devices} devices, and {len(devices)} are here; take {fit}, or "
                          f"start {cfg.devices} (on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count="
                          f"{cfg.devices}).")
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * 5)


def abstract_mesh(cfg: MeshConfig) -> AbstractMesh:
    """The same without devices: shardings of machines that are not here."""
    sizes = mesh_sizes(cfg)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 5)


def mesh_sizes(cfg: MeshConfig) -> dict[str, int]:
    return {name: getattr(cfg, name) for name in ("pipe", *DATA, "tensor")}


def spec(*names: str | None) -> PartitionSpec:
    """The split of an array by the names of its dimensions (None: whole).

    Raises:
      ValueError: an unknown name, or two dimensions that would be split over the same axis.
    """
    entries, used = [], set()
    for name in names:
        if name is not None and name not in AXES:
            raise ValueError(f"dimension {name!r} has no mesh axes; add it to AXES.")
        axes = AXES[name] if name else ()
        if clash := used.intersection(axes):
            raise ValueError(f"dimensions {names} are split twice over {sorted(clash)}; an axis splits one dimension.")
        used.update(axes)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def dimension_names(path: str, rank: int) -> tuple[str, ...]:
    """The names of the dimensions of the leaf at `path` ("opt_state/1/mu/layers/attention/q_b").

    Raises:
      ValueError: no rule fits the path, or the rule has more dimensions than the leaf.
    """
    for pattern, names in (PARAMETERS | REPLICATED).items():
        if fnmatch.fnmatchcase(f"/{path}", f"*/{pattern}"):
            names = tuple(names.split())
            if len(names) > rank:
                break
            return ("layers",) * (rank - len(names)) + names
    raise ValueError(f"no rule says where {path} ({rank} dimensions) lies; add one to PARAMETERS in parallel/mesh.py.")


def place(path: str, shape, mesh) -> Placed:
    """Where the leaf at `path` lies. Its master is split over `pipe` and the data axes that its working copy leaves.

    All of them along the first dimension that they divide together; else each along the first that it divides. Never
    along stacked layers, which are taken one by one.
    """
    names = dimension_names(path, len(shape))
    compute = spec(*names)
    if any(fnmatch.fnmatchcase(f"/{path}", f"*/{pattern}") for pattern in REPLICATED):
        return Placed(compute, compute)
    split = [axes_of(entry) for entry in compute]
    free = tuple(axis for axis in ("pipe", *DATA) if axis not in sum(split, ()) and mesh.shape[axis] > 1)
    for axes in (free, *((axis,) for axis in free)):
        fits = [dim for dim, size in enumerate(shape) if names[dim] != "layers" and
                size % math.prod(mesh.shape[axis] for axis in split[dim] + axes) == 0]
        if axes and fits:
            split[fits[0]] += axes
            if axes == free:
                break
    return Placed(compute, PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in split)))


def axes_of(entry) -> tuple[str, ...]:
    """The axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def paths(tree):
    """The tree with the path of each leaf in its place."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree)


def master_shardings(tree, mesh):
    """Shardings of a training state, or of a part of one that begins at its parameters."""
    return jax.tree.map(lambda path, x: NamedSharding(mesh, place(path, x.shape, mesh).master), paths(tree), tree)


def working_copy(params):
    """The parameters as a step computes with them: whole along the data axes. Does nothing without a mesh."""
    return _constrained(params, lambda *leaf: place(*leaf).compute)


def masters(tree):
    """Gradients or parameters, split as the masters are. Does nothing without a mesh."""
    return _constrained(tree, lambda *leaf: place(*leaf).master)


def on_the_way(path, shape, mesh) -> PartitionSpec:
    """Between master and the stages of a pipeline: whole along the data axes, still split over `pipe` as the master is.

    The partitioner moves one axis between dimensions by an all-to-all; two at once it does by gathering everything.
    """
    compute, master = place(path, shape, mesh)
    kept = [tuple(axis for axis in axes_of(there) if axis == "pipe" or axis in axes_of(here))
            for here, there in zip(compute, master)]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in kept))


def _constrained(tree, where):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    constrained = lambda path, x: jax.lax.with_sharding_constraint(x, where(path, x.shape, mesh))
    return jax.tree.map(constrained, paths(tree), tree)


def data_shards() -> int:
    """Parts that a batch is split into here; 1 without a mesh, or inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.manual_axes else math.prod(mesh.shape[axis] for axis in DATA)


def size_here(name: str, size: int) -> int:
    """How much of a dimension the arrays at hand have: a device's part inside a shard_map, else all of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return size // math.prod(mesh.shape[axis] for axis in AXES[name] if axis in mesh.manual_axes)


def constrain(x, names: tuple[str | None, ...]):
    """Splits an activation by the names of its dimensions. Does nothing without a mesh, or inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))


def on_parts(f, in_specs, out_specs, *arrays, summed=None):
    """f(*arrays) on each device's own part of each, by `spec`s; f itself without a mesh, or inside a shard_map.

    For what the partitioner would otherwise gather first: it does not see into a kernel.

    Args:
      summed: for each output the name of the dimension over whose parts it is still to be added up, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return f(*arrays)

    def whole(*arrays):
        outputs = f(*arrays)
        if summed is None:
            return outputs
        return tuple(jax.lax.psum(x, AXES[name]) if name else x for x, name in zip(outputs, summed, strict=True))

    return jax.shard_map(whole, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


def by_rows(f, *arrays):
    """The same for arrays whose first dimension is split as the batch is (a top-k). No gradient flows through it."""
    return on_parts(f, (spec("batch"),) * len(arrays), spec("batch"), *jax.lax.stop_gradient(arrays))


GROUPS = (  # of the table of bytes, in the order of matching
    ("mtp", "*/mtp_*"), ("experts", "*/layers/ffn/gate"), ("experts", "*/layers/ffn/up"),
    ("experts", "*/layers/ffn/down"), ("shared experts", "*/shared/*"), ("router", "*/router/*"),
    ("norms", "*/scale"), ("attention", "*/attention/*"), ("dense ffn", "*/dense_layers/ffn/*"),
    ("embedding and head", "*"))


def bytes_per_device(params, mesh) -> dict[str, dict[str, int]]:
    """{group: {"compute", "master"}}: bytes on one device of the working copy and of the masters.

    Each moment in float32, and an average, takes as much as the masters. In a pipeline a rank works on one stage of the
    MoE layers (on two with "dualpipe").
    """
    table, ranks = {}, mesh.shape["pipe"]
    for path, leaf in zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params)):
        group = next(name for name, pattern in GROUPS if fnmatch.fnmatchcase(f"/{path}", pattern))
        row = table.setdefault(group, {"compute": 0, "master": 0})
        for kind, where in place(path, leaf.shape, mesh)._asdict().items():
            part = NamedSharding(mesh, where).shard_shape(leaf.shape)
            if kind == "compute" and path.startswith("layers/"):
                part = (-(-part[0] // ranks), *part[1:])
            row[kind] += math.prod(part) * leaf.dtype.itemsize
    return table
