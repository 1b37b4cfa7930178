"""The config `v2_236b` of the package: deepseek_jax/configs/v2_236b.py."""

from deepseek_jax.configs.v2_236b import get_config

__all__ = ["get_config"]
