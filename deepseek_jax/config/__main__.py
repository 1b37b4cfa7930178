"""Prints the reference page of all config keys, Markdown."""

from deepseek_jax.config.reference import page

print(page(), end="")
