"""Distillation on the student's own answers: equal to an oracle in float64, gradients only by the student, on any mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.config import ConfigError, DistillConfig, load_config
from deepseek_jax.posttraining.distill_on_policy import reverse_kl
from deepseek_jax.posttraining.loop import check_reinforce, reinforce
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.step import init_state
from tests.posttraining import policies
from tests.precision import float64

B, T, D, E, W = 2, 4, 3, 5, 6
TEACHER = policies.config_of(model=policies.SMALL | dict(d_model=48))


def case(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in ((B, T, D), (D, W), (B, T, E), (E, W))]


def oracle(hidden, head, theirs, their_head, weights):
    """Weighted loss and its gradients by the student's hidden states and head, token by token."""
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    loss, d_hidden, d_head = 0.0, np.zeros_like(hidden), np.zeros_like(head)
    for at in np.ndindex(B, T):
        p, q = softmax(hidden[at] @ head), softmax(theirs[at] @ their_head)
        kl = sum(p[v] * (np.log(p[v]) - np.log(q[v])) for v in range(W))
        loss += weights[at] * kl
        by_logits = weights[at] * p * (np.log(p) - np.log(q) - kl)
        d_hidden[at] = head @ by_logits
        d_head += np.outer(hidden[at], by_logits)
    return loss, d_hidden, d_head


@pytest.mark.parametrize("chunk", [3, 64])
def test_loss_and_gradient_are_those_of_the_oracle_and_the_teacher_has_none(chunk):
    arrays, weights = case(), np.random.default_rng(1).random((B, T))
    with float64():
        loss = lambda *arrays: (reverse_kl(*arrays, chunk) * weights).sum()
        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*map(jnp.asarray, arrays))
    for found, wanted in zip((value, *grads), oracle(*arrays, weights)):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
    assert not any(np.asarray(g).any() for g in grads[2:])


def test_a_student_that_is_its_teacher_learns_nothing():
    hidden, head, _, _ = (np.asarray(x, np.float32) for x in case())
    value, grad = jax.value_and_grad(lambda h: reverse_kl(h, head, hidden, head, 3).sum())(hidden)
    assert abs(value) < 1e-5 and np.abs(grad).max() < 1e-6


@pytest.fixture(scope="module")
def pupil(small_run, tmp_path_factory):
    """A config with a teacher of another width that prefers some words."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    policies.start_run(folder, TEACHER)
    state, checkpoints = init_state(TEACHER), Checkpoints(folder)
    checkpoints.save(2, state.replace(params=state.params | {"head": 20 * state.params["head"]}), {})
    checkpoints.close()
    return dataclasses.replace(
        small_run, distill=DistillConfig(str(folder), 1.0), optimizer=dataclasses.replace(
            small_run.optimizer, learning_rate=1e-2),
        rollout=dataclasses.replace(small_run.rollout, task="tests.posttraining.policies:EVEN"))


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_on_its_own_answers_and_resumes_to_the_bit(pupil, tmp_path):
    assert reinforce(pupil, str(tmp_path / "whole"))
    rows = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx([row["reverse_kl"] for row in rows])
    assert rows[3]["reverse_kl"] < rows[0]["reverse_kl"] and "reward" in rows[0] and "kl" not in rows[0]
    policies.assert_continues(reinforce, pupil, tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("change", "said"), [
    (dict(distill=dict(weight=0.5)), "of a student's own answers take 1 and 1"),
    (dict(distill=dict(temperature=2.0)), "of a student's own answers take 1 and 1"),
    (dict(grpo=dict(kl_weight=0.1)), r"take grpo\.kl_weight=0"),
    (dict(rollout=dict(reward="majority")), "take 'task', which is measured"),
])
def test_what_a_teacher_does_not_go_with_is_one_line(pupil, change, said):
    config = dataclasses.replace(pupil, **{
        name: dataclasses.replace(getattr(pupil, name), **values) for name, values in change.items()})
    with pytest.raises(ConfigError, match=said):
        check_reinforce(config)


def test_the_named_config_takes_a_start_and_a_teacher(pupil):
    folders = [f"--config.init.from={pupil.init.from_}", f"--config.distill.from={pupil.distill.from_}"]
    check_reinforce(load_config("distill_on_policy", folders))
    with pytest.raises(ConfigError, match="distill.from names no teacher"):
        load_config("distill_on_policy", folders[:1])
