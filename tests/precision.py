"""Arithmetic in 64 bits, where jax's newest spelling of it is missing too (before 0.8)."""

import contextlib

import jax
from jax import experimental


def float64() -> contextlib.AbstractContextManager[None]:
    """Inside, arrays keep 64 bits."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else experimental.enable_x64()
