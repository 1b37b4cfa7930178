"""A whole DeepSeek-V3, small: MLA, 32 fine-grained experts with loss-free balancing, MTP, on the Python library's source.

    make train        or        python -m deepseek_jax.train --config experiments/configs/tiny.py --workdir run
"""

from deepseek_jax.config import default_config


def get_config():
    config = default_config("tiny")
    config.train.steps = 600
    config.train.batch_size = 8
    config.train.sequence_length = 512
    config.train.eval_batches = 8
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup = 0.05
    config.optimizer.constant_until = 0.5
    config.balance.bias_speed = 0.005
    return config
