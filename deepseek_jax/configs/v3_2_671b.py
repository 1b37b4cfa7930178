"""DeepSeek-V3.2: V3 whose attention reads 2,048 tokens, chosen by an indexer. Set for the V3.2 report's sparse stage.

Its weights come from a run whose indexer has warmed up (`model.index_warmup`, docs/sparse_attention.md). Without a
cluster it can be traced (`jax.eval_shape`), but not run.

    python -m deepseek_jax.train --config v3_2_671b --workdir DIR --config.init.from=WARMED_UP
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("v3_2_671b")
    config.train.steps = 15_000
    config.train.sequence_length = 128 * 1024
    config.train.batch_size = 480
    config.train.accumulation_steps = 4
    config.train.eval_every = 1000
    config.train.checkpoint_every = 500
    config.optimizer.learning_rate = 7.3e-6
    config.optimizer.warmup = 0.0
    config.optimizer.constant_until = 1.0
    config.optimizer.cosine_until = 1.0
    config.optimizer.tail_from = 1.0
    config.optimizer.moment_dtype = "bfloat16"
    return config
