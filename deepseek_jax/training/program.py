"""What a run prints once about its program: versions, devices, flags, compile time, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.parallel.compiler import compiler_options, xla_flags

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax", "optax")


def describe_machine(config: Config) -> str:
    """Versions, devices and flags, one line each."""
    versions = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    devices, mesh = jax.devices(), config.mesh
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1)
    options = compiler_options(devices[0].platform, jax.__version_info__)
    lines = [f"Python {platform.python_version()}, {', '.join(versions)}",
             f"{mesh.devices} of {len(devices)} devices ({devices[0].device_kind}), {jax.process_count()} "
             f"process{'es' * (jax.process_count() > 1)}; mesh: {axes or 'one device'}",
             f"XLA_FLAGS: {' '.join(xla_flags()) or 'none'}"]
    lines += [f"LIBTPU_INIT_ARGS: {flags}"] if (flags := os.environ.get("LIBTPU_INIT_ARGS")) else []
    lines += [f"options of the compiler: {', '.join(f'{k}={v}' for k, v in options.items())}"] if options else []
    return "\n".join(lines)


def describe_program(compiled: Any, seconds: float) -> str:
    """The compile time of the step, and its memory per device. compiled: jax.stages.Compiled."""
    memory, said = compiled.memory_analysis(), f"The step was compiled in {seconds:.1f} s"
    if memory is None:
        return f"{said}."
    mb = lambda count: f"{count / 1e6:,.1f} MB"
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (f"{said}. Memory a device: {mb(memory.argument_size_in_bytes)} of arguments, {mb(own)} of results that are "
            f"not in their place, {mb(memory.temp_size_in_bytes)} of temporaries.")


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
