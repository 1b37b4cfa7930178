"""The latent cache (report section 2.1.1): per token and layer only the normed latent c and the rotated key k_pe.

Rows are stored in pages of a fixed number of tokens, `pages_PSX` per layer; a sequence has a table of page numbers, so
it grows without copying and shares the pages of a common prefix. Page 0 is a scratch page; masked writes go there. A
row is stored as numbers, or in the FP8 layout that the kernels also read, 656 bytes at kv rank 512:

    512 E4M3 values | 4 float32 scales, one for 128 values | 64 bfloat16 rotary values

Sparse attention stores the indexer's key of each token on pages with the same page numbers: index_head_dim numbers
more, in FP8 128 E4M3 values and a float32 scale.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ConfigError, ModelConfig
from kernels_pallas import api

FORMATS = ("float64", "float32", "bfloat16", "fp8")


class SparsePages(NamedTuple):
    """Pages of one layer with sparse attention: of latents, and of the indexer's keys."""

    latents_PSX: jax.Array
    keys_PSX: jax.Array


def row_shape(cfg: ModelConfig, kind: str) -> tuple[int, Any]:
    """(length, dtype) of one token's row in one layer. Raises ConfigError for an unknown `kind` of cache."""
    C, R = cfg.kv_rank, cfg.rope_head_dim
    if kind not in FORMATS:
        raise ConfigError(f"a cache of {kind!r} is unknown; take one of {', '.join(FORMATS)}.")
    return (api.packed_width(C, R), jnp.uint8) if kind == "fp8" else (C + R, jnp.dtype(kind))


def key_shape(cfg: ModelConfig, kind: str) -> tuple[int, Any]:
    """(length, dtype) of one token's key of the indexer in one layer."""
    I = cfg.index_head_dim
    return (api.packed_width(I, 0), jnp.uint8) if kind == "fp8" else (I, jnp.dtype(kind))


def bytes_per_token(cfg: ModelConfig, kind: str, mtp: int = 0) -> int:
    """Bytes of one token in all layers and in `mtp` MTP modules, which have their own attention."""
    shapes = [row_shape(cfg, kind), *([] if cfg.index_topk is None else [key_shape(cfg, kind)])]
    return (cfg.num_layers + mtp) * sum(length * jnp.dtype(dtype).itemsize for length, dtype in shapes)


def _memory() -> float:
    """Bytes of this machine's memory; infinite if the system does not report it (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf


def check_room(cfg: ModelConfig, kind: str, tokens: int, mtp: int = 0) -> None:
    """Raises ConfigError for a cache that the device cannot hold."""
    size, stats = tokens * bytes_per_token(cfg, kind, mtp), jax.devices()[0].memory_stats() or {}
    room = stats.get("bytes_limit") or _memory()
    if size > room:
        raise ConfigError(f"a cache of {tokens:,} tokens takes {size / 1e9:,.0f} GB, and there are {room / 1e9:,.0f}; "
                          "take fewer sequences at once, or a smaller length.")


def make(cfg: ModelConfig, kind: str, pages: int, page_size: int, mtp: int = 0) -> tuple[jax.Array | SparsePages, ...]:
    """An empty cache: one array [pages, page_size, row] for each layer, then one for each MTP module."""
    def empty(length, dtype):
        return jnp.zeros((pages, page_size, length), dtype)

    def layer():
        latents_PSX = empty(*row_shape(cfg, kind))
        return latents_PSX if cfg.index_topk is None else SparsePages(latents_PSX, empty(*key_shape(cfg, kind)))

    return tuple(layer() for _ in range(cfg.num_layers + mtp))


def pack(kind: str, c_BTC: jax.Array, k_pe_BTR: jax.Array) -> jax.Array:
    """Rows [B, T, X] as they are stored: of the dtype `kind`, or 656 bytes a token in V3 for "fp8"."""
    rows_BTX = jnp.concatenate([c_BTC, k_pe_BTR], axis=-1)
    return api.pack_fp8(rows_BTX, k_pe_BTR.shape[-1]) if kind == "fp8" else rows_BTX.astype(kind)


def unpack(cfg: ModelConfig, kind: str, rows_BSX: jax.Array) -> jax.Array:
    """[c | k_pe] in cfg.dtype, [B, S, C + R]."""
    return api.unpack_fp8(rows_BSX, cfg.kv_rank, cfg.dtype) if kind == "fp8" else rows_BSX.astype(cfg.dtype)


def pack_key(kind: str, k_BTI: jax.Array) -> jax.Array:
    """Keys of the indexer as they are stored, [B, T, X]: of the cache's dtype, or bytes (`api.pack_fp8`)."""
    return api.pack_fp8(k_BTI, 0) if kind == "fp8" else k_BTI.astype(kind)


def unpack_key(cfg: ModelConfig, kind: str, rows_BSX: jax.Array) -> jax.Array:
    """Keys of the indexer in cfg.dtype, [B, S, I]."""
    return api.unpack_fp8(rows_BSX, cfg.index_head_dim, cfg.dtype) if kind == "fp8" else rows_BSX.astype(cfg.dtype)


def write(pages_PSX: jax.Array, rows_BTX: jax.Array, page_BT: jax.Array, offset_BT: jax.Array) -> jax.Array:
    """The pages [P, S, X] with each row at its place, int32 page and offset; masked rows go to page 0."""
    chex.assert_equal_shape_prefix([rows_BTX, page_BT, offset_BT], 2)
    return pages_PSX.at[page_BT, offset_BT].set(rows_BTX)


def page_and_offset(table_BP: jax.Array, position_BT: jax.Array, valid_BT: jax.Array,
           page_size: int) -> tuple[jax.Array, jax.Array]:
    """(page, offset), int32 [B, T] each, of each position of each sequence; (0, .) where it is not valid."""
    page_BT = jnp.take_along_axis(table_BP, position_BT // page_size, axis=1, mode="clip")
    return jnp.where(valid_BT, page_BT, 0), position_BT % page_size


def read(pages_PSX: jax.Array, table_BP: jax.Array) -> jax.Array:
    """Rows [B, P * page_size, X] of the pages in each table, in order."""
    return lax.collapse(pages_PSX.at[table_BP].get(mode="promise_in_bounds"), 1, 3)
