"""The config `lora` of the package: deepseek_jax/configs/lora.py."""

from deepseek_jax.configs.lora import get_config

__all__ = ["get_config"]
