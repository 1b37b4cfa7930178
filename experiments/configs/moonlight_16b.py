"""The config `moonlight_16b` of the package: deepseek_jax/configs/moonlight_16b.py."""

from deepseek_jax.configs.moonlight_16b import get_config

__all__ = ["get_config"]
