"""The types that the parts of the model exchange, and the legend of array names.

Array names end in their dimensions: B batch, T query position, S key position, D model, H head, Q query rank, C key-
value rank, N non-rotary head dim (in attention) or token (elsewhere), R rotary head dim (in attention) or row sorted
by expert (in experts), V value dim, A N + R, E expert, K chosen experts, G group, F feed-forward, W vocabulary, L
layer, M micro-batch. A file that departs from this legend states its own at the top.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax

from deepseek_jax.parallel.dispatch import Traffic


class TokenContext(NamedTuple):
    """The information about tokens, besides hidden states, that a block may use.

    rope: cos and sin of the positions, [B, T, rope_head_dim / 2] each. segment_ids_BT: int32, attention stays inside
    equal ids; None: one segment. tokens_BT: int32, the tokens whose embeddings the block reads (in MTP module k those k
    ahead). positions_BT: int32. step: int32 scalar, the optimizer step; None outside of training. chosen_BTK: int32,
    the experts to use in this layer; see RoutingContext.
    """

    rope: tuple[jax.Array, jax.Array]
    segment_ids_BT: jax.Array | None = None
    tokens_BT: jax.Array | None = None
    positions_BT: jax.Array | None = None
    step: jax.Array | None = None
    chosen_BTK: jax.Array | None = None


class RoutingContext(NamedTuple):
    """The information about tokens that a routing rule may use: int32 [N] each; `step` as in TokenContext.

    chosen_NK: int32, earlier choices of experts to use again (router replay); the gates still come from the rule's own
    scores. Negative: the rule decides; None: it decides everywhere.
    """

    tokens_N: jax.Array | None
    positions_N: jax.Array | None
    step: jax.Array | None = None
    chosen_NK: jax.Array | None = None


class Routing(NamedTuple):
    """The result of a routing rule.

    scores_NE: unbiased affinities, not negative; the balance losses read them. chosen_NK: int32, the experts of each
    token, all different. gates_NK: the weight of each chosen expert's output.
    """

    scores_NE: jax.Array
    chosen_NK: jax.Array
    gates_NK: jax.Array


@flax.struct.dataclass
class RoutingStats:
    """Routing statistics of one MoE layer; stacked along a leading axis for several.

    counts_E: int32, tokens that chose each expert. sequence_loss, auxiliary_loss: unweighted, float32.
    traffic: counters of dispatch; None on one device. captured: {"scores": [B, T, E], "chosen": [B, T, K]}, the
    requested ones.
    """

    counts_E: jax.Array
    sequence_loss: jax.Array
    auxiliary_loss: jax.Array
    traffic: Traffic | None
    captured: dict[str, jax.Array]


class IndexerStats(NamedTuple):
    """Statistics of the indexer of one layer; float32 scalars, means over its tokens.

    loss: KL divergence from the attention of all heads together to the softmax of the index scores, in nats. recall:
    the share of dense attention's weight that falls on the tokens that the indexer chooses.
    """

    loss: jax.Array
    recall: jax.Array


class BlockStats(NamedTuple):
    """Statistics of the parts of one block. routing: None in a dense block. indexer: None without one."""

    routing: RoutingStats | None
    indexer: IndexerStats | None


@flax.struct.dataclass
class Output:
    """The result of a forward pass. L counts MoE layers; MTP entries are empty at depth 0.

    logits_BTW: float32; None with logits=False.
    hidden_BTD: after the final norm, the input of the head. mtp_hidden[k - 1]: the same for depth k.
    `mtp_logits[k - 1][b, i]`: for token i + k + 1; the last k positions saw wrapped-around tokens: mask them.
    counts: {"bias": int32 [L, E], "mtp_bias": int32 [depth, E]}, tokens that chose each expert; keys as in `router`.
    traffic: counters of dispatch, summed over MoE layers (MTP's included); None on one device.
    sequence_loss, auxiliary_loss: unweighted, float32, averaged over MoE layers (MTP's included).
    captured: {"scores": [L, B, T, E], "chosen": [L, B, T, K]}, the requested ones. indexer: averaged over all layers
    (MTP's included); None for models without.
    """

    logits_BTW: jax.Array | None
    hidden_BTD: jax.Array
    mtp_logits: tuple[jax.Array, ...]
    mtp_hidden: tuple[jax.Array, ...]
    counts: dict[str, jax.Array]
    traffic: Traffic | None
    sequence_loss: jax.Array
    auxiliary_loss: jax.Array
    captured: dict[str, Any]
    indexer: IndexerStats | None = None
