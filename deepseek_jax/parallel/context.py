"""Sequences split over the mesh axes `context` and `context_node`: which tokens a device has.

A sequence is cut into 2 C blocks, and device c of C has blocks c and 2 C - 1 - c: an early query sees few keys and a
late one many, and so all devices have the same work. A batch [B, T] then is [B * C, T / C] parts, split over devices
as rows are, and a layer that looks at single tokens need not know. Before a batch is cut, every device has the token
ids of its sequences, so that targets and what MTP reads are shifted across all seams.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.mesh import CONTEXT
from deepseek_jax.parallel.sharding import on_shards, spec


def context_size() -> int:
    """Devices that a sequence is split over here; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in CONTEXT)


def blocks_of(part: int | jax.Array, parts: int) -> tuple[int | jax.Array, int | jax.Array]:
    """The two of 2 * parts blocks that make up a part, in their order."""
    return part, 2 * parts - 1 - part


def in_parts(x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] of complete sequences -> [B * C, T / C, ...], the parts of each device; inside a shard_map its own.

    No gradient flows through it.
    """
    parts = context_size()
    if parts == 1:
        return x_BT

    def own(x_BT):
        blocks_BNt = x_BT.reshape(x_BT.shape[0], 2 * parts, -1, *x_BT.shape[2:])
        mine = blocks_of(lax.axis_index(CONTEXT), parts)
        return jnp.concatenate([lax.dynamic_index_in_dim(blocks_BNt, n, 1, keepdims=False) for n in mine], axis=1)

    return on_shards(own, (spec("sequences"),), spec("batch"), lax.stop_gradient(x_BT))


def mean_over_parts(x_B: jax.Array) -> jax.Array:
    """[B * C, ...], the same for all parts of a sequence: the mean over them."""
    if context_size() == 1:
        return x_B
    return on_shards(lambda x_B: lax.pmean(x_B, CONTEXT), (spec("batch"),), spec("batch"), x_B)
