"""The time of a call on this machine.

On a GPU the kernels of a call are timed by CUPTI, each by its name, so that Python and the gaps between kernels do not
count. Before each call 128 MiB are written, more than twice the L2 cache: operands come from memory, as in training.
Elsewhere, or if CUPTI refuses, the host's clock is used, and the result says so.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FLUSHED = 2**27  # bytes; the L2 cache of an H100 or H200 has 50 MiB
FLUSH = "not"  # part of XLA's name for the kernel of `~x`; no other kernel here has it


class Timing(NamedTuple):
    """seconds: of a call, median. clock: "cupti" or "host". kernels: median seconds by name ({}: host). rounds: all."""

    seconds: float
    clock: str
    kernels: dict[str, float]
    rounds: list[float]


def time_calls(function: Callable, arguments: tuple, calls: int) -> Timing:
    """Times `calls` calls, at least 2, after one that compiles."""
    if jax.default_backend() == "gpu":
        try:
            return _by_kernels(function, arguments, calls)
        except (ImportError, AttributeError, RuntimeError) as error:
            if "CUDA_ERROR" in str(error):  # of the kernel itself
                raise
    return _by_the_host(function, arguments, calls)


def _by_kernels(function, arguments, calls):
    from jax.experimental.mosaic.gpu import profiler

    cold = jax.jit(lambda scratch, *arguments: (function(*arguments), ~scratch))
    scratch = jnp.zeros(FLUSHED // 4, jnp.int32)
    _, rounds = profiler.measure(cold, aggregate=False, iterations=calls)(scratch, *arguments)
    return summarize(rounds)


def summarize(rounds: Any) -> Timing:
    """The timing from CUPTI's (kernel name, milliseconds) pairs of each call, without the flushing kernel.

    Raises:
      RuntimeError: not exactly one kernel of a call flushes, so it cannot be distinguished from the others.
    """
    flushes = {sum(FLUSH in name for name, _ in pairs) for pairs in rounds or ()}
    if flushes != {1}:
        raise RuntimeError(f"{flushes or 'no'} kernels of a call flush the cache, not one.")
    calls = [[(name, ms / 1000) for name, ms in pairs if FLUSH not in name] for pairs in rounds]
    seconds = [sum((s for _, s in pairs), 0.0) for pairs in calls]
    names = dict.fromkeys(name for name, _ in calls[0])
    kernels = {name: statistics.median(sum(s for n, s in pairs if n == name) for pairs in calls) for name in names}
    return Timing(statistics.median(seconds), "cupti", kernels, seconds)


def _by_the_host(function, arguments, calls):
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return Timing(statistics.median(seconds), "host", {}, seconds)
