"""Import and export of Hugging Face checkpoints."""

from deepseek_jax.interop.load import dequantized, load_hf, save_hf

__all__ = ["dequantized", "load_hf", "save_hf"]
