"""The frozen base of low-rank adapters: read once, never trained and never saved.

Its weights are kept in the dtype that the model computes with and where a step computes with them: there is no master,
no moment and no gradient of them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from deepseek_jax.checkpoint.adapters import Base, identify, read_weights
from deepseek_jax.config import Config, LoraConfig
from deepseek_jax.model import lora
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.training.step import init_state


def frozen_shapes(config: Config) -> dict[str, Any]:
    """{"params", "router"} of the base, as shapes."""
    model = jax.eval_shape(functools.partial(init_state, dataclasses.replace(config, lora=LoraConfig())))

    def kept(keys, x):
        return jax.ShapeDtypeStruct(x.shape, lora.held(config.model, tuple(key.key for key in keys), x.dtype))

    return {"params": jax.tree_util.tree_map_with_path(kept, model.params), "router": model.router}


def load_base(config: Config, runner: Runner, known: Base | None = None) -> tuple[dict[str, Any], Base]:
    """The weights of init.from, {"params", "router"}, and which they are.

    known: those that the adapters were trained on so far. Raises ConfigError where others are there now, or none.
    """
    base, path = identify(str(config.init.from_), config.lora.scale, known)
    return read_weights(path, runner.with_shardings(frozen_shapes(config), frozen=True), cast=True), base
