"""Reinforcement learning: the training loop with rollouts instead of a corpus.

    weights of init.from -> answers -> rewards -> advantages -> steps of the policy -> answers of the new policy ...

Optimizer, mesh, checkpoints, signals and metrics are those of `training.loop`. A rollout is a function of weights, seed
and step, so a run resumes bit-identically without saving any answer: it stops and saves only between rollouts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.chat.template import without_template
from deepseek_jax.checkpoint.adapters import Base, restore_weights
from deepseek_jax.config import GROUP_LIMITED, Config, ConfigError
from deepseek_jax.data.prepare import find_tokenizer
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.posttraining import rollout
from deepseek_jax.posttraining.distill_logits import OTHER_TOKENS, TEACHER, load_teacher, teacher_of
from deepseek_jax.posttraining.distill_on_policy import check_on_policy, on_policy_loss
from deepseek_jax.posttraining.reward_model import RewardModel, reward_config
from deepseek_jax.posttraining.tasks import Task, find_task
from deepseek_jax.posttraining.update import policy_loss, view
from deepseek_jax.serving.engine import check_servable
from deepseek_jax.training.base import check_tokenizer
from deepseek_jax.training.loop import Pending, Run, check_run, closing
from deepseek_jax.training.step import fresh_state
from deepseek_jax.training.types import Metrics
from deepseek_jax.workdir import alone_in, claim_workdir


def reinforce(config: Config, workdir: str) -> bool:
    """Trains to config.train.steps, resuming the run in the work directory. False: a signal ended it early.

    Raises:
      ConfigError: a config without a start or a task, another config's work directory, a mesh that does not fit.
      DivergedError: a loss that is not finite.
      CheckpointError: a checkpoint that could not be written.
    """
    check_reinforce(config)
    check_servable(config.model)
    task = find_task(config.rollout.task, config.rollout.size)
    runner = check_run(config, workdir)
    if config.rollout.reward_model is not None:  # before anything is written
        reward_config(config)
    if config.distill.from_ is not None:
        teacher_of(config)
    with alone_in(workdir):
        tokenizer = find_tokenizer(config, workdir, [])
        claim_workdir(config, workdir)
        with closing(ReinforceRun(config, workdir, task, tokenizer, runner)) as run:
            return run.go()


def check_reinforce(config: Config) -> None:
    """Raises ConfigError for settings that reinforcement learning does not support."""
    train, answers = config.train, config.rollout
    if config.init.from_ is None:
        raise ConfigError("reinforcement learning starts from the weights of a run; add --config.init.from=RUN.")
    if config.init.step is not None:
        raise ConfigError(f"init.from={config.init.from_} branches a run that trained on documents; take "
                          f"init.from={config.init.folder}.")
    if config.preference.objective is not None:
        raise ConfigError(f"preference.objective={config.preference.objective!r} is for deepseek_jax.train; take None.")
    if config.distill.from_ is not None:
        check_on_policy(config)
    if jax.process_count() > 1:
        raise ConfigError("reinforcement learning runs in one process; start it on one machine, without "
                          "jax.distributed.")
    if config.mesh.pipe > 1:
        raise ConfigError(f"mesh.pipe={config.mesh.pipe}: pipelines train next tokens alone; take mesh.pipe=1.")
    if config.mesh.parts > 1:
        raise ConfigError(f"{config.mesh.parts_key}={config.mesh.parts}: next tokens alone are trained on parts of "
                          f"sequences; take {config.mesh.parts_key}=1.")
    if config.model.index_warmup:
        raise ConfigError("model.index_warmup=True trains the indexer alone, by a loss that rewards do not have; take "
                          "--config.model.index_warmup=False.")
    if config.optimizer.qk_clip is not None:
        raise ConfigError(f"optimizer.qk_clip={config.optimizer.qk_clip:g} is for pre-training and fine-tuning, and "
                          "rewards measure no logits; take --config.optimizer.qk_clip=None.")
    if answers.group_size < 2 or train.batch_size % answers.group_size:
        fits = [g for g in range(2, train.batch_size + 1) if train.batch_size % g == 0]
        raise ConfigError(f"rollout.group_size={answers.group_size} must be at least 2 and divide train.batch_size="
                          f"{train.batch_size}, which counts answers; take one of {fits}.")
    if answers.reward == "majority" and answers.group_size < 3:
        raise ConfigError("rollout.reward='majority' needs groups of three or more: two answers agree, or tie.")
    if train.ramp_from is not None:
        raise ConfigError("train.ramp_from is for pre-training; take None: all rollouts have one size.")
    for name in ("steps", "checkpoint_every"):
        if getattr(train, name) % config.grpo.updates:
            raise ConfigError(f"train.{name}={getattr(train, name)} must be a multiple of grpo.updates="
                              f"{config.grpo.updates}: a run stops and saves between rollouts.")
    if answers.replay_routes and config.model.router != GROUP_LIMITED:
        raise ConfigError(f"model.router={config.model.router!r} cannot replay routes; take "
                          "--config.rollout.replay_routes=False.")


class ReinforceRun(Run):
    """A run whose batches are answers of its own policy."""

    loss = staticmethod(policy_loss)
    name = "reinforce"

    def __init__(self, config: Config, workdir: str, task: Task, tokenizer: Tokenizer, runner: Runner):
        self.task, self.tokenizer = task, tokenizer
        self.reward = rollout.votes(config.rollout.group_size) if config.rollout.reward == "majority" else None
        if config.distill.from_ is not None:
            self.teacher = teacher_of(config)
            check_tokenizer(config.distill.from_, tokenizer, TEACHER, OTHER_TOKENS)
            self.loss = functools.partial(on_policy_loss, self.teacher)
        super().__init__(config, workdir, None, runner)
        self.conventions = without_template(workdir, tokenizer)
        self.together = config.grpo.updates
        seen = runner.jit(functools.partial(view, config))
        self.view = lambda variables, micro: jax.device_get(
            seen(variables["params"], variables["router"], runner.shard_batch(micro), self.frozen_params))
        self.start = self._start_variables() if config.grpo.kl_weight else None
        self.measured: dict[int, dict[str, float]] = {}  # metrics of rollouts, by the first step that used them
        self.faults: dict[int, str] = {}

    def find_reference(self, known: Base | None) -> tuple[dict[str, Any] | None, Base | None]:
        """The teacher, or the identity of the reward model."""
        if self.config.distill.from_ is not None:
            return load_teacher(self.teacher, self.runner, known)
        if self.config.rollout.reward_model is None:
            return None, None
        self.reward = RewardModel(self.config, self.runner, self.tokenizer, known)
        return None, self.reward.base

    def _start_variables(self) -> dict[str, Any]:
        """The reference of the KL term: the weights that the run started from; with adapters, the base itself."""
        if self.frozen is not None:
            return {"params": jax.tree.map(jnp.zeros_like, self.state.params), "router": self.frozen["router"]}
        fresh = jax.eval_shape(fresh_state(self.config))
        abstract = self.runner.with_shardings({"params": fresh.params, "router": fresh.router})
        return restore_weights(str(self.config.init.folder), abstract)[0]

    def batches(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Draws a rollout when its first step is requested, which is after the previous step has been taken."""
        for first in range(self.step, self.config.train.steps, self.together):
            with self.watching.stall.suspended():
                batch = self._rollout(first)
            for step in range(first, first + self.together):
                yield step, batch

    def _rollout(self, step: int) -> dict[str, np.ndarray]:
        config = self.config
        groups = config.train.batch_size // config.rollout.group_size
        drawn = rollout.draw_problems(config, self.task, self.tokenizer, rollout.TRAINING, step, groups,
                                      self.conventions)
        problems = [problem for problem in drawn for _ in range(config.rollout.group_size)]
        answers = rollout.answer(config, self.sample_variables(), self.task, self.tokenizer, problems, step,
                                 self.conventions, self.reward)
        batch = rollout.batch_of(config, answers)
        views = [self.view({"params": self.state.params, "router": self.state.router}, micro)
                 for micro in _micro_batches(batch)]
        chosen = None if views[0].chosen_LBTK is None else np.stack([v.chosen_LBTK for v in views])
        self.measured[step + 1] = rollout.measures(config, answers) | rollout.disagreement(
            batch, np.stack([v.logprob_BT for v in views]), chosen)
        if answers.faults:
            self.faults[step + 1] = ", ".join(f"{n} x {kind}" for kind, n in sorted(answers.faults.items()))
        if self.start is not None:
            reference_MBT = np.stack([self.view(self.start, micro).logprob_BT for micro in _micro_batches(batch)])
            batch["reference"] = np.pad(reference_MBT, ((0, 0), (0, 0), (1, 0)))
        if not config.rollout.replay_routes:
            batch.pop("routes", None)
        return batch

    def row(self, pending: Pending, metrics: Metrics, tokens_per_second: float) -> dict[str, float]:
        """The row of training, with the metrics of the rollout and the objective."""
        row = super().row(pending, metrics, tokens_per_second)
        row.pop("mtp_loss", None)  # not trained here
        return row | self.measured.pop(pending.step, {})

    def words(self, row: dict[str, float]) -> str:
        """The part of a row that the progress bar shows."""
        if "reward" not in row:
            return f"loss {row['loss']:.3f}"
        return f"reward {row['reward']:.3f}, {row['answer_tokens']:.1f} tokens, MaxVio {row['max_vio']:.2f}"

    def _record(self, pending: Pending, bar):
        super()._record(pending, bar)
        if found := self.faults.pop(pending.step, None):
            self._say(bar, f"step {pending.step}: answers without a reward, counted as 0: {found}")

    def _steps(self, bar) -> bool:
        if self.step == 0:
            with self.watching.stall.suspended():
                self._evaluate(bar)
        return super()._steps(bar)

    def _evaluate(self, bar):
        """Scores greedy answers to a fixed set of problems by the task's rule, whatever the training reward is."""
        config = self.config
        count = max(1, config.train.eval_batches) * config.train.batch_size
        problems = rollout.draw_problems(config, self.task, self.tokenizer, rollout.EVALUATION, 0, count,
                                         self.conventions)
        answers = rollout.answer(config, self.sample_variables(), self.task, self.tokenizer, problems,
                                 conventions=self.conventions)
        reward = float(np.mean(answers.rewards))
        if self.writer:
            self.writer.write(self.step, eval_reward=reward, eval_faults=sum(answers.faults.values()))
        self._say(bar, f"step {self.step}: reward {reward:.3f} of the likeliest answers to {count} held-out problems")


def _micro_batches(batch):
    """The inputs of `view` for each micro-batch."""
    return [{name: batch[name][m] for name in ("tokens", "weights", "segment_ids")}
            for m in range(int(batch["active"]))]
