"""The config `v2_lite_16b_h100_8` of the package: deepseek_jax/configs/v2_lite_16b_h100_8.py."""

from deepseek_jax.configs.v2_lite_16b_h100_8 import get_config

__all__ = ["get_config"]
