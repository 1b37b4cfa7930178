"""The config `reward` of the package: deepseek_jax/configs/reward.py."""

from deepseek_jax.configs.reward import get_config

__all__ = ["get_config"]
