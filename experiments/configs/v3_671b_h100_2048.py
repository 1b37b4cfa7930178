"""The config `v3_671b_h100_2048` of the package: deepseek_jax/configs/v3_671b_h100_2048.py."""

from deepseek_jax.configs.v3_671b_h100_2048 import get_config

__all__ = ["get_config"]
