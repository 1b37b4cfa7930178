"""DeepSeek-V3 (report section 2): embedding, dense blocks, MoE blocks, final norm, head, and the MTP modules.

Layers of a kind are stacked along a leading axis; deep stacks are scanned, so compile time does not grow with depth.
Collections: `params`, and `router` (the biases: `bias` [MoE layers, E] and `mtp_bias` [depth, E]; absent for models
without).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ConfigError, MeshConfig, ModelConfig
from deepseek_jax.config.model import RECOMPUTABLE, UNROLLED_LAYERS
from deepseek_jax.model.attention import LOGITS, MLA
from deepseek_jax.model.block import residual_block
from deepseek_jax.model.experts import MoE
from deepseek_jax.model.layers import FFN, SAVED_NAMES, RMSNorm, head_logits, weight, wide
from deepseek_jax.model.mtp import MTPModule, ahead
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.router import initial_bias
from deepseek_jax.model.sparse_attention import SparseMLA
from deepseek_jax.model.types import BlockStats, Output, TokenContext
from deepseek_jax.parallel.context import in_parts
from deepseek_jax.plugin import load_object


class BlockParts(NamedTuple):
    """Factories of a block's parts, which return modules with the signatures of those here; a study replaces one.

    attention(cfg, name) -> module(x_BTD, rope, segment_ids_BT) -> y_BTD (with cfg.index_topk: y_BTD, IndexerStats)
    dense_ffn(cfg, ffn_dim, name) -> module(x_BTD) -> y_BTD
    moe(cfg, mesh, capture, name) -> module(x_BTD, bias_E, context) -> y_BTD, RoutingStats
    """

    attention: Callable[..., Any] = MLA
    dense_ffn: Callable[..., Any] = FFN
    moe: Callable[..., Any] = MoE


def block_parts(cfg: ModelConfig) -> BlockParts:
    """The parts selected by the config. Raises ConfigError if model.attention is not a module."""
    if cfg.attention == "mla":
        return BlockParts(MLA if cfg.index_topk is None else SparseMLA)
    attention = load_object("model.attention", cfg.attention)
    if not callable(attention):
        raise ConfigError(f"model.attention={cfg.attention!r} is no module; give one with the signature of "
                          "deepseek_jax.model.attention.MLA.")
    return BlockParts(attention)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); dense or MoE."""

    cfg: ModelConfig
    moe: bool
    capture: tuple[str, ...] = ()
    mesh: MeshConfig = MeshConfig()
    parts: BlockParts | None = None  # None: those selected by cfg

    @nn.compact
    def __call__(self, x_BTD: jax.Array, bias_E: jax.Array | None, context: TokenContext,
                 chosen_BTK: jax.Array | None = None) -> tuple[jax.Array, BlockStats]:
        """Hidden states [B, T, D], and the statistics of routing and indexer. chosen_BTK: experts to replay, if any."""
        context = context._replace(chosen_BTK=chosen_BTK)
        cfg, parts = self.cfg, self.parts or block_parts(self.cfg)
        attention = parts.attention(cfg, name="attention")
        if self.moe:
            ffn = parts.moe(cfg, self.mesh, self.capture, name="ffn")
            feed_forward = lambda h_BTD: ffn(h_BTD, bias_E, context)
        else:
            ffn = parts.dense_ffn(cfg, cfg.dense_ffn_dim, name="ffn")
            feed_forward = lambda h_BTD: (ffn(h_BTD), None)

        def attend(h_BTD):
            made = attention(h_BTD, context.rope, context.segment_ids_BT)
            return (made, None) if cfg.index_topk is None else made

        x_BTD, indexer, routing = residual_block(
            x_BTD, RMSNorm(cfg, name="attention_norm"), attend, RMSNorm(cfg, name="ffn_norm"), feed_forward)
        return x_BTD, BlockStats(routing, indexer)


def rematerialized(block: type[nn.Module], cfg: ModelConfig, scanned: bool) -> Any:
    """The block with the rematerialization of cfg.remat.

    Outside a scan, XLA must be prevented from merging the recomputation with the first computation.
    """
    if cfg.remat == "none":
        return block
    saved = set(SAVED_NAMES) - {RECOMPUTABLE.get(name) for name in cfg.recomputed}
    policy = jax.checkpoint_policies.save_only_these_names(*saved) if cfg.remat != "full" else None
    return nn.remat(block, policy=policy, prevent_cse=not scanned)


class DeepSeekV3(nn.Module):
    """The model. With a `mesh` of several devices it runs inside jax.set_mesh of that mesh."""

    cfg: ModelConfig
    mesh: MeshConfig = MeshConfig()
    parts: BlockParts | None = None  # of the blocks; None: those selected by cfg

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None,
                 logits: bool = True, capture: tuple[str, ...] = (), step: jax.Array | None = None,
                 chosen: jax.Array | None = None) -> Output:
        """Runs the model and its MTP modules.

        Args:
          tokens_BT: int32.
          positions: int32 [B, T] for RoPE; None: 0, 1, 2, ...
          segment_ids: int32 [B, T], attention stays inside equal ids; None: one segment a row.
          logits: False omits them (losses are computed in chunks from the hidden states).
          capture: any of "scores", "chosen".
          step: int32 scalar, the optimizer step, for routing rules that read it; None outside of training.
          chosen: int32 [MoE layers, B, T, K], experts to use again (router replay); negative: the router decides, as it
            always does in MTP modules. Your own rules have to read it.
        Returns:
          Output; if sequences are split, arrays with a token dimension are those of parts, see `parallel.context`.
        """
        cfg = self.cfg
        capture = tuple(capture)
        if unknown := set(capture) - {"scores", "chosen"}:
            raise ValueError(f"capture={sorted(unknown)} is unknown; take any of 'scores', 'chosen'.")
        if chosen is not None and self.mesh.parts > 1:
            raise ValueError(f"experts to take again are of complete sequences, not of {self.mesh.parts} parts.")
        chex.assert_rank(tokens_BT, 2)
        chex.assert_equal_shape([x for x in (tokens_BT, positions, segment_ids) if x is not None])
        embedding_WD = weight(self, "embedding", (cfg.vocab_size, cfg.d_model))
        head_DW = weight(self, "head", (cfg.d_model, cfg.vocab_size))
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        own_BT, positions = in_parts(tokens_BT), in_parts(positions)
        segment_ids = None if segment_ids is None else in_parts(segment_ids)
        context = TokenContext(rope_table(cfg, positions, wide(cfg.dtype)), segment_ids, own_BT, positions, step)
        # Gathered, then cast: a frequent token's gradient is summed in float32.
        x_BTD = embedding_WD[own_BT].astype(cfg.dtype)
        stats: dict[str, BlockStats] = {}
        if cfg.num_dense_layers:
            dense = self._stack(cfg.num_dense_layers, "dense_layers", False)
            x_BTD, stats["dense"] = dense(x_BTD, None, context, None)
        if cfg.num_moe_layers:
            bias_LE = self._bias("bias", cfg.num_moe_layers)
            layers = self._stack(cfg.num_moe_layers, "layers", True, capture, chosen is not None)
            x_BTD, stats["bias"] = layers(x_BTD, bias_LE, context, chosen)
        hidden_BTD = RMSNorm(cfg, name="norm")(x_BTD)

        mtp_hidden, mtp_stats = [], []
        mtp_bias_KE = self._bias("mtp_bias", cfg.mtp_depth) if cfg.mtp_depth else None
        h_BTD = hidden_BTD
        for k in range(1, cfg.mtp_depth + 1):
            read_BT = in_parts(ahead(tokens_BT, k))
            ahead_BTD = embedding_WD[read_BT].astype(cfg.dtype)
            block = functools.partial(rematerialized(Block, cfg, scanned=False), cfg, moe=True, capture=capture,
                                      mesh=self.mesh, parts=self.parts)
            bias_E = None if mtp_bias_KE is None else mtp_bias_KE[k - 1]
            h_BTD, one = MTPModule(cfg, block, name=f"mtp_{k}")(h_BTD, ahead_BTD, bias_E,
                                                              context._replace(tokens_BT=read_BT))
            mtp_hidden.append(h_BTD)
            mtp_stats.append(one)
        if mtp_stats:
            stats["mtp_bias"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *mtp_stats)
        return self._output(hidden_BTD, tuple(mtp_hidden), head_DW, stats, logits)

    def _stack(self, length, name, moe, capture=(), replay=False):
        # A short stack is unrolled: a loop would copy all residuals for the backward pass into stacked buffers.
        scanned = length > UNROLLED_LAYERS
        bias_axis = 0 if moe and self.cfg.has_router_bias else nn.broadcast
        chosen_axis = 0 if replay else nn.broadcast
        stack = nn.scan(rematerialized(Block, self.cfg, scanned), variable_axes={"params": 0, LOGITS: 0},
                        split_rngs={"params": True}, length=length, unroll=1 if scanned else length,
                        in_axes=(bias_axis, nn.broadcast, chosen_axis))  # pyright: ignore[reportArgumentType]: axes of a tree
        return stack(self.cfg, moe=moe, capture=capture, mesh=self.mesh, parts=self.parts, name=name)

    def _bias(self, name, layers):
        """The routing biases [layers, E]: data that the step updates, not a parameter. None for models without
        biases."""
        if not self.cfg.has_router_bias:
            return None
        return self.variable("router", name, initial_bias, self.cfg, (layers, self.cfg.num_experts)).value

    def _output(self, hidden_BTD, mtp_hidden, head_DW, stats: dict[str, BlockStats], logits):
        routing = {name: of.routing for name, of in stats.items() if of.routing is not None}

        def mean(of_stacks):
            values = [x.reshape(-1) for x in of_stacks]
            return jnp.concatenate(values).mean() if values else jnp.zeros((), wide(self.cfg.dtype))

        return Output(
            logits_BTW=head_logits(hidden_BTD, head_DW) if logits else None, hidden_BTD=hidden_BTD,
            mtp_logits=tuple(head_logits(h, head_DW) for h in mtp_hidden) if logits else (), mtp_hidden=mtp_hidden,
            counts={name: s.counts_E for name, s in routing.items()},
            traffic=jax.tree.map(lambda *counters: sum(c.sum() for c in counters),
                                 *(s.traffic for s in routing.values())) if routing else None,
            sequence_loss=mean(s.sequence_loss for s in routing.values()),
            auxiliary_loss=mean(s.auxiliary_loss for s in routing.values()),
            captured=routing["bias"].captured if "bias" in routing else {},
            # For a dense model there is nothing to map over, and the trees are None.
            indexer=jax.tree.map(lambda *parts: mean(parts), *(s.indexer for s in stats.values())))
