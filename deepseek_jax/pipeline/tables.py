"""A schedule as arrays of integers, one row a tick, for a program that reads them while it runs (no jax here)."""

from typing import NamedTuple

import numpy as np

from deepseek_jax.pipeline.schedule import Schedule
from deepseek_jax.pipeline.ticks import message_source


class Ranks(NamedTuple):
    """int32 [ticks, ranks] each: what a rank does. Where there is nothing to read or write, an index that is harmless.

    branch: index into `Tables.branches`.
    forward, backward: micro-batch of F, and of B, Bi or W.
    forward_message, backward_message: slots where their inputs wait.
    activation_in, activation_out: the slot that the cell takes, and the one it gives: the same one where it does not
      fill another. deferred: the slot it takes and gives.
    arrivals: [ticks, ranks, 4], the message slots of what comes from the rank before (an activation, a gradient)
      and from the rank after (an activation, a gradient); the slot after the last one takes what nobody reads.
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
    """int32 [ticks, ends] each, the same for all ranks: which micro-batch enters or leaves, -1 where none does.

    enter: before the tick.   left: came out of the last stage in this tick; gradient_slot: the message slot, on that
    stage's rank, where the gradient of its loss goes.   back: its gradient came out of the first stage.
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
    """Everything that the executor looks up."""
    route, ticks, trash = schedule.route, len(schedule.table), schedule.slots.messages
    places = [(direction, rank) for direction in range(route.directions) for rank in range(schedule.ranks)]
    entrances = tuple((d, r) for d, r in places if route.before(r, d) is None)
    exits = tuple((d, r) for d, r in places if route.after(r, d) is None)
    kinds = [[tuple((op.kind, op.direction) for op in cell) for cell in row] for row in schedule.table]
    branches = tuple(sorted({cell for row in kinds for cell in row}))

    ranks = Ranks(*(np.zeros((ticks, schedule.ranks), np.int32) for _ in Ranks._fields[:-1]),
                  np.full((ticks, schedule.ranks, 4), trash, np.int32))
    ends = Ends(*(np.full((ticks, n), -1, np.int32) for n in (len(entrances), len(exits), len(exits), len(entrances))))
    when = {(op.kind[0], rank, op.direction, op.microbatch): tick for tick, rank, op in operations(schedule)}

    for tick, row in enumerate(schedule.table):
        for rank, cell in enumerate(row):
            at = tick, rank
            ranks.branch[at] = branches.index(kinds[tick][rank])
            for op in cell:
                _write_cell(ranks, at, op)
            # A cell that fills no slot gives back the one it took.
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
            # Activations of direction 0 and gradients of direction 1 come from the rank before. At the turn of a V a
            # rank hears from itself, in place of a rank after it.
            from_before = (op.kind == "F") == (op.direction == 0)
            ranks.arrivals[when[source], rank, 2 * (not from_before) + (op.kind != "F")] = op.message
    return Tables(branches, entrances, exits, ranks, ends)


def operations(schedule):
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
