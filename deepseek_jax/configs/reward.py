"""A reward model trained on preference pairs, starting from the run of init.from; `reinforce` can then use it.

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
    config.optimizer.learning_rate = 1e-5  # a new head needs a high rate; a small model an even higher one
    return config
