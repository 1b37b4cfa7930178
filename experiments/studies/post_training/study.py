"""From pre-training to reinforcement learning on a task that a rule checks (report sections 5.1 and 5.2)."""

import pathlib

import numpy as np

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.post_training.measure import PostTraining

RL = {"kind": "reinforced"}
# Half the width: a quarter of the weights of the other arms, except for the embeddings.
SMALL = {"model.d_model": 64, "model.q_rank": 24, "model.kv_rank": 16, "model.num_heads": 2,
         "model.dense_ffn_dim": 128, "model.expert_ffn_dim": 32}
ARMS = {
    "pre-trained": {"kind": "pretrained"},
    "fine-tuned": {"kind": "tuned"},
    "GRPO": RL,
    "fine-tuned, GRPO": RL,
    "KL 0.04": {**RL, "grpo.kl_weight": 0.04},
    "groups of 4": {**RL, "rollout.group_size": 4},
    "groups of 16": {**RL, "rollout.group_size": 16},
    "biases move": {**RL, "balance.bias_speed": 0.005},
    "bfloat16": {**RL, "model.dtype": "bfloat16"},
    "bfloat16, no replay": {**RL, "model.dtype": "bfloat16", "rollout.replay_routes": False},
    "FP8 rollouts": {**RL, "rollout.fp8": True},
    "FP8 rollouts, no replay": {**RL, "rollout.fp8": True, "rollout.replay_routes": False},
    "adapters": {**RL, "lora.rank": 16, "lora.alpha": 32.0, "optimizer.learning_rate": 3e-3},
    "small": {"kind": "pretrained", **SMALL},
    "small, GRPO": {**RL, **SMALL},
    "small, distilled": {"kind": "distilled", **SMALL},
}
BEGUN = {"fine-tuned, GRPO": "fine-tuned", "small, GRPO": "small", "small, distilled": "GRPO"}
AFTER = {arm: BEGUN.get(arm, "pre-trained") for arm in ARMS if arm not in ("pre-trained", "small")}
SHARES = ("pre-trained", "fine-tuned", "GRPO", "fine-tuned, GRPO", "small", "small, GRPO", "small, distilled")
VARIANTS = [arm for arm in ARMS if arm not in SHARES]
RISING = ("GRPO", "groups of 4", "groups of 16", "FP8 rollouts", "adapters")  # the other curves cover that of GRPO


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    arms = results["arms"]
    made, (final, rising, apart) = plots.figure(5.2, 3, gridspec_kw={"width_ratios": [1, 1.1, 1]})
    first = {arm: arms[arm] for arm in SHARES if arm in arms}
    plots.intervals(final, {"arms": first}, "reward")
    final.set_xlim(-0.02, 1.02)
    plots.finish(final, "Right answers: right is better", "share, at temperature 1")
    for colour, arm in zip(plots.PALETTE, RISING):
        if arm in arms:
            reward = arms[arm]["curves"]["reward"]
            rising.plot(np.arange(1, len(reward) + 1), reward, color=colour, label=arm, linewidth=1.4)
    rising.set_ylim(-0.02, 1.02)
    plots.legend(rising, loc="lower right")
    plots.finish(rising, "While GRPO trains: up is better", "step", "mean of the step's answers")
    pairs = [*((arm, "GRPO") for arm in VARIANTS), ("groups of 16", "groups of 4")]
    plots.differences(apart, results, "mean_reward", pairs)
    plots.finish(apart, "Mean reward of 30 steps", "share, paired (right: better)")
    plots.save(made, folder / "post_training.png", f"{plots.INTERVALS} Bars that end at the frame go on.")


STUDY = Study(
    name="post_training",
    arms=ARMS,
    measure=PostTraining(after=AFTER, students={"small, distilled": "small"}),
    draw=draw,
    quick_arms=("pre-trained", "GRPO"),
    quick_seeds=(0,),
    claims=(
        Claim("Before reinforcement learning at most a tenth of the answers is right.", "reward", "pre-trained", 0.1,
              "lower"),
        Claim("Reinforcement learning helps it.", "reward", "GRPO", "pre-trained", "higher"),
        Claim("Afterwards at least seven of ten are.", "reward", "GRPO", 0.7, "higher"),
        Claim("Fine-tuning on 1,000 right answers helps.", "reward", "fine-tuned", "pre-trained", "higher"),
        Claim("Reinforcement learning after it helps more.", "reward", "fine-tuned, GRPO", "fine-tuned", "higher"),
        Claim("A KL term to the start slows learning down.", "mean_reward", "KL 0.04", "GRPO", "lower"),
        Claim("Groups of 16 learn faster than groups of 4, from as many answers.", "mean_reward", "groups of 16",
              "groups of 4", "higher"),
        Claim("Biases that move slow it down.", "mean_reward", "biases move", "GRPO", "lower"),
        Claim("In bfloat16, replaying the sampler's routes learns faster.", "mean_reward",
              "bfloat16", "bfloat16, no replay", "higher"),
        Claim("With answers drawn in FP8, replaying the sampler's routes learns faster.", "mean_reward",
              "FP8 rollouts", "FP8 rollouts, no replay", "higher"),
        Claim("Answers drawn in FP8 teach less.", "mean_reward", "FP8 rollouts", "GRPO", "lower"),
        Claim("Adapters alone get seven of ten right as well.", "reward", "adapters", 0.7, "higher"),
        Claim("A small model learns more from a large one's answers than from its own rewards.", "reward",
              "small, distilled", "small, GRPO", "higher"),
    ))
