"""Generation from trained or converted models."""

from deepseek_jax.serving.engine import Request
from deepseek_jax.serving.generation import Generation, generate, run_requests

__all__ = ["Generation", "Request", "generate", "run_requests"]
