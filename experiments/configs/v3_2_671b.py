"""The config `v3_2_671b` of the package: deepseek_jax/configs/v3_2_671b.py."""

from deepseek_jax.configs.v3_2_671b import get_config

__all__ = ["get_config"]
