"""The order of operations on each rank of a pipeline: five schedules (report section 3.2.1), standard library only.

An operation is the forward pass F of one micro-batch through one stage, its backward pass B, or the two halves of B:
Bi, the gradient of the input, which the previous stage waits for, and W, the gradient of the weights, which nothing
waits for. A cell is a rank's work at a time: one operation, or a forward and a backward pass of two micro-batches that
overlap (F&B: while one computes, the other one's tokens are exchanged).

    gpipe      all forward passes, then all backward passes
    1f1b       a backward pass as soon as possible, which bounds the activations by the number of stages that follow
    zb1p       1f1b with W deferred into otherwise idle time (ZB-H1, arXiv 2401.10241)
    dualpipe   micro-batches enter at both ends; rank r has stages r and R - 1 - r, and overlaps F and B of the two
    dualpipev  the same on half of the ranks: rank r has stages r and 2R - 1 - r, and every micro-batch passes twice
"""

from collections import deque
from typing import NamedTuple


class Op(NamedTuple):
    """One pass of one micro-batch through one of a rank's stages.

    kind: "F", "B", "Bi" or "W".   direction: 0 runs from rank 0 to the last, 1 back.   microbatch: 0 to C - 1.
    The rest are slots of the rank's buffers (`schedule.Slots`), -1 where the operation uses none:
    message: of the input from another rank: an activation for F, a gradient for B and Bi.
    activation: of the residuals that F saves; B and Bi read them.
    deferred: of what Bi saves for W.
    """

    kind: str
    direction: int
    microbatch: int
    message: int = -1
    activation: int = -1
    deferred: int = -1


Cell = tuple[Op, ...]


def kind_of(cell: Cell) -> str:
    """ "" of an idle cell, "F", "B", "Bi", "W", or "F&B"."""
    return "&".join(op.kind for op in cell)


class Route(NamedTuple):
    """The route of micro-batches.

    Direction 1 exists if `both_ways`; in a V it starts where direction 0 ends: the last rank sends to itself.
    """

    ranks: int
    both_ways: bool
    v_shaped: bool

    @property
    def stages(self) -> int:
        return self.ranks * (2 if self.v_shaped else 1)

    @property
    def directions(self) -> int:
        return 2 if self.both_ways else 1

    def stage(self, rank: int, direction: int) -> int:
        """The stage that this rank runs for that direction."""
        return rank if direction == 0 else self.stages - 1 - rank

    def before(self, rank: int, direction: int) -> tuple[int, int] | None:
        """(rank, direction) of the previous stage, or None at the first."""
        if direction == 0:
            return (rank - 1, 0) if rank else None
        return (rank + 1, 1) if rank < self.ranks - 1 else self._turn(0)

    def after(self, rank: int, direction: int) -> tuple[int, int] | None:
        """(rank, direction) of the next stage, or None at the last."""
        if direction == 1:
            return (rank - 1, 1) if rank else None
        return (rank + 1, 0) if rank < self.ranks - 1 else self._turn(1)

    def _turn(self, direction):
        return (self.ranks - 1, direction) if self.v_shaped else None


class _Rank:
    """Collects one rank's cells; micro-batches of a direction run in order, and W takes the oldest deferred one.

    most: weight gradients that may be deferred at a time; a Bi beyond that becomes a B. None: no limit.
    """

    def __init__(self, first_microbatch, most=None):
        self.cells, self._deferred, self._most = [], deque(), most
        self._next = {(kind, d): m for d, m in enumerate(first_microbatch) for kind in "FB"}

    def _op(self, kind, direction):
        count = kind[0], direction
        op = Op(kind, direction, self._next[count])
        self._next[count] += 1
        if kind == "Bi":
            self._deferred.append(op)
        return op

    def add(self, *ops):
        """Each op is (kind, direction); two of them are one overlapped cell."""
        full = self._most is not None and self.deferred >= self._most
        self.cells.append(tuple(self._op("B" if kind == "Bi" and full else kind, d) for kind, d in ops))

    def weights(self):
        """W of the oldest deferred weight gradient, if there is one."""
        if not self._deferred:
            return
        _, direction, microbatch = self._deferred.popleft()[:3]
        self.cells.append((Op("W", direction, microbatch),))

    @property
    def deferred(self):
        return len(self._deferred)


def gpipe(rank: int, ranks: int, microbatches: int, most: int | None = None) -> list[Cell]:
    """All forward passes, then all backward passes; nothing is deferred, so `most` changes nothing."""
    out = _Rank([0])
    for kind in ["F"] * microbatches + ["B"] * microbatches:
        out.add((kind, 0))
    return out.cells


def one_forward_one_backward(rank: int, ranks: int, microbatches: int, most: int | None = None) -> list[Cell]:
    """As many forward passes as ranks follow, then one backward pass for each; nothing is deferred."""
    out = _Rank([0])
    ahead = min(ranks - 1 - rank, microbatches)
    for kind in ["F"] * ahead + ["F", "B"] * (microbatches - ahead) + ["B"] * ahead:
        out.add((kind, 0))
    return out.cells


def zero_bubble(rank: int, ranks: int, microbatches: int, most: int | None = None) -> list[Cell]:
    """Rank r defers `r` weight gradients, as many as the last rank would otherwise idle for at the end."""
    out = _Rank([0], most)
    ahead = min(ranks - 1 - rank, microbatches)
    for kind in ["F"] * ahead + ["F", "Bi"] * (microbatches - ahead) + ["Bi"] * ahead:
        out.add((kind, 0))
        if out.deferred > rank:
            out.weights()
    while out.deferred:
        out.weights()
    return out.cells


def dualpipe(rank: int, ranks: int, microbatches: int, most: int | None = None) -> list[Cell]:
    """DualPipe (report section 3.2.1): half of the micro-batches enter at either end, an even number of each.

    Args:
      most: weight gradients that may be deferred at a time; None: as many as there are.
    """
    nearer_end = min(rank, ranks - 1 - rank)
    near = 0 if rank < ranks // 2 else 1
    return _both_ways(nearer_end, ranks // 2, microbatches // 2 - ranks + nearer_end + 1, near,
                      [0, microbatches // 2], most)


def dualpipev(rank: int, ranks: int, microbatches: int, most: int | None = None) -> list[Cell]:
    """DualPipe cut in half: each rank has the two stages that face each other, and `most` is as in `dualpipe`."""
    return _both_ways(rank, ranks, microbatches - 2 * ranks + rank + 1, 0, [0, 0], most)


def _both_ways(depth, half, steady, near, first_microbatch, most):
    """The eight steps of DualPipe.

    Args:
      depth: ranks between this one and the end where direction `near` enters; `half` is where the directions meet.
      steady: how many times step 4 runs its two overlapped cells.
      first_microbatch: of each direction.
      most: see _Rank.
    """
    out, far = _Rank(first_microbatch, most), 1 - near
    inner = half - 1 - depth  # ranks between this one and the middle
    for _ in range(2 * inner):  # 1: what enters nearby
        out.add(("F", near))
    for _ in range(depth + 1):  # 2: until the other direction's first one turns around
        out.add(("F", near))
        out.add(("F", far))
    for _ in range(inner):  # 3
        out.add(("Bi", far))
        out.weights()
        out.add(("F", far))
    for i in range(steady):  # 4: nothing but overlapped cells
        if i == 0 and inner == 0:  # in the middle not overlapped, which lets the first gradients out earlier
            out.add(("F", near))
            out.add(("B", far))
        else:
            out.add(("F", near), ("B", far))
        out.add(("F", far), ("B", near))
    for _ in range(inner):  # 5
        out.add(("B", far))
        out.add(("F", far), ("B", near))
    for i in range(2 * (depth + 1)):  # 6: the second half of these defers its weight gradients
        out.add(("Bi" if i > depth else "B", near if i % 2 else far))
    for _ in range(inner):  # 7
        out.weights()
        out.add(("Bi", near))
    while out.deferred:  # 8
        out.weights()
    return out.cells


ORDERS = {"gpipe": gpipe, "1f1b": one_forward_one_backward, "zb1p": zero_bubble, "dualpipe": dualpipe,
          "dualpipev": dualpipev}
