"""Compares the results of a kernel with its twin's.

Products and attention: the largest difference is less than 1 % of the largest magnitude. Quantizers: a GPU divides
within 2 ulp and has a different exponential, which changes some roundings by a step of E4M3 (7 % at the top of a tile);
so scales may differ by 2 ulp, each value by one step, and at most one value in ten thousand may differ.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.formats import Quantized

LARGEST_ERROR, MOST_ULP, MOST_STEPS, MOST_MOVED = 0.01, 2, 1, 1e-4


def compare(ours: Any, theirs: Any) -> dict[str, Any]:
    """{"right", and the largest "error", or "scale_ulp", "steps" and "moved"} for two trees with the same structure."""
    is_pair = lambda x: isinstance(x, Quantized)
    rows = [_quantized(x, y) if is_pair(x) else _numbers(x, y)
            for x, y in zip(jax.tree.leaves(ours, is_leaf=is_pair), jax.tree.leaves(theirs, is_leaf=is_pair),
                            strict=True)]
    worst = {name: max(row[name] for row in rows if name in row) for row in rows for name in row if name != "right"}
    return worst | {"right": all(row["right"] for row in rows)}


@jax.jit
def _difference(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    apart = jnp.abs(x - y)
    # Checked separately, since a maximum may lose a NaN.
    return jnp.where(jnp.isfinite(apart).all(), apart.max() / jnp.maximum(jnp.abs(y).max(), 1e-30), jnp.inf)


def _numbers(x, y):
    error = float(_difference(x, y))
    return {"error": error, "right": x.shape == y.shape and x.dtype == y.dtype and error < LARGEST_ERROR}


@jax.jit
def _moved(x, y):
    def place(values):  # position among all E4M3 values, in order
        bits = lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.int32)
        return jnp.where(bits >= 128, 128 - bits, bits)

    steps = jnp.abs(place(x.values) - place(y.values))
    bits = [lax.bitcast_convert_type(q.scales, jnp.int32) for q in (x, y)]
    return jnp.abs(bits[0] - bits[1]).max(), steps.max(), (steps > 0).mean()


def _quantized(x, y):
    ulp, steps, moved = _moved(x, y)
    right = ulp <= MOST_ULP and steps <= MOST_STEPS and moved < MOST_MOVED
    return {"scale_ulp": int(ulp), "steps": int(steps), "moved": float(moved), "right": bool(right)}
