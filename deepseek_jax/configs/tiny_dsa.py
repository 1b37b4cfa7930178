"""`tiny` with the sparse attention of DeepSeek-V3.2: a token attends to 64 others, which an indexer chooses.

    python -m deepseek_jax.train --config tiny_dsa --workdir run

To continue a run of `tiny`, as V3.2 did from V3.1, train first the indexer alone, then everything
(docs/sparse_attention.md).
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("tiny_dsa")
    config.data.validation_fraction = 0.15
    config.train.steps = 360
    config.train.batch_size = 16
    config.train.sequence_length = 256
    config.train.eval_every = 100
    config.train.eval_batches = 6
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup = 0.05
    config.optimizer.constant_until = 0.4
    config.balance.bias_speed = 0.005
    return config
