"""GLM-4.7-Flash, 30B-A3B: the architecture of V3 with wider heads, 64 experts (top 4), and an MTP module.

Meant for fine-tuning its published checkpoint, which `convert from-hf` turns into a work directory (`init.from`).
Without accelerators it can be traced (`jax.eval_shape`), but not run.

    python -m deepseek_jax.train --config glm_4_7_flash --workdir DIR --config.init.from=CONVERTED
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("glm_4_7_flash")
    config.train.steps = 1000
    config.train.sequence_length = 4096
    config.train.batch_size = 64
    config.train.accumulation_steps = 8
    config.optimizer.learning_rate = 1e-5
    return config
