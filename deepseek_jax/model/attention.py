"""Multi-head latent attention, training form (report section 2.1.1).

Keys and values of all heads are up-projected from one normed latent c of kv_rank numbers per token; a single rotary
key k_pe is shared by the heads. Queries come from a separate latent. Only c and k_pe need to be cached.

    q = [q_nope | rope(q_pe)]    k_h = [W_UK_h c | rope(k_pe)]    v_h = W_UV_h c    o = W_O softmax(scale q k) v
"""

import functools
from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.blockwise import attend, largest_logits
from deepseek_jax.model.layers import RMSNorm, Weight, linear, weight, with_flat_inputs
from deepseek_jax.model.ring_attention import ring_attention
from deepseek_jax.model.rope import rotate, softmax_scale
from deepseek_jax.parallel.context import context_size
from deepseek_jax.parallel.sharding import constrain

HEADS_OUT, HEADS_IN = ("heads", None), (None, "heads")  # the dimension of a weight that a mesh splits
SPLIT = ("batch", None, "heads", None)
LOGITS = "attention_logits"  # a collection: if it is mutable, each attention writes "largest" [H] into it


class MLA(nn.Module):
    """Multi-head latent attention; any module with this signature may replace it (see `transformer.BlockParts`)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array],
                 segment_ids_BT: jax.Array | None) -> jax.Array:
        cfg = self.cfg
        if context_size() > 1:
            q_BTHA, c_BTC, k_pe_BTR, _, kv_b_CHX = queries_latents(self, x_BTD, rope)
            latent_BTX = jnp.concatenate([c_BTC, k_pe_BTR], axis=-1)
            # The config allows no adapters here.
            o_BTHV = ring_attention(cfg, functools.partial(_from_latents, cfg), q_BTHA, latent_BTX,
                                    cast(jax.Array, kv_b_CHX), segment_ids_BT)
        else:
            q_BTHA, k_BTHA, v_BTHV, _ = queries_keys_values(self, x_BTD, rope)
            if self.is_mutable_collection(LOGITS) and not self.is_initializing():
                self.put_variable(LOGITS, "largest", largest_logits(q_BTHA, k_BTHA, segment_ids_BT, softmax_scale(cfg),
                                                                    cfg.attention_block))
            o_BTHV = attend(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, softmax_scale(cfg), cfg.attention_block,
                            "e5m6" if cfg.fp8.enabled else None, cfg.implementation)
        return output(self, o_BTHV)


def queries_keys_values(module: nn.Module, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array],
                        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """q and k [B, T, H, N + R], v [B, T, H, V], and the normed query latent [B, T, Q] (None if there is none).

    Declares the weights that they need in `module`, which is being called.
    """
    cfg: ModelConfig = module.cfg  # pyright: ignore[reportAttributeAccessIssue]: of MLA and SparseMLA
    q_BTHA, c_BTC, k_pe_BTR, latent_BTQ, kv_b_CHX = queries_latents(module, x_BTD, rope)
    return q_BTHA, *keys_values(cfg, c_BTC, k_pe_BTR, kv_b_CHX), latent_BTQ


def queries_latents(module: nn.Module, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array],
                    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Weight]:
    """The results of `project`, and W_UKV [C, H, N + V]. Declares all of MLA's weights except W_O in `module`."""
    cfg: ModelConfig = module.cfg  # pyright: ignore[reportAttributeAccessIssue]: of MLA and SparseMLA
    D, H, Q, C = cfg.d_model, cfg.num_heads, cfg.q_rank, cfg.kv_rank
    N, R, V = cfg.nope_head_dim, cfg.rope_head_dim, cfg.v_head_dim
    if Q is None:
        w = {"q": weight(module, "q", (D, H, N + R))}
    else:
        w = {"q_a": weight(module, "q_a", (D, Q)), "q_b": weight(module, "q_b", (Q, H, N + R))}
    w["kv_a"] = weight(module, "kv_a", (D, C + R))
    norm = functools.partial(RMSNorm, cfg, cfg.latent_norm_eps)
    q_norm = None if Q is None else norm(name="q_norm")
    q_BTHA, c_BTC, k_pe_BTR, latent_BTQ = project(cfg, x_BTD, rope, w, q_norm, norm(name="kv_norm"))
    return constrain(q_BTHA, SPLIT), c_BTC, k_pe_BTR, latent_BTQ, weight(module, "kv_b", (C, H, N + V))


def keys_values(cfg: ModelConfig, c_BTC: jax.Array, k_pe_BTR: jax.Array,
                kv_b_CHX: Weight) -> tuple[jax.Array, jax.Array]:
    """k [B, T, H, N + R] and v [B, T, H, V] from the normed latents c [B, T, C] and the rotated keys [B, T, R]."""
    N = cfg.nope_head_dim
    kv_BTHX = constrain(linear(c_BTC, kv_b_CHX, cfg.fp8, names=HEADS_OUT), SPLIT)
    k_pe_BTHR = jnp.broadcast_to(k_pe_BTR[:, :, None], kv_BTHX.shape[:3] + k_pe_BTR.shape[-1:])
    return jnp.concatenate([kv_BTHX[..., :N], k_pe_BTHR], axis=-1), kv_BTHX[..., N:]


def _from_latents(cfg: ModelConfig, latent_BTX: jax.Array, kv_b_CHX: Weight) -> tuple[jax.Array, jax.Array]:
    return keys_values(cfg, latent_BTX[..., :cfg.kv_rank], latent_BTX[..., cfg.kv_rank:], kv_b_CHX)


def output(module: nn.Module, o_BTHV: jax.Array) -> jax.Array:
    """The contribution of attention to the residual stream, [B, T, D]. Declares W_O in `module`."""
    cfg: ModelConfig = module.cfg  # pyright: ignore[reportAttributeAccessIssue]: of MLA and SparseMLA
    H, V, D = cfg.num_heads, cfg.v_head_dim, cfg.d_model
    return linear(o_BTHV.reshape(o_BTHV.shape[:2] + (H * V,)), with_flat_inputs(weight(module, "o", (H, V, D))),
                  cfg.fp8, saved="e5m6", names=HEADS_IN)


def project(cfg: ModelConfig, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], w: dict[str, jax.Array],
            q_norm: Callable[[jax.Array], jax.Array] | None,
            kv_norm: Callable[[jax.Array], jax.Array],
            ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The projections that both forms of MLA start with.

    Args:
      w: the weights by name, "q" or "q_a" and "q_b", and "kv_a".
      q_norm, kv_norm: RMSNorm of the query latent (not used if there is none) and of the key-value latent.
    Returns:
      queries [B, T, H, N + R], rotated; the normed latent c [B, T, C]; the rotated key k_pe [B, T, R] of all heads.
      The latter two are cached. Last the normed query latent [B, T, Q]; None if there is none.
    """
    N, C = cfg.nope_head_dim, cfg.kv_rank
    if cfg.q_rank is None or q_norm is None:
        latent_BTQ, q_BTHA = None, linear(x_BTD, w["q"], cfg.fp8, names=HEADS_OUT)
    else:
        latent_BTQ = q_norm(checkpoint_name(linear(x_BTD, w["q_a"], cfg.fp8), "latent"))
        q_BTHA = linear(latent_BTQ, w["q_b"], cfg.fp8, names=HEADS_OUT)
    q_BTHA = jnp.concatenate([q_BTHA[..., :N], rotate(q_BTHA[..., N:], rope)], axis=-1)
    kv_BTX = checkpoint_name(linear(x_BTD, w["kv_a"], cfg.fp8), "latent")
    return q_BTHA, kv_norm(kv_BTX[..., :C]), rotate(kv_BTX[..., None, C:], rope)[:, :, 0], latent_BTQ
