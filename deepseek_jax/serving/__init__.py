"""Generation from trained or converted models. The names below are loaded when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_jax.serving.generation import Generation, generate, run_requests
    from deepseek_jax.serving.sequence import Request

__all__ = ["Generation", "Request", "generate", "run_requests"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'deepseek_jax.serving' has no attribute {name!r}")
    home = "sequence" if name == "Request" else "generation"
    return getattr(importlib.import_module(f"deepseek_jax.serving.{home}"), name)
