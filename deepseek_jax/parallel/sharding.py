"""The sharding of every array: one table from arrays to dimension names, one from names to mesh axes.

    parameter path -> names of its dimensions -> mesh axes        "layers/attention/q_b" -> q_rank, heads -> -, tensor

Batches are split over (replica, node, local), their sequences over (context, context_node) (see `parallel.context`),
experts over (context_node, node, local), heads, dense feed-forward networks and the vocabulary over tensor. Master
weights, moments and averages are additionally split over pipe and all axes that split tokens (ZeRO-1); a step gathers
the weights for its computation once and scatters their gradients back. A parameter without a rule is an error.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.parallel.mesh import DATA, NODES, PARTS

AXES = {  # name of a dimension -> the mesh axes that split it
    "sequences": DATA,
    "batch": PARTS,  # parts of sequences: the rows of activations
    "tokens": (*PARTS, "tensor"),  # around the experts, where the ranks of `tensor` split the tokens of a row
    "experts": (*NODES, "local"),
    "heads": ("tensor",), "ffn": ("tensor",), "vocab": ("tensor",),
    "layers": (), "model": (), "q_rank": (), "kv_rank": (), "head_dim": (), "expert_ffn": (), "scored": (), "norm": (),
    "rank": (),  # of adapters
    "index_heads": (),
    "blocks": (),  # of a weight in FP8
}

# The end of a leaf's path -> the names of its last dimensions, after those of stacked layers. The first match wins.
PARAMETERS = {
    "embedding": "vocab model",
    "head": "model vocab",
    "reward_head": "model",
    "attention/q": "model heads head_dim",
    "attention/q_a": "model q_rank",
    "attention/q_b": "q_rank heads head_dim",
    "attention/kv_a": "model kv_rank",
    "attention/kv_b": "kv_rank heads head_dim",
    "attention/o": "heads head_dim model",
    "indexer/wq_b": "q_rank index_heads head_dim",
    "indexer/wk": "model head_dim",
    "indexer/weights_proj": "model index_heads",
    "router/weight": "model scored",
    "shared/gate": "model ffn", "shared/up": "model ffn", "shared/down": "ffn model",
    "dense_layers/ffn/gate": "model ffn", "dense_layers/ffn/up": "model ffn", "dense_layers/ffn/down": "ffn model",
    "ffn/gate": "experts model expert_ffn", "ffn/up": "experts model expert_ffn",
    "ffn/down": "experts expert_ffn model",
    "projection": "model model",
    "scale": "norm",
    "k_norm/bias": "norm",
}


def _of_adapters(pattern: str, dims: str) -> dict[str, str]:
    """Low-rank adapters [..., inputs, rank] and [..., rank, outputs] are split as their weight is."""
    names = dims.split()
    stack, inputs = int(names[0] == "experts"), 2 if pattern == "attention/o" else 1
    lead, ins, outs = names[:stack], names[stack:stack + inputs], names[stack + inputs:]
    return {f"{pattern}/a": " ".join([*lead, *ins, "rank"]), f"{pattern}/b": " ".join([*lead, "rank", *outs])}


def _in_fp8(pattern: str, dims: str) -> dict[str, str]:
    """Values of a frozen weight in FP8 are split like the weight; scales are not split, except for those of experts."""
    stack = ["experts"] if dims.startswith("experts") else []
    return {f"{pattern}/values": dims, f"{pattern}/scales": " ".join([*stack, "blocks", "blocks"])}


for _pattern, _dims in tuple(PARAMETERS.items()):
    if _pattern.startswith("attention/") or _pattern.endswith(("/gate", "/up", "/down")):
        PARAMETERS |= _of_adapters(_pattern, _dims)
    if _pattern.startswith(("attention/", "indexer/w")) or _pattern.endswith(("/gate", "/up", "/down")):
        PARAMETERS |= _in_fp8(_pattern, _dims)

# Leaves of a training state that are replicated on every device.
REPLICATED = {"router/bias": "layers scored", "router/mtp_bias": "layers scored", "balancer/*": "", "step": "",
              "rng": "", "count": "", "ns_coeffs": ""}


class LeafSharding(NamedTuple):
    """The specs of one leaf: for a step's computation, and for the storage of its master copy and moments."""

    compute: PartitionSpec
    storage: PartitionSpec


def spec(*names: str | None) -> PartitionSpec:
    """The split of an array by the names of its dimensions (None: not split).

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
    raise ValueError(f"no rule says where {path} ({rank} dimensions) lies; add one to PARAMETERS in "
                     "parallel/sharding.py.")


def leaf_sharding(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> LeafSharding:
    """How the leaf at `path` is split. Storage is also split over `pipe` and token axes that compute does not use.

    All of them along the first dimension that they divide together; otherwise each along the first dimension that it
    divides. Never along stacked layers, which are used one by one.
    """
    names = dimension_names(path, len(shape))
    compute = spec(*names)
    if any(fnmatch.fnmatchcase(f"/{path}", f"*/{pattern}") for pattern in REPLICATED):
        return LeafSharding(compute, compute)
    split = [axes_of(entry) for entry in compute]
    free = tuple(axis for axis in ("pipe", *PARTS) if axis not in sum(split, ()) and mesh.shape[axis] > 1)
    for axes in (free, *((axis,) for axis in free)):
        fits = [dim for dim, size in enumerate(shape) if names[dim] != "layers" and
                size % math.prod(mesh.shape[axis] for axis in split[dim] + axes) == 0]
        if axes and fits:
            split[fits[0]] += axes
            if axes == free:
                break
    return LeafSharding(compute, PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in split)))


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def paths(tree: Any) -> Any:
    """The tree with the path of each leaf in its place."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree)


def storage_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a training state, or of a part of one that begins at its parameters."""
    where = lambda path, x: NamedSharding(mesh, leaf_sharding(path, x.shape, mesh).storage)
    return jax.tree.map(where, paths(tree), tree)


def compute_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of parameters that only steps read: those of the computation."""
    where = lambda path, x: NamedSharding(mesh, leaf_sharding(path, x.shape, mesh).compute)
    return jax.tree.map(where, paths(tree), tree)


def constrain_to_compute(params: Any) -> Any:
    """The parameters as a step computes with them: not split over the data axes. Does nothing without a mesh."""
    return _constrained(params, lambda *leaf: leaf_sharding(*leaf).compute)


def constrain_to_storage(tree: Any) -> Any:
    """Gradients or parameters, split as the masters are. Does nothing without a mesh."""
    return _constrained(tree, lambda *leaf: leaf_sharding(*leaf).storage)


def stage_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Between storage and the stages of a pipeline: not split over the data axes, still split over `pipe`.

    The partitioner moves one axis between dimensions by an all-to-all, but gathers everything to move two at once.
    """
    compute, storage = leaf_sharding(path, shape, mesh)
    left = [tuple(axis for axis in axes_of(there) if axis == "pipe" or axis in axes_of(here))
            for here, there in zip(compute, storage)]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in left))


def constrain_to_stage(tree: Any, mesh: Mesh | AbstractMesh, stacked: bool = False) -> Any:
    """Parameters or gradients, split as `stage_spec` says. stacked: [stages, slots, ...] of layers."""
    def constrained(path, a):
        if not stacked:
            return jax.lax.with_sharding_constraint(a, stage_spec(path, a.shape, mesh))
        return jax.lax.with_sharding_constraint(a, PartitionSpec(None, *stage_spec(path, a.shape[1:], mesh)))

    return jax.tree.map(constrained, paths(tree), tree)


def _constrained(tree, where):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    constrained = lambda path, x: jax.lax.with_sharding_constraint(x, where(path, x.shape, mesh))
    return jax.tree.map(constrained, paths(tree), tree)


def data_shards() -> int:
    """The number of parts of a batch's tokens here; 1 without a mesh, or inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.manual_axes else math.prod(mesh.shape[axis] for axis in PARTS)


def local_size(name: str, size: int) -> int:
    """The local size of a dimension: a device's part inside a shard_map, otherwise all of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return size // math.prod(mesh.shape[axis] for axis in AXES[name] if axis in mesh.manual_axes)


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Splits an activation by the names of its dimensions, one an axis; None: not split, or not by us.

    Does nothing without a mesh, or inside a shard_map.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))


def on_shards(f: Callable[..., Any], in_specs: Any, out_specs: Any, *arrays: Any,
              summed: tuple[str | None, ...] | None = None) -> Any:
    """f(*arrays) on each device's part of the arrays, by `spec`s; f itself without a mesh, or inside a shard_map.

    For functions whose inputs the partitioner would otherwise gather, since it does not see into a kernel.

    Args:
      summed: for each output the name of the dimension over whose parts it is still to be added up, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return f(*arrays)

    def added_up(*arrays):
        outputs = f(*arrays)
        if summed is None:
            return outputs
        return tuple(jax.lax.psum(x, AXES[name]) if name else x for x, name in zip(outputs, summed, strict=True))

    return jax.shard_map(added_up, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


def by_rows(f: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """The same for arrays whose first dimension is split as the batch is (a top-k). No gradient flows through it."""
    return on_shards(f, (spec("batch"),) * len(arrays), spec("batch"), *jax.lax.stop_gradient(arrays))
