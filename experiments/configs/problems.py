"""The config `problems` of the package: deepseek_jax/configs/problems.py."""

from deepseek_jax.configs.problems import get_config

__all__ = ["get_config"]
