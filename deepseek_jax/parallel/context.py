"""Sequences split over the mesh axes `context` and `context_node`: the tokens of each device.

A sequence is cut into 2 C blocks, and device c of C has blocks c and 2 C - 1 - c: an early query sees few keys and a
late one many, so with this order all devices have the same work. A batch [B, T] then becomes [B * C, T / C] parts,
split over devices like rows, so that layers that work on single tokens are not affected. Before a batch is cut, every
device has the token ids of its sequences, so targets and the inputs of MTP are shifted correctly across part
boundaries.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.mesh import CONTEXT
from deepseek_jax.parallel.sharding import on_shards, spec


def context_size() -> int:
    """The number of devices that a sequence is split over here; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in CONTEXT)


def blocks_of(part: int | jax.Array, parts: int) -> tuple[int | jax.Array, int | jax.Array]:
    """The indices of the two of 2 * parts blocks that form a part, in order; int32 scalars where `part` is one."""
    return part, 2 * parts - 1 - part


def in_parts(x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] of complete sequences -> [B * C, T / C, ...], the parts of all devices; inside a shard_map this
    device's.

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
    """[B * C, ...]: replaces the value of each part by the mean over the parts of its sequence."""
    if context_size() == 1:
        return x_B
    return on_shards(lambda x_B: lax.pmean(x_B, CONTEXT), (spec("batch"),), spec("batch"), x_B)
