"""Model FLOPs utilization (MFU) of a step against a stated peak."""

import time

import jax
import jax.numpy as jnp

from deepseek_jax.scale.hardware import PEAK_BFLOAT16


def peak_flops(dtype: str, devices: int = 1) -> float:
    """Peak FLOP/s of the devices: from the data sheet for accelerators, from a timed product per process for CPUs.

    An unknown accelerator is timed as well. Products of 1024^3 to 2048 x 2048 x 1024 are timed, and the best counts.
    """
    kind = jax.devices()[0].device_kind
    for prefix, peak in sorted(PEAK_BFLOAT16.items(), key=lambda item: -len(item[0])):
        if kind.startswith(prefix) and dtype == "bfloat16":
            return peak * devices
    a, b = jnp.ones((2048, 1024), dtype), jnp.ones((1024, 2048), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    best = min(_seconds(lambda: product(a, b)) for _ in range(5))
    return jax.process_count() * 2 * 2048 * 1024 * 2048 / best


def _seconds(run):
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
