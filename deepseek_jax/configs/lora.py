"""Supervised fine-tuning like `sft`, of low-rank adapters instead of the weights: the base is not changed.

    python -m deepseek_jax.train --config lora --workdir adapted --config.init.from=run \
        --config.data.sources="(('chats.jsonl', 1.0),)" --config.train.steps=200
    python -m deepseek_jax.convert to-hf adapted exported --merge

Rows of chats.jsonl: as for `sft`. The work directory holds only the adapters: keep `run`.
"""

from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.configs import sft


def get_config() -> ConfigDict:
    config: Any = sft.get_config()
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 2e-4  # adapters begin at 0 and are small: far above the rate of full weights
    return config
