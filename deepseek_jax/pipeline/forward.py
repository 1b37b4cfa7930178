"""Runs micro-batches through the stages of a pipeline without gradients, for evaluation and samples.

    rank 0    0 1 2 3 . .        in tick t rank r has micro-batch t - r;
    rank 1    . 0 1 2 3 .        its result is then sent to rank r + 1
    rank 2    . . 0 1 2 3

A rank keeps only the activation of one micro-batch, the sums and the weights of its own stage. This is the same for
every schedule: all have one stage per rank here, and without backward passes there is nothing to order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.pipeline.execute import Arguments, Model


def forwarded(ranks: int, model: Model, mesh: Any, specs: Arguments,
              axis: str = "pipe") -> Callable[[Arguments], tuple[Any, Any]]:
    """Makes the function that runs all micro-batches through all stages. Call it under jit.

    Args:
      ranks: also the number of stages, in natural order.
      model, mesh, specs, axis: as in `execute.pipelined`; losses are not used.
    Returns:
      Arguments -> (sums of the stages, leaves [stages, ...]; sums of `leave`), over all micro-batches and devices.
    """
    def body(arguments):
        rank, own = lax.axis_index(axis), lambda tree: jax.tree.map(lambda a: a[0], tree)
        params, fixed, shared = model.parts(own(arguments.params)), own(arguments.fixed), arguments.shared
        microbatches = len(jax.tree.leaves(arguments.inputs)[0])

        def at(m):
            m = jnp.clip(m, 0, microbatches - 1)
            return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, m, keepdims=False), arguments.inputs)

        def tick(t, x):
            """Tick t of a rank: (y, sums of the stage, sums of `leave`)."""
            x = jax.tree.map(lambda entered, a: jnp.where(rank == 0, entered, a), model.enter(shared, at(t)), x)
            y, _, of_stage = model.stage(params, fixed, x, at(t - rank))
            last = jax.tree.map(lambda a: lax.psum(jnp.where(rank == ranks - 1, a, 0), axis), y)
            _, of_leave = model.leave(shared, last, at(t - ranks + 1))
            return y, of_stage, of_leave

        x = jax.eval_shape(model.enter, shared, at(0))
        sums = jax.eval_shape(tick, jnp.int32(0), x)[1:]
        zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)

        def step(t, carry):
            x, stage_sums, leave_sums = carry
            y, of_stage, of_leave = tick(t, x)
            add = lambda counts: lambda total, part: total + jnp.where(counts, part, 0)
            stage_sums = jax.tree.map(add((t >= rank) & (t < rank + microbatches)), stage_sums, of_stage)
            leave_sums = jax.tree.map(add(t >= ranks - 1), leave_sums, of_leave)
            onward = [(r, r + 1) for r in range(ranks - 1)]
            return jax.tree.map(lambda a: lax.ppermute(a, axis, onward), y), stage_sums, leave_sums

        _, stage_sums, leave_sums = lax.fori_loop(0, microbatches + ranks - 1, step, (zeros(x), *zeros(sums)))
        others = tuple(name for name in mesh.axis_names if name != axis)
        return (jax.tree.map(lambda a: lax.psum(a, others)[None], stage_sums),
                jax.tree.map(lambda a: lax.psum(a, mesh.axis_names), leave_sums))

    return jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=(P(axis), P()), check_vma=False)
