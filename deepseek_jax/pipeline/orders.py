"""In which order each rank of a pipeline does its work: five schedules (report section 3.2.1), standard library only.

An operation is the forward pass F of one micro-batch through one stage, its backward pass B, or the two halves of B:
Bi, the gradient of the input, which the stage before waits for, and W, the gradient of the weights, which nobody
waits for. A cell is what a rank does at a time: one operation, or a forward and a backward pass of two micro-batches
that overlap (F&B: while one computes, the other one's tokens travel).

    gpipe      all forward passes, then all backward passes
    1f1b       a backward pass as soon as there is one: a stage holds at most as many micro-batches as stages follow
    zb1p       1f1b with W put off into what would be idle time (ZB-H1, arXiv 2401.10241)
    dualpipe   micro-batches enter at both ends; rank r holds stages r and R - 1 - r, and overlaps F and B of the two
    dualpipev  the same on half of the ranks: rank r holds stages r and 2R - 1 - r, and every micro-batch passes twice
"""

from collections import deque
from typing import NamedTuple


class Op(NamedTuple):
    """One pass of one micro-batch through one of a rank's stages.

    kind: "F", "B", "Bi" or "W".   direction: 0 runs from rank 0 to the last, 1 back.   microbatch: 0 to C - 1.
    The rest are slots of the rank's buffers (`schedule.Slots`), -1 where the operation uses none:
    message: where the input waits that came from another rank: an activation for F, a gradient for B and Bi.
    activation: where F leaves what the backward pass needs; B and Bi read it.
    deferred: where Bi leaves what W needs.
    """

    kind: str
    direction: int
    microbatch: int
    message: int = -1
    activation: int = -1
    deferred: int = -1


def kind_of(cell):
    """ "" of an idle cell, "F", "B", "Bi", "W", or "F&B"."""
    return "&".join(op.kind for op in cell)


class Route(NamedTuple):
    """How micro-batches travel.

    There is direction 1 if `both_ways`; in a V it goes on where direction 0 ended: the last rank hands over to itself.
    """

    ranks: int
    both_ways: bool
    v_shaped: bool

    @property
    def stages(self):
        return self.ranks * (2 if self.v_shaped else 1)

    @property
    def directions(self):
        return 2 if self.both_ways else 1

    def stage(self, rank, direction):
        """Which stage this rank runs for that direction."""
        return rank if direction == 0 else self.stages - 1 - rank

    def before(self, rank, direction):
        """(rank, direction) of the stage before, or None at the first."""
        if direction == 0:
            return (rank - 1, 0) if rank else None
        return (rank + 1, 1) if rank < self.ranks - 1 else self._turn(0)

    def after(self, rank, direction):
        """(rank, direction) of the stage after, or None at the last."""
        if direction == 1:
            return (rank - 1, 1) if rank else None
        return (rank + 1, 0) if rank < self.ranks - 1 else self._turn(1)

    def _turn(self, direction):
        return (self.ranks - 1, direction) if self.v_shaped else None


class _Rank:
    """Writes down one rank's cells; micro-batches of a direction go through in order, W takes the oldest deferred.

    most: weight gradients that may wait at a time; a Bi too many becomes a B. None: all that the schedule puts off.
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
        """W of the oldest that waits, if one does."""
        if not self._deferred:
            return
        _, direction, microbatch = self._deferred.popleft()[:3]
        self.cells.append((Op("W", direction, microbatch),))

    @property
    def deferred(self):
        return len(self._deferred)


def gpipe(rank, ranks, microbatches, most=None):
    out = _Rank([0])
    for kind in ["F"] * microbatches + ["B"] * microbatches:
        out.add((kind, 0))
    return out.cells


def one_forward_one_backward(rank, ranks, microbatches, most=None):
    out = _Rank([0])
    ahead = min(ranks - 1 - rank, microbatches)
    for kind in ["F"] * ahead + ["F", "B"] * (microbatches - ahead) + ["B"] * ahead:
        out.add((kind, 0))
    return out.cells


def zero_bubble(rank, ranks, microbatches, most=None):
    """Rank r puts `r` weight gradients off: as many as the last rank would otherwise idle at the end."""
    out = _Rank([0], most)
    ahead = min(ranks - 1 - rank, microbatches)
    for kind in ["F"] * ahead + ["F", "Bi"] * (microbatches - ahead) + ["Bi"] * ahead:
        out.add((kind, 0))
        if out.deferred > rank:
            out.weights()
    while out.deferred:
        out.weights()
    return out.cells


def dualpipe(rank, ranks, microbatches, most=None):
    nearer_end = min(rank, ranks - 1 - rank)
    near = 0 if rank < ranks // 2 else 1
    return _both_ways(nearer_end, ranks // 2, microbatches // 2 - ranks + nearer_end + 1, near,
                      [0, microbatches // 2], most)


def dualpipev(rank, ranks, microbatches, most=None):
    return _both_ways(rank, ranks, microbatches - 2 * ranks + rank + 1, 0, [0, 0], most)


def _both_ways(depth, half, steady, near, first_microbatch, most):
    """The eight steps of DualPipe.

    Args:
      depth: ranks between this one and the end where direction `near` enters; `half` is where the directions meet.
      steady: how often the two overlapped cells of step 4 come.
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
    for i in range(2 * (depth + 1)):  # 6: the second half of these puts its weight gradients off
        out.add(("Bi" if i > depth else "B", near if i % 2 else far))
    for _ in range(inner):  # 7
        out.weights()
        out.add(("Bi", near))
    while out.deferred:  # 8
        out.weights()
    return out.cells


ORDERS = {"gpipe": gpipe, "1f1b": one_forward_one_backward, "zb1p": zero_bubble, "dualpipe": dualpipe,
          "dualpipev": dualpipev}
