"""A schedule as arrays of integers, one row per tick, which the executor reads while it runs (no jax here)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.pipeline.orders import Op
from deepseek_jax.pipeline.schedule import Schedule
from deepseek_jax.pipeline.ticks import message_source


class Ranks(NamedTuple):
    """int32 [ticks, ranks] each: the operation of a rank. If it reads or writes nothing, the index is a harmless one.

    branch: index into `Tables.branches`.
    forward, backward: micro-batch of F, and of B, Bi or W.
    forward_message, backward_message: the message slots of their inputs.
    activation_in, activation_out: the slot of residuals that the cell reads, and the one that it writes: the same slot
      if it fills none. deferred: the slot of a pending weight gradient that it reads and writes.
    arrivals: [ticks, ranks, 4], the message slots for arrivals from the previous rank (an activation, a gradient) and
      from the next rank (an activation, a gradient); the slot after the last one is scratch.
    """

    branch: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    forward_message: np.ndarray
    backward_message: np.ndarray
    activation_in: np.ndarray
    activation_out: np.ndarray
    deferred: np.ndarray
    arrivals: np.ndarray


class Ends(NamedTuple):
    """int32 [ticks, ends] each, the same for all ranks: the micro-batch that enters or leaves, or -1.

    enter: enters the first stage in this tick.   left: leaves the last stage; gradient_slot: the message slot, on that
    stage's rank, for the gradient of its loss.   back: its gradient leaves the first stage.
    """

    enter: np.ndarray
    left: np.ndarray
    gradient_slot: np.ndarray
    back: np.ndarray


class Tables(NamedTuple):
    """branches: the different cells, each ((kind, direction), ...); entrances, exits: (direction, rank) each."""

    branches: tuple
    entrances: tuple
    exits: tuple
    ranks: Ranks
    ends: Ends


def tabulate(schedule: Schedule) -> Tables:
    """The tables of a schedule."""
    route, ticks, trash = schedule.route, len(schedule.table), schedule.slots.messages
    places = [(direction, rank) for direction in range(route.directions) for rank in range(schedule.ranks)]
    entrances = tuple((d, r) for d, r in places if route.before(r, d) is None)
    exits = tuple((d, r) for d, r in places if route.after(r, d) is None)
    kinds = [[tuple((op.kind, op.direction) for op in cell) for cell in row] for row in schedule.table]
    branches = tuple(sorted({cell for row in kinds for cell in row}))

    ranks = Ranks(*(np.zeros((ticks, schedule.ranks), np.int32) for _ in Ranks._fields[:-1]),
                  np.full((ticks, schedule.ranks, 4), trash, np.int32))  # pyright: ignore[reportCallIssue] (9 fields)
    ends = Ends(*(np.full((ticks, n), -1, np.int32) for n in (len(entrances), len(exits), len(exits), len(entrances))))
    when = {(op.kind[0], rank, op.direction, op.microbatch): tick for tick, rank, op in operations(schedule)}

    for tick, row in enumerate(schedule.table):
        for rank, cell in enumerate(row):
            at = tick, rank
            ranks.branch[at] = branches.index(kinds[tick][rank])
            for op in cell:
                _write_cell(ranks, at, op)
            # A cell that fills no slot writes the one that it read.
            if not any(op.kind == "F" for op in cell):
                ranks.activation_out[at] = ranks.activation_in[at]
            elif len(cell) == 1:
                ranks.activation_in[at] = ranks.activation_out[at]
    for tick, rank, op in operations(schedule):
        place = op.direction, rank
        if op.kind == "F" and place in entrances:
            ends.enter[tick, entrances.index(place)] = op.microbatch
        if op.kind == "F" and place in exits:
            ends.left[tick, exits.index(place)] = op.microbatch
        if op.kind in ("B", "Bi") and place in entrances:
            ends.back[tick, entrances.index(place)] = op.microbatch
        source = message_source(op.kind, rank, op.direction, op.microbatch, route)
        if source is None:
            continue
        if op.kind != "F" and place in exits:
            ends.gradient_slot[when[source], exits.index(place)] = op.message
        else:
            # Activations of direction 0 and gradients of direction 1 come from the previous rank. At the end of a V a
            # rank sends to itself, in place of a next rank.
            from_before = (op.kind == "F") == (op.direction == 0)
            ranks.arrivals[when[source], rank, 2 * (not from_before) + (op.kind != "F")] = op.message
    return Tables(branches, entrances, exits, ranks, ends)


def stacked(schedules: Sequence[Schedule]) -> Tables:
    """The tables of schedules that differ in their number of micro-batches, along a new first axis; the last is the
    longest.

    A shorter one is idle at its end. Slots are numbered as in the one with the most slots.
    """
    each = [tabulate(schedule) for schedule in schedules]
    ticks = max(len(table.ends.enter) for table in each)
    branches = tuple(sorted({(), *(cell for table in each for cell in table.branches)}))
    most = max(schedule.slots.messages for schedule in schedules)

    def padded(a, value):
        return np.pad(a, ((0, ticks - len(a)), *((0, 0),) * (a.ndim - 1)), constant_values=value)

    def ranks(table):
        of_all = np.array([branches.index(cell) for cell in table.branches], np.int32)
        named = table.ranks._replace(branch=of_all[table.ranks.branch])._asdict()
        fill = {"branch": branches.index(()), "arrivals": most}
        return Ranks(**{name: padded(a, fill.get(name, 0)) for name, a in named.items()})

    along = lambda trees: type(trees[0])(*(np.stack(arrays) for arrays in zip(*trees)))
    return Tables(branches, each[0].entrances, each[0].exits, along([ranks(table) for table in each]),
                  along([Ends(*(padded(a, -1) for a in table.ends)) for table in each]))


def operations(schedule: Schedule) -> Iterator[tuple[int, int, Op]]:
    """(tick, rank, operation) of all operations."""
    return ((tick, rank, op) for tick, row in enumerate(schedule.table) for rank, cell in enumerate(row)
            for op in cell)


def _write_cell(ranks, at, op):
    if op.kind == "F":
        ranks.forward[at], ranks.activation_out[at] = op.microbatch, op.activation
        ranks.forward_message[at] = max(op.message, 0)
        return
    ranks.backward[at], ranks.deferred[at] = op.microbatch, max(op.deferred, 0)
    if op.kind != "W":
        ranks.activation_in[at], ranks.backward_message[at] = op.activation, op.message
