"""Distillation by text (report section 5.1, arXiv 2501.12948): a teacher answers a task's prompts, the task's rule
rejects wrong answers, and a student is fine-tuned on the rest.

Every prompt gets several attempts at temperature 1; the first that ended by itself and was rewarded enough is kept. The
samples are a function of the teacher, the task and the seed. The student need not have the teacher's tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.chat.template import without_template
from deepseek_jax.config import RolloutConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.posttraining import rollout
from deepseek_jax.posttraining.tasks import Task
from deepseek_jax.serving.engine import check_servable
from deepseek_jax.workdir import load_run

TOGETHER = 64  # prompts per batch, each with its own random stream


class Asking(NamedTuple):
    """Settings of a teacher. attempts: per prompt. least: the reward that an answer needs."""

    attempts: int = 1
    max_new_tokens: int = 256
    least: float = 1.0
    seed: int = 0


class Answered(NamedTuple):
    """A prompt and the answer that was kept; None: none of the attempts was good enough."""

    prompt: str
    answer: str | None


def teacher_answers(workdir: str, task: Task, count: int, asking: Asking) -> Iterator[Answered]:
    """The answers of the run in a work directory to `count` problems of a task, in their order.

    Raises:
      ConfigError: there is no run, it cannot be served, or a prompt leaves no room for an answer.
    """
    run = load_run(workdir)
    check_servable(run.config.model)
    config = dataclasses.replace(
        run.config, rollout=RolloutConfig(max_new_tokens=asking.max_new_tokens, group_size=asking.attempts),
        train=dataclasses.replace(run.config.train, seed=asking.seed))
    tokenizer = Tokenizer.load(f"{workdir}/tokenizer.json", config.model.vocab_size)
    conventions = without_template(workdir, tokenizer)
    for number, first in enumerate(range(0, count, TOGETHER)):
        rng = np.random.default_rng([asking.seed, rollout.TRAINING, number])
        drawn = [task.draw(rng) for _ in range(min(TOGETHER, count - first))]
        problems = [rollout.problem_of(config, tokenizer, conventions, *problem) for problem in drawn
                    for _ in range(asking.attempts)]
        answers = rollout.answer(config, run.variables, task, tokenizer, problems, number, conventions)
        good = [reward >= asking.least and sequence.end is not None
                for reward, sequence in zip(answers.rewards, answers.sequences)]
        for i, (prompt, _) in enumerate(drawn):
            attempts = range(i * asking.attempts, (i + 1) * asking.attempts)
            kept = next((answers.texts[j] for j in attempts if good[j]), None)
            yield Answered(prompt, kept)
