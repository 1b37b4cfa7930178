"""Reward models (report section 5.2.1): a number for a prompt and its answer, learned from preference pairs.

    reward(answer) = w . hidden state at the answer's last token
    loss = -log sigmoid(reward(chosen) - reward(rejected))          the Bradley-Terry model; log 2 at the start, w = 0

Only differences of rewards are determined: adding a constant to all answers of a prompt changes no loss.
`deepseek_jax.reinforce` can then use the run's folder as its reward; it passes the policy's sampled tokens unchanged.
"""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.adapters import Base
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model.layers import wide
from deepseek_jax.model.types import Output
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.posttraining.rewards import Scores
from deepseek_jax.posttraining.rollout import drawn
from deepseek_jax.serving.sequence import Sequence
from deepseek_jax.training.base import check_tokenizer, load_reference, main_model, read_as
from deepseek_jax.training.step import of_rows, run_model

NAME = "the reward model rollout.reward"  # in messages


def last_of(weights_BT: jax.Array) -> jax.Array:
    """bool [B, T]: True at the last token of each row whose weight is not 0; all False in a row without one."""
    counted_BT = weights_BT != 0
    from_here_BT = jnp.cumsum(counted_BT[:, ::-1], axis=1)[:, ::-1]
    return counted_BT & (from_here_BT == 1)


def rewards_at(hidden_BTD: jax.Array, head_D: jax.Array, last_BT: jax.Array) -> jax.Array:
    """[B]: head . hidden at the one token of each row where `last_BT` is True, float32 (float64 where hidden is).

    No gradient flows to other tokens, whatever their values; a row without such a token has 0.
    """
    hidden_BD = jnp.where(last_BT[..., None], hidden_BTD, 0).sum(axis=1)
    return hidden_BD.astype(wide(hidden_BTD.dtype)) @ head_D


def row_rewards(config: Config, params: dict[str, Any], router: dict[str, jax.Array], micro: dict[str, jax.Array],
                step: jax.Array | None = None) -> tuple[jax.Array, Output]:
    """The rewards [rows] of one micro-batch, and the model's output.

    micro: tokens, weights (not 0 for answers) and segment_ids, [rows, T + 1]; answers end before the last column, which
    the model does not read.
    """
    output = run_model(config, params, router, of_rows(config, micro), step=step)
    return rewards_at(output.hidden_BTD, params["reward_head"], last_of(micro["weights"][:, :-1])), output


def reward_config(config: Config) -> Config:
    """The config for running the reward model of rollout.reward here: its own model, without FP8.

    Raises ConfigError for a run that is not a reward model, or that has another vocabulary.
    """
    folder = str(config.rollout.reward_model)
    own = read_as(config, folder, NAME, "the policy")
    if own.preference.objective != "reward":
        raise ConfigError(f"rollout.reward=model:{folder} is no reward model; train one with python -m "
                          "deepseek_jax.train --config reward.")
    return own


class RewardModel:
    """The reward model of rollout.reward, frozen. base: the identity of its checkpoint."""

    def __init__(self, config: Config, runner: Runner, tokenizer: Tokenizer, known: Base | None):
        """known: the checkpoint used by the run so far. Raises ConfigError if it has changed, or has another
        tokenizer."""
        folder, self.rows = str(config.rollout.reward_model), runner.rows
        check_tokenizer(folder, tokenizer, NAME, "the policy; train it from a run of the policy's tokenizer")
        own = reward_config(config)
        self.variables, self.base = load_reference(own, runner, folder, known, "the reward model, rollout.reward")
        self.length = config.train.sequence_length + 2  # of a row: one more than the longest answer with its prompt
        score = runner.jit(lambda variables, micro: row_rewards(
            main_model(own), variables["params"], variables["router"], micro)[0])
        self.score = lambda micro: np.asarray(score(self.variables, runner.shard_batch(micro)))

    def __call__(self, sequences: list[Sequence], texts: list[str]) -> Scores:
        """The reward of each answer, read at its last token. A reward that is not finite is a fault, with reward 0."""
        parts = [self.score(self._rows(sequences[at:at + self.rows])) for at in range(0, len(sequences), self.rows)]
        rewards_B: Any = np.concatenate(parts)[:len(sequences)]
        bad_B = ~np.isfinite(rewards_B) | np.array([not drawn(sequence) for sequence in sequences])
        faults = collections.Counter({"no finite number": int(bad_B.sum())} if bad_B.any() else {})
        return Scores(np.where(bad_B, 0, rewards_B).tolist(), faults)

    def _rows(self, sequences) -> dict[str, np.ndarray]:
        shape = self.rows, self.length
        tokens_BT, weights_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for b, sequence in enumerate(sequences):
            first, made = len(sequence.request.prompt), [token.id for token in drawn(sequence)]
            tokens_BT[b] = np.resize([*sequence.request.prompt, *made], self.length)
            weights_BT[b, first:first + len(made)] = 1
        return {"tokens": tokens_BT, "weights": weights_BT, "segment_ids": np.ones(shape, np.int32)}
