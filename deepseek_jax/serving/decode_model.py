"""The model for decoding: blocks over the latent cache, for T tokens of each sequence (report section 2.1).

Blocks and MTP modules are composed as in training (`model.block`), from absorbed attention and experts for few tokens;
these are functions of arrays, on weights that `weights.prepare` lays out once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import mtp_block, residual_block
from deepseek_jax.model.layers import ffn, head_logits, linear, rms_norm, wide
from deepseek_jax.model.rope import rope_table
from deepseek_jax.serving.decode_attention import CacheGeometry, TokenSlots, attention
from deepseek_jax.serving.decode_moe import Routed, moe
from deepseek_jax.serving.decode_sparse import sparse_attention
from deepseek_jax.serving.latent_cache import SparsePages
from deepseek_jax.serving.tiles import in_tiles, map_tiles
from deepseek_jax.serving.weights import DecodeWeights, LayerWeights

Pages = jax.Array | SparsePages
Cache = tuple[Pages, ...]  # pages of each layer, then of each MTP module


def block(cfg: ModelConfig, geometry: CacheGeometry, w: LayerWeights, x_BTD: jax.Array,
          rope: tuple[jax.Array, jax.Array], pages: Pages,
          slots: TokenSlots) -> tuple[jax.Array, Pages, Routed | None]:
    """One transformer block. Returns x [B, T, D], the layer's pages, and routing results; None for a dense block."""
    norm = lambda scale: lambda x_BTD: rms_norm(x_BTD, scale, cfg.norm_eps)

    def feed_forward(h_BTD):
        if w.router is not None:
            return moe(cfg, w, h_BTD, slots)
        return ffn(h_BTD, *(w.ffn[name] for name in ("gate", "up", "down"))), None

    attend: Any = attention if cfg.index_topk is None else sparse_attention  # each with its own kind of pages
    return residual_block(x_BTD, norm(w.attention_norm),
                          lambda h_BTD: attend(cfg, geometry, w.attention, h_BTD, rope, pages, slots),
                          norm(w.ffn_norm), feed_forward)


def forward(cfg: ModelConfig, geometry: CacheGeometry, weights: DecodeWeights, cache: Cache,
            slots: TokenSlots) -> tuple[jax.Array, Cache, Routed]:
    """The main model on T tokens of each sequence, whose earlier latents are in the cache.

    Returns:
      hidden states [B, T, D] after the final norm, the cache with these tokens in it, routing results of the MoE
      layers.
    """
    run = functools.partial(_forward, cfg, geometry, weights)
    made = in_tiles(run, cache, slots) if geometry.deterministic else run(cache, slots)
    (hidden_BTD, chosen_BTLK), cache, counts_LE = made
    return hidden_BTD, cache, Routed(counts_LE, chosen_BTLK)


def _forward(cfg, geometry, weights, cache, slots):
    rope = rope_table(cfg, slots.position_BT, wide(cfg.dtype))
    x_BTD = weights.embedding[slots.token_BT]
    pages, routed = list(cache), []
    for i, w in enumerate(weights.layers):
        x_BTD, pages[i], one = block(cfg, geometry, w, x_BTD, rope, pages[i], slots)
        if one is not None:
            routed.append(one)
    counts_LE = jnp.stack([r.counts for r in routed]) if routed else jnp.zeros((0, cfg.num_experts), jnp.int32)
    chosen_BTLK = jnp.stack([r.chosen for r in routed], axis=2) if routed and geometry.routes else None
    return (rms_norm(x_BTD, weights.norm, cfg.norm_eps), chosen_BTLK), tuple(pages), counts_LE


def predict_ahead(cfg: ModelConfig, geometry: CacheGeometry, weights: DecodeWeights, k: int, cache: Cache,
                  hidden_BTD: jax.Array, slots: TokenSlots) -> tuple[jax.Array, Cache]:
    """MTP module k (from 1): position i takes h_{k-1}[i] and token i + k, and its own latents of earlier positions.

    Args:
      slots: with the tokens k ahead.
    Returns:
      h_k [B, T, D] after the module's norm, for the shared head; the cache.
    """
    run = functools.partial(_predict_ahead, cfg, geometry, weights, k)
    made = in_tiles(run, cache, slots, hidden_BTD) if geometry.deterministic else run(cache, slots, hidden_BTD)
    return made[:2]


def _predict_ahead(cfg, geometry, weights, k, cache, slots, hidden_BTD):
    w, layer = weights.mtp[k - 1], cfg.num_layers + k - 1
    rope = rope_table(cfg, slots.position_BT, wide(cfg.dtype))
    norm = lambda scale: lambda x_BTD: rms_norm(x_BTD, scale, cfg.norm_eps)

    def mtp_layer(x_BTD):
        x_BTD, pages, _ = block(cfg, geometry, w.block, x_BTD, rope, cache[layer], slots)
        return x_BTD, pages

    h_BTD, pages = mtp_block(hidden_BTD, weights.embedding[slots.token_BT], norm(w.hidden_norm),
                                 norm(w.embedding_norm), lambda x_BTX: linear(x_BTX, w.projection, cfg.fp8),
                                 mtp_layer, norm(w.norm))
    return h_BTD, (*cache[:layer], pages, *cache[layer + 1:]), ()


def logits(geometry: CacheGeometry, weights: DecodeWeights, hidden_BTD: jax.Array) -> jax.Array:
    """float32 [B, T, W] of hidden states that `forward` or `predict_ahead` returned."""
    run = lambda hidden_BTD: head_logits(hidden_BTD, weights.head)
    return map_tiles(run, hidden_BTD) if geometry.deterministic else run(hidden_BTD)
