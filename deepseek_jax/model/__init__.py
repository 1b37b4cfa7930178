"""The network: Flax linen modules around pure functions, one idea per file."""

from deepseek_jax.model.transformer import BlockParts, DeepSeekV3
from deepseek_jax.model.types import Output

__all__ = ["BlockParts", "DeepSeekV3", "Output"]
