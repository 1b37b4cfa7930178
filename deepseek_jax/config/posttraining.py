"""After pre-training: adapters; a teacher; preference pairs; reinforcement learning, its answers and its objective."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from deepseek_jax.config.schema import FRACTION, NOT_NEGATIVE, POSITIVE, Checked, ConfigError, usable_path


@dataclasses.dataclass(frozen=True)
class LoraConfig(Checked, section="lora"):
    """Low-rank adapters (arXiv 2106.09685), which are trained instead of the weights of init.from."""

    rank: Annotated[int | None, POSITIVE, "of the adapters; None: all parameters are trained"] = None
    alpha: Annotated[float, POSITIVE, "their product is multiplied by alpha / rank"] = 16.0
    targets: Annotated[Literal["attention", "experts", "all"],
                       "weights that get adapters; experts: every feed-forward network, dense, shared and routed; "
                       "router, embedding, head and norms get none"] = "all"
    fp8: Annotated[bool, "keep the frozen base in E4M3, in blocks of 128 x 128 as published checkpoints do; products "
                         "dequantize it"] = False

    @property
    def scale(self) -> float:
        """The factor on the product of the adapters."""
        assert self.rank is not None
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class DistillConfig(Checked, section="distill"):
    """A teacher whose distribution is learned in addition to the tokens of data.sources (docs/posttraining.md)."""

    from_: Annotated[str | None, "the work directory of the teacher, with the same tokenizer; None: no teacher"] = None
    weight: Annotated[float, FRACTION, "of KL(teacher || student); the cross-entropy has 1 - weight"] = 0.5
    temperature: Annotated[float, POSITIVE, "that softens both before they are compared"] = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.from_ == "":
            raise ConfigError("distill.from names no teacher; add --config.distill.from=RUN.")
        if self.from_ is not None:  # a shell does not expand the ~ in --config.distill.from=~/run
            object.__setattr__(self, "from_", usable_path("distill.from", self.from_))


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(Checked, section="preference"):
    """Training on pairs of answers, one of which is preferred, instead of on next tokens (docs/posttraining.md)."""

    objective: Annotated[Literal["dpo", "reward"] | None,
                         "dpo: direct preference optimization (arXiv 2305.18290); reward: a reward model, which scores "
                         "answers (Bradley-Terry); None: next tokens"] = None
    beta: Annotated[float, POSITIVE, "of dpo: factor on the log-ratio to init.from, which is the reward"] = 0.1


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Checked, section="rollout"):
    """Prompts and answers of deepseek_jax.reinforce (docs/posttraining.md).

    Answers are drawn at temperature 1, so that their log-probabilities are those of the policy.
    """

    task: Annotated[str, "reverse, sort, addition, countdown, reasoning_gym:NAME, or your own as "
                         "package.module:NAME"] = "reverse"
    size: Annotated[int, POSITIVE, "number of letters, words, digits or numbers in a problem"] = 4
    reward: Annotated[str, "task: the task's own rule; majority: the group's most common answer; model:RUN: a reward "
                              "model"] = "task"
    group_size: Annotated[int, POSITIVE, "answers to each prompt; train.batch_size counts answers"] = 8
    max_new_tokens: Annotated[int, POSITIVE, "of an answer"] = 32
    draft: Annotated[bool, "the MTP modules, if the model has them, draft tokens"] = True
    replay_routes: Annotated[bool, "training uses the experts that were chosen while sampling"] = True
    fp8: Annotated[bool, "draws the answers for training with weights and a cache in FP8, as a server might"] = False

    def __post_init__(self):
        super().__post_init__()
        if self.reward not in ("task", "majority") and not self.reward_model:
            raise ConfigError(f"rollout.reward={self.reward!r} is unknown; take 'task', 'majority' or 'model:RUN'.")

    @property
    def reward_model(self) -> str | None:
        """The work directory of the reward model in rollout.reward; None: it is not a reward model."""
        kind, _, folder = self.reward.partition(":")
        return usable_path("rollout.reward", folder) if kind == "model" and folder else None


@dataclasses.dataclass(frozen=True)
class GrpoConfig(Checked, section="grpo"):
    """The objective of deepseek_jax.reinforce: group relative policy optimization (arXiv 2402.03300)."""

    updates: Annotated[int, POSITIVE, "optimizer steps on each batch of answers"] = 1
    clip_low: Annotated[float, POSITIVE, "ratios below 1 - clip_low are clipped"] = 0.2
    clip_high: Annotated[float, POSITIVE, "ratios above 1 + clip_high are clipped; DAPO: 0.28"] = 0.2
    advantage: Annotated[Literal["std", "mean"], "std: deviation from the group's mean in standard deviations; mean: "
                                                 "not divided, as in Dr. GRPO"] = "std"
    mean: Annotated[Literal["sequence", "token"], "sequence: mean over the tokens of an answer, then over answers; "
                                                  "token: over all tokens of the batch, as in DAPO"] = "sequence"
    kl_weight: Annotated[float, NOT_NEGATIVE, "beta of the KL divergence from the weights of init.from"] = 0.0
