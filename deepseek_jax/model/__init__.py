"""The network: Flax linen modules around pure functions, one idea a file."""

from deepseek_jax.model.transformer import DeepSeekV3, Output

__all__ = ["DeepSeekV3", "Output"]
