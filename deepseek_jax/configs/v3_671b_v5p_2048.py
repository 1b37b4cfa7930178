"""DeepSeek-V3 on 2,048 chips of TPU v5p, a slice of 8x16x16, in bfloat16: 53.2 of 95 GB a device.

The program of `compile --model v3_671b --target v5p:8x16x16 --pipe 16 --expert 64 --remat full --deferred 0`: the run
of v3_671b_h100_2048 without FP8, which these chips don't have, and with all activations recomputed. Its batch
ramp was not compiled.

    python -m deepseek_jax.train --config v3_671b_v5p_2048 --workdir gs://BUCKET/RUN
"""

from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.configs import v3_671b_h100_2048


def get_config() -> ConfigDict:
    config: Any = v3_671b_h100_2048.get_config()
    config.fp8.enabled = False
    config.mesh.dispatch_fp8 = False
    config.model.remat = "full"
    return config
