"""The config `gigachat3_10b` of the package: deepseek_jax/configs/gigachat3_10b.py."""

from deepseek_jax.configs.gigachat3_10b import get_config

__all__ = ["get_config"]
