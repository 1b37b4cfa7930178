"""GigaChat3-10B-A1.8B (3 and 3.1): the smallest public model of V3's architecture that has an MTP module.

Meant for fine-tuning its published checkpoint, which `convert from-hf` turns into a work directory (`init.from`).
Without accelerators it can be traced (`jax.eval_shape`), but not run.

    python -m deepseek_jax.train --config gigachat3_10b --workdir DIR --config.init.from=CONVERTED
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("gigachat3_10b")
    config.train.steps = 1000
    config.train.sequence_length = 4096
    config.train.batch_size = 64
    config.train.accumulation_steps = 8
    config.optimizer.learning_rate = 1e-5
    return config
