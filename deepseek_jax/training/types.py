"""The types that the parts of a training step exchange."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.dispatch import Traffic


class Batch(NamedTuple):
    """Inputs and next-token targets of one micro-batch.

    tokens_BT, targets_BT: int32. weights_BT: float32, 0 leaves a target out. segment_ids_BT, positions_BT: int32, if
    documents are masked; None without masks.
    """

    tokens_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    segment_ids_BT: jax.Array | None
    positions_BT: jax.Array | None


class TokenLosses(NamedTuple):
    """Summed losses in nats of the main model and of each MTP depth [D], and the weights summed over; float32."""

    nats: jax.Array
    weight: jax.Array
    mtp_nats_D: jax.Array
    mtp_weight_D: jax.Array


class Normalizers(NamedTuple):
    """Factors that turn sums over one micro-batch into its part of the loss of the complete batch.

    weight, mtp_weight_D: summed weights of the COMPLETE batch. mtp_lambda: the weight of the MTP loss. share: this
    micro-batch's part of the batch. float32.
    """

    weight: jax.Array
    mtp_weight_D: jax.Array
    mtp_lambda: jax.Array | float
    share: jax.Array | float


class Sums(NamedTuple):
    """Sums over a batch. counts: int32 [L, E] under the names of the `router` collection.

    sequence_loss, auxiliary_loss: unweighted, float32, summed over micro-batches. A pipeline has no auxiliary loss: 0.
    own: other metrics of the loss by name, weighted like its tokens. logits: largest attention logits, as in
    `qk_clip.clip`; {} if they are not needed. They are not sums: `added` takes the larger one.
    """

    losses: TokenLosses
    counts: dict[str, jax.Array]
    traffic: Traffic | None
    sequence_loss: jax.Array
    auxiliary_loss: jax.Array
    own: dict[str, jax.Array] = {}  # noqa: RUF012 (never written to)
    logits: dict[str, Any] = {}  # noqa: RUF012 (never written to)

    def added(self, more: Sums) -> Sums:
        """These and those of more tokens."""
        added = jax.tree.map(jnp.add, self._replace(logits={}), more._replace(logits={}))
        return added._replace(logits=jax.tree.map(jnp.maximum, self.logits, more.logits))


class Metrics(NamedTuple):
    """Metrics of one step: float32 scalars, loss and mtp_loss in nats per token; counts int32 per layer.

    sequence_loss, auxiliary_loss: unweighted, means over the micro-batches. bias_low, bias_high: the smallest and the
    largest routing bias after the step; 0 if there is none. own: weighted means of the loss's other metrics, and with
    optimizer.qk_clip max_logit, the largest attention logit of the step, before clipping.
    biases: float32 [L, E] after the step, by the names of the `router` collection.
    """

    loss: jax.Array
    mtp_loss: jax.Array
    lr: jax.Array
    grad_norm: jax.Array
    sequence_loss: jax.Array
    auxiliary_loss: jax.Array
    bias_low: jax.Array
    bias_high: jax.Array
    counts: dict[str, jax.Array]
    traffic: Traffic | None
    own: dict[str, jax.Array] = {}  # noqa: RUF012 (never written to)
    biases: dict[str, jax.Array] = {}  # noqa: RUF012 (never written to)
