"""DeepSeek-V2, 236B: softmax routing over 160 experts, restricted to 3 of 8 groups, no MTP.

Without accelerators it can be traced (`jax.eval_shape`), but not run.

    python -m deepseek_jax.train --config v2_236b --workdir DIR
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("v2_236b")
    config.train.steps = 300_000
    config.train.sequence_length = 4096
    config.train.batch_size = 9216
    config.train.accumulation_steps = 72
    config.optimizer.learning_rate = 2.4e-4
    config.balance.sequence_loss_weight = 1e-3
    return config
