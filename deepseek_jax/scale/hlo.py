"""What a compiled program communicates, read off XLA's scheduled text (no jax).

A collective is asynchronous when XLA gave it a start and a done, and hidden when products stand between them; all
others the device waits for. The axes of one are those along which the devices of its first group differ.
"""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64}
_HEAD = re.compile(r"\s*(?:ROOT )?(%?[\w.\-]+) = ")
_PARENTHESES = re.compile(r"[()]")
_OPERATION = re.compile(r" ([\w\-]+)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program text.

    bytes: the larger of what goes in and what comes out on a device. times: executions a step, as far as loops know
    their trip counts. branch: it stands in a branch, so that not every one of those times happens.
    products: matrix products between start and done; None where it is not asynchronous.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int
    branch: bool
    products: int | None


def size_of(shape: str) -> int:
    """Bytes of all arrays in the text of a type."""
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        bits = BITS.get(dtype) or int((re.findall(r"\d+", dtype) or ["32"])[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def first_group(text: str) -> list[int]:
    """The devices of the first of a collective's groups, in any of the forms that XLA writes them in."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        return [int(n) for n in found[1].split(",")]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, dims, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        order = order or list(range(len(dims)))
        return [_iota(i, dims, order) for i in range(math.prod(groups[1:]))]
    return []


def _iota(index, dims, order):
    """Element `index` of arange(prod(dims)).reshape(dims).transpose(order), flattened."""
    shape, at = [dims[axis] for axis in order], [0] * len(dims)
    for axis, size in reversed(list(zip(order, shape))):
        index, at[axis] = divmod(index, size)
    value = 0
    for size, place in zip(dims, at):
        value = value * size + place
    return value


def axes_of_group(group: list[int], sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which these devices differ; no group: all."""
    if not group:
        return tuple(name for name, size in sizes.items() if size > 1)
    places = []
    for device in group:
        place = []
        for size in reversed(sizes.values()):
            device, at = divmod(device, size)
            place.append(at)
        places.append(place[::-1])
    return tuple(name for name, column in zip(sizes, zip(*places)) if len(set(column)) > 1)


def computations(text: str) -> dict[str, list[tuple]]:
    """{name: [(result, type, operation, the rest of the line)]}, the entry under "ENTRY" too."""
    found, lines = {}, None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?(%?[\w.\-]+) .*->", line)):
            lines = found[head[2]] = []
            if head[1]:
                found["ENTRY"] = lines
        elif lines is not None and (head := _HEAD.match(line)):
            end = _end_of_type(line, head.end())
            operation = _OPERATION.match(line, end)
            lines.append((head[1], line[head.end():end], operation[1], line[operation.end():]))
    return found


def _end_of_type(line, at):
    """Where the type that begins at `at` ends: at a space outside of its parentheses."""
    if line[at] != "(":
        return line.index(" ", at)
    depth = 0
    for parenthesis in _PARENTHESES.finditer(line, at):
        depth += 1 if parenthesis[0] == "(" else -1
        if not depth:
            return parenthesis.end()
    return len(line)


class _Program:
    def __init__(self, text, sizes):
        self.sizes, self.bodies = sizes, computations(text)
        self.collectives: list[Collective] = []
        self._counted = {}

    def products(self, name) -> int:
        """Matrix products in a computation, those it calls included."""
        if name not in self._counted:
            self._counted[name] = 0  # a cycle cannot be
            self._counted[name] = sum(self.products_of(*line[2:]) for line in self.bodies.get(name, ()))
        return self._counted[name]

    def products_of(self, operation, rest) -> int:
        if operation in ("dot", "convolution"):
            return 1
        if operation == "custom-call":
            return int(bool(re.search(r'custom_call_target="(__cublas|mosaic_gpu|tpu_custom_call)', rest)))
        return sum(self.products(name) for name in _called(rest))

    def walk(self, name, times=1, branch=False):
        """Collects what stands in a computation and in those that it calls."""
        lines = self.bodies.get(name, ())
        sizes = {line[0]: size_of(line[1]) for line in lines}
        waiting = {}  # start -> (its Collective, products so far)
        for result, shape, operation, rest in lines:
            operands = re.findall(r"%[\w.\-]+", rest.split(")")[0])
            kind, phase = self.kind(operation, rest)
            if phase == "done" and operands and operands[0] in waiting:
                one, products = waiting.pop(operands[0])
                self.collectives.append(dataclasses.replace(one, products=products))
            elif kind and phase != "done":
                size = max(sum(sizes.get(o, 0) for o in operands), 0 if phase == "start" else size_of(shape))
                if phase == "start" and kind == "all-gather":
                    size = size_of(shape) - size  # (what goes in, what comes out)
                axes = axes_of_group(first_group(self.groups(rest)), self.sizes)
                one = Collective(kind, axes, size, times, branch, None)
                if phase == "start":
                    waiting[result] = one, 0
                else:
                    self.collectives.append(one)
            elif operation == "while":
                trips = re.search(r'known_trip_count[^\d]*(\d+)', rest)
                for inner in _called(rest):
                    self.walk(inner, times * (int(trips[1]) if trips else 1), branch)
            elif operation in ("conditional", "call"):
                for inner in _called(rest):
                    self.walk(inner, times, branch or operation == "conditional")
            if not kind and (n := self.products_of(operation, rest)):
                waiting = {start: (one, products + n) for start, (one, products) in waiting.items()}

    def kind(self, operation, rest):
        """(kind of collective or None, "start", "done" or "whole")."""
        if operation in ("async-start", "async-done", "async-update"):
            inner = [line[2] for name in _called(rest) for line in self.bodies.get(name, ())]
            found = next((name for name in inner if name in KINDS), None)
            if operation == "async-done":
                return found, "done"
            return (found, "start") if operation == "async-start" else (None, "")
        for phase in ("start", "done"):
            if operation.endswith("-" + phase) and operation.removesuffix("-" + phase) in KINDS:
                return operation.removesuffix("-" + phase), phase
        return (operation, "whole") if operation in KINDS else (None, "")

    def groups(self, rest):
        """The line that names the groups: its own, or that of what an async-start wraps."""
        if "replica_groups=" in rest or "source_target_pairs=" in rest:
            return rest
        inner = [line[3] for name in _called(rest) for line in self.bodies.get(name, ()) if line[2] in KINDS]
        return inner[0] if inner else ""


def _called(rest) -> list[str]:
    names = re.findall(r"(?:calls|body|to_apply|true_computation|false_computation)=(%?[\w.\-]+)", rest)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
        names += [name.strip() for name in branches[1].split(",")]
    return names


def collectives(text: str, sizes: dict[str, int]) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      text: `compiled.as_text()`, scheduled.
      sizes: of the mesh's axes, in order.
    """
    program = _Program(text, sizes)
    program.walk("ENTRY")
    return program.collectives


def table(found: list[Collective]) -> list[dict]:
    """By kind and axes, JSON-able.

    bytes: if each runs once; bytes_executed: as often as loops of known length make it. hidden: with products between
    start and done; exposed_bytes: of the others.
    """
    rows: dict[tuple, dict] = {}
    for one in found:
        row = rows.setdefault((one.kind, one.axes), {
            "kind": one.kind, "axes": list(one.axes), "count": 0, "bytes": 0, "bytes_executed": 0, "asynchronous": 0,
            "hidden": 0, "exposed_bytes": 0, "products_between": 0, "in_branches": 0})
        row["count"] += 1
        row["bytes"] += one.bytes
        row["bytes_executed"] += one.bytes * one.times
        row["asynchronous"] += one.products is not None
        row["hidden"] += bool(one.products)
        row["products_between"] += one.products or 0
        row["exposed_bytes"] += 0 if one.products else one.bytes
        row["in_branches"] += one.branch
    return sorted(rows.values(), key=lambda row: -row["bytes_executed"])
