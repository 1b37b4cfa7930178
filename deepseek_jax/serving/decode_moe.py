"""Routed and shared experts for the few tokens of a decoding step (report section 2.1.2).

Training sorts thousands of tokens into rows; a step has one to a few hundred. Which of three forms is fastest depends
on how many choices there are for each expert here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import ffn, matmul, swiglu, wide
from deepseek_jax.model.permute import combine, sort_by_expert, to_rows
from deepseek_jax.model.router import apply_rule, count_choices
from deepseek_jax.model.types import RoutingContext
from deepseek_jax.parallel.sharding import AXES
from deepseek_jax.serving.decode_attention import TokenSlots
from deepseek_jax.serving.weights import LayerWeights


class Routed(NamedTuple):
    """Routing results: tokens that chose each expert, int32 [E]; each token's experts, int32 [B, T, K].

    For several layers: [L, E], and [B, T, L, K] if the experts are reported, otherwise None.
    """

    counts: jax.Array
    chosen: jax.Array | None


def choices_in_turn(x_ND: jax.Array, chosen_NK: jax.Array, gates_NK: jax.Array, gate_EDF: jax.Array,
                    up_EDF: jax.Array, down_EFD: jax.Array) -> jax.Array:
    """sum over k of gates[n, k] * FFN of chosen[n, k], [N, D], for so few tokens that they hardly share experts.

    One choice after the other: nothing is sorted, and only the chosen experts' weights are read.
    """
    N, K = chosen_NK.shape
    f32 = wide(x_ND.dtype)

    def choice(i, y_ND):
        n, k = i // K, i % K
        gate, up, down = (lax.dynamic_index_in_dim(w, chosen_NK[n, k], keepdims=False)
                          for w in (gate_EDF, up_EDF, down_EFD))
        y_1D = ffn(lax.dynamic_slice_in_dim(x_ND, n, 1), gate, up, down).astype(f32) * gates_NK[n, k].astype(f32)
        return lax.dynamic_update_slice_in_dim(y_ND, lax.dynamic_slice_in_dim(y_ND, n, 1) + y_1D, n, 0)

    return lax.fori_loop(0, N * K, choice, jnp.zeros(x_ND.shape, f32)).astype(x_ND.dtype)


def tiles_in_turn(x_ND: jax.Array, chosen_NK: jax.Array, gates_NK: jax.Array, gate_EDF: jax.Array,
                  up_EDF: jax.Array, down_EFD: jax.Array) -> jax.Array:
    """The same for more tokens, [N, D]; a choice equal to E is not an expert of this device, and adds nothing.

    As in training, tokens are sorted by expert into tiles; here a loop takes the tiles that are not empty, one by one,
    through all three products. Few tokens leave most experts out, and only a tile's weights are copied.
    """
    (N, K), E = chosen_NK.shape, gate_EDF.shape[0]
    # Twice the mean load: small batches read each expert once, large ones waste little in each expert's last tile.
    height = min(1 << (max(2 * N * K // E, 1).bit_length() - 1), 32)
    p = sort_by_expert(chosen_NK, E + 1, height)
    x_RD, end_E = to_rows(x_ND, p), jnp.cumsum(p.sizes_E[:E]) // height

    def tile(t, y_RD):
        e = jnp.searchsorted(end_E, t, side="right")
        gate, up, down = (lax.dynamic_index_in_dim(w, e, keepdims=False) for w in (gate_EDF, up_EDF, down_EFD))
        y_MD = ffn(lax.dynamic_slice_in_dim(x_RD, t * height, height), gate, up, down)
        return lax.dynamic_update_slice_in_dim(y_RD, y_MD, t * height, 0)

    return combine(lax.fori_loop(0, end_E[-1], tile, jnp.zeros_like(x_RD)), gates_NK, p)


def all_at_once(x_ND: jax.Array, chosen_NK: jax.Array, gates_NK: jax.Array, gate_EDF: jax.Array,
                up_EDF: jax.Array, down_EFD: jax.Array) -> jax.Array:
    """The same, [N, D], with every expert for every token, and gates of zero for experts that were not chosen.

    Faster if most experts are needed anyway and rows are cheap: weights are read without a copy.
    """
    N, (E, D, F) = len(x_ND), gate_EDF.shape
    gate_EN1 = (jax.nn.one_hot(chosen_NK, E, axis=0) * gates_NK[None]).sum(axis=2)[..., None].astype(x_ND.dtype)
    x_END = jnp.broadcast_to(x_ND[None], (E, N, D))
    h_ENF = gate_EN1 * swiglu(matmul(x_END, gate_EDF), matmul(x_END, up_EDF))
    return matmul(jnp.swapaxes(h_ENF, 0, 1).reshape(N, E * F), down_EFD.reshape(E * F, D))


def _devices() -> int:
    """The number of devices that share the experts."""
    return lax.axis_size(AXES["experts"]) if jax.sharding.get_abstract_mesh().manual_axes else 1


def moe(cfg: ModelConfig, w: LayerWeights, x_BTD: jax.Array, slots: TokenSlots) -> tuple[jax.Array, Routed]:
    """Routed and shared experts, [B, T, D], and the routing results. Only valid tokens are counted.

    Inside `weights.on_mesh` the routed experts are those of this device.
    """
    x_ND = x_BTD.reshape(-1, cfg.d_model)
    context = RoutingContext(slots.token_BT.reshape(-1), slots.position_BT.reshape(-1))
    assert w.router is not None
    _, chosen_NK, gates_NK = apply_rule(cfg, x_ND, {"weight": w.router}, w.bias_E, context)
    f, valid_BT = w.ffn, slots.valid_BT
    place_NK, here, devices = chosen_NK, f["gate"].shape[0], _devices()
    if w.places is not None:  # experts with replicas: a token's row number selects one
        row_N1 = jnp.arange(chosen_NK.shape[0])[:, None]
        place_NK = w.places.table_EX[chosen_NK, row_N1 % w.places.count_E[chosen_NK]]
    run = choices_in_turn
    if devices > 1 or 4 * place_NK.size > here:
        # A core multiplies 16 bfloat16 rows at once: fewer cost the same.
        narrow_and_many = x_ND.dtype == jnp.bfloat16 and x_ND.shape[0] <= 32 and place_NK.size >= here * devices
        run = all_at_once if narrow_and_many else tiles_in_turn
        if devices > 1:
            place_NK = place_NK - lax.axis_index(AXES["experts"]) * here
        local_NK = (place_NK >= 0) & (place_NK < here) & valid_BT.reshape(-1, 1)
        place_NK = jnp.where(local_NK, place_NK, here)
    y_ND = run(x_ND, place_NK, gates_NK, f["gate"], f["up"], f["down"])
    if devices > 1:  # all devices have all tokens, and each has summed its own experts
        y_ND = lax.psum(y_ND.astype(wide(y_ND.dtype)), AXES["experts"]).astype(y_ND.dtype)
    if cfg.num_shared_experts:
        shared = f["shared"]
        y_ND = y_ND + ffn(x_ND, shared["gate"], shared["up"], shared["down"])
    chosen_BTK = chosen_NK.reshape(*valid_BT.shape, -1)
    chosen_NK = jnp.where(valid_BT.reshape(-1, 1), chosen_NK, cfg.num_experts)  # not counted
    return y_ND.reshape(x_BTD.shape), Routed(count_choices(chosen_NK, cfg.num_experts), chosen_BTK)
