"""The config `glm_4_7_flash` of the package: deepseek_jax/configs/glm_4_7_flash.py."""

from deepseek_jax.configs.glm_4_7_flash import get_config

__all__ = ["get_config"]
