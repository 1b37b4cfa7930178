"""DeepSeek-V2-Lite, 16B, on one machine of eight H100s, in bfloat16: all parameters are trained.

The program of `compile --model v2_lite_16b --target h100:8 --expert 8 --sequences 512 --capacity 1.5`. A step has 512
sequences, a ninth of the paper's 4,608, and so a third of its learning rate, by the square-root rule; moments
are bfloat16.

    python -m deepseek_jax.train --config v2_lite_16b_h100_8 --workdir DIR
"""

from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.configs import v2_lite_16b


def get_config() -> ConfigDict:
    config: Any = v2_lite_16b.get_config()
    config.mesh.update(dict(local=8, buffers="ragged", capacity=1.5))
    config.train.batch_size = 512
    config.train.accumulation_steps = 64
    config.train.eval_batches = 64
    config.optimizer.learning_rate = 1.4e-4
    config.optimizer.moment_dtype = "bfloat16"
    return config
