"""A reward model of preference pairs, which begins as the run that init.from names; then a reward of `reinforce`.

    python -m deepseek_jax.train --config reward --workdir rewards --config.init.from=tuned \
        --config.data.sources="(('pairs.jsonl', 1.0),)" --config.train.steps=200
    python -m deepseek_jax.reinforce --config grpo_reverse --workdir rl --config.init.from=tuned \
        --config.rollout.reward=model:rewards

Rows of pairs.jsonl are those of config dpo.
"""

from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.configs import dpo


def get_config() -> ConfigDict:
    config: Any = dpo.get_config()
    config.preference.objective = "reward"
    config.optimizer.learning_rate = 1e-5  # a new head has far to go; a small model takes more
    return config
