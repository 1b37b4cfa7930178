"""Moonlight-16B-A3B: the architecture of V3 at 16B, without a query latent, groups of experts or MTP.

Meant for fine-tuning its published checkpoint, which `convert from-hf` turns into a work directory (`init.from`).
Without accelerators it can be traced (`jax.eval_shape`), but not run.

    python -m deepseek_jax.train --config moonlight_16b --workdir DIR --config.init.from=CONVERTED
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("moonlight_16b")
    config.train.steps = 1000
    config.train.sequence_length = 4096
    config.train.batch_size = 64
    config.train.accumulation_steps = 8
    config.optimizer.learning_rate = 1e-5
    return config
