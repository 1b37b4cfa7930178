"""Group relative policy optimization (arXiv 2402.03300; report section 5.2.2): policy gradients without a critic.

For each prompt the policy draws a group of answers. An answer with a reward above its group's mean becomes more likely,
token by token; one below the mean becomes less likely. With the reward r_i of answer i, and the policy pi:

    A_i = (r_i - mean(r)) / std(r)                          over the group
    ratio = pi(token) / pi_old(token)                       pi_old drew the answers
    KL = pi_ref / pi - log(pi_ref / pi) - 1                 never negative; its mean over pi is the KL divergence
    loss = -min(ratio * A_i, clip(ratio, 1 - clip_low, 1 + clip_high) * A_i) + kl_weight * KL

The loss of a batch is the mean over tokens, then over answers, or over all tokens at once. Published variants are words
and numbers of `GrpoConfig`: Dr. GRPO (arXiv 2503.20783) does not divide by std; DAPO (2503.14476) clips higher above
than below, and takes the mean over all tokens.

G counts the answers of a group, P groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepseek_jax.config import GrpoConfig

EPSILON = 1e-6  # added to std: rewards that differ only by rounding must not become advantages


def advantages(cfg: GrpoConfig, rewards_PG: jax.Array) -> jax.Array:
    """[P, G]: the reward of each answer relative to its group. 0 for a group of equal rewards."""
    low_P1, high_P1 = rewards_PG.min(axis=1, keepdims=True), rewards_PG.max(axis=1, keepdims=True)
    # The mean of equal rewards is rounded: they would differ from it by an amount as small as their std.
    deviation_PG = jnp.where(low_P1 == high_P1, 0, rewards_PG - rewards_PG.mean(axis=1, keepdims=True))
    if cfg.advantage == "mean":
        return deviation_PG
    return deviation_PG / (rewards_PG.std(axis=1, keepdims=True) + EPSILON)


def token_weights(cfg: GrpoConfig, counted_BT: jax.Array) -> jax.Array:
    """[B, T]: the weight of each token, so that sum(weight * loss) / sum(weight) is the mean selected by cfg.mean.

    counted_BT: 1 for the tokens of answers, 0 for prompts and padding.
    """
    if cfg.mean == "token":
        return counted_BT
    return counted_BT / jnp.maximum(counted_BT.sum(axis=1, keepdims=True), 1)


def kl_estimate(log_ratio: jax.Array) -> jax.Array:
    """Estimate of the KL divergence of the policy from the reference, for tokens that it drew: unbiased, never
    negative.

    log_ratio: log(pi_ref / pi), of any shape, in nats; the result has that shape.
    """
    # expm1 keeps small ratios exact, and rounding must not make the result negative.
    return jnp.maximum(jnp.expm1(log_ratio) - log_ratio, 0)


def token_losses(cfg: GrpoConfig, logprob_BT: jax.Array, old_BT: jax.Array, advantage_BT: jax.Array,
                 counted_BT: jax.Array, reference_BT: jax.Array | None = None
                 ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of each token, and its metrics, all [B, T]; 0 for tokens that do not count.

    Args:
      logprob_BT: log pi(token) now, which is differentiated.
      old_BT: log pi_old(token), of the policy that drew it.
      advantage_BT: of the answer that the token belongs to.
      counted_BT: not 0 for the tokens that count. No gradient flows to others, whatever their values.
      reference_BT: log pi_ref(token), for cfg.kl_weight > 0.
    Returns:
      losses; {"clipped": 1 where the clip cuts off the gradient, "ratio_error": |ratio - 1|, "kl": its estimate}.
    """
    counts_BT = counted_BT != 0
    apart = lambda a_BT, b_BT: jnp.where(counts_BT, a_BT - b_BT, 0)  # before exp: padding must not overflow into a NaN
    ratio_BT = jnp.exp(apart(logprob_BT, old_BT))
    clipped_BT = jnp.clip(ratio_BT, 1 - cfg.clip_low, 1 + cfg.clip_high)
    gain_BT = jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    loss_BT = -jnp.where(counts_BT, gain_BT, 0)
    watched = {"clipped": (clipped_BT * advantage_BT < ratio_BT * advantage_BT).astype(ratio_BT.dtype),
               "ratio_error": jnp.abs(ratio_BT - 1)}
    if reference_BT is not None:
        kl_BT = kl_estimate(apart(reference_BT, logprob_BT))
        loss_BT, watched["kl"] = loss_BT + cfg.kl_weight * kl_BT, kl_BT
    return loss_BT, {name: jnp.where(counts_BT, x_BT, 0) for name, x_BT in watched.items()}
