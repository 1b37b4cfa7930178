"""Devices to compile for, which this machine does not have.

    h100:2048        GPUs, eight to a host        v5p:8x16x16, v6e:16x16, 7x:4x4x4        TPU slices

XLA's compilers need only a description of the chip. GPUs require the extra `aot`, TPUs libtpu.
"""

import math
import os
import re
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.scale.hardware import DEVICE_MEMORY, Kernels
from kernels_pallas.tools import compile_report

TPUS = {"v5p": "v5p", "v5e": "v5e", "v6e": "v6e", "7x": "TPU7x"}
GPUS = ("h100", "h800")  # an H800 is an H100 with a slower NVLink; the programs are the same


def count(target: str) -> int:
    """The number of jax devices of a target.

    Raises:
      ConfigError: the target cannot be read.
    """
    name, _, shape = target.partition(":")
    if name not in (*GPUS, *TPUS):
        raise ConfigError(f"target {target!r} is unknown; take one of {', '.join((*GPUS, *TPUS))}, with its size: "
                          "h100:2048, v5p:8x16x16.")
    if not re.fullmatch(r"\d+" if name in GPUS else r"\d+(x\d+)*", shape) or 0 in map(int, shape.split("x")):
        example = "h100:2048" if name in GPUS else "v5p:8x16x16"
        raise ConfigError(f"target {target!r} lacks its size; say it as in {example}.")
    number = math.prod(map(int, shape.split("x")))
    if name in GPUS and number > 8 and number % 8:
        raise ConfigError(f"target {target!r}: {number} GPUs are not whole hosts of 8; take {number // 8 * 8} or "
                          f"{(number // 8 + 1) * 8}.")
    return number * (2 if name == "7x" else 1)  # two jax devices a chip


def memory_of(target: str) -> float:
    """Memory of one of its jax devices, bytes."""
    return DEVICE_MEMORY[target.partition(":")[0]]


def kernels_of(target: str) -> Kernels:
    """The kernels of this project that are used on the target."""
    return "hopper" if target.partition(":")[0] in GPUS else "tpu"


def devices_of(target: str) -> list[Any]:
    """Its devices, as descriptions that jax can compile for.

    Raises:
      ConfigError: no compiler for them is installed; the message says what to install.
    """
    number = count(target)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # read when the compiler is first asked for
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    name, _, shape = target.partition(":")
    if name in GPUS:
        hosts, each = (1, number) if number < 8 else (number // 8, 8)
        try:
            return compile_report.described(f"1x{hosts}x{each}")
        except compile_report.NoCompiler as error:
            raise ConfigError(str(error)) from error
    try:
        import libtpu  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise ConfigError("compiling for TPUs needs libtpu; pip install libtpu brings it.") from error
    os.environ.setdefault("TPU_LIBRARY_PATH", libtpu.get_library_path())
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is touched, so compilations may run side by side
    try:
        return topologies.get_topology_desc(f"{TPUS[name]}:{shape}", platform="tpu").devices
    except Exception as error:  # libtpu's message lists the slices that exist
        words = str(error).splitlines()[0][:120]
        raise ConfigError(f"target {target!r}: libtpu knows no such slice ({words}).") from error
