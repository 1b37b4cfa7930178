"""The config `v2_lite_16b` of the package: deepseek_jax/configs/v2_lite_16b.py."""

from deepseek_jax.configs.v2_lite_16b import get_config

__all__ = ["get_config"]
