"""A student learns its teacher's distribution on the student's own answers to a task's prompts; both share a tokenizer.

    python -m deepseek_jax.reinforce --config distill_on_policy --workdir student --config.init.from=run_reverse \
        --config.distill.from=rl
"""

from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.configs import grpo_reverse


def get_config() -> ConfigDict:
    config: Any = grpo_reverse.get_config()
    config.distill["from"] = ""  # to be named
    config.distill.weight = 1.0
    return config
