"""Distillation by logits: equal to an oracle in float64, and a teacher that does not fit is refused."""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, DistillConfig, MeshConfig
from deepseek_jax.config.training import DataConfig, InitConfig
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.posttraining.distill_logits import DistillRun, Teacher, distances, distill, teacher_of
from deepseek_jax.training.loop import train
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.workdir import claim_workdir
from tests import runs
from tests.posttraining import policies
from tests.precision import float64

N, D, E, W = 7, 4, 3, 6
TEACHER = policies.config_of(model=dict(num_layers=2, num_dense_layers=1, d_model=48))
SMALL = dict(model=policies.SMALL)


def case(seed=0):
    rng = np.random.default_rng(seed)
    return dict(hidden=rng.standard_normal((N, D)), head=rng.standard_normal((D, W)),
                theirs=rng.standard_normal((N, E)), their_head=rng.standard_normal((E, W)),
                targets=rng.integers(W, size=N), weights=np.array([1.0, 0, 1, 0.5, 1, 0, 2]))


def oracle(cfg, c):
    """Loss, and gradients by the hidden states and the head, token by token."""
    def softmax(x):
        e = np.exp(x)
        return e / e.sum()

    loss, d_hidden, d_head, T = 0.0, np.zeros_like(c["hidden"]), np.zeros_like(c["head"]), cfg.temperature
    for n in range(N):
        logits = c["hidden"][n] @ c["head"]
        p, soft, wanted = softmax(logits), softmax(logits / T), softmax(c["theirs"][n] @ c["their_head"] / T)
        loss += c["weights"][n] * ((1 - cfg.weight) * -np.log(p[c["targets"][n]])
                                   + cfg.weight * T**2 * (wanted * np.log(wanted / soft)).sum())
        by_logits = c["weights"][n] * ((1 - cfg.weight) * (p - np.eye(W)[c["targets"][n]])
                                       + cfg.weight * T * (soft - wanted))
        d_hidden[n] = c["head"] @ by_logits
        d_head += np.outer(c["hidden"][n], by_logits)
    return loss, d_hidden, d_head


def loss_of(cfg, c, chunk=3):
    theirs, their_head, targets, weights = (jnp.asarray(c[name]) for name in
                                            ("theirs", "their_head", "targets", "weights"))
    return lambda hidden, head: distances(hidden, head, Teacher(theirs, their_head), targets, weights, cfg, chunk).loss


def gradients(cfg, c):
    return jax.value_and_grad(loss_of(cfg, c), argnums=(0, 1))(jnp.asarray(c["hidden"]), jnp.asarray(c["head"]))


@pytest.mark.parametrize("values", [(0.5, 1.0), (1.0, 2.0), (0.25, 0.5)])
def test_loss_and_gradient_are_those_of_the_oracle(values):
    cfg, c = DistillConfig("run", *values), case()
    with float64():
        value, grads = gradients(cfg, c)
        again = loss_of(cfg, c, chunk=64)(jnp.asarray(c["hidden"]), jnp.asarray(c["head"]))
    for found, wanted in zip((value, *grads), oracle(cfg, c)):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(again, value, rtol=1e-12)


def test_a_student_that_is_its_teacher_learns_nothing():
    c = case()
    c |= dict(theirs=c["hidden"], their_head=c["head"])
    value, grads = gradients(DistillConfig("run", 1.0, 2.0), {k: np.asarray(v, np.float32) if k != "targets" else v
                                                              for k, v in c.items()})
    assert abs(value) < 1e-5 and all(np.abs(g).max() < 1e-6 for g in grads)


def test_tokens_without_a_weight_have_no_gradient():
    c = case()
    _, (d_hidden, _) = gradients(DistillConfig("run", 0.5, 1.0), c)
    np.testing.assert_array_equal(np.asarray(d_hidden).any(axis=1), c["weights"] > 0)


@pytest.fixture(scope="module")
def pupil(tmp_path_factory):
    """A student's config, with a teacher of another width and depth that has no weights yet."""
    folder = tmp_path_factory.mktemp("pupil")
    runs.write_corpus(folder / "corpus")
    claim_workdir(TEACHER, str(folder / "teacher"))
    policies.tokenizer().save(str(folder / "teacher" / "tokenizer.json"))
    return dataclasses.replace(
        policies.config_of(**SMALL, sequence_length=32, eval_batches=1, final_eval_batches=1, sample_tokens=0),
        init=InitConfig(), distill=DistillConfig(str(folder / "teacher"), 1.0),
        data=DataConfig(sources=((str(folder / "corpus"), 1.0),), validation_fraction=0.2, fim_rate=0.0))


def test_a_teacher_with_another_tokenizer_is_one_line(pupil, tmp_path):
    loader = types.SimpleNamespace(tokenizer=train_tokenizer(["other words"] * 4, 288))
    with pytest.raises(ConfigError, match="has another tokenizer than the student; distillation by text takes any"):
        DistillRun(pupil, str(tmp_path), loader, None)


@pytest.mark.parametrize(("change", "said"), [
    (dict(model=dict(vocab_size=320)), "has a vocabulary of 288, and the student one of 320"),
    (dict(mesh=dict(pipe=2)), "take mesh.pipe=1, or distill.from=None"),
    (dict(mesh=dict(context=2)), "take mesh.context=1, or distill.from=None"),
])
def test_what_cannot_be_taught_is_one_line(pupil, change, said):
    config = dataclasses.replace(pupil)
    for name, values in change.items():
        object.__setattr__(config, name, dataclasses.replace(getattr(config, name), **values))
    with pytest.raises(ConfigError, match=said):
        teacher_of(config)


def test_a_teacher_is_named_and_never_silently_left_out(pupil, tmp_path):
    with pytest.raises(ConfigError, match="distill.from names no teacher; add --config.distill.from=RUN"):
        DistillConfig("")
    with pytest.raises(ConfigError, match="which posttraining.distill_logits.distill trains with"):
        train(pupil, str(tmp_path / "run"))


@pytest.mark.slow
def test_a_student_of_another_shape_comes_nearer_to_its_teacher_and_resumes_to_the_bit(pupil, tmp_path):
    policies.start_run(pathlib.Path(str(pupil.distill.from_)), TEACHER)
    assert distill(pupil, str(tmp_path / "whole")).finished
    rows = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert len(rows) == 4 and rows[3]["kl"] < rows[0]["kl"] and rows[0]["loss"] == pytest.approx(rows[0]["kl"])
    policies.assert_continues(distill, pupil, tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_mesh_learns_from_a_teacher_as_one_device_does(pupil, tmp_path):
    policies.start_run(pathlib.Path(str(pupil.distill.from_)), TEACHER)
    once = dataclasses.replace(pupil, train=dataclasses.replace(pupil.train, accumulation_steps=1))
    assert distill(once, str(tmp_path / "one")).finished
    assert distill(dataclasses.replace(once, mesh=MeshConfig(node=2, local=4)), str(tmp_path / "eight")).finished
    policies.assert_alike(tmp_path / "one", tmp_path / "eight", ("loss", "kl", "cross_entropy", "grad_norm"))


@pytest.mark.slow
def test_the_command_trains_the_named_config(pupil, tmp_path):
    policies.start_run(pathlib.Path(str(pupil.distill.from_)), TEACHER)
    done = runs.run("train", "--config", "distill", "--workdir", tmp_path / "run",
                    f"--config.distill.from={pupil.distill.from_}", f"--config.data.sources={pupil.data.sources!r}",
                    "--config.data.validation_fraction=0.2", "--config.model.vocab_size=288",
                    "--config.model.num_layers=1", "--config.model.num_dense_layers=0", "--config.model.mtp_depth=0",
                    "--config.model.dtype=float32", "--config.train.steps=1", "--config.train.batch_size=4",
                    "--config.train.sequence_length=32", "--config.train.sample_tokens=0")
    assert done.code == 0 and "kl" in read_metrics(tmp_path / "run")[0], done
