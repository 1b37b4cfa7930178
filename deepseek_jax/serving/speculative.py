"""Lossless speculative decoding with the MTP modules (report sections 2.2 and 5.4.3; rejection sampling: 2211.17192).

Modules draft the next tokens; the model reads all of them in one step and keeps those that it would have chosen too:

    accept draft x with probability min(1, p(x) / q(x)); at the first rejection draw from max(p - q, 0) instead

p is the model's distribution, q the draft's. Either way the token is distributed as p; at temperature 0 both are
one-hot, and the result is the greedy continuation. Without drafts the same step is plain decoding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.serving.decode_attention import CacheGeometry, TokenSlots
from deepseek_jax.serving.decode_model import Cache, logits, predict_ahead
from deepseek_jax.serving.sampling import ACCEPT, DRAFT, TOKEN, Sampling, draw, keys, likeliest, probabilities
from deepseek_jax.serving.weights import DecodeWeights


class Drafts(NamedTuple):
    """The state passed from one step to the next, for each sequence.

    token_Bd: int32, drafts of the next d tokens; the first count_B of them are to be verified.
    q_BdW: float32, the distributions they were drawn from; not updated while all sequences are greedy.
    previous_hidden: for each module k > 1, h_{k-1} [B, D] at the position k - 1 before the one that is fed next: the
      token there may have been a draft when module k last saw it, and is now final.
    """

    token_Bd: jax.Array
    count_B: jax.Array
    q_BdW: jax.Array
    previous_hidden: tuple[jax.Array, ...]


def no_drafts(cfg: ModelConfig, sequences: int, depth: int) -> Drafts:
    """Empty drafts of `depth` tokens for each sequence."""
    modules = min(depth, cfg.mtp_depth)
    return Drafts(jnp.zeros((sequences, depth), jnp.int32), jnp.zeros(sequences, jnp.int32),
                  jnp.zeros((sequences, depth, cfg.vocab_size), jnp.float32),
                  tuple(jnp.zeros((sequences, cfg.d_model), cfg.dtype) for _ in range(1, modules)))


def verify(sampling: Sampling, logits_BTW: jax.Array, drafts: Drafts,
           index_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The accepted drafts, and the token after them.

    Args:
      logits_BTW: the model's, of the token after the last known one and after each of the T - 1 drafts.
      index_B: int32, index in its sequence of the token that logits_BTW[:, 0] are for.
    Returns:
      tokens int32 [B, T], of which the first accepted + 1 count; accepted int32 [B].
    """
    B, T, _ = logits_BTW.shape
    index_BT = index_B[:, None] + jnp.arange(T)[None]
    drafted_Bd = jnp.arange(T - 1)[None] < drafts.count_B[:, None]

    def leading(accepted_Bd):
        return jnp.cumprod((accepted_Bd & drafted_Bd).astype(jnp.int32), axis=1).sum(axis=1)

    def greedy():
        best_BT = likeliest(logits_BTW)
        accepted_B = leading(best_BT[:, :-1] == drafts.token_Bd)
        return _row(best_BT, accepted_B), accepted_B

    def sampled():
        p_BTW = probabilities(sampling, logits_BTW)
        of_draft = lambda p_BdW: jnp.take_along_axis(p_BdW, drafts.token_Bd[..., None], axis=-1)[..., 0]
        u_Bd = jax.vmap(jax.vmap(jax.random.uniform))(keys(sampling, index_BT[:, :-1], ACCEPT))
        accepted_B = leading(u_Bd * of_draft(drafts.q_BdW) < of_draft(p_BTW[:, :-1]))
        p_BW = _row(p_BTW, accepted_B)
        # q of the draft that was rejected; nothing was drafted after the last one.
        q_BTW = jnp.pad(jnp.where(drafted_Bd[..., None], drafts.q_BdW, 0), ((0, 0), (0, 1), (0, 0)))
        rest_BW = jnp.maximum(p_BW - _row(q_BTW, accepted_B), 0)
        rest_BW = jnp.where(rest_BW.sum(axis=-1, keepdims=True) > 0, rest_BW, p_BW)
        key_B1 = keys(sampling, index_B[:, None] + accepted_B[:, None], TOKEN)
        return draw(key_B1, rest_BW[:, None])[:, 0], accepted_B

    token_B, accepted_B = lax.cond((sampling.temperature_B > 0).any(), sampled, greedy)
    tokens_BT = jnp.pad(drafts.token_Bd, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(T)[None] == accepted_B[:, None], token_B[:, None], tokens_BT), accepted_B


class Settled(NamedTuple):
    """The final tokens of a step: T tokens of each of B sequences, of which the first accepted + 1 are valid.

    hidden_BTD: of the main model at positions p, p + 1, ...; tokens_BT: int32, the tokens one ahead of each.
    accepted_B: the last settled token is tokens_BT[b, accepted_B[b]]. position_B: p, int32.
    limit_B: positions from here on are never kept. table_BP: int32, pages.
    """

    hidden_BTD: jax.Array
    tokens_BT: jax.Array
    accepted_B: jax.Array
    position_B: jax.Array
    limit_B: jax.Array
    table_BP: jax.Array


def draft(cfg: ModelConfig, geometry: CacheGeometry, weights: DecodeWeights, cache: Cache, drafts: Drafts,
          sampling: Sampling, settled: Settled) -> tuple[Drafts, Cache]:
    """Runs the MTP modules over the tokens that are now final, and drafts as many more as `drafts` has places.

    Module k runs over the positions p - (k - 1) .. p + T - 1, where p is the first position that was fed, so every
    position of its cache ends up with the final token. For drafts beyond the last module, that module is chained: its
    own output replaces the hidden state, at the next position.
    """
    B, depth, modules = len(settled.position_B), drafts.token_Bd.shape[1], len(weights.mtp)
    accepted_B = settled.accepted_B
    ahead, h, start_B, last_B = settled.tokens_BT, settled.hidden_BTD, settled.position_B, accepted_B
    drawn, previous_hidden = [], []

    def slots_of(token_BT, position_BT, valid_BT):
        kept_BT = valid_BT & (position_BT >= 0) & (position_BT < settled.limit_B[:, None])
        return TokenSlots(token_BT, jnp.maximum(position_BT, 0), kept_BT, settled.table_BP)

    for k in range(1, depth + 1):
        if k > modules:  # chained
            h, start_B, last_B = _row(h, last_B)[:, None], start_B + last_B + 1, jnp.zeros_like(last_B)
            ahead = drawn[-1][0][:, None]
        elif k > 1:
            previous_hidden.append(_row(h, jnp.maximum(accepted_B, 0)))
            h = jnp.concatenate([drafts.previous_hidden[k - 2][:, None], h], axis=1)
            start_B = start_B - 1
            # The drafts so far follow the final tokens.
            ahead = jnp.pad(ahead, ((0, 0), (0, 1)))
            last_B = last_B + 1
            ahead = jnp.where(jnp.arange(ahead.shape[1])[None] == last_B[:, None], drawn[-1][0][:, None], ahead)
        at_BT = jnp.arange(h.shape[1])[None]
        slots = slots_of(ahead, start_B[:, None] + at_BT, at_BT <= last_B[:, None])
        h, cache = predict_ahead(cfg, geometry, weights, min(k, modules), cache, h, slots)
        logits_B1W = logits(geometry, weights, _row(h, last_B)[:, None])
        drawn.append(_draw(sampling, logits_B1W, settled.position_B + accepted_B + 1 + k))
    token_Bd, q_BdW = (jnp.stack(part, axis=1) for part in zip(*drawn, strict=True))
    return Drafts(token_Bd, jnp.full(B, depth, jnp.int32), q_BdW, tuple(previous_hidden)), cache


def _draw(sampling: Sampling, logits_B1W, index_B):
    """A draft of the token with this index, [B], and the distribution it comes from, [B, W]."""
    def greedy():
        return likeliest(logits_B1W)[:, 0], jnp.zeros_like(logits_B1W)[:, 0]

    def sampled():
        q_B1W = probabilities(sampling, logits_B1W)
        key_B1 = keys(sampling, index_B[:, None], DRAFT)
        return draw(key_B1, q_B1W)[:, 0], q_B1W[:, 0]

    return lax.cond((sampling.temperature_B > 0).any(), sampled, greedy)


def _row(x_BT, index_B):
    """x[b, index[b]], without the second axis."""
    index = index_B.reshape((-1, 1) + (1,) * (x_BT.ndim - 2))
    return jnp.take_along_axis(x_BT, index, axis=1)[:, 0]
