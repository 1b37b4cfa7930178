"""The config `sft` of the package: deepseek_jax/configs/sft.py."""

from deepseek_jax.configs.sft import get_config

__all__ = ["get_config"]
