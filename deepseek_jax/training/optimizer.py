"""AdamW or Muon over float32 masters, and the report's learning-rate shape (report section 4.2).

Warm-up, constant, cosine, then two constant tail levels, all as fractions of the run, so that a run of 600 steps and
one of 14.8T tokens have the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import OptimizerConfig
from deepseek_jax.parallel.sharding import dimension_names


def learning_rate(cfg: OptimizerConfig, steps: int) -> Callable[[Any], jax.Array]:
    """The schedule: step (int array, from 0) -> float32 rate."""
    def rate(step):
        at = (step + 1) / steps  # the first step already learns; the last one ends the run
        cosine = (at - cfg.constant_until) / max(cfg.cosine_until - cfg.constant_until, 1e-9)
        falling = cfg.cosine_to + (1 - cfg.cosine_to) * 0.5 * (1 + jnp.cos(math.pi * jnp.clip(cosine, 0, 1)))
        share = jnp.where(at > cfg.tail_from, cfg.tail_to, falling)
        warm = jnp.minimum(at / cfg.warmup, 1.0) if cfg.warmup > 0 else 1.0
        return jnp.asarray(cfg.learning_rate * share * warm, jnp.float32)

    return rate


def in_dtype(inner: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """Keeps the floating-point state of `inner` in `dtype` between updates; computes in the gradients' own dtype."""
    def cast(state, to):
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        wide = jnp.result_type(*jax.tree.leaves(grads))
        grads, state = inner.update(grads, cast(state, wide), params)
        return grads, cast(state, dtype)

    init = lambda params: cast(inner.init(params), dtype)
    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]: optax takes any dtype


def decayed(params: Any) -> Any:
    """Which parameters weight decay shrinks: all but the norms' scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def only_indexer(updates: Any) -> Any:
    """The updates of the indexers of sparse attention; zero for all other parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if any(part.key == "indexer" for part in path) else jnp.zeros_like(x), updates)


def matrices(params: Any) -> Any:
    """Which axes of each parameter are inputs and outputs of a matrix; None: it is none, or embedding or head.

    Layers and experts are matrices of their own; heads are parts of one, as in the Kimi models.
    """
    def of(path, x):
        names = dimension_names(jax.tree_util.keystr(path, simple=True, separator="/"), x.ndim)
        first = sum(name in ("layers", "experts") for name in names)
        if len(names) - first < 2 or "vocab" in names:
            return None
        middle = first + (2 if names[first:first + 2] == ("heads", "head_dim") else 1)
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, x.ndim)))

    return jax.tree_util.tree_map_with_path(of, params)


def scale_by_muon(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Muon's direction of matrices, of the size that Adam's has, and Adam's of the rest (arXiv 2502.16982).

    Momentum 0.95 and the factor 0.2 are those of Moonlight and Kimi K2.
    """
    muon = optax.contrib.muon(1.0, beta=0.95, mu_dtype=cfg.moment_dtype, muon_weight_dimension_numbers=matrices,
                              consistent_rms=0.2)

    def rules(params):
        found = matrices(params)
        return jax.tree.map(lambda numbers: "adam" if numbers is None else "muon", found,
                            is_leaf=lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers))

    # A rate of 1 has turned the direction round.
    return optax.partition({"muon": optax.chain(muon, optax.scale(-1.0)), "adam": scale_by_adam(cfg)}, rules)


def scale_by_adam(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction, with moments in cfg.moment_dtype."""
    return in_dtype(optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=1e-8), cfg.moment_dtype)


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam or Muon, decoupled weight decay, schedule."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        scale_by_muon(cfg) if cfg.kind == "muon" else scale_by_adam(cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(cfg, steps)))
