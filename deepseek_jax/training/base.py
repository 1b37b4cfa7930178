"""Frozen models of a run, read once, never trained or saved: the base of low-rank adapters, and the model that a loss
compares with (a reference policy, a teacher).

Their weights are kept in the dtype that the model computes with, or in FP8, and in the sharding of a step's
computation: they have no masters, moments or gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import fp8
from deepseek_jax.checkpoint.adapters import Base, identify, read_leaves, read_weights, stored
from deepseek_jax.checkpoint.arrays import dequantize, restore
from deepseek_jax.checkpoint.blocks import MATRICES, Values, in_blocks
from deepseek_jax.config import Config, ConfigError, FP8Config, LoraConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model import lora
from deepseek_jax.model.parts import check_parts
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.training.step import init_state
from deepseek_jax.workdir import load_workdir_config


def frozen_shapes(config: Config) -> dict[str, Any]:
    """{"params", "router"} of the base, as shapes."""
    model = jax.eval_shape(functools.partial(init_state, dataclasses.replace(config, lora=LoraConfig())))

    def kept(keys, x):
        path = tuple(key.key for key in keys)
        if config.lora.fp8 and path[-1] in MATRICES:
            shapes: Any = (jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(
                fp8.shape_of_scales(x.shape, *MATRICES[path[-1]]), jnp.float32))
            return fp8.Blocks(*shapes)
        return jax.ShapeDtypeStruct(x.shape, lora.held(config.model, path, x.dtype))

    return {"params": jax.tree_util.tree_map_with_path(kept, model.params), "router": model.router}


def in_full(config: Config, params: Any) -> Any:
    """Frozen parameters, with FP8 leaves dequantized to the dtype that the model computes with, as NumPy arrays: a
    device that holds a model in FP8 may have no room for a second copy."""
    def full(keys, x):
        if not isinstance(x, fp8.Blocks):
            return x
        inputs, (values, scales) = MATRICES[keys[-1].key][0], map(np.asarray, x)
        out, stack = np.empty(values.shape, config.model.dtype), scales.ndim - 2
        for place in np.ndindex(values.shape[:stack]):
            matrix = values[place].reshape(math.prod(values.shape[stack:stack + inputs]), -1)
            out[place] = dequantize(matrix, scales[place], out.dtype).reshape(out.shape[stack:])
        return out

    return jax.tree_util.tree_map_with_path(full, params, is_leaf=lambda x: isinstance(x, fp8.Blocks))


def _blocks(leaf: Any, wanted: Any) -> Any:
    """A leaf as an array, or as Blocks if `wanted` has them."""
    if not isinstance(wanted, fp8.Blocks):
        return restore(leaf, wanted)
    values = Values(leaf)
    return fp8.Blocks(restore(values, wanted.values), restore(values.scales, wanted.scales))


def main_model(config: Config) -> Config:
    """The config without MTP modules, which a frozen model need not run."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mtp_depth=0))


def read_as(config: Config, folder: str, what: str, reader: str) -> Config:
    """The config for reading and running the model of `folder` here: its own model, without FP8 and adapters.

    what, reader: the frozen model and the one that is trained, in messages.
    Raises:
      ConfigError: no run there, one of another vocabulary, or one that does not fit the mesh.
    """
    theirs = load_workdir_config(folder)
    if theirs.model.vocab_size != config.model.vocab_size:
        raise ConfigError(f"{what}={folder} has a vocabulary of {theirs.model.vocab_size}, and {reader} one of "
                          f"{config.model.vocab_size}; take the same tokenizer and model.vocab_size.")
    model = dataclasses.replace(theirs.model, fp8=FP8Config())
    try:
        check_parts(model, config.balance)
        return dataclasses.replace(config, model=model, preference=theirs.preference, lora=LoraConfig())
    except ConfigError as error:
        raise ConfigError(f"{what}={folder}: {error}") from error


def check_tokenizer(folder: str, tokenizer: Tokenizer, what: str, reader: str) -> None:
    """Raises ConfigError if the run in `folder` has another tokenizer than `tokenizer`. what, reader: as in `read_as`;
    the latter ends the message."""
    if Tokenizer.load(f"{folder}/tokenizer.json").digest != tokenizer.digest:
        raise ConfigError(f"{what}={folder} has another tokenizer than {reader}.")


def load_base(config: Config, runner: Runner, known: Base | None = None) -> tuple[dict[str, Any], Base]:
    """The weights of init.from, {"params", "router"}, and the identity of their checkpoint.

    known: the checkpoint that the adapters were trained on so far. Raises ConfigError if it has changed or is gone.
    """
    base, path = identify(str(config.init.folder), config.lora.scale, known, fp8=config.lora.fp8)
    shapes = runner.with_shardings(frozen_shapes(config), frozen=True)
    if not config.lora.fp8:
        return read_weights(path, shapes, cast=True), base
    return read_leaves(path, in_blocks(stored(path)), shapes, _blocks), base


def load_reference(config: Config, runner: Runner, folder: str, known: Base | None,
                   what: str) -> tuple[dict[str, Any], Base]:
    """The weights of the run in `folder`, {"params", "router"}, and the identity of their checkpoint.

    Args:
      config: a config whose model is that of the run there.
      known: the checkpoint that the run compared with so far. what: as in `identify`.
    Raises:
      ConfigError: the checkpoint has changed or is gone.
    """
    reference, path = identify(folder, 1.0, known, what)
    return read_weights(path, runner.with_shardings(frozen_shapes(config), frozen=True), cast=True), reference
