"""Sparse attention of DeepSeek-V3.2, training form: MLA over the tokens that an indexer chooses (V3.2 report, 2.1).

The choice has no gradient. The indexer has a separate loss, the KL divergence from the attention over the same tokens,
and the two do not affect each other: no gradient flows through the indexer's inputs or its target.

    p[t, s] = sum_h softmax(scale q k)[h, t, s] / H        loss = mean_t KL(p[t, :] || softmax(I[t, :]))

Both softmaxes run over the chosen tokens; in the warm-up over all tokens, like attention then.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import output, queries_keys_values
from deepseek_jax.model.indexer import Indexer, IndexTerms, chosen_mask, index_scores
from deepseek_jax.model.layers import wide
from deepseek_jax.model.rope import softmax_scale
from deepseek_jax.model.types import IndexerStats
from deepseek_jax.parallel.sharding import by_rows


class SparseMLA(nn.Module):
    """MLA over chosen tokens: `MLA`'s parameters and those of the indexer. Also returns the indexer's statistics."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array],
                 segment_ids_BT: jax.Array | None) -> tuple[jax.Array, IndexerStats]:
        cfg = self.cfg
        q_BTHA, k_BTHA, v_BTHV, latent_BTQ = queries_keys_values(self, x_BTD, rope)
        assert latent_BTQ is not None  # the config checks that there is one
        index = Indexer(cfg, name="indexer")(lax.stop_gradient(x_BTD), lax.stop_gradient(latent_BTQ), rope)
        o_BTHV, stats = attend_chosen(cfg, q_BTHA, k_BTHA, v_BTHV, index, segment_ids_BT)
        return output(self, checkpoint_name(o_BTHV, "attention")), stats


def attend_chosen(cfg: ModelConfig, q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array, index: IndexTerms,
                  segment_ids_BT: jax.Array | None) -> tuple[jax.Array, IndexerStats]:
    """Causal softmax attention over the cfg.index_topk tokens with the highest index scores; over all in the warm-up.

    Queries are processed in blocks of cfg.attention_block, whose scores with all keys exist at once; the backward pass
    recomputes them.

    Args:
      segment_ids_BT: int32, tokens are chosen among those with equal ids; None: one segment.
    Returns:
      [B, T, H, V] in the dtype of q; the loss and the recall of the indexer.
    """
    T, topk = q_BTHA.shape[1], cfg.index_topk
    assert topk is not None
    block = min(cfg.attention_block, T)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros(q_BTHA.shape[:2], jnp.int32)

    @jax.checkpoint
    def of_block(queries):
        position_t, segment_Bt, q_BtHA, index_q_BtJI, weight_BtJ = queries
        same_BtS = segment_Bt[:, :, None] == segment_ids_BT[:, None]
        seen_BtS = same_BtS & (position_t[:, None] >= jnp.arange(T)[None])[None]
        score_BtS = jnp.where(seen_BtS, index_scores(index_q_BtJI, weight_BtJ, index.k_BTI), -jnp.inf)
        chosen_BtS = seen_BtS & by_rows(functools.partial(chosen_mask, topk=topk), score_BtS)
        attended_BtS = seen_BtS if cfg.index_warmup else chosen_BtS
        s_BHtS = jnp.einsum("BtHA,BSHA->BHtS", q_BtHA, k_BTHA, preferred_element_type=wide(cfg.dtype))
        s_BHtS = s_BHtS * softmax_scale(cfg)
        p_BHtS = jax.nn.softmax(jnp.where(attended_BtS[:, None], s_BHtS, -jnp.inf), axis=-1)
        o_BtHV = jnp.einsum("BHtS,BSHV->BtHV", p_BHtS.astype(cfg.dtype), v_BTHV)
        s_BHtS, p_BHtS = lax.stop_gradient((s_BHtS, p_BHtS))
        return o_BtHV, divergence(p_BHtS.mean(axis=1), score_BtS, attended_BtS), recall(s_BHtS, seen_BtS, chosen_BtS)

    def blocks(x_BT):
        """[B, T, ...] -> [blocks, B, block, ...]; the last block is padded with copies of the last query."""
        x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % block), *((0, 0),) * (x_BT.ndim - 2)), mode="edge")
        return x_BT.reshape(x_BT.shape[0], -1, block, *x_BT.shape[2:]).swapaxes(0, 1)

    joined = lambda x_nBt: x_nBt.swapaxes(0, 1).reshape(x_nBt.shape[1], -1, *x_nBt.shape[3:])[:, :T]
    position_nt = blocks(jnp.arange(T)[None])[:, 0]
    made = lax.map(of_block, (position_nt, *map(blocks, (segment_ids_BT, q_BTHA, index.q_BTJI, index.weight_BTJ))))
    o_BTHV, loss_BT, recall_BT = map(joined, made)
    return o_BTHV, IndexerStats(loss_BT.mean(), recall_BT.mean())


def divergence(target_BTS: jax.Array, score_BTS: jax.Array, over_BTS: jax.Array) -> jax.Array:
    """KL(target || softmax of the scores) over the tokens with `over_BTS` true, in nats, [B, T]."""
    log_q_BTS = jax.nn.log_softmax(jnp.where(over_BTS, score_BTS, -jnp.inf), axis=-1)
    log_p_BTS = jnp.log(jnp.where(target_BTS > 0, target_BTS, 1))
    return jnp.where(target_BTS > 0, target_BTS * (log_p_BTS - jnp.where(over_BTS, log_q_BTS, 0)), 0).sum(axis=-1)


def recall(s_BHTS: jax.Array, seen_BTS: jax.Array, chosen_BTS: jax.Array) -> jax.Array:
    """The share of dense attention that falls on the chosen tokens, averaged over heads: float32 [B, T].

    s_BHTS: scores before the softmax. seen_BTS, chosen_BTS: bool, tokens that dense and sparse attention read.
    """
    mass = lambda over_BTS: jax.nn.logsumexp(jnp.where(over_BTS[:, None], s_BHTS, -jnp.inf), axis=-1)
    return jnp.exp(mass(chosen_BTS) - mass(seen_BTS)).mean(axis=1)
