"""Weights laid out for decoding: a tree per layer, W_UK and W_UV separate, in cfg.dtype, experts split on a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from deepseek_jax import fp8
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.parallel.sharding import AXES, spec


class Places(NamedTuple):
    """The places of each expert's replicas: table_EX int32, padded by repetition; count_E int32, their number."""

    table_EX: jax.Array
    count_E: jax.Array


class LayerWeights(NamedTuple):
    """One block. attention: by name, with k_up_HNC and v_up_HCV instead of kv_b. ffn: gate, up, down (and shared).

    router [D, E], bias_E: of a MoE block; None in a dense one. places: None if each expert is at its own number.
    """

    attention: dict[str, jax.Array]
    attention_norm: jax.Array
    ffn_norm: jax.Array
    ffn: dict[str, Any]
    router: jax.Array | None = None
    bias_E: jax.Array | None = None
    places: Places | None = None


class MTPWeights(NamedTuple):
    """One MTP module; embedding and head are the model's."""

    block: LayerWeights
    norm: jax.Array
    embedding_norm: jax.Array
    hidden_norm: jax.Array
    projection: jax.Array


class DecodeWeights(NamedTuple):
    """A model in the form that the compiled programs of generation use."""

    embedding: jax.Array
    head: jax.Array
    norm: jax.Array
    layers: tuple[LayerWeights, ...]
    mtp: tuple[MTPWeights, ...]


def prepare(cfg: ModelConfig, variables: dict[str, Any], modules: int = 0) -> DecodeWeights:
    """The variables laid out for decoding, one layer after another: with NumPy arrays the device never holds two
    copies.

    Args:
      variables: also with weights kept in FP8, {"values", "scales"}, as `load_hf(keep_fp8=True)` leaves them.
      modules: MTP modules to include.
    """
    params, router = variables["params"], variables.get("router", {})
    layers = []
    for name, count in (("dense_layers", cfg.num_dense_layers), ("layers", cfg.num_moe_layers)):
        for i in range(count):
            bias_E = router["bias"][i] if name == "layers" and cfg.has_router_bias else None
            layers.append(_layer(cfg, jax.tree.map(lambda x, i=i: x[i], params[name]), bias_E))
    mtp = []
    for k in range(modules):
        bias_E = router["mtp_bias"][k] if cfg.has_router_bias else None
        mtp.append(_module(cfg, params[f"mtp_{k + 1}"], bias_E))
    embedding, head = (_narrow(cfg, params[name]) for name in ("embedding", "head"))
    return DecodeWeights(embedding, head, jnp.asarray(params["norm"]["scale"]), tuple(layers), tuple(mtp))


def _dequantized(cfg: ModelConfig, tree: Any, name: str = "") -> Any:
    """A checkpoint's FP8 weights [..., out, in] in the model's layout."""
    if not isinstance(tree, dict):
        return tree
    if "values" not in tree:
        return {key: _dequantized(cfg, part, key) for key, part in tree.items()}
    w = jnp.swapaxes(fp8.dequantize(fp8.Quantized(tree["values"], tree["scales"]), cfg.dtype), -1, -2)
    heads = (cfg.num_heads, -1)
    split = {"wq_b": (w.shape[-2], cfg.index_heads, -1),
             "q": (w.shape[-2], *heads), "q_b": (w.shape[-2], *heads), "kv_b": (w.shape[-2], *heads),
             "o": (*heads, w.shape[-1])}
    return w.reshape(w.shape[:-2] + split.get(name, w.shape[-2:]))


@functools.partial(jax.jit, static_argnums=0)
def _narrow(cfg: ModelConfig, tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(cfg.dtype), _dequantized(cfg, tree))


@functools.partial(jax.jit, static_argnums=0)
def _module(cfg: ModelConfig, module: dict[str, Any], bias_E: jax.Array | None) -> MTPWeights:
    norm, embedding_norm, hidden_norm = (module[name]["scale"] for name in ("norm", "embedding_norm", "hidden_norm"))
    return MTPWeights(_layer(cfg, module["block"], bias_E), norm, embedding_norm, hidden_norm,
                      _narrow(cfg, module["projection"]))


@functools.partial(jax.jit, static_argnums=0)
def _layer(cfg: ModelConfig, p: dict[str, Any], bias_E: jax.Array | None) -> LayerWeights:
    narrow, p = functools.partial(_narrow, cfg), _dequantized(cfg, p)
    attention = dict(p["attention"])
    kv_b = attention.pop("kv_b").astype(cfg.dtype)
    norms = {name: attention.pop(name)["scale"] for name in ("q_norm", "kv_norm") if name in attention}
    if "indexer" in attention:  # its norm and the weights of its heads stay float32, as in training
        indexer = attention.pop("indexer")
        norms["indexer"] = indexer | narrow({name: indexer[name] for name in ("wq_b", "wk")})
    attention = narrow(attention) | norms | {
        "k_up_HNC": kv_b[..., :cfg.nope_head_dim].transpose(1, 2, 0), "v_up_HCV": kv_b[..., cfg.nope_head_dim:]
        .transpose(1, 0, 2), "o": attention["o"].astype(cfg.dtype).reshape(-1, cfg.d_model)}
    dense = LayerWeights(attention, p["attention_norm"]["scale"], p["ffn_norm"]["scale"],
                         narrow({name: w for name, w in p["ffn"].items() if name != "router"}))
    if "router" not in p["ffn"]:
        return dense
    return dense._replace(router=p["ffn"]["router"]["weight"], bias_E=bias_E)


def split(tree: Any) -> Any:
    """PartitionSpecs of weights or a cache on a mesh: experts are split, in order; everything else is replicated."""
    def of(path, x):
        routed = len(path) > 1 and path[-2] == jax.tree_util.GetAttrKey("ffn") and x.ndim == 3
        return spec("experts", None, None) if routed else spec()

    return jax.tree_util.tree_map_with_path(of, tree)


def share_out(tree: Any, mesh: Mesh | None) -> Any:
    """Moves a tree to a mesh as `split` specifies (None: leaves everything where it is).

    Raises:
      ConfigError: devices would get unequal numbers of experts.
    """
    if mesh is None:
        return tree
    try:
        return jax.tree.map(lambda x, where: jax.device_put(x, NamedSharding(mesh, where)), tree, split(tree))
    except ValueError as error:
        devices = math.prod(mesh.shape[axis] for axis in AXES["experts"])
        raise ConfigError(f"the experts, replicas included, cannot be shared out evenly over {devices} devices "
                          "(nodes times mesh.local); take a number of places that they divide.") from error


def on_mesh(program: Callable[..., Any], weights: DecodeWeights, *arrays: Any) -> Any:
    """program(weights, *arrays); on a mesh all devices run it on the same tokens, each with its own experts."""
    if jax.sharding.get_abstract_mesh().empty:
        return program(weights, *arrays)
    everywhere = (spec(),) * len(arrays)
    return jax.shard_map(program, in_specs=(split(weights), *everywhere), out_specs=spec(), check_vma=False)(
        weights, *arrays)
