"""Checkpoints of runs that train low-rank adapters: they hold only the adapters and the identity of the base.

    W + alpha / rank * A B        merged when they are read, so that every reader finds the weights of a model

meta.json of such a checkpoint has "lora": the base's folder, its step, a digest of its manifest, alpha / rank, and
whether the base was kept in FP8. A base that is gone or has changed is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from deepseek_jax.checkpoint.arrays import Stored, restore
from deepseek_jax.checkpoint.blocks import in_blocks
from deepseek_jax.checkpoint.format import read_meta
from deepseek_jax.checkpoint.manager import check_fit, find_checkpoint, read_checkpoint, read_items
from deepseek_jax.checkpoint.manifest import files_of
from deepseek_jax.config import ConfigError


class Base(NamedTuple):
    """The checkpoint that a run depends on, such as the base of adapters.

    digest: of its files' lengths and checksums. scale: of adapters; 1 for any other. fp8: the adapters were trained
    with a base in FP8 (`checkpoint.blocks`).
    """

    folder: str
    step: int
    digest: str
    scale: float
    fp8: bool = False


def identify(folder: str, scale: float, known: Base | None = None, what: str = "the base of the adapters, init.from",
             fp8: bool = False) -> tuple[Base, pathlib.Path]:
    """The base in `folder` as it is now, and its checkpoint: the newest, or that of `known`.

    what: its name in messages, with the config key of the folder. scale, fp8: as in Base.
    Raises:
      ConfigError: there is no checkpoint, or it is not `known`.
    """
    try:
        path = find_checkpoint(folder, None if known is None else known.step)
    except ConfigError as error:
        raise ConfigError(f"{what}={folder}, cannot be read: {error}") from error
    digest = hashlib.sha256(json.dumps(files_of(path), sort_keys=True).encode()).hexdigest()
    base = Base(folder, int(path.name), digest, scale, fp8)
    if known is not None and base.digest != known.digest:
        raise ConfigError(f"{what}={folder}, is another checkpoint of step {known.step} than the one that the training "
                          "began with; put that one back.")
    return base, path


def base_of(path: pathlib.Path) -> Base | None:
    """The base of the adapters in a checkpoint; None: it holds all weights."""
    found = read_meta(path)["meta"].get("lora")
    return None if found is None else Base(**found)


def restore_weights(workdir: str | os.PathLike[str], abstract: dict[str, Any] | None = None, ema: bool = False,
                    step: int | None = None) -> tuple[dict[str, Any], int]:
    """All weights of a run, whether it trains them or adapters.

    Args:
      abstract, step: as in `restore_items`, of {"params", "router"}.
      ema: read the moving average of the weights; {} if the run keeps none.
    Returns:
      {"params", "router"}, step.
    Raises:
      ConfigError: there is no such checkpoint, it does not fit, or its base is gone.
    """
    return read_checkpoint(workdir, lambda path: read_weights(path, abstract, ema), step)


def read_weights(path: pathlib.Path, abstract: dict[str, Any] | None = None, ema: bool = False,
                 cast: bool = False) -> dict[str, Any]:
    """`restore_weights` of the checkpoint in a folder. cast: as in `manager.read_items`."""
    base, name = base_of(path), "ema" if ema else "params"
    if base is None:
        wanted = abstract and {name: abstract["params"], "router": abstract["router"]}
        items = read_items(path, (name, "router"), wanted, cast)[0]
        return {"params": items[name], "router": items["router"]}
    leaves = stored(path, name)
    return read_leaves(path, leaves, abstract if leaves else abstract and {**abstract, "params": {}})


def read_leaves(path: pathlib.Path, leaves: dict[str, Any], abstract: dict[str, Any] | None = None,
                read: Callable[[Any, Any], Any] = restore) -> dict[str, Any]:
    """{"params", "router"} of the checkpoint at `path`, whose parameters are `leaves`, cast as in `abstract`.

    Args:
      leaves: {"params/...": leaf}, as `stored` returns them.
      abstract: shapes, dtypes and shardings of both; None: arrays as they are stored, on one device.
      read: makes an array from a leaf and its entry in `abstract`.
    Raises:
      ConfigError: names or shapes differ from `abstract`.
    """
    router = read_items(path, ("router",), abstract and {"router": abstract["router"]})[0]["router"]
    found = {tuple(name.split("/")[1:]): leaf for name, leaf in leaves.items()}
    asked = {keys: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for keys, leaf in found.items()} if abstract is None \
        else flatten_dict(abstract["params"])
    named = lambda tree: {"/".join(("params", *keys)): tuple(x.shape) for keys, x in tree.items()}
    check_fit(path, named(found), named(asked))
    params = unflatten_dict({keys: read(found[keys], x) for keys, x in asked.items()})
    return {"params": params, "router": router}


def stored(checkpoint: pathlib.Path, name: str = "params") -> dict[str, Any]:
    """{"params/...": leaf} for all parameters of the run with that checkpoint, each readable in parts.

    name: "ema": the moving average of the parameters; there may be none.
    """
    base, leaves, files = base_of(checkpoint), read_meta(checkpoint)["leaves"], files_of(checkpoint)
    own = {path.replace(f"{name}/", "params/", 1): Stored(checkpoint, leaf, files, path)
           for path, leaf in leaves.items() if path.startswith(f"{name}/")}
    if base is None or not own:
        return own
    below = stored(identify(base.folder, base.scale, base)[1])
    if base.fp8:  # leaves that a checkpoint keeps in FP8 have these values already, and are exported unchanged
        below |= in_blocks({path: leaf for path, leaf in below.items() if leaf.scales is None})
    return below | {path: Merged(leaf, own[f"{path}/a"], own[f"{path}/b"], base.scale)
                    for path, leaf in below.items() if f"{path}/a" in own}


def merge(params: Any, adapters: Any, scale: float) -> Any:
    """The parameters with their adapters added; parameters without adapters are the same arrays."""
    if not adapters:
        return params
    if isinstance(params, dict):
        return {name: merge(part, adapters.get(name), scale) for name, part in params.items()}
    if isinstance(params, np.ndarray):
        return merged(params, np.asarray(adapters["a"]), np.asarray(adapters["b"]), scale)
    where = params.sharding if isinstance(params.sharding, NamedSharding) else None
    return jax.jit(merged, static_argnums=3, out_shardings=where)(params, adapters["a"], adapters["b"], scale)


def merged(w: Any, a: Any, b: Any, scale: float) -> Any:
    """w + scale * a b in w's dtype, added in that of the adapters. NumPy or JAX arrays.

    w: [..., I, ..., O, ...], after axes that a [..., I, ..., R] and b [..., R, O, ...] have as well.
    """
    stack = a.ndim + b.ndim - w.ndim - 2
    rank, lead = a.shape[-1], w.shape[:stack]
    inputs = math.prod(a.shape[stack:-1])
    multiply = np.matmul if isinstance(w, np.ndarray) else functools.partial(jnp.matmul, precision="highest")
    product = multiply(a.reshape(*lead, inputs, rank) * a.dtype.type(scale), b.reshape(*lead, rank, -1))
    return (w.astype(product.dtype) + product.reshape(w.shape)).astype(w.dtype)


class Merged:
    """A leaf of the base with its adapters added, read in parts like `checkpoint.arrays.Stored`."""

    scales = None

    def __init__(self, w: Any, a: Any, b: Any, scale: float):
        self.w, self.a, self.b, self.scale = w, a, b, scale
        self.shape, self.dtype = w.shape, w.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """NumPy array of the part that a tuple of slices (one an axis, step 1) cuts out."""
        ranks = len(self.a.shape), len(self.b.shape)
        stack, every = sum(ranks) - len(self.shape) - 2, slice(None)
        outputs = len(self.shape) - (ranks[1] - stack - 1)
        a = self.a[(*index[:outputs], every)]
        b = self.b[(*index[:stack], every, *index[outputs:])]
        return merged(self.w[index], a, b, self.scale)
