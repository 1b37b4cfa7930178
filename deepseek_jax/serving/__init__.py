"""Generation from trained or converted models."""

from deepseek_jax.serving.generation import Generation, generate

__all__ = ["Generation", "generate"]
