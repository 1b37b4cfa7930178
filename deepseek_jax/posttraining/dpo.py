"""Direct preference optimization (arXiv 2305.18290): learning from pairs of answers without a reward model.

Of two answers to a prompt, `chosen` was preferred to `rejected`. With the policy pi, the reference pi_ref that it
started from, and an answer's log-probability as the sum over its tokens:

    reward(answer) = beta * log(pi(answer) / pi_ref(answer))        implicit: the one that pi is optimal for
    loss = -log sigmoid(reward(chosen) - reward(rejected))          log 2 at the start, where pi is pi_ref

P counts pairs; in [P, 2] the chosen answer is the first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def answer_logprobs(logprob_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
    """[P, 2]: log-probabilities of complete answers. Rows are chosen and rejected in turn.

    counted_BT: not 0 for the tokens of answers; no gradient flows to others, whatever their values.
    """
    return jnp.where(counted_BT != 0, logprob_BT, 0).sum(axis=1).reshape(-1, 2)


def pair_losses(beta: float, policy_P2: jax.Array, reference_P2: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of each pair in nats, and its metrics, all [P].

    Args:
      beta: the factor on the log-ratio to the reference, which is the reward.
      policy_P2: log pi(answer), which is differentiated. reference_P2: log pi_ref(answer).
    Returns:
      losses; {"accuracy": 1 where the chosen answer has the larger reward, "margin": by how much, "reward_chosen",
      "reward_rejected"}.
    """
    return bradley_terry(beta * (policy_P2 - reference_P2))


def bradley_terry(reward_P2: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log sigmoid(reward of the chosen - reward of the rejected), [P], and the metrics of `pair_losses`, [P] each.

    reward_P2: float32, of the chosen and the rejected answer of each pair.
    """
    chosen_P, rejected_P = reward_P2[:, 0], reward_P2[:, 1]
    margin_P = chosen_P - rejected_P
    return -jax.nn.log_sigmoid(margin_P), {
        "accuracy": (margin_P > 0).astype(margin_P.dtype), "margin": margin_P,
        "reward_chosen": chosen_P, "reward_rejected": rejected_P}
