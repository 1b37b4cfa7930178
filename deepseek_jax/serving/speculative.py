"""Lossless speculative decoding with the MTP modules (report sections 2.2 and 5.4.3; rejection sampling: 2211.17192).

Modules draft the next tokens, the model reads all of them in one step, and keeps those that it would have said itself:

    accept draft x with probability min(1, p(x) / q(x)); at the first rejection draw from max(p - q, 0) instead

p is the model's distribution, q the draft's. Either way the token is distributed as p; at temperature 0 both are
one-hot, and what comes out is the greedy continuation. Without drafts the same step is plain decoding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import head_logits
from deepseek_jax.serving import sampling as choosing
from deepseek_jax.serving.decode_model import Reach, Rows, predict_ahead
from deepseek_jax.serving.sampling import Sampling


class Drafts(NamedTuple):
    """What one step hands to the next, for each sequence.

    token_Bd: int32, drafts of the next d tokens; the first count_B of them are to be verified.
    q_BdW: float32, the distributions they were drawn from; not kept up while all sequences are greedy.
    behind: for each module k > 1, h_{k-1} [B, D] at k - 1 before the position that is fed next: a token that was a
      draft when module k last saw that position is the true one now.
    """

    token_Bd: jax.Array
    count_B: jax.Array
    q_BdW: jax.Array
    behind: tuple[jax.Array, ...]


def no_drafts(cfg: ModelConfig, sequences: int, depth: int) -> Drafts:
    modules = min(depth, cfg.mtp_depth)
    return Drafts(jnp.zeros((sequences, depth), jnp.int32), jnp.zeros(sequences, jnp.int32),
                  jnp.zeros((sequences, depth, cfg.vocab_size), jnp.float32),
                  tuple(jnp.zeros((sequences, cfg.d_model), cfg.dtype) for _ in range(1, modules)))


def verify(sampling: Sampling, logits_BTW, drafts: Drafts, index_B):
    """Which drafts hold, and the token after them.

    Args:
      logits_BTW: the model's, of the token after the last known one and after each of the T - 1 drafts.
      index_B: int32, index in its sequence of the token that logits_BTW[:, 0] are for.
    Returns:
      tokens int32 [B, T], of which the first accepted + 1 count; accepted int32 [B].
    """
    B, T, _ = logits_BTW.shape
    index_BT = index_B[:, None] + jnp.arange(T)[None]
    drafted_Bd = jnp.arange(T - 1)[None] < drafts.count_B[:, None]

    def leading(held_Bd):
        return jnp.cumprod((held_Bd & drafted_Bd).astype(jnp.int32), axis=1).sum(axis=1)

    def greedy():
        best_BT = choosing.likeliest(logits_BTW)
        accepted_B = leading(best_BT[:, :-1] == drafts.token_Bd)
        return _row(best_BT, accepted_B), accepted_B

    def sampled():
        p_BTW = choosing.probabilities(sampling, logits_BTW)
        of_draft = lambda p_BdW: jnp.take_along_axis(p_BdW, drafts.token_Bd[..., None], axis=-1)[..., 0]
        u_Bd = jax.vmap(jax.vmap(jax.random.uniform))(choosing.keys(sampling, index_BT[:, :-1], choosing.ACCEPT))
        accepted_B = leading(u_Bd * of_draft(drafts.q_BdW) < of_draft(p_BTW[:, :-1]))
        p_BW = _row(p_BTW, accepted_B)
        # q of the draft that was rejected; nothing was drafted where the last one held.
        q_BTW = jnp.pad(jnp.where(drafted_Bd[..., None], drafts.q_BdW, 0), ((0, 0), (0, 1), (0, 0)))
        rest_BW = jnp.maximum(p_BW - _row(q_BTW, accepted_B), 0)
        rest_BW = jnp.where(rest_BW.sum(axis=-1, keepdims=True) > 0, rest_BW, p_BW)
        key_B1 = choosing.keys(sampling, index_B[:, None] + accepted_B[:, None], choosing.TOKEN)
        return choosing.draw(key_B1, rest_BW[:, None])[:, 0], accepted_B

    token_B, accepted_B = lax.cond((sampling.temperature_B > 0).any(), sampled, greedy)
    tokens_BT = jnp.pad(drafts.token_Bd, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(T)[None] == accepted_B[:, None], token_B[:, None], tokens_BT), accepted_B


def draft(cfg: ModelConfig, reach: Reach, weights, cache, sampling: Sampling, depth: int, hidden_BTD, tokens_BT,
          accepted_B, drafts: Drafts, position_B, limit_B, table_BP):
    """Runs the MTP modules over the tokens that were just settled, and drafts `depth` more behind them.

    Module k goes over the positions p - (k - 1) .. p + T - 1, p being the first that was fed: so every position of its
    cache ends up with the true token. Beyond the last module that module is chained: its own output stands for the
    hidden state, at the next position.

    Args:
      hidden_BTD: of the main model at positions p, p + 1, ...; tokens_BT: the tokens one ahead of each.
      accepted_B: the last settled token is tokens_BT[b, accepted_B[b]].
      limit_B: positions from here on are never kept.
    Returns:
      Drafts, the cache.
    """
    B, T, _ = hidden_BTD.shape
    modules = len(weights["mtp"])
    ahead, h, start_B, last_B = tokens_BT, hidden_BTD, position_B, accepted_B
    drawn, behind = [], []

    def rows_of(position_BT, valid_BT):
        return Rows(jnp.maximum(position_BT, 0), valid_BT & (position_BT >= 0) & (position_BT < limit_B[:, None]),
                    table_BP)

    for k in range(1, depth + 1):
        if k > modules:  # chained
            h, start_B, last_B = _row(h, last_B)[:, None], start_B + last_B + 1, jnp.zeros_like(last_B)
            ahead = drawn[-1][0][:, None]
        elif k > 1:
            behind.append(_row(h, jnp.maximum(accepted_B, 0)))
            h = jnp.concatenate([drafts.behind[k - 2][:, None], h], axis=1)
            start_B = start_B - 1
            # The drafts so far stand behind the settled tokens.
            ahead = jnp.pad(ahead, ((0, 0), (0, 1)))
            last_B = last_B + 1
            ahead = jnp.where(jnp.arange(ahead.shape[1])[None] == last_B[:, None], drawn[-1][0][:, None], ahead)
        at_BT = jnp.arange(h.shape[1])[None]
        rows = rows_of(start_B[:, None] + at_BT, at_BT <= last_B[:, None])
        h, cache = predict_ahead(cfg, reach, weights, min(k, modules), cache, h, ahead, rows)
        logits_B1W = head_logits(_row(h, last_B), weights["head"])[:, None]
        drawn.append(_draw(sampling, logits_B1W, position_B + accepted_B + 1 + k))
    token_Bd, q_BdW = (jnp.stack(part, axis=1) for part in zip(*drawn, strict=True))
    return Drafts(token_Bd, jnp.full(B, depth, jnp.int32), q_BdW, tuple(behind)), cache


def _draw(sampling: Sampling, logits_B1W, index_B):
    """A draft of the token with this index, [B], and the distribution it comes from, [B, W]."""
    def greedy():
        return choosing.likeliest(logits_B1W)[:, 0], jnp.zeros_like(logits_B1W)[:, 0]

    def sampled():
        q_B1W = choosing.probabilities(sampling, logits_B1W)
        key_B1 = choosing.keys(sampling, index_B[:, None], choosing.DRAFT)
        return choosing.draw(key_B1, q_B1W)[:, 0], q_B1W[:, 0]

    return lax.cond((sampling.temperature_B > 0).any(), sampled, greedy)


def _row(x_BT, index_B):
    """x[b, index[b]], without the second axis."""
    index = index_B.reshape((-1, 1) + (1,) * (x_BT.ndim - 2))
    return jnp.take_along_axis(x_BT, index, axis=1)[:, 0]
