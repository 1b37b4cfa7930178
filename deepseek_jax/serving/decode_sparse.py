"""Sparse attention over the cache, for T tokens of each of B sequences (V3.2 report, section 2.1).

The indexer scores all of a token's context, index_head_dim numbers a token. Absorbed attention then reads only the
latents of the chosen tokens, so its cost does not depend on the length; only the scan of the indexer's keys grows.

    chosen = topk(I[t, :])    o = (softmax(q~ c + q_pe k_pe over chosen) c) W_UV
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import project
from deepseek_jax.model.indexer import IndexTerms, index_scores, index_terms
from deepseek_jax.model.layers import linear, rms_norm, wide
from deepseek_jax.model.rope import softmax_scale
from deepseek_jax.serving import latent_cache
from deepseek_jax.serving.decode_attention import CacheGeometry, TokenSlots, per_head
from deepseek_jax.serving.latent_cache import SparsePages

TOGETHER = 16  # queries per sequence whose scores and chosen latents exist at once


def sparse_attention(cfg: ModelConfig, geometry: CacheGeometry, w: dict[str, jax.Array], x_BTD: jax.Array,
                     rope: tuple[jax.Array, jax.Array], pages: SparsePages,
                     slots: TokenSlots) -> tuple[jax.Array, SparsePages]:
    """Absorbed MLA over chosen tokens. Returns its output [B, T, D] and the layer's pages, with these tokens in them.

    A deterministic geometry scores the complete tables: a scan of another length would round differently.
    """
    norm = lambda name: lambda x: rms_norm(x, w[name], cfg.latent_norm_eps)
    q_BTHA, c_BTC, k_pe_BTR, latent_BTQ = project(cfg, x_BTD, rope, w, norm("q_norm"), norm("kv_norm"))
    assert latent_BTQ is not None  # the config checks that it exists
    index = index_terms(cfg, x_BTD, latent_BTQ, rope, w["indexer"])  # pyright: ignore[reportArgumentType]: a dict
    place = latent_cache.page_and_offset(slots.table_BP, slots.position_BT, slots.valid_BT, geometry.page_size)
    pages = SparsePages(
        latent_cache.write(pages.latents_PSX, latent_cache.pack(geometry.kind, c_BTC, k_pe_BTR), *place),
        latent_cache.write(pages.keys_PSX, latent_cache.pack_key(geometry.kind, index.k_BTI), *place))
    N, C = cfg.nope_head_dim, cfg.kv_rank
    q_BTHX = jnp.concatenate([per_head(q_BTHA[..., :N], w["k_up_HNC"]), q_BTHA[..., N:]], axis=-1)
    widths = geometry.widths[-1:] if geometry.deterministic else geometry.widths
    reach = jnp.where(slots.valid_BT, slots.position_BT, 0).max() // geometry.page_size  # all pages except the last
    branches = [functools.partial(_attend, cfg, geometry, width) for width in widths]
    branch = jnp.minimum(jnp.searchsorted(jnp.array(widths), reach, side="right"), len(widths) - 1)
    o_BTHX = lax.switch(branch, branches, q_BTHX, index, pages, slots)
    o_BTHV = per_head(o_BTHX[..., :C].astype(cfg.dtype), w["v_up_HCV"])
    return linear(o_BTHV.reshape(*o_BTHV.shape[:2], -1), w["o"]), pages


def _attend(cfg, geometry, width, q_BTHX, index: IndexTerms, pages: SparsePages, slots):
    """softmax(scores) rows of the chosen tokens, which are on the first `width` pages of the tables, [B, T, H, X]."""
    table_BP, size = slots.table_BP[:, :width], geometry.page_size
    keys_BSI = latent_cache.unpack_key(cfg, geometry.kind, latent_cache.read(pages.keys_PSX, table_BP))
    # On a CPU, XLA would fuse the gather into the product, which takes 2.5 times as long; elsewhere it does not.
    keys_BSI = lax.optimization_barrier(keys_BSI)
    at_1S = jnp.arange(keys_BSI.shape[1])[None]

    def of_one(query):
        q_BHX, index_q_BJI, weight_BJ, position_B = query
        score_BS = index_scores(index_q_BJI[:, None], weight_BJ[:, None], keys_BSI)[:, 0]
        score_BS = jnp.where(at_1S <= position_B[:, None], score_BS, -jnp.inf)
        best_BK, at_BK = lax.top_k(score_BS, min(cfg.index_topk, score_BS.shape[1]))
        page_BK = jnp.take_along_axis(table_BP, at_BK // size, axis=1)
        stored_BKX = pages.latents_PSX.at[page_BK, at_BK % size].get(mode="promise_in_bounds")
        # A short context has fewer tokens than are chosen: the remaining rows belong to other sequences and may be NaN.
        own_BK = best_BK > -jnp.inf
        rows_BKX = jnp.where(own_BK[..., None], latent_cache.unpack(cfg, geometry.kind, stored_BKX), 0)
        s_BHK = jnp.einsum("BHX,BKX->BHK", q_BHX, rows_BKX, preferred_element_type=wide(cfg.dtype))
        p_BHK = jax.nn.softmax(jnp.where(own_BK[:, None], s_BHK * softmax_scale(cfg), -jnp.inf), axis=-1)
        return jnp.einsum("BHK,BKX->BHX", p_BHK.astype(cfg.dtype), rows_BKX, preferred_element_type=p_BHK.dtype)

    queries = jax.tree.map(lambda x_BT: jnp.swapaxes(x_BT, 0, 1),
                           (q_BTHX, index.q_BTJI, index.weight_BTJ, slots.position_BT))
    return jnp.swapaxes(lax.map(of_one, queries, batch_size=min(TOGETHER, q_BTHX.shape[1])), 0, 1)
