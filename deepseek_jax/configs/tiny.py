"""DeepSeek-V3, complete but small: MLA, 32 fine-grained experts with loss-free balancing, MTP. Learns Python's library.

    make train        or        python -m deepseek_jax.train --config tiny --workdir run
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("tiny")
    config.data.validation_fraction = 0.15  # some 80 files: fewer would have too few kinds of text, and unusual loads
    config.train.steps = 360
    config.train.batch_size = 16
    config.train.sequence_length = 256
    config.train.eval_every = 100
    config.train.eval_batches = 6
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup = 0.05
    config.optimizer.constant_until = 0.4
    config.balance.bias_speed = 0.005  # 0.001 could move a bias by only 0.4 in a run of this length
    return config
