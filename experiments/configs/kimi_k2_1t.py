"""The config `kimi_k2_1t` of the package: deepseek_jax/configs/kimi_k2_1t.py."""

from deepseek_jax.configs.kimi_k2_1t import get_config

__all__ = ["get_config"]
