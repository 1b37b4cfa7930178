"""Deterministic decoding: the results for a token do not depend, to the last bit, on the other tokens of a batch.

The rounding of a product depends on its shape, and the shape on the number of sequences in a step, the length of a
chunk and the number of drafts. Here all of them are cut into tiles of TILE tokens, each token a row with its own page
table, so that prompts, steps and drafts use products of a single shape. Within such a product all rows are computed in
the same way (a property of the libraries, which the tests check).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.serving.decode_attention import TokenSlots

TILE = 16  # a core multiplies that many rows of bfloat16 at once: fewer cost the same


def _cut(x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] -> [tiles, TILE, 1, ...], tokens in order, padded with zeros."""
    x_N = lax.collapse(x_BT, 0, 2)
    x_N = jnp.pad(x_N, [(0, -len(x_N) % TILE)] + [(0, 0)] * (x_N.ndim - 1))
    return x_N.reshape(-1, TILE, 1, *x_N.shape[1:])


def _joined(x_IM1: jax.Array, B: int, T: int) -> jax.Array:
    """The inverse of `_cut`."""
    x_N = lax.collapse(x_IM1, 0, 3)
    return x_N[:B * T].reshape(B, T, *x_N.shape[1:])


def in_tiles(run: Callable[..., tuple[Any, Any, Any]], cache: Any, slots: TokenSlots,
             *hidden_BTD: jax.Array) -> tuple[Any, Any, Any]:
    """run(cache, slots, *hidden) -> (arrays [B, T, ...], cache, counts) on tiles, one after the other.

    A tile reads the latents of earlier tiles from the cache, and tokens of one tile read each other's, since `run`
    writes before it reads. Tiles without a valid token are skipped.
    """
    B, T = slots.token_BT.shape
    tables_BTP = jnp.broadcast_to(slots.table_BP[:, None], (B, T, slots.table_BP.shape[1]))
    tiles = TokenSlots(*map(_cut, (slots.token_BT, slots.position_BT, slots.valid_BT, tables_BTP)))
    tiles, xs = tiles._replace(table_BP=tiles.table_BP[:, :, 0]), tuple(map(_cut, hidden_BTD))
    used_I = tiles.valid_BT.any(axis=(1, 2))
    order_I = jnp.argsort(~used_I, stable=True)

    def tile(i, carry):
        made_IM1, cache, counts = carry
        slots, *x = jax.tree.map(lambda part: part[order_I[i]], (tiles, *xs))
        made_M1, cache, more = run(cache, slots, *x)
        made_IM1 = jax.tree.map(lambda all_IM1, one_M1: all_IM1.at[order_I[i]].set(one_M1), made_IM1, made_M1)
        return made_IM1, cache, jax.tree.map(jnp.add, counts, more)

    made, _, counts = jax.eval_shape(run, cache, *jax.tree.map(lambda part: part[0], (tiles, *xs)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), counts)
    start = jax.tree.map(lambda x: jnp.zeros((len(used_I), *x.shape), x.dtype), made)
    # The number of iterations is data: XLA would merge a loop with a single known iteration into the surrounding code.
    made_IM1, cache, counts = lax.fori_loop(0, used_I.sum(), tile, (start, cache, zeros))
    return jax.tree.map(lambda x_IM1: _joined(x_IM1, B, T), made_IM1), cache, counts


def map_tiles(run: Callable[..., Any], *x_BT: jax.Array) -> Any:
    """Runs `run` on tiles [TILE, 1, ...] of arrays [B, T, ...]; returns its results as arrays [B, T, ...]."""
    made = lax.map(lambda parts: run(*parts), tuple(map(_cut, x_BT)))
    return jax.tree.map(lambda part: _joined(part, *x_BT[0].shape[:2]), made)
