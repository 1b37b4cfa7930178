"""Direct preference optimization: equal to an oracle in float64, with zero gradients where required."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.posttraining.dpo import answer_logprobs, pair_losses
from deepseek_jax.training.losses import token_logprobs
from tests.precision import float64

P, T, D, W = 3, 5, 4, 7


def case(seed=0):
    """Hidden states of policy and reference, a head each, tokens, and answers of different lengths."""
    rng = np.random.default_rng(seed)
    start, stop = np.array([[1], [2], [1], [0], [3], [1]]), np.array([[4], [3], [5], [2], [5], [2]])
    return dict(hidden=rng.standard_normal((2 * P, T, D)), head=rng.standard_normal((D, W)),
                before=rng.standard_normal((2 * P, T, D)), before_head=rng.standard_normal((D, W)),
                targets=rng.integers(W, size=(2 * P, T)),
                counted=((np.arange(T) >= start) & (np.arange(T) < stop)).astype(float))


def oracle(beta, c):
    """Loss and gradients by the hidden states and the head, pair by pair and token by token."""
    def softmax(hidden, head):
        e = np.exp(hidden @ head)
        return e / e.sum()

    loss, d_hidden, d_head = 0.0, np.zeros_like(c["hidden"]), np.zeros_like(c["head"])
    for pair in range(P):
        margin, terms = 0.0, []
        for row, sign in ((2 * pair, 1), (2 * pair + 1, -1)):
            for t in np.flatnonzero(c["counted"][row]):
                p, q = (softmax(c[h][row, t], c[w]) for h, w in (("hidden", "head"), ("before", "before_head")))
                target = c["targets"][row, t]
                margin += sign * beta * (np.log(p[target]) - np.log(q[target]))
                terms.append((row, t, sign * (np.eye(W)[target] - p)))
        loss += np.log1p(np.exp(-margin)) / P
        for row, t, by_logits in terms:
            by_logits = by_logits * -beta / (1 + np.exp(margin)) / P
            d_hidden[row, t] += c["head"] @ by_logits
            d_head += np.outer(c["hidden"][row, t], by_logits)
    return loss, d_hidden, d_head


def loss_of(beta, c):
    """The same by the library, as a function of hidden states and head."""
    of = lambda hidden, head: answer_logprobs(
        token_logprobs(hidden, head, jnp.asarray(c["targets"]), 4), jnp.asarray(c["counted"]))
    before_P2 = of(jnp.asarray(c["before"]), jnp.asarray(c["before_head"]))
    return lambda hidden, head: pair_losses(beta, of(hidden, head), before_P2)[0].mean()


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_loss_and_gradient_are_those_of_the_oracle(beta):
    c = case()
    with float64():
        value, grads = jax.value_and_grad(loss_of(beta, c), argnums=(0, 1))(jnp.asarray(c["hidden"]),
                                                                            jnp.asarray(c["head"]))
    for found, wanted in zip((value, *grads), oracle(beta, c)):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_prompts_and_padding_have_no_gradient_even_where_they_are_no_numbers():
    c = case()
    c["hidden"][c["counted"] == 0] = np.nan
    logprob_BT = jnp.where(jnp.asarray(c["counted"]) > 0, -1.0, jnp.nan)
    grads = jax.grad(lambda x: pair_losses(0.1, answer_logprobs(x, jnp.asarray(c["counted"])),
                                           jnp.zeros((P, 2)))[0].sum())(logprob_BT)
    np.testing.assert_array_equal(np.asarray(grads) != 0, c["counted"] > 0)


def test_rewards_margin_and_accuracy_are_those_of_the_pair():
    loss_P, watched = pair_losses(0.5, jnp.array([[-1.0, -4.0], [-3.0, -3.0]]), jnp.array([[-2.0, -3.0], [-4.0, -1.0]]))
    np.testing.assert_allclose(watched["reward_chosen"], [0.5, 0.5])
    np.testing.assert_allclose(watched["reward_rejected"], [-0.5, -1.0])
    np.testing.assert_allclose(watched["margin"], [1.0, 1.5])
    np.testing.assert_array_equal(watched["accuracy"], [1, 1])
    np.testing.assert_allclose(loss_P, np.log1p(np.exp([-1.0, -1.5])), rtol=1e-6)
    same = pair_losses(0.5, jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    np.testing.assert_allclose(same[0], np.log(2), rtol=1e-7)
    assert same[1]["accuracy"] == 0  # a tie is not a preference


def test_the_largest_differences_are_finite():
    value, grad = jax.value_and_grad(lambda x: pair_losses(1.0, x, jnp.zeros((1, 2)))[0].sum())(
        jnp.array([[-1e4, 0.0]]))
    assert value == 1e4 and np.isfinite(grad).all()
