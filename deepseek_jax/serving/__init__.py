"""Generation from trained or converted models."""

from deepseek_jax.serving.decode import Generation, generate

__all__ = ["Generation", "generate"]
