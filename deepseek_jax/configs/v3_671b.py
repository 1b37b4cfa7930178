"""DeepSeek-V3 itself, as the report trained it (section 4.2): 14.8T tokens in about 240,000 steps.

Without a cluster it can be traced (`jax.eval_shape`), but not run.

    python -m deepseek_jax.train --config v3_671b --workdir DIR
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("v3_671b")
    config.train.steps = 240_000
    config.train.sequence_length = 4096
    config.train.batch_size = 15360
    config.train.accumulation_steps = 120  # of 128 sequences: one for each data-parallel rank of the report
    config.train.ramp_from = 3072
    config.train.ramp_until = 0.052  # 469B tokens
    config.train.eval_every = 1000
    config.train.checkpoint_every = 500
    config.train.ema_decay = 0.999
    config.optimizer.moment_dtype = "bfloat16"
    config.optimizer.warmup = 2000 / 240_000
    return config
