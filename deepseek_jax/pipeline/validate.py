"""Checks a schedule's table, and computes its costs (standard library only).

The checks prove that every operation is in the table once, at the rank of its stage; that the ranks' orders do not
deadlock; that everything an operation reads was computed at least a tick before; and that no slot, of activations,
deferred weight gradients or messages, is overwritten before its last read.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline.orders import Cell, kind_of
from deepseek_jax.pipeline.schedule import NAMES, Schedule, make_schedule
from deepseek_jax.pipeline.ticks import message_source, sources

CELLS = ("", "F", "B", "Bi", "W", "F&B")


class ScheduleError(ValueError):
    """A table that would not compute the step correctly; the message says where."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The costs of a valid schedule, times in the unit of the given costs.

    makespan: of the step if every rank starts a cell as soon as its inputs exist; messages take no time.
    lockstep_makespan: when all ranks share ticks, each as long as its slowest cell.
    idle: per rank, of the free-running makespan.
    peak_activations: per rank, micro-batches whose residuals are saved.
    peak_deferred: per rank, deferred weight gradients.
    bubble: idle time by the formula of the report's table, for comparison; exact where F = Bi = W and F&B = F + B.
    """

    makespan: float
    lockstep_makespan: float
    idle: tuple[float, ...]
    peak_activations: tuple[int, ...]
    peak_deferred: tuple[int, ...]
    bubble: float
    ticks: int


def cell_costs(costs: Mapping[str, float] | None = None) -> dict[str, float]:
    """Time of each kind of cell.

    Args:
      costs: f, b (the full backward pass), w, and fb (F&B; f + b if it is missing). None: 1, 2, 1, 3.
    Raises:
      ConfigError: an unknown or missing key, a negative or infinite time, or w above b.
    """
    costs = dict({"f": 1, "b": 2, "w": 1} if costs is None else costs)
    if missing := {"f", "b", "w"} - set(costs):
        raise ConfigError(f"costs lack {', '.join(sorted(missing))}; give f, b, w, and fb if F and B overlap.")
    if unknown := set(costs) - {"f", "b", "w", "fb"}:
        raise ConfigError(f"costs have no {', '.join(sorted(unknown))}; give f, b, w and fb.")
    costs.setdefault("fb", costs["f"] + costs["b"])
    if not all(0 <= value < math.inf for value in costs.values()):  # NaN fails both comparisons
        raise ConfigError(f"costs={costs} must be finite and not negative.")
    if costs["w"] > costs["b"]:
        raise ConfigError(f"w={costs['w']} is a part of the backward pass, so b={costs['b']} cannot be less.")
    return {"": 0, "F": costs["f"], "B": costs["b"], "Bi": costs["b"] - costs["w"], "W": costs["w"],
            "F&B": costs["fb"]}


def validate(schedule: Schedule, costs: Mapping[str, float] | None = None) -> Report:
    """Checks the table and reports its costs.

    Args:
      costs: as in `cell_costs`.
    Raises:
      ScheduleError: the table is wrong; the message names tick, rank and operation.
      ConfigError: the costs are wrong.
    """
    time = cell_costs(costs)
    ticks = _complete(schedule)
    _no_deadlock(schedule)
    _dependencies(schedule, ticks)
    _slots(schedule, ticks)
    makespan = max(start + time[kind_of(cell)] for start, _, cell in starts(schedule, costs))
    busy = [sum(time[kind_of(cell)] for cell in schedule.order(rank)) for rank in range(schedule.ranks)]
    return Report(
        makespan=makespan, idle=tuple(makespan - b for b in busy),
        lockstep_makespan=sum(max(time[kind_of(cell)] for cell in row) for row in schedule.table),
        peak_activations=_peaks(schedule, lambda op: (op.kind == "F") - (op.kind in ("B", "Bi"))),
        peak_deferred=_peaks(schedule, lambda op: (op.kind == "Bi") - (op.kind == "W")),
        bubble=bubble(schedule.name, schedule.stages, costs), ticks=len(schedule.table))


def compare(ranks: Iterable[int], microbatches: Iterable[int],
            costs: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Figures of all five schedules over ranks and micro-batches, where they exist: one dictionary each.

    All of the same model on the same ranks: dualpipev has twice as many stages, which take half as long and save half.
    `activations` and `deferred` count the slots that every rank has, in shares of a rank's layers; `lockstep` is the
    makespan if all ranks share ticks.
    """
    rows = []
    for r, m, name in itertools.product(ranks, microbatches, NAMES):
        try:
            schedule = make_schedule(name, r, m)
        except ConfigError:
            if name == "gpipe":  # it exists for all sensible numbers
                raise
            continue
        share = r / schedule.stages
        report = validate(schedule, {kind: share * t for kind, t in (costs or {"f": 1, "b": 2, "w": 1}).items()})
        rows.append({"schedule": name, "ranks": r, "microbatches": m, "makespan": report.makespan,
                     "idle": max(report.idle), "lockstep": report.lockstep_makespan, "ticks": report.ticks,
                     "activations": share * schedule.slots.activations, "deferred": share * schedule.slots.deferred})
    return rows


def bubble(name: str, stages: int, costs: Mapping[str, float] | None = None) -> float:
    """Idle time per rank by the table of the report's section 3.2.1 (Table 2), and of GPipe."""
    time = cell_costs(costs)
    f, b, w, fb = (time[kind] for kind in ("F", "B", "W", "F&B"))
    if name in ("gpipe", "1f1b"):
        return (stages - 1) * (f + b)
    if name == "zb1p":
        return (stages - 1) * (f + b - 2 * w)
    return (stages / 2 - 1) * (fb + b - 3 * w)


def _say(op, rank):
    return f"{op.kind} of micro-batch {op.microbatch} in direction {op.direction} on rank {rank}"


def _complete(schedule):
    """Checks that every operation is there once, on its rank; returns the tick of each, B and Bi under "B"."""
    ticks, whole = {}, {}
    for tick, row in enumerate(schedule.table):
        if len(row) != schedule.ranks:
            raise ScheduleError(f"tick {tick} has {len(row)} cells for {schedule.ranks} ranks.")
        for rank, cell in enumerate(row):
            if kind_of(cell) not in CELLS:
                raise ScheduleError(f"tick {tick}, rank {rank}: {kind_of(cell)} is no cell; only F and B overlap.")
            for op in cell:
                key = op.kind[0], rank, op.direction, op.microbatch
                if key in ticks:
                    raise ScheduleError(f"tick {tick}: {_say(op, rank)} runs twice, first at tick {ticks[key]}.")
                ticks[key] = tick
                if op.kind[0] == "B":
                    whole[key[1:]] = op.kind == "B"
    expected = {("F", rank, direction, m) for rank in range(schedule.ranks)
                for direction in range(schedule.route.directions) for m in schedule.microbatches_of(direction)}
    expected |= {("B", *place) for _, *place in expected}
    expected |= {("W", *place) for place, is_whole in whole.items() if not is_whole}
    for what, keys in (("does not belong there", set(ticks) - expected), ("is missing", expected - set(ticks))):
        if keys:
            kind, rank, direction, microbatch = min(keys)
            raise ScheduleError(f"{kind} of micro-batch {microbatch} in direction {direction} on rank {rank} {what}.")
    return ticks


def _runs(schedule):
    """Runs the ranks' orders freely, each waiting only for inputs: yields (rank, cell, its sources)."""
    route, done = schedule.route, set()
    orders = [schedule.order(rank) for rank in range(schedule.ranks)]
    at = [0] * schedule.ranks
    waiting = {}  # operation -> ranks that wait for it
    runnable = list(range(schedule.ranks))
    while runnable:
        rank = runnable.pop()
        while at[rank] < len(orders[rank]):
            cell = orders[rank][at[rank]]
            needs = [s for op in cell for s in sources(op, rank, route)]
            if missing := [s for s in needs if s not in done]:
                waiting.setdefault(missing[0], []).append(rank)
                break
            yield rank, cell, needs
            at[rank] += 1
            for op in cell:
                key = op.kind[0], rank, op.direction, op.microbatch
                done.add(key)
                runnable += waiting.pop(key, [])
    for need, ranks in waiting.items():
        kind, rank, direction, microbatch = need
        op = orders[ranks[0]][at[ranks[0]]][0]
        raise ScheduleError(f"deadlock: {_say(op, ranks[0])} waits for ever for {kind} of micro-batch {microbatch} in "
                            f"direction {direction} on rank {rank}.")


def _no_deadlock(schedule):
    for _ in _runs(schedule):
        pass


def starts(schedule: Schedule, costs: Mapping[str, float] | None = None) -> Iterator[tuple[float, int, Cell]]:
    """When each cell starts if every rank runs freely: yields (start, rank, cell)."""
    time = cell_costs(costs)
    clock: list[float] = [0] * schedule.ranks
    end: dict[tuple, float] = {}
    for rank, cell, needs in _runs(schedule):
        start = max([clock[rank], *(end[s] for s in needs)])
        clock[rank] = start + time[kind_of(cell)]
        end |= {(op.kind[0], rank, op.direction, op.microbatch): clock[rank] for op in cell}
        yield start, rank, cell


def _dependencies(schedule, ticks):
    for tick, rank, op in _ops(schedule):
        for source in sources(op, rank, schedule.route):
            if ticks[source] >= tick:
                kind, r, direction, microbatch = source
                raise ScheduleError(
                    f"tick {tick}: {_say(op, rank)} needs {kind} of micro-batch {microbatch} in direction {direction} "
                    f"on rank {r}, which runs at tick {ticks[source]}, not before.")


def _ops(schedule):
    return ((tick, rank, op) for tick, row in enumerate(schedule.table) for rank, cell in enumerate(row)
            for op in cell)


def _slots(schedule, ticks):
    """Checks that each slot of each buffer holds a single value from its write until its last read."""
    lives = {}  # (buffer, rank, slot) -> [(first tick, last tick, its reader)]
    written = {}
    for tick, rank, op in _ops(schedule):
        place = rank, op.direction, op.microbatch
        source = message_source(op.kind, *place, schedule.route)
        _slot_in_range(schedule, tick, rank, op, "messages", op.message, source is not None)
        _slot_in_range(schedule, tick, rank, op, "activations", op.activation, op.kind != "W")
        _slot_in_range(schedule, tick, rank, op, "deferred", op.deferred, op.kind in ("Bi", "W"))
        if source is not None:
            lives.setdefault(("message", rank, op.message), []).append((ticks[source] + 1, tick, op))
        # The table is in the order of ticks, and dependencies are already proven: a value read here was written before.
        for buffer, slot, writer, readers in (("activation", op.activation, "F", ("B", "Bi")),
                                              ("deferred", op.deferred, "Bi", ("W",))):
            if op.kind == writer:
                written[buffer, place] = tick, slot
            elif op.kind in readers:
                first, filled = written[buffer, place]
                if slot != filled:
                    raise ScheduleError(f"tick {tick}: {_say(op, rank)} reads {buffer} slot {slot}, but tick {first} "
                                        f"filled slot {filled}.")
                lives.setdefault((buffer, rank, slot), []).append((first, tick, op))
    for (buffer, rank, slot), intervals in lives.items():
        intervals.sort()
        for (_, last, reader), (first, _, other) in itertools.pairwise(intervals):
            if first <= last:
                raise ScheduleError(
                    f"tick {first}: {buffer} slot {slot} on rank {rank} is overwritten for {_say(other, rank)}, while "
                    f"{_say(reader, rank)} reads it only at tick {last}.")


def _slot_in_range(schedule, tick, rank, op, buffer, slot, used):
    count = getattr(schedule.slots, buffer)
    if used and not 0 <= slot < count:
        raise ScheduleError(f"tick {tick}: {_say(op, rank)} uses slot {slot} of the {count} for {buffer}.")
    if not used and slot != -1:
        raise ScheduleError(f"tick {tick}: {_say(op, rank)} names slot {slot} for {buffer}, but uses none.")


def _peaks(schedule, change):
    """Per rank, the largest running sum of `change`; within a cell, beginnings are counted before ends."""
    peaks = []
    for rank in range(schedule.ranks):
        alive, peak = 0, 0
        for cell in schedule.order(rank):
            for step in sorted((change(op) for op in cell), reverse=True):
                alive += step
                peak = max(peak, alive)
        peaks.append(peak)
    return tuple(peaks)
