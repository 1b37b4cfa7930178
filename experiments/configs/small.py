"""The config `small` of the package: deepseek_jax/configs/small.py."""

from deepseek_jax.configs.small import get_config

__all__ = ["get_config"]
