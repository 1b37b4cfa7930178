"""DeepSeek-V3 in JAX: the model, its training and its serving, as the V3 technical report describes them.

The names below are loaded when they are first used: importing this package imports no jax. `deepseek_jax.train`,
`deepseek_jax.generate` and the like are the command modules; generation is `deepseek_jax.serving.generate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from deepseek_jax.config import Config, ConfigError, ModelConfig, default_config, load_config, model_config
    from deepseek_jax.interop import load_hf, save_hf
    from deepseek_jax.model import DeepSeekV3, Output
    from deepseek_jax.routing import Routing, routing_of
    from deepseek_jax.workdir import LoadedModel, load, load_run

__all__ = ["Config", "ConfigError", "DeepSeekV3", "LoadedModel", "ModelConfig", "Output", "Routing", "default_config",
           "load", "load_config", "load_hf", "load_run", "model_config", "routing_of", "save_hf"]

_HOMES = {
    "config": ("Config", "ConfigError", "ModelConfig", "default_config", "load_config", "model_config"),
    "interop": ("load_hf", "save_hf"),
    "model": ("DeepSeekV3", "Output"),
    "routing": ("Routing", "routing_of"),
    "workdir": ("LoadedModel", "load", "load_run"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"deepseek_jax.{home}"), name)
    raise AttributeError(f"module 'deepseek_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
