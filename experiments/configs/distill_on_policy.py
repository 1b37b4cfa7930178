"""The config `distill_on_policy` of the package: deepseek_jax/configs/distill_on_policy.py."""

from deepseek_jax.configs.distill_on_policy import get_config

__all__ = ["get_config"]
