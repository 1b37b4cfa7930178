"""Evaluation of a run, and the sample at its end, compiled for machines that you don't have: programs between steps.

Both take parameters in the layout of the training state. The moments (and averages) of that state stay on the devices,
and are counted.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import spec, storage_shardings
from deepseek_jax.scale.compile import targets
from deepseek_jax.scale.compile.aot import bytes_of, compiled_program, config_of, described
from deepseek_jax.scale.layout import Layout
from deepseek_jax.training.sample import continue_prompt, room
from deepseek_jax.training.step import eval_step, init_state

PROGRAMS = ("evaluate", "sample")


def lowered_program(config: Config, mesh: Any, program: str) -> tuple[Any, dict[str, int]]:
    """A function that lowers it, and bytes per device of the rest of the training state, which stays in memory."""
    state = jax.eval_shape(functools.partial(init_state, config))
    where = storage_shardings(state, mesh)
    size = lambda x, at: math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize
    held = {name: sum(jax.tree.leaves(jax.tree.map(size, tree, at))) for name, tree, at in (
        ("moments", state.opt_state, where.opt_state), ("averages", state.ema, where.ema))}
    whole, rows = (NamedSharding(mesh, at) for at in (PartitionSpec(), spec("sequences", None)))
    train, scalar = config.train, jax.ShapeDtypeStruct((), jnp.int32)
    if program == "evaluate":
        shape = train.batch_size // train.accumulation_steps, train.sequence_length + 1
        arguments = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in (
            ("tokens", jnp.int32), ("weights", jnp.float32), ("segment_ids", jnp.int32))},
        run = functools.partial(eval_step, config)
    else:
        prompt = jax.ShapeDtypeStruct((room(config, train.sample_tokens),), jnp.int32, sharding=whole)
        arguments, run = (prompt, scalar, scalar), functools.partial(continue_prompt, config)
    of_state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
                            (state.params, state.router), (where.params, where.router))
    jitted = jax.jit(run, out_shardings=whole)
    return lambda: jitted.lower(*of_state, *arguments), {name: n for name, n in held.items() if n}


def measure_forward(model: ModelConfig, layout: Layout, target: str, program: str) -> dict[str, Any]:
    """Compiles one of PROGRAMS for `target`; returns its report as JSON data."""
    config, devices = config_of(model, layout), targets.devices_of(target)
    mesh = make_mesh(config.mesh, devices)
    lower, held = lowered_program(config, mesh, program)
    with jax.set_mesh(mesh):
        compiled, made = compiled_program(lower, devices[0].platform)
    found = described(model, layout, target, compiled.as_text() or "", bytes_of(compiled) | held)
    return found | {"program": program, **made}
