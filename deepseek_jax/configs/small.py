"""The shape for timing this project and its peers (make bench); trains in an hour or two on two CPU cores.

    python -m deepseek_jax.train --config small --workdir run_small
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("small")
    config.train.steps = 4000
    config.train.batch_size = 8
    config.train.sequence_length = 512
    config.train.eval_every = 500
    config.train.eval_batches = 12
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup = 0.02
    config.balance.bias_speed = 0.005
    return config
