"""Arithmetic in 64 bits, also for jax before 0.8, which lacks the newest API for it."""

import contextlib

import jax
from jax import experimental


def float64() -> contextlib.AbstractContextManager[None]:
    """Within the `with` block, arrays keep 64 bits."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else experimental.enable_x64()
