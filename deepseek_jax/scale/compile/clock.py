"""The time that a device waits for exchanges of tokens, from a simulation of a compiled program's schedule (no jax).

The device has a clock, which products advance, and each network has a clock, on which transfers follow each other. A
device waits when a transfer ends later than its products. All operations except products take no time here, so that
less is hidden than in reality; the SMs used for moving tokens are considered in the planner's times, not here.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

from deepseek_jax.config import ModelConfig
from deepseek_jax.pipeline.tables import tabulate
from deepseek_jax.scale.compile import hlo
from deepseek_jax.scale.hardware import Hardware, Measured, hardware
from deepseek_jax.scale.layout import Layout
from deepseek_jax.scale.traffic import copies, rooms

KINDS = ("all-to-all", "ragged-all-to-all")


class Rates(NamedTuple):
    """FLOP/s of products."""

    bf16: float
    fp8: float

    def seconds(self, step: hlo.Step) -> float:
        return (step.flops - step.fp8) / self.bf16 + step.fp8 / self.fp8


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One exchange. axes: of the mesh, which determine its network. seconds: its duration; products: seconds of the
    products between its start and done; waited: by the device. flops: of the same products."""

    axes: tuple[str, ...]
    asynchronous: bool
    flops: float
    products: float
    seconds: float
    waited: float


def rates_of(hw: Hardware, m: Measured) -> Rates:
    """Seconds of the products; FP8 products take bfloat16's time on a machine without FP8 units."""
    return Rates(m.product_bf16 * hw.bf16, m.product_fp8 * (hw.fp8 or hw.bf16))


def clocked(steps: Iterable[hlo.Step], seconds: Callable[[hlo.Collective], float], rates: Rates) -> list[Transfer]:
    """Simulates a device that executes `steps`.

    Args:
      seconds: of a collective; 0: it is not an exchange of tokens.
    Returns:
      the exchanges, in the order of completion.
    """
    now = flops = products = 0.0
    free: dict[tuple, float] = {}  # the clock of each network
    under_way, transfers = {}, []  # key -> (axes, seconds, when it ends, FLOPs and products before its start)
    for step in steps:
        if step.what == "work":
            took = rates.seconds(step)
            now, flops, products = now + took, flops + step.flops, products + took
        elif step.what in ("start", "synchronous") and step.collective and (takes := seconds(step.collective)):
            axes = step.collective.axes
            ends = free[axes] = max(now, free.get(axes, 0.0)) + takes
            if step.what == "start":
                under_way[step.key] = axes, takes, ends, flops, products
            else:
                transfers.append(Transfer(axes, False, 0.0, 0.0, takes, ends - now))
                now = ends
        elif step.key in under_way:
            axes, takes, ends, flops_before, before = under_way.pop(step.key)
            transfers.append(Transfer(axes, True, flops - flops_before, products - before, takes, max(0.0, ends - now)))
            now = max(now, ends)
    return transfers


def cell_steps(text: str, layout: Layout) -> dict[str, list[hlo.Step]]:
    """The Steps of each kind of cell of a compiled pipeline, such as "F&B"; one of the two directions."""
    assert layout.pipeline is not None
    branches = tabulate(layout.pipeline).branches
    names = {"&".join(kind for kind, _ in branch): name
             for branch, name in zip(branches, hlo.branches(text, len(branches)), strict=True)}
    return {kind: hlo.steps(text, layout.mesh.sizes, name) for kind, name in names.items()}


def exchanges(c: ModelConfig, layout: Layout, hw: Hardware, m: Measured) -> Callable[[hlo.Collective], float]:
    """Seconds of a collective that exchanges tokens, for those rows of its buffer that leave the node or the device."""
    n, tokens = copies(c, layout), layout.tokens // layout.mesh.tensor
    across = tokens * n["across"] / (m.dispatch * hw.node_bandwidth)
    inside = tokens * n["inside"] / (m.local * hw.local_bandwidth)
    rows = rooms(c, layout)
    # For each row: the networks that the axes use.
    of_a_byte = {axes: max(across * (set(axes) != {"local"}), inside * ("local" in axes)) for axes in rows}
    known = lambda one: one.kind in KINDS and one.axes in rows
    return lambda one: one.bytes / rows[one.axes] * of_a_byte[one.axes] if known(one) else 0.0


def waits(c: ModelConfig, layout: Layout, steps: list[hlo.Step], machine: str) -> dict[str, float]:
    """Figures of a cell of a compiled step: {"transfers", their "seconds", "products": seconds of the products,
    "exposed": the share of the transfers' seconds that the device waits, "planned": the same if all other operations
    take the planner's times, see `timing`}."""
    hw, m = hardware(machine), Measured()
    rates, takes, slower = rates_of(hw, m), exchanges(c, layout, hw, m), (1 - m.reserved) / m.slowdown
    found = clocked(steps, takes, rates)
    planned = clocked(steps, takes, Rates(rates.bf16 * slower, rates.fp8 * slower))
    seconds = sum(t.seconds for t in found)
    share = lambda transfers: sum(t.waited for t in transfers) / seconds if seconds else 0.0
    return {"transfers": len(found), "seconds": seconds, "exposed": share(found), "planned": share(planned),
            "products": sum(rates.seconds(step) for step in steps if step.what == "work")}


def lines(found: dict[str, dict[str, float]]) -> list[str]:
    """{machine: `waits`} as text."""
    return [f"{one['transfers']} exchanges of a cell F&B take {1e3 * one['seconds']:.1f} ms on {machine}, its products "
            f"{1e3 * one['products']:.1f} ms; the device waits {one['exposed']:.0%}, with all else that the planner "
            f"counts {one['planned']:.0%}" for machine, one in found.items()]
