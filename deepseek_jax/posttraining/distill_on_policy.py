"""Distillation on the student's own answers (arXiv 2306.13649): it learns its teacher's distribution at their tokens.

    loss of a token = KL(student || teacher) = sum over words of p_student * (log p_student - log p_teacher)

The student draws answers as in reinforcement learning, and at each of their tokens its distribution moves toward the
teacher's. The divergence is the reverse KL over the complete vocabulary: a student without its teacher's capacity then
drops the modes that it cannot represent, while with the forward KL (`distill_logits`) it would spread over them.
Sampled tokens are fixed: no gradient flows through their choice, and rewards are only logged.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.model.layers import matmul, wide
from deepseek_jax.parallel.sharding import data_shards
from deepseek_jax.posttraining.distill_logits import Teacher
from deepseek_jax.posttraining.update import of_tokens, replayed
from deepseek_jax.training.base import main_model
from deepseek_jax.training.losses import in_chunks
from deepseek_jax.training.step import Inputs, of_rows, run_model
from deepseek_jax.training.types import Sums


def reverse_kl(hidden_BTD: jax.Array, head_DW: jax.Array, hidden_BTE: jax.Array, head_EW: jax.Array,
               chunk: int) -> jax.Array:
    """KL(student || teacher) of each token in nats, float32 [B, T] (float64 where hidden is).

    Both passes make the logits of `chunk` tokens at a time.

    Args:
      hidden_BTD, head_DW: the student's, which are differentiated.
      hidden_BTE, head_EW: the teacher's, to which no gradient flows.
    """
    theirs = lax.stop_gradient(Teacher(hidden_BTE, head_EW))

    @jax.checkpoint  # otherwise the logits of all chunks would be saved for the backward pass
    def of_chunk(part):
        ours_MW, wanted_MW = (jax.nn.log_softmax(matmul(hidden, head.astype(hidden.dtype), wide(hidden.dtype)))
                              for hidden, head in zip(part, (head_DW, theirs.head_EW)))
        return (jnp.exp(ours_MW) * (ours_MW - wanted_MW)).sum(axis=-1)

    def one(hidden_ND, theirs_NE):
        return lax.map(of_chunk, in_chunks(chunk, hidden_ND, theirs_NE)).reshape(-1)[:len(hidden_ND)]

    # Each device goes through its own tokens, as in `training.losses.token_losses`.
    parts = [x.reshape(data_shards(), -1, x.shape[-1]) for x in (hidden_BTD, theirs.hidden_NE)]
    each = jax.vmap(one)(*parts) if data_shards() > 1 else one(*(x[0] for x in parts))
    return each.reshape(hidden_BTD.shape[:2])


def on_policy_loss(teacher: Config, config: Config, params: dict[str, Any], inputs: Inputs) -> tuple[jax.Array, Sums]:
    """The loss of a micro-batch of answers (`update`); with the teacher's config a `training.step.Loss`.

    inputs.reference: the teacher's variables. Tokens are weighted by grpo.mean, and experts are replayed.
    """
    micro, theirs = inputs.micro, inputs.reference
    assert theirs is not None
    batch = of_rows(config, micro)
    output = run_model(config, params, inputs.router, batch, chosen=replayed(micro), step=inputs.step)
    hidden_BTE = run_model(main_model(teacher), theirs["params"], theirs["router"], batch).hidden_BTD
    kl_BT = reverse_kl(output.hidden_BTD, params["head"], hidden_BTE, theirs["params"]["head"],
                       config.train.loss_chunk)
    kl_BT = jnp.where(batch.weights_BT != 0, kl_BT, 0)
    return of_tokens(config, inputs, output, kl_BT, {"reverse_kl": kl_BT})


def check_on_policy(config: Config) -> None:
    """Raises ConfigError for settings that cannot be used with the student's own answers, or with a teacher."""
    distill = config.distill
    if (distill.weight, distill.temperature) != (1.0, 1.0):
        raise ConfigError(f"distill.weight={distill.weight:g} and distill.temperature={distill.temperature:g} are for "
                          "tokens of a corpus; of a student's own answers take 1 and 1.")
    if config.grpo.kl_weight:
        raise ConfigError(f"grpo.kl_weight={config.grpo.kl_weight:g} holds a policy to its start, and distill.from "
                          "draws it to the teacher; take grpo.kl_weight=0.")
    if config.rollout.reward != "task":
        raise ConfigError(f"rollout.reward={config.rollout.reward!r} has no effect where distill.from names a teacher; "
                          "take 'task', which is measured.")
