"""The two compiled programs of generation: `prefill` reads a chunk of prompts, `decode` runs steps of a batch.

Prefill runs over all tokens of a prompt except the last; decoding feeds that one like any other. So a prompt can be cut
into chunks of any length, or found in the cache, and one kind of step produces every token. All shapes are fixed by the
batch and the chunk; everything that varies (lengths, pages, sampling, number of steps) is data. On a mesh the experts
are split, and everything else is replicated (`weights.on_mesh`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import head_logits
from deepseek_jax.serving.decode_attention import CacheGeometry, TokenSlots
from deepseek_jax.serving.decode_model import Cache, forward, logits, predict_ahead
from deepseek_jax.serving.decode_moe import Routed
from deepseek_jax.serving.sampling import Sampling
from deepseek_jax.serving.speculative import Drafts, Settled, draft, verify
from deepseek_jax.serving.tiles import map_tiles
from deepseek_jax.serving.weights import DecodeWeights, on_mesh

ALTERNATIVES = 20  # likeliest tokens reported next to the chosen one


class PromptChunk(NamedTuple):
    """T tokens of each of B prompts, to be read into the cache.

    tokens_BX: int32, the T tokens, then those after them: one for each MTP module, at least one.
    position_B: int32, of the first; length_B: how many of the T count; known_B: tokens of the complete prompt.
    slot_B: int32, where each sequence's drafts are stored between calls. table_BP: int32, the pages of each.
    scored: bool scalar, whether to compute the logprob of the token after each of them.
    """

    tokens_BX: jax.Array
    position_B: jax.Array
    length_B: jax.Array
    known_B: jax.Array
    slot_B: jax.Array
    table_BP: jax.Array
    scored: jax.Array | np.bool_


class Batch(NamedTuple):
    """B sequences to continue.

    slot_B: int32, where each one's drafts are stored between calls.
    token_B: int32, the last known token; position_B: its index, which is fed next.
    limit_B: int32, the end of the sequence: positions from here on are not fed. 0 marks padding.
    fresh_B: bool, whether the drafts in the slot are another sequence's.
    table_BP: int32, the pages of each. sampling: of each.
    steps: int32 scalar, how many to run at most. logprobs: bool scalar, whether to compute any.
    """

    slot_B: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    limit_B: jax.Array
    fresh_B: jax.Array
    table_BP: jax.Array
    sampling: Sampling
    steps: jax.Array | np.integer
    logprobs: jax.Array | np.bool_


class Scores(NamedTuple):
    """Logprobs by the model itself (temperature 1); zeros where none were requested.

    logprob_BT: float32, of the token itself. best_BTX, best_logprob_BTX: the ALTERNATIVES likeliest tokens there.
    """

    logprob_BT: Any
    best_BTX: Any
    best_logprob_BTX: Any


class Steps(NamedTuple):
    """The results of `decode`, step by step, with room for N steps.

    tokens_NBT: the first count_NB of each row are new. drafted_NB, accepted_NB: drafts verified, and accepted.
    finite_NB: whether all logits of the step were finite. scores: of each new token, with a first axis N.
    counts_LE: tokens that chose each expert. chosen_NBTLK: experts of the tokens that were fed; the first count_NB of
    each row are valid; None unless the geometry asks for them.
    """

    tokens_NBT: jax.Array
    count_NB: jax.Array
    drafted_NB: jax.Array
    accepted_NB: jax.Array
    finite_NB: jax.Array
    scores: Scores
    counts_LE: jax.Array
    chosen_NBTLK: jax.Array | None


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def prefill(cfg: ModelConfig, geometry: CacheGeometry, weights: DecodeWeights, cache: Cache, drafts: Drafts,
            chunk: PromptChunk) -> tuple[Cache, Drafts, Routed, Scores]:
    """Reads a chunk of each prompt into the cache, MTP modules included.

    Returns:
      cache, drafts, routing results, scores of the token after each.
    """
    return on_mesh(functools.partial(_prefill, cfg, geometry), weights, cache, drafts, chunk)


def _prefill(cfg, geometry, weights, cache, drafts, chunk: PromptChunk):
    modules = len(weights.mtp)
    T = chunk.tokens_BX.shape[1] - max(1, modules)
    at_BT = jnp.arange(T)[None]
    position_BT = chunk.position_B[:, None] + at_BT
    slots = TokenSlots(chunk.tokens_BX[:, :T], position_BT, at_BT < chunk.length_B[:, None], chunk.table_BP)
    h_BTD, cache, routed = forward(cfg, geometry, weights, cache, slots)
    # In tiles: the logits of a complete chunk would be [B, T, W].
    score = lambda h_M1D, token_M1: _logprobs(head_logits(h_M1D, weights.head), token_M1)
    scores = _scores(chunk.scored, functools.partial(map_tiles, score), h_BTD, chunk.tokens_BX[:, 1:T + 1])
    previous_hidden = []
    for k in range(1, modules + 1):
        if k > 1:  # h_{k-1} at k - 1 before the last token, where decoding takes over
            at_B = jnp.clip(chunk.known_B - k - chunk.position_B, 0, T - 1)
            h_BD = jnp.take_along_axis(h_BTD, at_B[:, None, None], axis=1)[:, 0]
            previous_hidden.append(drafts.previous_hidden[k - 2].at[chunk.slot_B].set(h_BD))
        known_BT = slots.valid_BT & (position_BT + k < chunk.known_B[:, None])
        ahead = slots._replace(token_BT=chunk.tokens_BX[:, k:T + k], valid_BT=known_BT)
        h_BTD, cache = predict_ahead(cfg, geometry, weights, k, cache, h_BTD, ahead)
    return cache, drafts._replace(previous_hidden=tuple(previous_hidden)), routed, scores


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def decode(cfg: ModelConfig, geometry: CacheGeometry, most_steps: int, weights: DecodeWeights, cache: Cache,
           drafts: Drafts, batch: Batch) -> tuple[Cache, Drafts, Steps]:
    """Runs up to batch.steps (at most `most_steps`) steps, as long as any sequence is unfinished.

    Each step feeds every sequence its last token and the drafts after it. `drafts` are those of all slots; each step
    drafts as many tokens as their depth (0: plain decoding).
    """
    return on_mesh(functools.partial(_decode, cfg, geometry, most_steps), weights, cache, drafts, batch)


def _decode(cfg, geometry, most_steps, weights, cache, drafts, batch: Batch):
    B, T = batch.slot_B.shape[0], drafts.token_Bd.shape[1] + 1
    of_batch = jax.tree.map(lambda x: x[batch.slot_B], drafts)
    of_batch = of_batch._replace(count_B=jnp.where(batch.fresh_B, 0, of_batch.count_B))
    zeros = lambda dtype, *shape: jnp.zeros((most_steps, B, *shape), dtype)
    made = Steps(
        tokens_NBT=zeros(jnp.int32, T), count_NB=zeros(jnp.int32), drafted_NB=zeros(jnp.int32),
        accepted_NB=zeros(jnp.int32), finite_NB=jnp.ones((most_steps, B), bool),
        scores=Scores(zeros(jnp.float32, T), zeros(jnp.int32, T, ALTERNATIVES), zeros(jnp.float32, T, ALTERNATIVES)),
        counts_LE=jnp.zeros((cfg.num_moe_layers, cfg.num_experts), jnp.int32),
        chosen_NBTLK=zeros(jnp.int32, T, cfg.num_moe_layers, cfg.experts_per_token)
        if geometry.routes and cfg.num_moe_layers else None)

    def unfinished(carry):
        n, _, _, _, position_B, _ = carry
        return (n < batch.steps) & (position_B < batch.limit_B).any()

    def step(carry):
        n, cache, of_batch, token_B, position_B, made = carry
        now = batch._replace(token_B=token_B, position_B=position_B)
        cache, of_batch, one = _step(cfg, geometry, weights, cache, of_batch, now)
        count_B = one.count_NB
        last_B = jnp.take_along_axis(one.tokens_NBT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
        stacked = jax.tree.map(lambda x, y: x.at[n].set(y), made._replace(counts_LE=None), one._replace(counts_LE=None))
        made = stacked._replace(counts_LE=made.counts_LE + one.counts_LE)
        return n + 1, cache, of_batch, jnp.where(count_B > 0, last_B, token_B), position_B + count_B, made

    _, cache, of_batch, _, _, made = lax.while_loop(
        unfinished, step, (jnp.int32(0), cache, of_batch, batch.token_B, batch.position_B, made))
    drafts = jax.tree.map(lambda x, y: x.at[batch.slot_B].set(y), drafts, of_batch)
    return cache, drafts, made


def _step(cfg, geometry, weights, cache, drafts, batch: Batch):
    """One step from batch.token_B at batch.position_B; the returned Steps have no axis of steps."""
    depth = drafts.token_Bd.shape[1]
    room_B = batch.limit_B - batch.position_B  # tokens that may still be fed
    live_B = room_B > 0
    drafts = drafts._replace(count_B=jnp.clip(jnp.minimum(drafts.count_B, room_B - 1), 0))
    tokens_BT = jnp.concatenate([batch.token_B[:, None], drafts.token_Bd], axis=1)
    at_BT = jnp.arange(depth + 1)[None]
    valid_BT = (at_BT <= drafts.count_B[:, None]) & live_B[:, None]
    slots = TokenSlots(tokens_BT, batch.position_B[:, None] + at_BT, valid_BT, batch.table_BP)
    hidden_BTD, cache, routed = forward(cfg, geometry, weights, cache, slots)
    logits_BTW = logits(geometry, weights, hidden_BTD)
    made_BT, accepted_B = verify(batch.sampling, logits_BTW, drafts, batch.position_B + 1)
    drafted_B, count_B = drafts.count_B, jnp.where(live_B, accepted_B + 1, 0)
    if depth:
        settled = Settled(hidden_BTD, made_BT, accepted_B, batch.position_B, batch.limit_B, batch.table_BP)
        drafts, cache = draft(cfg, geometry, weights, cache, drafts, batch.sampling, settled)
    finite_B = (jnp.isfinite(logits_BTW).all(axis=-1) | ~valid_BT).all(axis=1)
    scores = _scores(batch.logprobs, _logprobs, logits_BTW, made_BT)
    return cache, drafts, Steps(made_BT, count_B, drafted_B, accepted_B, finite_B, scores, *routed)


def _scores(requested, compute, x_BTX, tokens_BT) -> Scores:
    """The scores from `compute`; zeros unless requested."""
    def nothing(x_BTX, tokens_BT):
        zeros = jnp.zeros((*tokens_BT.shape, ALTERNATIVES))
        return Scores(jnp.zeros(tokens_BT.shape), zeros.astype(jnp.int32), zeros)

    return lax.cond(requested, compute, nothing, x_BTX, tokens_BT)


def _logprobs(logits_BTW, tokens_BT) -> Scores:
    logprobs_BTW = jax.nn.log_softmax(logits_BTW.astype(jnp.float32), axis=-1)
    X = min(ALTERNATIVES, logits_BTW.shape[-1])
    best, which = lax.top_k(logprobs_BTW, X)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, ALTERNATIVES - X)))
    chosen_BT = jnp.take_along_axis(logprobs_BTW, tokens_BT[..., None], axis=-1)[..., 0]
    return Scores(chosen_BT, fill(which), fill(best))
