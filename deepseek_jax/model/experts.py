"""DeepSeekMoE (report section 2.1.2): many small routed experts, and a shared one that every token uses.

    h = shared(u) + sum over chosen experts of gate_i * FFN_i(u)

No token is ever dropped. Choices are sorted by expert into rows (`permute`), every expert's rows are multiplied by its
weights (`grouped_matmul`), and the results are gathered back.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax import fp8
from deepseek_jax.config import FP8Config, MeshConfig, ModelConfig
from deepseek_jax.model.grouped_matmul import grouped_matmul, implementation_here, row_alignment
from deepseek_jax.model.layers import FFN, Weight, save_ffn_input, swiglu, weight
from deepseek_jax.model.permute import Permutation, combine, sort_by_expert, to_rows, truncate
from deepseek_jax.model.router import Router, auxiliary_loss, count_choices, sequence_loss
from deepseek_jax.model.types import Routing, RoutingContext, RoutingStats, TokenContext
from deepseek_jax.parallel.dispatch import PLAIN, ExpertLayout, Wire, to_experts
from deepseek_jax.parallel.sharding import constrain, data_shards, local_size


class ExpertWeights(NamedTuple):
    """The experts' masters, float32, stacked along E."""

    gate_EDF: Weight
    up_EDF: Weight
    down_EFD: Weight


def routed_experts(x_ND: jax.Array, chosen_NK: jax.Array, gates_NK: jax.Array, weights: ExpertWeights,
                   implementation: str = "auto", recipe: FP8Config | None = None) -> jax.Array:
    """sum over k of gates[n, k] * FFN of chosen[n, k], [N, D] in the dtype of x: exact for every routing.

    implementation: "auto", "xla", or one of `grouped_matmul.IMPLEMENTATIONS`. `recipe`: if it is enabled, the products
    run in FP8 (and `implementation` is the recipe's).
    """
    E = weights.gate_EDF.shape[0]
    name, align = _how(implementation, recipe, chosen_NK.size, E)
    permutation = sort_by_expert(chosen_NK, E, align, even=align > 1 and name == "cpu")
    return _ffn(x_ND, gates_NK, permutation, weights, align, name, recipe)


def _how(implementation, recipe, rows, num_experts):
    """The implementation of the products, and the alignment of groups of rows."""
    name = implementation_here(implementation)
    if recipe is not None and recipe.enabled:
        return name, fp8.GROUP_ALIGNMENT
    return name, row_alignment(name, rows, num_experts)


def _ffn(x_ND, gates_NK, p: Permutation, weights: ExpertWeights, align, name, recipe):
    if recipe is not None and recipe.enabled:
        # The config allows no adapters with FP8.
        gate_EFD, up_EFD, down_EDF = (jnp.swapaxes(cast(jax.Array, w), 1, 2) for w in weights)
        y_RD = fp8.swiglu_ffn(to_rows(x_ND, p), gate_EFD, up_EFD, down_EDF, recipe, p.sizes_E)
        return combine(y_RD, gates_NK, p)
    product = functools.partial(grouped_matmul, sizes_E=p.sizes_E, align=align, implementation=name)
    x_RD = to_rows(x_ND, p)
    gate_RF, up_RF = (save_ffn_input(product(x_RD, w)) for w in (weights.gate_EDF, weights.up_EDF))
    y_RD = product(swiglu(gate_RF, up_RF), weights.down_EFD)
    return combine(y_RD, gates_NK, p)


def resident_experts(x_ND: jax.Array, id_NK: jax.Array, gates_NK: jax.Array, weights: ExpertWeights, even: int,
                     capacity: float | None = None, implementation: str = "auto",
                     recipe: FP8Config | None = None) -> tuple[jax.Array, jax.Array]:
    """The gated sum over those of a row's experts that are on this device, and the number of choices computed.

    Args:
      x_ND: the receive buffer of rows, of which any number may be filled.
      id_NK: int32, counted from 1 among the experts here; 0: none.
      even: choices that arrive if all loads are even; it determines the tile size.
      capacity: room as a multiple of `even`; later choices are dropped. None: room for all that could arrive.
    """
    E = weights.gate_EDF.shape[0]
    name, align = _how(implementation, recipe, even, E)
    # A row has at most as many choices here as there are experts here: these are moved to the front, the rest cut off.
    K = min(id_NK.shape[1], E)
    order_NK = jnp.argsort(id_NK == 0, axis=1, stable=True)[:, :K]
    id_NK, gates_NK = (jnp.take_along_axis(x, order_NK, axis=1) for x in (id_NK, gates_NK))
    room = id_NK.size if capacity is None else min(id_NK.size, math.ceil(capacity * even))
    # Choices of experts on other devices form a last group, which is cut off.
    permutation = sort_by_expert(jnp.where(id_NK > 0, id_NK - 1, E), E + 1, align)
    permutation, computed = truncate(permutation, id_NK, align, room + E * (align - 1))
    return _ffn(x_ND, gates_NK, permutation, weights, align, name, recipe), computed


# Values in E4M3, with a power-of-two scale for every 128 channels of a token (report section 3.3.3), whose exponent is
# sent and saved: for dispatched tokens in the forward pass, for gradients of the experts' outputs in the backward pass.
# Quantizing again at the next hop changes nothing.
def _encode(x_RD):
    q = fp8.quantize_tiles(x_RD, scale="power_of_two")
    return q.values, fp8.exponents_of(q.scales)


FP8_WIRE = Wire(_encode, lambda parts, dtype: fp8.dequantize(
    fp8.Quantized(parts[0], fp8.powers_of_two(parts[1])), dtype))


class MoE(nn.Module):
    """The feed-forward network of a MoE layer."""

    cfg: ModelConfig
    mesh: MeshConfig = MeshConfig()
    capture: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x_BTD: jax.Array, bias_E: jax.Array | None,
                 context: TokenContext | None = None) -> tuple[jax.Array, RoutingStats]:
        """x_BTD: normed hidden states. Returns the output [B, T, D] and routing statistics.

        `context` may be omitted for rules that read only hidden states, such as the report's.
        """
        cfg = self.cfg
        B, T, D = x_BTD.shape
        E, F = cfg.num_experts, cfg.expert_ffn_dim
        x_ND = x_BTD.reshape(B * T, D)
        routing: Routing = Router(cfg, name="router")(x_ND, bias_E, _of_tokens(context))
        here = local_size("experts", E)
        weights = ExpertWeights(*(weight(self, name, (here, *shape)) for name, shape in
                                  (("gate", (D, F)), ("up", (D, F)), ("down", (F, D)))))
        if self.mesh.devices == 1:
            y_ND, traffic = routed_experts(x_ND, routing.chosen_NK, routing.gates_NK, weights, cfg.implementation,
                                           cfg.fp8), None
        else:
            y_ND, traffic = self._dispatched(x_ND, routing, weights)
        y_BTD = constrain(y_ND.reshape(B, T, D), ("batch", None, None))
        if cfg.num_shared_experts:
            y_BTD = y_BTD + FFN(cfg, cfg.num_shared_experts * F, name="shared")(x_BTD)
        counts_E = count_choices(routing.chosen_NK, E)
        scores_BTE = routing.scores_NE.reshape(B, T, E)
        captured = {"scores": scores_BTE, "chosen": routing.chosen_NK.reshape(B, T, -1)}
        return y_BTD, RoutingStats(
            counts_E=counts_E, sequence_loss=sequence_loss(cfg, scores_BTE),
            auxiliary_loss=auxiliary_loss(cfg, routing.scores_NE, counts_E), traffic=traffic,
            captured={name: captured[name] for name in self.capture})

    def _dispatched(self, x_ND, routing: Routing, weights: ExpertWeights):
        """The same sum, by experts on other devices."""
        cfg, mesh = self.cfg, self.mesh
        even = routing.chosen_NK.size // (data_shards() * mesh.tensor)  # per device: `here` runs in a shard_map

        def here(x_RD, id_RK, gates_RK, weights):
            if mesh.nodes * mesh.local == 1 and (mesh.capacity is None or mesh.capacity >= 1):  # all experts are here
                return (routed_experts(x_RD, id_RK - 1, gates_RK, weights, cfg.implementation, cfg.fp8),
                        jnp.int32(id_RK.size))
            return resident_experts(x_RD, id_RK, gates_RK, weights, even, mesh.capacity, cfg.implementation, cfg.fp8)

        # A group of experts is on one node.
        most_nodes = min(mesh.nodes, cfg.groups_kept) if cfg.num_groups > 1 else mesh.nodes
        placement = ExpertLayout(mesh, cfg.num_experts, most_nodes, FP8_WIRE if mesh.dispatch_fp8 else PLAIN)
        return to_experts(placement, here, x_ND, routing.chosen_NK, routing.gates_NK, weights)


def _of_tokens(context: TokenContext | None) -> RoutingContext:
    """The context of B * T tokens in one row."""
    if context is None or context.tokens_BT is None or context.positions_BT is None:
        return RoutingContext(None, None, None)
    chosen_BTK = context.chosen_BTK
    chosen_NK = None if chosen_BTK is None else chosen_BTK.reshape(-1, chosen_BTK.shape[-1])
    return RoutingContext(context.tokens_BT.reshape(-1), context.positions_BT.reshape(-1), context.step, chosen_NK)
