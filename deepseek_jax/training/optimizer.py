"""AdamW or Muon over float32 masters, and the report's learning-rate schedule (report section 4.2).

Warm-up, constant, cosine, then two constant tail levels, all as fractions of the run, so that a run of 600 steps and
one of 14.8T tokens have the same schedule.
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
        at = (step + 1) / steps  # the rate is not 0 in the first step; fraction 1 is the end of the run
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
    """The parameters that weight decay applies to: all except the norms' scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def only_indexer(updates: Any) -> Any:
    """The updates of the indexers of sparse attention; zero for all other parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if any(part.key == "indexer" for part in path) else jnp.zeros_like(x), updates)


def matrices(params: Any) -> Any:
    """The input and output axes of each parameter that is a matrix; None: not a matrix, or the embedding or head.

    Each layer and expert is a separate matrix; heads are parts of one matrix, as in the Kimi models.
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
    """Muon's direction for matrices, scaled to the size of Adam's, and Adam's for the rest (arXiv 2502.16982).

    Momentum 0.95, Nesterov's as in Moonlight's code (K2's report has plain momentum); both use the factor 0.2.
    """
    def rules(params):
        found = matrices(params)
        return jax.tree.map(lambda numbers: "adam" if numbers is None else "muon", found,
                            is_leaf=lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers))

    muon = muon_of_matrices(beta=0.95, dtype=cfg.moment_dtype, consistent_rms=0.2)
    return optax.partition({"muon": muon, "adam": scale_by_adam(cfg)}, rules)


def muon_of_matrices(beta: float, dtype: Any, consistent_rms: float) -> optax.GradientTransformation:
    """optax's Muon for each matrix, with layers and experts as separate axes.

    optax would merge both into one axis, and a mesh that splits the experts would then gather all of them.
    """
    def of_leaf(grad, mu, numbers, state):
        first = numbers.reduction_axis[0]  # the preceding axes are layers and experts
        inputs, outputs = (tuple(axis - first for axis in axes) for axes in numbers)
        size = consistent_rms * math.sqrt(max(math.prod(grad.shape[axis] for axis in axes) for axes in numbers))
        one: Any = optax.contrib.scale_by_muon(beta=beta, mu_dtype=dtype, weight_dimension_numbers=(
            optax.contrib.MuonDimensionNumbers(inputs, outputs)))

        def of_matrix(grad, mu):
            direction, after = one.update(grad, state._replace(mu=mu))
            return size * direction, after.mu

        for _ in range(first):
            of_matrix = jax.vmap(of_matrix)
        return of_matrix(grad, mu)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        leaves, tree = jax.tree.flatten(updates)
        each = zip(leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(matrices(updates)), strict=True)
        made = [of_leaf(*one, state) for one in each]
        directions, mus = (tree.unflatten([pair[n] for pair in made]) for n in (0, 1))
        return directions, state._replace(count=optax.safe_increment(state.count), mu=mus)

    init = optax.contrib.scale_by_muon(beta=beta, mu_dtype=dtype).init
    return optax.GradientTransformation(init, update)


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
