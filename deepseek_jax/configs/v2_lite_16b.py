"""DeepSeek-V2-Lite, 16B: softmax routing balanced by the auxiliary loss, no query latent, no MTP.

Without accelerators it can be traced (`jax.eval_shape`), but not run.

    python -m deepseek_jax.train --config v2_lite_16b --workdir DIR
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("v2_lite_16b")
    config.train.steps = 300_000
    config.train.sequence_length = 4096
    config.train.batch_size = 4608
    config.train.accumulation_steps = 36
    config.optimizer.learning_rate = 4.2e-4
    config.balance.sequence_loss_weight = 1e-3
    return config
