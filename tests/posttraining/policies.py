"""A tiny policy with a real tokenizer, for the tests of posttraining."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.config import Config, GrpoConfig, OptimizerConfig, RolloutConfig, TrainConfig
from deepseek_jax.config.training import BalanceConfig, InitConfig
from deepseek_jax.data.tokenizer import Tokenizer, train_tokenizer
from deepseek_jax.posttraining.tasks import Task
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.step import init_state
from deepseek_jax.workdir import claim_workdir
from tests import runs
from tests.model import naive

# Rewards that answers of random weights sometimes get.
EVEN = Task(lambda rng: (f"say {rng.integers(9)}", None),
            lambda answer, reference: float(len(answer.encode()) % 2 == 0))

MODEL = dict(vocab_size=288, num_layers=2, num_dense_layers=1)
SMALL = dict(num_layers=1, num_dense_layers=0, mtp_depth=0)  # the smallest model with experts


def config_of(model=None, rollout=None, grpo=None, **train) -> Config:
    return Config(
        model=naive.tiny(**(MODEL | (model or {}))),
        rollout=RolloutConfig(**(dict(size=2, group_size=4, max_new_tokens=6) | (rollout or {}))),
        grpo=GrpoConfig(**(grpo or {})), balance=BalanceConfig(bias_speed=0.0, sequence_loss_weight=0.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.0, weight_decay=0.0),
        train=TrainConfig(**(dict(steps=4, batch_size=8, sequence_length=24, accumulation_steps=2, loss_chunk=16,
                                  checkpoint_every=2, eval_every=4) | train)))


def assert_alike(one: pathlib.Path, other: pathlib.Path, names: tuple[str, ...]) -> None:
    """Checks that two runs in float32 took the same steps, up to the order of their sums."""
    first, second = ([row for row in read_metrics(folder) if "loss" in row] for folder in (one, other))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        np.testing.assert_allclose([a[name] for name in names], [b[name] for name in names], rtol=1e-3, atol=1e-5)


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(["reverse a b c d = d c b a"] * 4, 288)


def assert_continues(train: Callable[[Config, str], Any], config: Config, folder: pathlib.Path,
                     whole: pathlib.Path) -> None:
    """Checks that a run in `folder` that is interrupted, as by Ctrl-C, once its first checkpoint is written, and
    started again, equals the uninterrupted run in `whole` to the bit."""
    def stops(self, *arguments):
        saves(self, *arguments)
        self.wait()
        raise KeyboardInterrupt

    saves = Checkpoints.save
    with mock.patch.object(Checkpoints, "save", stops), pytest.raises(KeyboardInterrupt):
        train(config, str(folder))
    assert runs.checkpoints(folder) == [config.train.checkpoint_every]
    train(config, str(folder))
    runs.assert_same_run(folder, whole)


def start_run(folder: pathlib.Path, config: Config) -> Config:
    """A run with random weights in `folder`, and the config that starts from it."""
    config = dataclasses.replace(config, init=InitConfig())
    claim_workdir(config, str(folder))
    tokenizer().save(str(folder / "tokenizer.json"))
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, init_state(config), {})
    checkpoints.close()
    return dataclasses.replace(config, init=InitConfig(str(folder)))
