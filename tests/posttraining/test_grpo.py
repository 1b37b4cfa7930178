"""The objective: equal to an oracle in float64, with zero gradients where required."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import GrpoConfig
from deepseek_jax.posttraining.grpo import advantages, kl_estimate, token_losses, token_weights
from deepseek_jax.training.losses import token_logprobs
from tests.precision import float64

P, G, T, D, W = 2, 4, 5, 3, 7
VARIANTS = [{}, dict(clip_high=0.28, mean="token"), dict(advantage="mean"), dict(kl_weight=0.04),
            dict(kl_weight=0.5, advantage="mean", mean="token", clip_low=0.1)]


def case(seed=0):
    """Hidden states, head, tokens, masks, rewards, and log-probabilities different enough for every branch."""
    rng = np.random.default_rng(seed)
    counted = (np.arange(T) >= 1) & (np.arange(T) < 2 + np.arange(P * G)[:, None] % (T - 1))
    return dict(hidden=rng.standard_normal((P * G, T, D)), head=rng.standard_normal((D, W)),
                targets=rng.integers(W, size=(P * G, T)), counted=counted.astype(float),
                rewards=rng.integers(3, size=(P, G)) / 2, old_noise=rng.normal(0, 0.3, (P * G, T)),
                reference_noise=rng.normal(0, 0.3, (P * G, T)))


def oracle(cfg, c):
    """Loss and gradients by the hidden states and the head, answer by answer and token by token."""
    loss, d_hidden, d_head = 0.0, np.zeros_like(c["hidden"]), np.zeros_like(c["head"])
    total = c["counted"].sum() if cfg.mean == "token" else P * G
    for b in range(P * G):
        group = c["rewards"][b // G]
        advantage = c["rewards"][b // G, b % G] - group.mean()
        if cfg.advantage == "std":
            advantage /= np.sqrt(((group - group.mean()) ** 2).mean()) + 1e-6
        length = 1 if cfg.mean == "token" else c["counted"][b].sum()
        for t in np.flatnonzero(c["counted"][b]):
            logits = c["hidden"][b, t] @ c["head"]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            target = c["targets"][b, t]
            ratio = np.exp(-c["old_noise"][b, t])
            plain, clipped = ratio * advantage, np.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high) * advantage
            value, by_logprob = -min(plain, clipped), -plain if plain <= clipped else 0.0
            if cfg.kl_weight:
                apart = c["reference_noise"][b, t]
                value += cfg.kl_weight * (np.exp(apart) - apart - 1)
                by_logprob += cfg.kl_weight * (1 - np.exp(apart))
            weight = 1 / length / total
            by_logits = weight * by_logprob * (np.eye(W)[target] - p)
            loss += weight * value
            d_hidden[b, t] += c["head"] @ by_logits
            d_head += np.outer(c["hidden"][b, t], by_logits)
    return loss, d_hidden, d_head


def loss_of(cfg, c, chunk):
    """The same by the library, as a function of hidden states and head."""
    at = token_logprobs(jnp.asarray(c["hidden"]), jnp.asarray(c["head"]), jnp.asarray(c["targets"]), chunk)
    old, reference = at + c["old_noise"], at + c["reference_noise"]
    advantage = jnp.broadcast_to(advantages(cfg, jnp.asarray(c["rewards"])).reshape(-1, 1), (P * G, T))
    weights = token_weights(cfg, jnp.asarray(c["counted"]))

    def loss(hidden, head):
        now = token_logprobs(hidden, head, jnp.asarray(c["targets"]), chunk)
        losses, _ = token_losses(cfg, now, old, advantage, weights, reference if cfg.kl_weight else None)
        return (losses * weights).sum() / weights.sum()

    return loss


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_loss_and_gradient_are_those_of_the_oracle(variant):
    cfg, c = GrpoConfig(**variant), case()
    with float64():
        value, grads = jax.value_and_grad(loss_of(cfg, c, chunk=7), argnums=(0, 1))(
            jnp.asarray(c["hidden"]), jnp.asarray(c["head"]))
    expected = oracle(cfg, c)
    for found, wanted in zip((value, *grads), expected):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)
    assert np.abs(expected[1]).max() > 1e-3


def test_no_gradient_flows_to_prompts_or_padding_whatever_they_hold():
    cfg, c = GrpoConfig(kl_weight=0.1), case()
    outside = c["counted"] == 0
    c["old_noise"][outside] = c["reference_noise"][outside] = 1e4  # exp of that is not finite
    gradient = jax.grad(loss_of(cfg, c, chunk=40))(jnp.asarray(c["hidden"]), jnp.asarray(c["head"]))
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[outside].any()
    assert (np.abs(np.asarray(gradient)).max(axis=-1) > 0).sum() > c["counted"].sum() / 2


def test_answers_meet_in_their_groups_mean_alone():
    cfg, c = GrpoConfig(), case()
    gradient = jax.grad(loss_of(cfg, c, chunk=8))
    before = np.asarray(gradient(jnp.asarray(c["hidden"]), jnp.asarray(c["head"])))
    other = c | {"rewards": np.concatenate([c["rewards"][:1], 1 - c["rewards"][1:]]),
                 "old_noise": np.concatenate([c["old_noise"][:G], c["old_noise"][G:] + 0.05])}
    after = np.asarray(jax.grad(loss_of(cfg, other, chunk=8))(jnp.asarray(c["hidden"]), jnp.asarray(c["head"])))
    np.testing.assert_array_equal(before[:G], after[:G])
    assert (before[G:] != after[G:]).any()


def test_advantages_have_no_mean_and_equal_rewards_have_none():
    rewards = np.float32([[0, 1, 1, 0], [0.1, 0.1, 0.1, 0.1], [0, 0, 0, 1]])
    found = advantages(GrpoConfig(), rewards)
    np.testing.assert_allclose(found[0], [-1, 1, 1, -1], rtol=1e-5)
    assert np.abs(found.mean(axis=1)).max() < 1e-6 and found[2, 3] > 1.7
    for rewards_of_all, group in ((0.1, 4), (0.9, 12), (5.3, 12), (100.7, 6)):  # their means are rounded
        assert not np.asarray(advantages(GrpoConfig(), np.full((1, group), rewards_of_all, np.float32))).any()
    np.testing.assert_allclose(advantages(GrpoConfig(advantage="mean"), rewards)[0], [-0.5, 0.5, 0.5, -0.5])


def test_a_long_answer_weighs_as_much_as_a_short_one_or_by_its_tokens():
    counted = np.float32([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(token_weights(GrpoConfig(), counted).sum(axis=1), [1, 1, 0])
    np.testing.assert_array_equal(token_weights(GrpoConfig(mean="token"), counted), counted)


@pytest.mark.parametrize(("ratio", "advantage", "clipped"), [
    (1.1, 1, 0), (1.25, 1, 0), (1.3, 1, 1), (0.5, 1, 0), (0.85, -1, 0), (0.7, -1, 1), (2.0, -1, 0)])
def test_a_clip_cuts_only_what_has_gone_far_enough_its_own_way(ratio, advantage, clipped):
    cfg, one = GrpoConfig(clip_low=0.2, clip_high=0.28), jnp.ones((1, 1))
    loss = lambda now: token_losses(cfg, now, 0 * one, advantage * one, one)[0].sum()
    assert token_losses(cfg, jnp.log(ratio) * one, 0 * one, advantage * one, one)[1]["clipped"] == clipped
    assert (float(jax.grad(loss)(jnp.log(ratio) * one)[0, 0]) == 0) == bool(clipped)


def test_the_kl_estimate_is_never_negative_and_unbiased():
    rng = np.random.default_rng(0)
    apart = np.float32(np.concatenate([rng.normal(0, s, 10_000) for s in (1e-8, 1e-4, 1e-2, 1, 5)]))
    assert float(kl_estimate(jnp.asarray(apart)).min()) >= 0 and kl_estimate(jnp.float32(0)) == 0
    p, q = np.float32([0.5, 0.3, 0.2]), np.float32([0.2, 0.2, 0.6])
    np.testing.assert_allclose((p * kl_estimate(jnp.log(q / p))).sum(), (p * np.log(p / q)).sum(), rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logprobs_in_chunks_are_those_of_the_softmax_and_no_logits_of_all_tokens_exist(chunk):
    c = {name: jnp.asarray(x, jnp.float32 if name != "targets" else jnp.int32) for name, x in case().items()}
    run = lambda hidden: token_logprobs(hidden, c["head"], c["targets"], chunk)
    expected = jnp.take_along_axis(jax.nn.log_softmax(c["hidden"] @ c["head"]), c["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(run(c["hidden"]), expected, atol=1e-6)
    if chunk < P * G * T:
        program = str(jax.make_jaxpr(jax.grad(lambda hidden: run(hidden).sum()))(c["hidden"]))
        assert f"[{-(-P * G * T // chunk)},{chunk},{W}]" not in program and f"[{P * G * T},{W}]" not in program
