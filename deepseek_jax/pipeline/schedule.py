"""Pipeline schedules as tables (report section 3.2.1), standard library only.

`make_schedule` makes a table of every rank's operation in every tick and the buffer slots that it uses. `validate`
checks such a table, `draw` draws it, and `execute` runs it in one `lax.scan`.
"""

import dataclasses
import functools

from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline.orders import ORDERS, Op, Route
from deepseek_jax.pipeline.ticks import Slots, assign_slots, assign_ticks

NAMES = tuple(ORDERS)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One step of a pipeline.

    table: `[tick][rank]` -> the operations of that cell: none, one, or F and B of two micro-batches, overlapped.
    microbatches: all of them, 0 to C - 1. In DualPipe the first half enters at rank 0, the others at the last rank.
    """

    name: str
    ranks: int
    microbatches: int
    table: tuple[tuple[tuple[Op, ...], ...], ...]
    slots: Slots

    @property
    def route(self) -> Route:
        return Route(self.ranks, self.name.startswith("dualpipe"), self.name == "dualpipev")

    @property
    def stages(self) -> int:
        return self.route.stages

    def microbatches_of(self, direction: int) -> range:
        """The micro-batches of one direction; in a V all of them are in both."""
        if self.name != "dualpipe":
            return range(self.microbatches)
        half = self.microbatches // 2
        return range(direction * half, (direction + 1) * half)

    def order(self, rank: int) -> list[tuple[Op, ...]]:
        """The rank's cells, without idle ticks."""
        return [row[rank] for row in self.table if row[rank]]


def check(name: str, ranks: int, microbatches: int) -> None:
    """Checks that there is such a schedule.

    Raises:
      ConfigError: there is none; the message says what would work.
    """
    if name not in NAMES:
        raise ConfigError(f"schedule {name!r} is unknown; take one of {', '.join(NAMES)}.")
    for what, value in (("ranks", ranks), ("microbatches", microbatches)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{what}={value!r} must be a whole number of at least 1.")
    if name == "dualpipe" and ranks % 2:
        raise ConfigError(f"dualpipe pairs each rank with its mirror, so ranks={ranks} must be even; "
                          f"take {ranks + 1}, or dualpipev for any number.")
    if name == "dualpipe" and microbatches % 2:
        raise ConfigError(f"dualpipe sends half of the micro-batches each way, so microbatches={microbatches} must be "
                          f"even; take {microbatches + 1}.")
    if name in ("dualpipe", "dualpipev") and microbatches < 2 * ranks:
        raise ConfigError(f"{name} over {ranks} ranks needs at least {2 * ranks} micro-batches to fill the pipeline, "
                          f"not {microbatches}; raise microbatches, or take 1f1b or zb1p.")


@functools.lru_cache(maxsize=64)
def make_schedule(name: str, ranks: int, microbatches: int, deferred: int | None = None) -> Schedule:
    """The table of a step.

    Args:
      name: gpipe, 1f1b, zb1p, dualpipe or dualpipev.
      ranks: devices along the pipeline. There are as many stages, for dualpipev twice as many.
      microbatches: of the complete step, both directions together.
      deferred: weight gradients that may be pending on a rank; None: as many as the schedule defers. A pending one
        takes more memory than the residuals of a recomputed stage, and all ranks have as many slots.
    Raises:
      ConfigError: dualpipe takes even numbers; both bidirectional ones need at least two micro-batches a rank.
    """
    check(name, ranks, microbatches)
    empty = Schedule(name, ranks, microbatches, (), Slots(0, 0, 0))
    rows = assign_ticks([ORDERS[name](rank, ranks, microbatches, deferred) for rank in range(ranks)], empty.route)
    table, slots = assign_slots(rows, empty.route)
    return dataclasses.replace(empty, table=table, slots=slots)
