"""The config `tiny` of the package: deepseek_jax/configs/tiny.py."""

from deepseek_jax.configs.tiny import get_config

__all__ = ["get_config"]
