"""The config `tiny_dsa` of the package: deepseek_jax/configs/tiny_dsa.py."""

from deepseek_jax.configs.tiny_dsa import get_config

__all__ = ["get_config"]
