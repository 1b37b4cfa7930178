"""Shared by the attention kernels: a ring of slots between one warpgroup that loads and two that multiply."""

# The stubs of Mosaic's transforms and ACC are wrong.
# pyright: reportAbstractUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

COMPUTE = 2  # warpgroups that multiply
LOWEST = -1e30  # a maximum before any score: finite, so that a block of masked scores subtracts no infinities


def swizzled(columns: int) -> tuple[Any, Any]:
    """The layout of bfloat16 in shared memory for TMA and the tensor core: tiles of 8 rows and 64, 32 or 16 columns."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)


BF16 = swizzled(64)


def roles(load: Callable[[], None], compute: Callable[[Any], None], registers: tuple[int, int] = (24, 240)) -> None:
    """Runs `load()` in the last warpgroup and `compute(group)` in the others, with that many registers a thread."""
    group = lax.axis_index("group")

    @pl.when(group == COMPUTE)
    def _():
        plgpu.set_max_registers(registers[0], action="decrease")
        load()

    @pl.when(group < COMPUTE)
    def _():
        plgpu.set_max_registers(registers[1], action="increase")
        compute(group)


class Ring(NamedTuple):
    """Slots of shared memory, filled by TMA in order, each used by both warpgroups before it is refilled."""

    slots: Any
    full: Any
    empty: Any

    @classmethod
    def of(cls, stages: int, *shapes: tuple[int, ...], transforms: Any = BF16) -> Ring:
        """Scratch types of a ring of `stages` slots; a slot holds a bfloat16 array of each shape."""
        return cls.holding(stages, *((shape, jnp.bfloat16, transforms) for shape in shapes))

    @classmethod
    def holding(cls, stages: int, *arrays: tuple, parts: int = 1) -> Ring:
        """The same for (shape, dtype, transforms), each of which is loaded in `parts` parts."""
        return cls([plgpu.SMEM((stages, *shape), dtype, transforms=transforms) for shape, dtype, transforms in arrays],
                   plgpu.Barrier(num_arrivals=parts * len(arrays), num_barriers=stages),
                   plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages))

    def fill(self, n: Any, *sources: Any) -> None:
        """Starts loading the arrays of step n, one for each array of a slot, as soon as the slot is free."""
        slot = self._free(n)
        for source, target in zip(sources, self.slots, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[slot], self.full.at[slot])

    def fill_rows(self, n: Any, sources: Any, height: int) -> None:
        """The same, `height` rows of each of a slot's arrays at a time: sources[part], an array for each."""
        slot = self._free(n)
        for part, arrays in enumerate(sources):
            for source, held in zip(arrays, self.slots, strict=True):
                plgpu.copy_gmem_to_smem(source, held.at[slot, pl.ds(part * height, height)], self.full.at[slot])

    def _free(self, n):
        slot = lax.rem(n, self.slots[0].shape[0])

        @pl.when(n >= self.slots[0].shape[0])
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        return slot

    def drain(self, n: Any) -> None:
        """Waits until all slots of n steps are free again: jax 0.11's interpreter wants all arrivals to be seen."""
        stages = self.slots[0].shape[0]

        @pl.loop(0, stages)
        def _(k):
            @pl.when(n + k >= stages)
            def _():
                plgpu.barrier_wait(self.empty.at[lax.rem(n + k, stages)])

    def use(self, n: Any, function: Callable) -> Any:
        """function(arrays of step n's slot), once they are loaded; then releases the slot."""
        slot = lax.rem(n, self.slots[0].shape[0])
        plgpu.barrier_wait(self.full.at[slot])
        result = function(*(held.at[slot] for held in self.slots))
        plgpu.barrier_arrive(self.empty.at[slot])
        return result


def multiply(a_smem: Any, b_smem: Any, interpret: bool = False) -> jax.Array:
    """a @ b in float32, both in shared memory."""
    if interpret:  # its race detector does not see the tensor core's reads
        a, b = a_smem[...], b_smem[...]
        plgpu.commit_smem()
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    def run(acc):
        plgpu.wgmma(acc, a_smem, b_smem)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((a_smem.shape[0], b_smem.shape[1]), jnp.float32))


def rows(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts a column of numbers [rows] over a tile [rows, columns]."""
    return lax.broadcast_in_dim(value, shape, (0,))


def multiply_add(total: jax.Array, a: Any, b_smem: Any, interpret: bool) -> Any:
    """total + a @ b: a running float32 sum, a [M, K] in registers or shared memory, b [K, N] in shared memory."""
    if interpret:  # it supports neither operands in registers nor sums with an initial value
        a, b = a if isinstance(a, jax.Array) else a[...], b_smem[...]
        plgpu.commit_smem()  # a plain read; the tensor core's would be ordered before TMA's next write
        return total + jnp.dot(a, b, preferred_element_type=jnp.float32)

    def run(acc):
        plgpu.wgmma(acc, a, b_smem)

    return pl.run_state(run)(plgpu.ACC.init(total))
