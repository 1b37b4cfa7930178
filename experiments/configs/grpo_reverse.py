"""The config `grpo_reverse` of the package: deepseek_jax/configs/grpo_reverse.py."""

from deepseek_jax.configs.grpo_reverse import get_config

__all__ = ["get_config"]
