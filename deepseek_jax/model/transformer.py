"""DeepSeek-V3 (report section 2): embedding, dense blocks, MoE blocks, final norm, head, and the MTP modules.

Layers of a kind are stacked along a leading axis; deep stacks are scanned, so compile time does not grow with depth.
Collections:
`params`, and `router` (the biases: `bias` [MoE layers, E] and `mtp_bias` [depth, E]; absent for models without).
"""

from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model import router as routing
from deepseek_jax.model.attention import MLA
from deepseek_jax.model.experts import MoE
from deepseek_jax.model.layers import FFN, SAVED_NAMES, RMSNorm, head_logits, weight, wide
from deepseek_jax.model.mtp import MTPModule, ahead
from deepseek_jax.model.rope import rope_table
from deepseek_jax.parallel.mesh import constrain

UNROLLED_LAYERS = 8


@flax.struct.dataclass
class Output:
    """What a forward pass gives. L counts MoE layers; MTP entries are absent (empty) at depth 0.

    logits_BTW: float32; None with logits=False.
    hidden_BTD: after the final norm, what the head multiplies. mtp_hidden[k - 1]: the same of depth k.
    mtp_logits[k - 1][b, i]: for token i + k + 1; the last k positions saw wrapped-around tokens: mask them.
    counts: {"bias": int32 [L, E], "mtp_bias": int32 [depth, E]}, tokens that chose each expert; keys as in `router`.
    traffic: counters of `parallel.dispatch`, summed over MoE layers (MTP's included); empty on one device.
    sequence_loss, auxiliary_loss: unweighted, float32, averaged over MoE layers (MTP's included).
    captured: {"scores": [L, B, T, E], "chosen": [L, B, T, K]}, those that were asked for.
    """

    logits_BTW: jax.Array | None
    hidden_BTD: jax.Array
    mtp_logits: tuple
    mtp_hidden: tuple
    counts: dict[str, jax.Array]
    traffic: dict[str, jax.Array]
    sequence_loss: jax.Array
    auxiliary_loss: jax.Array
    captured: dict[str, Any]


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); dense or MoE."""

    cfg: ModelConfig
    moe: bool
    capture: tuple[str, ...] = ()
    mesh: MeshConfig = MeshConfig()

    @nn.compact
    def __call__(self, x_BTD, bias_E, rope, segment_ids_BT):
        x_BTD = x_BTD + MLA(self.cfg, name="attention")(
            RMSNorm(self.cfg, name="attention_norm")(x_BTD), rope, segment_ids_BT)
        x_BTD = checkpoint_name(constrain(x_BTD, ("batch", None, None)), "residual")
        h_BTD = constrain(RMSNorm(self.cfg, name="ffn_norm")(x_BTD), ("batch", None, None))
        if not self.moe:
            y_BTD, stats = FFN(self.cfg, self.cfg.dense_ffn_dim, name="ffn")(h_BTD), None
        else:
            y_BTD, stats = MoE(self.cfg, self.mesh, self.capture, name="ffn")(h_BTD, bias_E)
        return constrain(x_BTD + y_BTD, ("batch", None, None)), stats


def rematerialized(block, cfg: ModelConfig, scanned: bool):
    """The block with cfg.remat's choice of what the backward pass recomputes.

    Outside a scan XLA must be kept from merging the recomputation with the first computation.
    """
    if cfg.remat == "none":
        return block
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES) if cfg.remat == "report" else None
    return nn.remat(block, policy=policy, prevent_cse=not scanned)


class DeepSeekV3(nn.Module):
    """The model. With a `mesh` of several devices it runs inside jax.set_mesh of that mesh."""

    cfg: ModelConfig
    mesh: MeshConfig = MeshConfig()

    @nn.compact
    def __call__(self, tokens_BT, positions=None, segment_ids=None, logits=True, capture=()):
        """Runs the model and its MTP modules.

        Args:
          tokens_BT: int32.
          positions: int32 [B, T] for RoPE; None: 0, 1, 2, ...
          segment_ids: int32 [B, T], attention stays inside equal ids; None: one segment a row.
          logits: False leaves them out (losses are computed in chunks from the hidden states).
          capture: any of "scores", "chosen".
        Returns:
          Output.
        """
        cfg = self.cfg
        capture = tuple(capture)
        if unknown := set(capture) - {"scores", "chosen"}:
            raise ValueError(f"capture={sorted(unknown)} is unknown; take any of 'scores', 'chosen'.")
        chex.assert_rank(tokens_BT, 2)
        chex.assert_equal_shape([x for x in (tokens_BT, positions, segment_ids) if x is not None])
        embedding_WD = weight(self, "embedding", (cfg.vocab_size, cfg.d_model))
        head_DW = weight(self, "head", (cfg.d_model, cfg.vocab_size))
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        rope = rope_table(cfg, positions, wide(cfg.dtype))
        # Gathered, then cast: a frequent token's gradient is summed in float32.
        x_BTD = embedding_WD[tokens_BT].astype(cfg.dtype)
        if cfg.num_dense_layers:
            dense = self._stack(cfg.num_dense_layers, "dense_layers", False, ())
            x_BTD, _ = dense(x_BTD, None, rope, segment_ids)
        stats = []
        if cfg.num_moe_layers:
            bias_LE = self._bias("bias", cfg.num_moe_layers)
            x_BTD, main = self._stack(cfg.num_moe_layers, "layers", True, capture)(
                x_BTD, bias_LE, rope, segment_ids)
            stats.append(("bias", main))
        hidden_BTD = RMSNorm(cfg, name="norm")(x_BTD)

        mtp_hidden, mtp_stats = [], []
        mtp_bias_KE = self._bias("mtp_bias", cfg.mtp_depth) if cfg.mtp_depth else None
        h_BTD = hidden_BTD
        for k in range(1, cfg.mtp_depth + 1):
            ahead_BTD = embedding_WD[ahead(tokens_BT, k)].astype(cfg.dtype)
            module = MTPModule(cfg, rematerialized(Block, cfg, scanned=False), capture, self.mesh, name=f"mtp_{k}")
            bias_E = None if mtp_bias_KE is None else mtp_bias_KE[k - 1]
            h_BTD, one = module(h_BTD, ahead_BTD, bias_E, rope, segment_ids)
            mtp_hidden.append(h_BTD)
            mtp_stats.append(one)
        if mtp_stats:
            stats.append(("mtp_bias", jax.tree.map(lambda *leaves: jnp.stack(leaves), *mtp_stats)))
        return self._output(hidden_BTD, tuple(mtp_hidden), head_DW, dict(stats), logits)

    def _stack(self, length, name, moe, capture):
        # A short stack is unrolled: a loop would copy all it keeps for the backward pass into stacked buffers.
        scanned = length > UNROLLED_LAYERS
        bias_axis = 0 if moe and self.cfg.has_router_bias else nn.broadcast
        stack = nn.scan(rematerialized(Block, self.cfg, scanned), variable_axes={"params": 0},
                        split_rngs={"params": True}, length=length, unroll=1 if scanned else length,
                        in_axes=(bias_axis, nn.broadcast, nn.broadcast))
        return stack(self.cfg, moe=moe, capture=capture, mesh=self.mesh, name=name)

    def _bias(self, name, layers):
        """The routing biases [layers, E]: data that the step updates, never a parameter. None for models without."""
        if not self.cfg.has_router_bias:
            return None
        return self.variable("router", name, routing.initial_bias, self.cfg, (layers, self.cfg.num_experts)).value

    def _output(self, hidden_BTD, mtp_hidden, head_DW, stats, logits):
        def mean(name):
            values = [s[name].reshape(-1) for s in stats.values()]
            return jnp.concatenate(values).mean() if values else jnp.zeros((), wide(self.cfg.dtype))

        return Output(
            logits_BTW=head_logits(hidden_BTD, head_DW) if logits else None, hidden_BTD=hidden_BTD,
            mtp_logits=tuple(head_logits(h, head_DW) for h in mtp_hidden) if logits else (), mtp_hidden=mtp_hidden,
            counts={name: s["counts"] for name, s in stats.items()},
            traffic=jax.tree.map(lambda *counters: sum(c.sum() for c in counters),
                                 *(s["traffic"] for s in stats.values())) if stats else {},
            sequence_loss=mean("sequence_loss"), auxiliary_loss=mean("auxiliary_loss"),
            captured=stats["bias"]["captured"] if "bias" in stats else {})
