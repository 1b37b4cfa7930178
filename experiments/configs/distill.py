"""The config `distill` of the package: deepseek_jax/configs/distill.py."""

from deepseek_jax.configs.distill import get_config

__all__ = ["get_config"]
