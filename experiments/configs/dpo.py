"""The config `dpo` of the package: deepseek_jax/configs/dpo.py."""

from deepseek_jax.configs.dpo import get_config

__all__ = ["get_config"]
