"""Absorbed attention over the latent cache (report section 2.1.1), for T tokens of each of B sequences.

Absorbed MLA never forms keys and values. Both up-projections move to the query's side, and all heads share the cached
latent, so that a token of context costs kv_rank + rope_head_dim numbers to read:

    q~ = q_nope W_UK    score = q~ c + q_pe k_pe    o = (softmax(score) c) W_UV
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import project
from deepseek_jax.model.layers import linear, matmul, rms_norm, wide
from deepseek_jax.model.rope import softmax_scale
from deepseek_jax.serving import latent_cache
from kernels_pallas import api


class TokenSlots(NamedTuple):
    """T tokens of each of B sequences, and the places of their latents.

    token_BT: int32; in MTP module k the tokens k ahead. position_BT: int32. valid_BT: bool; an invalid token does not
    affect the cache. table_BP: int32, each sequence's pages in order.
    """

    token_BT: jax.Array
    position_BT: jax.Array
    valid_BT: jax.Array
    table_BP: jax.Array


class CacheGeometry(NamedTuple):
    """Static: the format of the cache, and the table lengths (in pages) that attention is compiled for, ascending.

    The smallest sufficient length is used; the last is the complete table. deterministic: attention runs over blocks of
    the first length instead, and everything else in tiles of one shape (see `tiles`). routes: whether to report the
    experts that each token chose.
    """

    kind: str
    page_size: int
    widths: tuple[int, ...]
    deterministic: bool = False
    routes: bool = False


def per_head(x_BTHI: jax.Array, w_HIO: jax.Array) -> jax.Array:
    """Each head by its own matrix, [B, T, H, O] in the dtype of x."""
    B, T, H, I = x_BTHI.shape
    y_HMO = matmul(x_BTHI.reshape(B * T, H, I).swapaxes(0, 1), w_HIO)
    return y_HMO.swapaxes(0, 1).reshape(B, T, H, -1)


def _has_kernel(cfg, geometry, T):
    """Whether the device's kernel supports this attention: one query per sequence, rows of the published models' sizes,
    pages of a size that it can copy."""
    rows = (cfg.kv_rank, cfg.rope_head_dim) == (512, 64) and geometry.kind in ("bfloat16", "fp8")
    pages = geometry.page_size in (8, 16, 32) or geometry.page_size % 64 == 0
    # The kernel splits a context depending on the number of sequences, so its rounding depends on the batch.
    alone = T == 1 and not geometry.deterministic
    wanted = cfg.implementation == "auto" and cfg.dtype == "bfloat16"
    return alone and rows and pages and wanted and api.chosen_here("mla_decode") == "hopper"


def attention(cfg: ModelConfig, geometry: CacheGeometry, w: dict[str, jax.Array], x_BTD: jax.Array,
              rope: tuple[jax.Array, jax.Array], pages_PSX: jax.Array,
              slots: TokenSlots) -> tuple[jax.Array, jax.Array]:
    """Absorbed MLA. Returns its output [B, T, D] and the layer's pages, with the latents of these tokens in them."""
    norm = lambda name: lambda x: rms_norm(x, w[name], cfg.latent_norm_eps)
    q_BTHA, c_BTC, k_pe_BTR, _ = project(cfg, x_BTD, rope, w, norm("q_norm"), norm("kv_norm"))
    page_BT, offset_BT = latent_cache.page_and_offset(slots.table_BP, slots.position_BT, slots.valid_BT,
                                                      geometry.page_size)
    pages_PSX = latent_cache.write(pages_PSX, latent_cache.pack(geometry.kind, c_BTC, k_pe_BTR), page_BT, offset_BT)
    N, C = cfg.nope_head_dim, cfg.kv_rank
    q_BTHX = jnp.concatenate([per_head(q_BTHA[..., :N], w["k_up_HNC"]), q_BTHA[..., N:]], axis=-1)
    if _has_kernel(cfg, geometry, q_BTHX.shape[1]):
        lengths_B = jnp.where(slots.valid_BT, slots.position_BT, 0)[:, 0] + 1
        o_BHC = api.mla_decode(q_BTHX[:, 0], pages_PSX, slots.table_BP, lengths_B, scale=softmax_scale(cfg))
        o_BTHC = o_BHC[:, None]
    else:
        reach = jnp.where(slots.valid_BT, slots.position_BT, 0).max() // geometry.page_size  # all pages except the last
        attend = _in_blocks if geometry.deterministic else _at_once
        o_BTHC = attend(cfg, geometry, q_BTHX, pages_PSX, slots, reach)[..., :C].astype(cfg.dtype)
    o_BTHV = per_head(o_BTHC, w["v_up_HCV"])
    return linear(o_BTHV.reshape(*o_BTHV.shape[:2], -1), w["o"]), pages_PSX


def _at_once(cfg, geometry, q_BTHX, pages_PSX, slots, reach):
    """softmax(scores) rows over the smallest sufficient part of the tables, [B, T, H, X]."""
    def attend(width, q_BTHX, pages_PSX, slots):
        rows_BSX = _rows(cfg, geometry, pages_PSX, slots, slots.table_BP[:, :width], 0)
        return _mix(jax.nn.softmax(_scores(cfg, q_BTHX, rows_BSX, slots, 0), axis=-1), rows_BSX)

    branch = jnp.searchsorted(jnp.array(geometry.widths), reach, side="right")
    branches = [functools.partial(attend, width) for width in geometry.widths]
    return lax.switch(branch, branches, q_BTHX, pages_PSX, slots)


def _in_blocks(cfg, geometry, q_BTHX, pages_PSX, slots, reach):
    """The same in blocks of one size, with a running maximum: a block after a token's position changes no bit."""
    width, f32 = geometry.widths[0], wide(cfg.dtype)
    table_BP = jnp.pad(slots.table_BP, ((0, 0), (0, -slots.table_BP.shape[1] % width)))

    def block(i, carry):
        most_BTH1, sum_BTH1, o_BTHX = carry
        first = i * width * geometry.page_size
        pages_BW = lax.dynamic_slice_in_dim(table_BP, i * width, width, axis=1)
        rows_BSX = _rows(cfg, geometry, pages_PSX, slots, pages_BW, first)
        s_BTHS = _scores(cfg, q_BTHX, rows_BSX, slots, first)
        new_BTH1 = jnp.maximum(most_BTH1, s_BTHS.max(axis=-1, keepdims=True))
        p_BTHS, kept_BTH1 = jnp.exp(s_BTHS - new_BTH1), jnp.exp(most_BTH1 - new_BTH1)
        return (new_BTH1, sum_BTH1 * kept_BTH1 + p_BTHS.sum(axis=-1, keepdims=True),
                o_BTHX * kept_BTH1 + _mix(p_BTHS, rows_BSX))

    start_BTH1 = jnp.zeros((*q_BTHX.shape[:3], 1), f32)
    _, sum_BTH1, o_BTHX = lax.fori_loop(
        0, reach // width + 1, block, (start_BTH1 - jnp.inf, start_BTH1, jnp.zeros(q_BTHX.shape, f32)))
    return o_BTHX / sum_BTH1


def _rows(cfg, geometry, pages_PSX, slots, table_BP, first):
    """The rows of those pages, [B, S, X]; first: the position of the first of them."""
    rows_BSX = latent_cache.unpack(cfg, geometry.kind, latent_cache.read(pages_PSX, table_BP))
    # Rows of other sequences may hold NaN, and NaN times zero is NaN: they are replaced by zeros.
    last_B = jnp.where(slots.valid_BT, slots.position_BT, -1).max(axis=1)
    at_S = first + jnp.arange(rows_BSX.shape[1])
    rows_BSX = jnp.where((at_S[None] <= last_B[:, None])[..., None], rows_BSX, 0)
    if len(rows_BSX) > 1 and api.device_here().platform == "cpu":  # a CPU would widen them once per product
        rows_BSX = rows_BSX.astype(wide(cfg.dtype))
    return rows_BSX


def _scores(cfg, q_BTHX, rows_BSX, slots, first):
    """[B, T, H, S] in float32; -inf after a token's own position."""
    B, T, H, X = q_BTHX.shape
    # Rows times queries: the only order for which XLA:CPU neither widens nor transposes the rows of a sequence.
    q_BXY = jnp.swapaxes(q_BTHX.astype(rows_BSX.dtype).reshape(B, T * H, X), 1, 2)
    s_BTHS = jnp.swapaxes(matmul(rows_BSX, q_BXY, wide(cfg.dtype)), 1, 2).reshape(B, T, H, -1) * softmax_scale(cfg)
    at_S = first + jnp.arange(rows_BSX.shape[1])
    return jnp.where(at_S[None, None, None] <= slots.position_BT[:, :, None, None], s_BTHS, -jnp.inf)


def _mix(p_BTHS, rows_BSX):
    """p rows, [B, T, H, X], over complete rows including the rotated key: slicing it off would copy the rows."""
    B, T, H, S = p_BTHS.shape
    o_BYX = matmul(p_BTHS.astype(rows_BSX.dtype).reshape(B, T * H, S), rows_BSX, p_BTHS.dtype)
    return o_BYX.reshape(B, T, H, -1)
