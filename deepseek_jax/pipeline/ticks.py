"""Assigns the cells of all ranks to common ticks, and their saved arrays to slots of fixed-size buffers.

One SPMD program runs a pipeline in lock step: a tick lasts as long as its slowest cell. Starting every cell as soon
as its inputs exist wastes up to an eighth of DualPipe, since short cells then fall into the same ticks as long ones.
So the ticks are searched: the only choice at each tick is its maximum duration (every cell that is ready and fits then
runs, because running it earlier does no harm), and the placement is the shortest path over the ranks' progress.
"""

import heapq
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from deepseek_jax.pipeline.orders import Cell, Op, Route, kind_of

# With these the bubbles of all five schedules are those of the report's table. Only the ratios matter here.
NOMINAL = {"F": 1, "B": 2, "Bi": 1, "W": 1, "F&B": 3}
BEAM = 32  # states kept per moment; keeping all gives nothing shorter for up to 32 ranks (tests, LOG)


class Slots(NamedTuple):
    """The number of slots of each rank's buffers; the same on all ranks, since one program runs on all of them.

    activations: residuals that F saves for the backward pass.   deferred: arrays that Bi saves for W.
    messages: activations and gradients that have arrived and are not used yet.
    """

    activations: int
    deferred: int
    messages: int


def sources(op: Op, rank: int, route: Route) -> list[tuple[str, int, int, int]]:
    """The operations that must have run: (kind, rank, direction, microbatch); "B" stands for B and Bi."""
    _, direction, microbatch = op[:3]
    if op.kind == "W":
        return [("B", rank, direction, microbatch)]
    neighbour = route.before(rank, direction) if op.kind == "F" else route.after(rank, direction)
    own = [] if op.kind == "F" else [("F", rank, direction, microbatch)]
    return own + ([(op.kind[0], *neighbour, microbatch)] if neighbour else [])


class _Search:
    """The cells of all ranks as a graph; `needs[r][i]` are (rank, index) that cell i of rank r waits for."""

    def __init__(self, orders, route):
        self.lengths = tuple(len(cells) for cells in orders)
        self.cost = [[NOMINAL[kind_of(cell)] for cell in cells] for cells in orders]
        where = {(op.kind[0], rank, op.direction, op.microbatch): (rank, i)
                 for rank, cells in enumerate(orders) for i, cell in enumerate(cells) for op in cell if op.kind != "W"}
        self.needs = [[[where[s] for op in cell for s in sources(op, rank, route) if s[1] != rank]
                       for cell in cells] for rank, cells in enumerate(orders)]
        self.tail = self._longest_paths()

    def _longest_paths(self):
        """Time from the start of each cell to the end of all work, if every rank ran freely: a lower bound."""
        tail = [[0] * (n + 1) for n in self.lengths]
        behind = [[0] * n for n in self.lengths]  # the longest tail of the cells that wait for this one
        left = list(self.lengths)
        waiting = [[0] * n for n in self.lengths]
        for row in self.needs:
            for rank, i in (s for cell in row for s in cell):
                waiting[rank][i] += 1
        moved = True
        while moved:
            moved = False
            for rank in range(len(left)):
                while left[rank] and not waiting[rank][left[rank] - 1]:
                    i = left[rank] = left[rank] - 1
                    tail[rank][i] = self.cost[rank][i] + max(tail[rank][i + 1], behind[rank][i])
                    for r, j in self.needs[rank][i]:
                        waiting[r][j] -= 1
                        behind[r][j] = max(behind[r][j], tail[rank][i])
                    moved = True
        return tail

    def remaining(self, state):
        tails = [self.tail[rank][i] for rank, i in enumerate(state)]
        return max(tails), sum(tails)

    def steps(self, state):
        """Every tick that could come next: (how long it lasts, the state after it)."""
        ready = {rank: self.cost[rank][i] for rank, i in enumerate(state) if i < self.lengths[rank]
                 and all(state[r] > j for r, j in self.needs[rank][i])}
        for longest in set(ready.values()):
            yield longest, tuple(i + (ready.get(rank, longest + 1) <= longest) for rank, i in enumerate(state))


def assign_ticks(orders: list[list[Cell]], route: Route, beam: int = BEAM) -> list[list[Cell]]:
    """The shortest placement of these orders: rows of cells, one a rank, () where it waits."""
    search = _Search(orders, route)
    start: tuple[int, ...] = (0,) * len(orders)
    came_from: dict[tuple[int, ...], tuple[int, Any]] = {start: (0, None)}
    at: dict[int, set[tuple[int, ...]]] = {0: {start}}
    moments = [0]
    while True:
        now = heapq.heappop(moments)
        states = [s for s in at.pop(now) if came_from[s][0] == now]
        if search.lengths in states:
            break
        for state in sorted(states, key=search.remaining)[:beam]:
            for longest, after in search.steps(state):
                if after not in came_from or came_from[after][0] > now + longest:
                    came_from[after] = now + longest, state
                    if now + longest not in at:
                        at[now + longest] = set()
                        heapq.heappush(moments, now + longest)
                    at[now + longest].add(after)
    path = [search.lengths]
    while path[-1] != start:
        path.append(came_from[path[-1]][1])
    path.reverse()
    return [[cells[i] if j > i else () for cells, i, j in zip(orders, before, after)]
            for before, after in itertools.pairwise(path)]


def color(intervals: Iterable[tuple[Any, int, int]]) -> tuple[dict[Any, int], int]:
    """Gives every (key, first, last) its own slot from first to last, with as few slots as possible.

    Returns:
      {key: slot}, number of slots.
    """
    slots, free, ends, used = {}, [], [], 0
    for key, first, last in sorted(intervals, key=lambda interval: interval[1:]):
        while ends and ends[0][0] < first:
            heapq.heappush(free, heapq.heappop(ends)[1])
        if not free:
            free.append(used)
            used += 1
        slots[key] = heapq.heappop(free)
        heapq.heappush(ends, (last, slots[key]))
    return slots, used


def assign_slots(rows: list[list[Cell]], route: Route) -> tuple[tuple[tuple[Cell, ...], ...], Slots]:
    """Writes slots into every operation: (rows, Slots)."""
    tick = {(op.kind[0], rank, op.direction, op.microbatch): t
            for t, row in enumerate(rows) for rank, cell in enumerate(row) for op in cell}
    named, counts = {}, []
    for rank in range(len(rows[0])):
        lives = {"activation": [], "deferred": [], "message": []}
        for kind, r, direction, microbatch in tick:
            if r != rank:
                continue
            begin, backward = tick[kind, r, direction, microbatch], tick["B", r, direction, microbatch]
            if kind == "F":
                lives["activation"].append(((direction, microbatch), begin, backward))
            if kind == "W":
                lives["deferred"].append(((direction, microbatch), backward, begin))
            if (sender := message_source(kind, r, direction, microbatch, route)) is not None:
                lives["message"].append(((kind, direction, microbatch), tick[sender] + 1, begin))
        colored = {name: color(intervals) for name, intervals in lives.items()}
        named[rank] = {name: slots for name, (slots, _) in colored.items()}
        counts.append([colored[name][1] for name in ("activation", "deferred", "message")])

    def with_slots(op, rank):
        micro, names = (op.direction, op.microbatch), named[rank]
        return op._replace(message=names["message"].get((op.kind[0], *micro), -1),
                           activation=-1 if op.kind == "W" else names["activation"][micro],
                           deferred=-1 if op.kind in "FB" else names["deferred"][micro])

    table = tuple(tuple(tuple(with_slots(op, rank) for op in cell) for rank, cell in enumerate(row)) for row in rows)
    return table, Slots(*(max(column) for column in zip(*counts)))


def message_source(kind: str, rank: int, direction: int, microbatch: int,
                   route: Route) -> tuple[str, int, int, int] | None:
    """The operation whose result is in this one's message slot; None for W, and for F of the first stage.

    The gradient of the last stage's output comes from the loss, right after that stage's own forward pass.
    """
    if kind == "F":
        neighbour = route.before(rank, direction)
        return ("F", *neighbour, microbatch) if neighbour else None
    if kind in ("B", "Bi"):
        neighbour = route.after(rank, direction)
        return ("B", *neighbour, microbatch) if neighbour else ("F", rank, direction, microbatch)
    return None
