"""The choice of experts for a token, and the balancing of their loads (report section 2.1.2, arXiv 2408.15664).

An expert's affinity s decides how much it contributes; affinity plus bias decides whether it is chosen. The bias is not
a parameter: once per optimizer step it moves by `speed`, up for experts with too low a load.

    s = sigmoid(u W)    chosen = top-K of s + b within the best groups    gate = s[chosen] / sum s[chosen] * scale

Your own rule is one function with the signature of `route`, set in a config as model.router="package.module:function";
your own update of the bias is a `BiasRule`, set as balance.bias_rule="package.module:NAME".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import GROUP_LIMITED, BalanceConfig, ConfigError, ModelConfig
from deepseek_jax.model.layers import weight, wide
from deepseek_jax.model.types import Routing, RoutingContext
from deepseek_jax.parallel.context import mean_over_parts
from deepseek_jax.parallel.sharding import by_rows
from deepseek_jax.plugin import load_object


def affinities(cfg: ModelConfig, logits_NE: jax.Array) -> jax.Array:
    """Unbiased scores, [N, E] in the logits' dtype: sigmoid (V3) or softmax over the experts (V2)."""
    return jax.nn.sigmoid(logits_NE) if cfg.score == "sigmoid" else jax.nn.softmax(logits_NE, axis=-1)


def biased(cfg: ModelConfig, scores_NE: jax.Array, bias_E: jax.Array | None) -> jax.Array:
    """The scores used for selection, [N, E]. The bias is data: no gradient flows to it, or through selection."""
    scores_NE = lax.stop_gradient(scores_NE)
    if not cfg.has_router_bias or bias_E is None:
        return scores_NE
    bias_1E = lax.stop_gradient(bias_E)[None]
    return scores_NE * bias_1E if cfg.router_bias == "multiplicative" else scores_NE + bias_1E


def limit_to_groups(cfg: ModelConfig, scores_NE: jax.Array) -> jax.Array:
    """The scores [N, E], with -inf for the experts outside the best groups.

    A group's score is the sum of its two best experts (sigmoid models) or its best one (softmax models).
    """
    if cfg.num_groups == 1:
        return scores_NE
    N, E = scores_NE.shape
    scores_NGX = scores_NE.reshape(N, cfg.num_groups, E // cfg.num_groups)
    best = 2 if cfg.score == "sigmoid" else 1
    group_NG = lax.top_k(scores_NGX, best)[0].sum(axis=-1)
    kept_NM = lax.top_k(group_NG, cfg.groups_kept)[1]
    keep_NG = (kept_NM[:, :, None] == jnp.arange(cfg.num_groups)[None, None]).any(axis=1)
    # -inf, not 0: biased scores can be negative.
    return jnp.where(keep_NG[:, :, None], scores_NGX, -jnp.inf).reshape(N, E)


def select(cfg: ModelConfig, scores_NE: jax.Array, bias_E: jax.Array | None) -> jax.Array:
    """int32 [N, K]: the experts chosen for each token."""
    return by_rows(lambda biased_NE: lax.top_k(limit_to_groups(cfg, biased_NE), cfg.experts_per_token)[1],
                   biased(cfg, scores_NE, bias_E))


def gates(cfg: ModelConfig, scores_NE: jax.Array, chosen_NK: jax.Array) -> jax.Array:
    """The gates of the chosen experts, from the UNBIASED scores: [N, K], in V3 summing to route_scale."""
    gate_NK = jnp.take_along_axis(scores_NE, chosen_NK, axis=1)
    if cfg.normalize_gates:
        gate_NK = gate_NK / (gate_NK.sum(axis=-1, keepdims=True) + 1e-20)
    return gate_NK * cfg.route_scale


def count_choices(chosen_NK: jax.Array, num_experts: int) -> jax.Array:
    """int32 [E]: the number of tokens that chose each expert."""
    return (chosen_NK[:, :, None] == jnp.arange(num_experts)[None, None]).sum(axis=(0, 1), dtype=jnp.int32)


def sequence_loss(cfg: ModelConfig, scores_BTE: jax.Array) -> jax.Array:
    """The complementary sequence-wise loss sum_i f_i P_i, averaged over sequences, without its weight alpha: a
    scalar.

    f_i counts the tokens for which expert i is among the top K of the unbiased scores, without group limits, as in
    equation 18 of the report. It is 1 for uniform loads and scores.
    """
    _, T, E = scores_BTE.shape
    top_BTK = by_rows(lambda scores_BTE: lax.top_k(scores_BTE, cfg.experts_per_token)[1], scores_BTE)
    f_BE = jax.vmap(lambda top_TK: count_choices(top_TK, E))(top_BTK) * (E / (cfg.experts_per_token * T))
    p_BE = (scores_BTE / scores_BTE.sum(axis=-1, keepdims=True)).mean(axis=1)
    f_BE, p_BE = mean_over_parts(f_BE), mean_over_parts(p_BE)
    return (f_BE * p_BE).sum(axis=-1).mean()


def auxiliary_loss(cfg: ModelConfig, scores_NE: jax.Array, counts_E: jax.Array) -> jax.Array:
    """A scalar: the classic batch-wise balance loss sum_i f_i P_i (GShard, Switch), baseline of arXiv 2408.15664."""
    N, E = scores_NE.shape
    f_E = counts_E * (E / (cfg.experts_per_token * N))
    p_E = (scores_NE / scores_NE.sum(axis=-1, keepdims=True)).mean(axis=0)
    return (f_E * p_E).sum()


class BiasRule(NamedTuple):
    """The update of the routing biases, once per optimizer step, in the style of an optax transformation.

    init: biases float32 [L, E] -> state, any pytree of arrays (() for none); it is part of the checkpoint.
    update: (biases [L, E], counts int32 [L, E] summed over the WHOLE global batch, speed, state) -> (biases, state).
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def load_error(counts_LE: jax.Array, dtype: Any) -> jax.Array:
    """Mean load of each layer minus the load of each expert, [L, E] in `dtype`; positive: the load was too low."""
    E = counts_LE.shape[-1]
    total_L1 = counts_LE.sum(axis=-1, keepdims=True)
    # In integers first: a float32 mean of more than 2^24 choices is inexact, and so is the sign for an even load.
    return (total_L1 // E - counts_LE).astype(dtype) + (total_L1 % E).astype(dtype) / E


def _sign(error_LE, counts_LE):
    return jnp.sign(error_LE)


def _proportional(error_LE, counts_LE):
    mean_L1 = counts_LE.sum(axis=-1, keepdims=True) / counts_LE.shape[-1]
    return error_LE / jnp.maximum(mean_L1, 1).astype(error_LE.dtype)


STEPS = {"sign": _sign, "proportional": _proportional}  # the report's rule; the error as a fraction of the mean load


def update_bias(bias_LE: jax.Array, counts_LE: jax.Array, speed: jax.Array | float, rule: str = "sign") -> jax.Array:
    """Moves each expert's routing bias by `speed` against its load, once per optimizer step.

    Args:
      bias_LE: float32, per layer and expert.
      counts_LE: tokens that chose each expert, summed over the WHOLE global batch; a shard's counts alone
        make replicas drift apart.
      speed: the report uses 0.001, and 0 for the last 500B tokens.
      rule: "sign", or "proportional" to the load error as a fraction of the mean load.
    """
    return bias_LE + speed * STEPS[rule](load_error(counts_LE, bias_LE.dtype), counts_LE)


def bias_rule(cfg: BalanceConfig) -> BiasRule:
    """The rule of balance.bias_rule. Raises ConfigError if it is not a rule."""
    name = cfg.bias_rule
    if name in STEPS:
        return BiasRule(lambda bias_LE: (), lambda bias_LE, counts_LE, speed, state: (
            update_bias(bias_LE, counts_LE, speed, name), state))
    rule = load_object("balance.bias_rule", name)
    if not isinstance(rule, BiasRule):
        raise ConfigError(f"balance.bias_rule={name!r} is no BiasRule; make one with model.router.BiasRule(init, "
                          "update).")
    return rule


def initial_bias(cfg: ModelConfig, shape: tuple[int, ...]) -> jax.Array:
    """Zeros, or ones for a multiplicative bias: float32 of `shape` (float64 for a float64 model)."""
    fill = 1.0 if cfg.router_bias == "multiplicative" else 0.0
    return jnp.full(shape, fill, wide(cfg.dtype))


def route(cfg: ModelConfig, x_ND: jax.Array, weights: dict[str, jax.Array], bias_E: jax.Array | None,
          context: RoutingContext) -> Routing:
    """The report's rule for N tokens: float32 throughout, whatever the model's dtype.

    Args:
      weights: {"weight": float32 [D, E]}.
      bias_E: float32; None for models without a bias.
      context: only `chosen_NK` is read.
    """
    w_DE = weights["weight"]
    # Accelerators would otherwise use bfloat16 passes, which would flip near ties.
    logits_NE = jnp.matmul(x_ND.astype(w_DE.dtype), w_DE, precision=lax.Precision.HIGHEST)
    scores_NE = checkpoint_name(affinities(cfg, logits_NE), "routing")
    chosen_NK = select(cfg, scores_NE, bias_E)
    if context.chosen_NK is not None:
        chosen_NK = jnp.where(context.chosen_NK >= 0, context.chosen_NK, chosen_NK)
    return Routing(scores_NE, chosen_NK, gates(cfg, scores_NE, chosen_NK))


def in_turn(cfg: ModelConfig, x_ND: jax.Array, weights: dict[str, jax.Array], bias_E: jax.Array | None,
            context: RoutingContext) -> Routing:
    """Even loads by construction, for measuring speed (balance.force_balanced): token n takes experts n K, n K + 1, ...

    Scores and gates are those of `route`, at its cost. Loads differ by one at most; all of a token's experts are
    adjacent, so fewer nodes are involved than the group limit would allow.
    """
    found = route(cfg, x_ND, weights, bias_E, context)
    turn_NK = jnp.arange(found.chosen_NK.size, dtype=jnp.int32).reshape(found.chosen_NK.shape) % cfg.num_experts
    # Read and discarded, so that the compiler keeps the selection of a real step.
    turn_NK += jnp.minimum(found.chosen_NK, 0)
    return Routing(found.scores_NE, turn_NK, gates(cfg, found.scores_NE, turn_NK))


RoutingRule = Callable[[ModelConfig, jax.Array, dict[str, jax.Array], Any, RoutingContext], Routing]


def across_tokens(rule: RoutingRule) -> RoutingRule:
    """Marks a rule whose choice for a token depends on other tokens, such as expert choice.

    It can be trained; decoding and pipelines refuse it, since they do not see the same tokens at once as a training
    step.
    """
    rule.across_tokens = True  # pyright: ignore[reportFunctionMemberAccess]
    return rule


def routing_rule(cfg: ModelConfig) -> RoutingRule:
    """The rule of model.router. Raises ConfigError if there is none."""
    if cfg.router == GROUP_LIMITED:
        return route
    rule: Any = load_object("model.router", cfg.router)
    if callable(rule):
        return rule  # pyright: ignore[reportReturnType]: what a config names cannot be checked here
    raise ConfigError(f"model.router={cfg.router!r} is no function; give one with the signature of "
                      "deepseek_jax.model.router.route.")


def check_routes_alone(cfg: ModelConfig, where: str) -> None:
    """Raises ConfigError if model.router decides over several tokens at once, which `where` does not support."""
    if getattr(routing_rule(cfg), "across_tokens", False):
        raise ConfigError(f"model.router={cfg.router!r} chooses experts over all tokens of a batch, and {where} does "
                          "not see them at once; take a rule that looks at each token alone.")


def apply_rule(cfg: ModelConfig, x_ND: jax.Array, weights: dict[str, jax.Array], bias_E: jax.Array | None,
               context: RoutingContext) -> Routing:
    """Routes by the rule of model.router. Raises ConfigError if it does not return a Routing of these tokens."""
    found = routing_rule(cfg)(cfg, x_ND, weights, bias_E, context)
    N, E, K = len(x_ND), cfg.num_experts, cfg.experts_per_token
    wanted = Routing(((N, E), jnp.floating), ((N, K), jnp.integer), ((N, K), jnp.floating))  # pyright: ignore
    if not isinstance(found, Routing) or any(jnp.shape(x) != shape or not jnp.issubdtype(jnp.result_type(x), kind)
                                             for x, (shape, kind) in zip(found, wanted)):
        raise ConfigError(f"model.router={cfg.router!r} returned {found!r}; a rule returns Routing(scores, chosen, "
                          f"gates): float [{N}, {E}], int [{N}, {K}], float [{N}, {K}].")
    return found


class Router(nn.Module):
    """Declares the weight of a routing rule and calls it."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_ND: jax.Array, bias_E: jax.Array | None, context: RoutingContext) -> Routing:
        w_DE = weight(self, "weight", (self.cfg.d_model, self.cfg.num_experts))
        return apply_rule(self.cfg, x_ND, {"weight": w_DE}, bias_E, context)
