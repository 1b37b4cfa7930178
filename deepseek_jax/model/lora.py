"""Low-rank adapters (arXiv 2106.09685): a frozen base, and two trained low-rank matrices for each adapted weight.

    y = x W + alpha / rank * (x A) B        B = 0 at the start, so the model equals its base

Adapters are a tree that mirrors `params`, with {"a", "b"} at each adapted weight: attention's projections, dense
feed-forward networks, shared and routed experts (adapters for each), including those of MTP modules.
`checkpoint.adapters` merges them: here W and A B are never added.

I and O are a weight's axes of inputs and outputs, R is the rank.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import LoraConfig, ModelConfig
from deepseek_jax.model.layers import LowRank, wide

# The number of input and output axes of a weight; the axes before them are layers and experts.
ATTENTION = {"q": (1, 2), "q_a": (1, 1), "q_b": (1, 2), "kv_a": (1, 1), "kv_b": (1, 2), "o": (2, 1)}
FEED_FORWARD = {"gate": (1, 1), "up": (1, 1), "down": (1, 1)}


def axes_of(cfg: LoraConfig, path: tuple[str, ...]) -> tuple[int, int] | None:
    """The numbers of input and output axes of the parameter at `path` of the tree; None: it gets no adapters."""
    if path[-2:-1] == ("attention",) and cfg.targets != "experts":
        return ATTENTION.get(path[-1])
    if path[-2:-1] in (("ffn",), ("shared",)) and cfg.targets != "attention":
        return FEED_FORWARD.get(path[-1])
    return None


def fresh(cfg: LoraConfig, key: jax.Array, params: dict[str, Any]) -> dict[str, Any]:
    """Initial adapters: A is normal, so that x A has the size of x, and B = 0. float32 (float64 for a float64 model).

    Args:
      key: of the random numbers. params: of the model, or their shapes.
    Returns:
      A tree like params with only the adapted weights: {"a": [..., I, rank], "b": [..., rank, O]} in their places.
    """
    rank, adapters = cfg.rank, {}
    assert rank is not None
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for i, (keys, w) in enumerate(leaves):
        path = tuple(key.key for key in keys)
        axes = axes_of(cfg, path)
        if axes is None:
            continue
        stack, inputs = len(w.shape) - sum(axes), w.shape[len(w.shape) - sum(axes):len(w.shape) - axes[1]]
        lead, outputs = w.shape[:stack], w.shape[len(w.shape) - axes[1]:]
        a = jax.random.normal(jax.random.fold_in(key, i), (*lead, *inputs, rank), wide(w.dtype))
        node = adapters
        for name in path:
            node = node.setdefault(name, {})
        node |= {"a": a / math.sqrt(math.prod(inputs)), "b": jnp.zeros((*lead, rank, *outputs), a.dtype)}
    return adapters


def attach(cfg: LoraConfig, base: Any, adapters: Any) -> Any:
    """The model's parameters: those of the base, with a LowRank instead of each adapted weight."""
    if not adapters:
        return base
    if not isinstance(base, dict):
        return LowRank(base, adapters["a"], adapters["b"] * cfg.scale)
    return {name: attach(cfg, part, adapters.get(name)) for name, part in base.items()}


def held(cfg: ModelConfig, path: tuple[str, ...], dtype: Any) -> jnp.dtype:
    """The dtype of a frozen parameter: the one that the model computes with, except for norms, the router's weights and
    the head of a reward model, which keep theirs."""
    own = path[-1] in ("scale", "reward_head") or path[-2:] == ("router", "weight")
    return jnp.dtype(dtype if own else cfg.dtype)
