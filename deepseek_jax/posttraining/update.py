"""The policy loss of one micro-batch, and the trainer's view of answers; `training.step` uses them instead of
next-token prediction.

A batch has the arrays of every step's batch (`training.step.accumulate`), and for each token, at its own place:

    weights      of its loss (`grpo.token_weights`); 0 for prompts and padding
    advantages   of its answer
    sampled      its log-probability when it was drawn
    reference    that of the reference policy; only where grpo.kl_weight > 0
    routes       [MoE layers, K, rows, T + 1]: its experts when it was fed, -1 where that is unknown; only for replay

MTP modules get no gradient: they keep drafting for a policy that changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model.types import Output
from deepseek_jax.parallel.sharding import constrain_to_compute
from deepseek_jax.posttraining.grpo import token_losses
from deepseek_jax.training.losses import objective, token_logprobs
from deepseek_jax.training.step import Inputs, complete, of_rows, run_model, sums_of
from deepseek_jax.training.types import Sums, TokenLosses


def policy_loss(config: Config, params: dict[str, Any], inputs: Inputs) -> tuple[jax.Array, Sums]:
    """GRPO's loss and the balance losses of one micro-batch; a `training.step.Loss`."""
    micro, weights_BT = inputs.micro, inputs.micro["weights"][:, 1:]
    logprob_BT, output = _logprobs(config, params, inputs.router, micro, replayed(micro), inputs.step)
    of_targets = {name: micro[name][:, 1:] for name in ("sampled", "advantages", "reference") if name in micro}
    loss_BT, watched = token_losses(config.grpo, logprob_BT, of_targets["sampled"], of_targets["advantages"],
                                    weights_BT, of_targets.get("reference"))
    return of_tokens(config, inputs, output, loss_BT, watched)


def of_tokens(config: Config, inputs: Inputs, output: Output, loss_BT: jax.Array,
              watched: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
    """The result of a `training.step.Loss`, from the losses and metrics of answers' tokens.

    Args:
      loss_BT: float32, of each target, counted by inputs.micro["weights"]. The MTP modules have none.
      watched: metrics by name, [B, T] each; their weighted sums become `Sums.own`.
    """
    weights_BT = inputs.micro["weights"][:, 1:]
    weighted = lambda x_BT: (x_BT * weights_BT).sum()
    none_D = jnp.zeros_like(inputs.normalizers.mtp_weight_D)
    losses = TokenLosses(weighted(loss_BT), weights_BT.sum(), none_D, none_D)
    sums = sums_of(output, losses, {name: weighted(x_BT) for name, x_BT in watched.items()})
    return objective(output, losses, inputs.normalizers, config.balance), sums


def replayed(micro: dict[str, jax.Array]) -> jax.Array | None:
    """The recorded experts of the tokens that the model reads, in its layout: [MoE layers, B, T, K]."""
    return jnp.moveaxis(micro["routes"][..., :-1], 1, -1) if "routes" in micro else None


class View(NamedTuple):
    """The trainer's own results for tokens, without replay.

    logprob_BT: float32, of each target. chosen_LBTK: int32, the experts of each token read; None in a dense model.
    """

    logprob_BT: jax.Array
    chosen_LBTK: jax.Array | None


def view(config: Config, params: dict[str, Any], router: dict[str, jax.Array], micro: dict[str, Any],
         base: dict[str, Any] | None = None) -> View:
    """The trainer's log-probabilities and routes of one micro-batch.

    micro: tokens, weights, segment_ids, [B, T + 1] each. base: of adapters, as in `training.step.accumulate`.
    """
    params = complete(config, constrain_to_compute(params), base)
    logprob_BT, output = _logprobs(config, params, router, micro, None, None)
    return View(logprob_BT, output.captured.get("chosen"))


def _logprobs(config, params, router, micro, chosen, step) -> tuple[jax.Array, Output]:
    batch = of_rows(config, micro)
    output = run_model(config, params, router, batch, chosen=chosen, step=step, capture=("chosen",))
    return token_logprobs(output.hidden_BTD, params["head"], batch.targets_BT, config.train.loss_chunk), output
