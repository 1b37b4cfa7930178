"""The communication of a compiled program, parsed from XLA's scheduled text (no jax).

A collective is asynchronous if XLA gave it a start and a done, and hidden if there are products between them; the
device waits for all others. Its axes are those along which the devices of its first group differ.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64}
_HEAD = re.compile(r"\s*(?:ROOT )?(%?[\w.\-]+) = ")
_PARENTHESES = re.compile(r"[()]")
_OPERATION = re.compile(r" ([\w\-]+)\(")
# Products other than HLO's own, and the form in which all of them state the contracted dimensions.
_KERNEL = re.compile(r'custom_call_target="(__cublas|mosaic_gpu|tpu_custom_call)')
_QUANTIZER = re.compile(r"/quantizer/")  # kernels_pallas.hopper.quantize, which multiplies no matrices
_CONTRACTED = re.compile(r'(?:lhs_contracting_dims=\{|"lhs_contracting_dimensions":\[)([\d,"]*)')
_ATTENTION = re.compile(r"/attention_(forward|dq|dkv)/")  # kernels_pallas.hopper.mla_attention, by name
_PRODUCTS = re.compile(r"/(experts|fp8)_products/")  # kernels_pallas.hopper.grouped_matmul, and those in FP8
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program text.

    bytes: the larger of a device's input and output. times: executions per step, as far as trip counts of loops are
    known. branch: whether it is in a branch, so that not all of those executions happen.
    products: matrix products between start and done; None if it is not asynchronous.
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
    """The devices of the first of a collective's groups, in any of XLA's forms; for a permutation the first two that
    exchange something. Raises ValueError for another form."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(n) for n in found[1].split(",")]
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text):
        pairs = [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", found[1])]
        return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, dims, order = ([int(n) for n in part.split(",")] if part else [] for part in found.groups())
        order = order or list(range(len(dims)))
        return [_iota(i, dims, order) for i in range(math.prod(groups[1:]))]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", text):
        mesh, axes = re.findall(r"'([^']+)'=(\d+)", found[1]), re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3])
        return [_device(place, found[2]) for place in _along(mesh, axes)]
    if found := re.search(r"replica_groups=(?!\{\})\S*", text):
        raise ValueError(f"{found[0]} is no known form of groups")
    return []


def _device(place, order):
    """The device at a place of a mesh. order: None, `[4,2]T(1,0)` (see `_iota`) or `3,1,0,2`."""
    if order is None:
        return place
    if found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        dims, axes = ([int(n) for n in part.split(",")] if part else [] for part in found.groups())
        return _iota(place, dims, axes or list(range(len(dims))))
    if re.fullmatch(r"\d+(,\d+)*", order):
        return int(order.split(",")[place])
    raise ValueError(f"device_ids=({order}) is no known order of devices")


def _along(mesh, axes):
    """The first group along axes of a mesh. [(name, size)]; [(name, size of what is before it, size)], of which the
    last two are "" except for a part of an axis."""
    sizes = {name: int(size) for name, size in mesh}
    group = [0]
    for name, before, size in axes:
        count = int(size or sizes[name])
        names = list(sizes)
        step = math.prod(sizes[n] for n in names[names.index(name):]) // (int(before or 1) * count)
        group = [first + i * step for first in group for i in range(count)]
    return group


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
    """{name: [(result, type, operation, the rest of the line)]}; the entry is also under "ENTRY".

    Raises:
      ValueError: a line has no operation.
    """
    found: dict[str, list[tuple]] = {}
    lines = None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?(%?[\w.\-]+) .*->", line)):
            lines = found[head[2]] = []
            if head[1]:
                found["ENTRY"] = lines
        elif lines is not None and (head := _HEAD.match(line)):
            end = _end_of_type(line, head.end())
            operation = _OPERATION.match(line, end)
            if operation is None:
                raise ValueError(f"a line of the program has no operation: {line.strip()}")
            lines.append((head[1], line[head.end():end], operation[1], line[operation.end():]))
    return found


def _end_of_type(line, at):
    """The end of the type that begins at `at`: a space outside of its parentheses."""
    if line[at] != "(":
        return line.index(" ", at)
    depth = 0
    for parenthesis in _PARENTHESES.finditer(line, at):
        depth += 1 if parenthesis[0] == "(" else -1
        if not depth:
            return parenthesis.end()
    return len(line)


class Work(NamedTuple):
    """Matrix products, their FLOPs, and how many of those are of operands in FP8, of attention's and experts' kernels.

    Of kernels not written in HLO, attention's, the experts' and FP8's are known. All rows count, including those that
    are empty.
    """

    products: int = 0
    flops: float = 0.0
    fp8: float = 0.0
    attention: float = 0.0
    experts: float = 0.0


class Step(NamedTuple):
    """A line of a program that communicates or multiplies, in the order of execution.

    what: "start" or "done" of the asynchronous collective `key`; "synchronous": a collective that is not asynchronous;
    "work": matrix products, see Work; or "inner": the computations `inner`, run `trips` times, or one of them in a
    branch.
    """

    what: str
    key: str = ""
    collective: Collective | None = None
    products: int = 0
    flops: float = 0.0
    fp8: float = 0.0
    inner: tuple[str, ...] = ()
    trips: int = 1


class _Program:
    def __init__(self, text, sizes, rows=None):
        self.sizes, self.rows, self.bodies = sizes, rows, computations(text)
        self._types = {name: {line[0]: line[1] for line in lines} for name, lines in self.bodies.items()}
        self._counted = {}

    def work(self, name) -> Work:
        """The products in a computation, including those of computations that it calls, times trips."""
        if name not in self._counted:
            self._counted[name] = Work()  # there are no cycles
            each = [self.work_of(name, *line) for line in self.bodies.get(name, ())]
            self._counted[name] = Work(*map(sum, zip(*each)))
        return self._counted[name]

    def work_of(self, name, result, shape, operation, rest) -> Work:
        if operation in ("dot", "convolution") or (operation == "custom-call" and _KERNEL.search(rest)):
            if _QUANTIZER.search(rest):
                return Work()
            flops = self.flops(name, shape, rest)
            return Work(1, flops, flops * ("/fp8_products/" in rest), flops * bool(_ATTENTION.search(rest)),
                        flops * ("/experts_products/" in rest))
        if operation in ("custom-call", "custom-call-start"):  # the latter is for a TPU's sparse core
            return Work()
        each = [self.work(inner) for inner in _called(rest)]
        if operation == "conditional":
            return max(each, key=lambda one: (one.flops, one.products), default=Work())
        trips = _trips(operation, rest)
        return Work(sum(one.products for one in each),
                    *(trips * sum(one[i] for one in each) for i in range(1, len(Work._fields))))

    def flops(self, name, shape, rest) -> float:
        if attention := _ATTENTION.search(rest):
            return self.attention_flops(name, attention[1], rest)
        if _PRODUCTS.search(rest):  # rows by weights, each by its expert's own, or the rows of two arrays
            left = _dims(rest.partition("operand_layout_constraints=")[2])
            if self.rows and "/experts_products/" in rest:
                left = [min(row, self.rows) for row in left[:1]] + left[1:]
            return 2.0 * math.prod(left) * _dims(shape)[-1] if len(left) == 2 else 0.0
        contracted = _CONTRACTED.search(rest)
        if not contracted:
            return 0.0
        left = _dims(self._types[name].get(_operands(rest)[0], ""))
        summed = math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1])) if left else 0
        return 2.0 * math.prod(_dims(shape)) * summed

    def attention_flops(self, name, part, rest) -> float:
        """FLOPs of one of attention's kernels, from q [B, T, H, A] and v [B, T, H, V]; causal, so half of the
        square."""
        q, _, v = (_dims(self._types[name].get(operand, "")) for operand in _operands(rest)[:3])
        if len(q) != 4 or len(v) != 4:
            return 0.0
        (B, T, H, A), V = q, v[3]
        widths = {"forward": A + V, "dq": 2 * A + V, "dkv": 2 * A + 2 * V}[part]
        return float(B * H * T * T * widths)

    def steps(self, name, times=1, branch=False) -> Iterator[Step]:
        """The Steps of a computation."""
        sizes = {result: size_of(shape) for result, shape in self._types.get(name, {}).items()}
        started, loaded = set(), {}
        for result, shape, operation, rest in self.bodies.get(name, ()):
            operands, about = _operands(rest), rest
            if operation == "custom-call-start":  # loads the program of a TPU's sparse core; the update starts it
                loaded[result] = rest
                continue
            if operation == "custom-call-update":
                operation, about = "custom-call-start", loaded.get(operands[0], "")
            kind, phase = self.kind(operation, about)
            if phase == "done" and operands and operands[0] in started:
                yield Step("done", operands[0])
            elif kind and phase != "done":
                if kind == "ragged-all-to-all":  # sent data, receive buffer, offsets and sizes
                    size = max(sizes.get(o, 0) for o in operands)
                else:
                    size = max(sum(sizes.get(o, 0) for o in operands), 0 if phase == "start" else size_of(shape))
                if phase == "start" and kind == "all-gather":
                    size = size_of(shape) - size  # (inputs, outputs)
                axes = axes_of_group(first_group(self.groups(about)), self.sizes)
                started |= {result} if phase == "start" else set()
                yield Step(phase, result, Collective(kind, axes, size, times, branch, None))
            elif operation in ("while", "conditional", "call"):
                yield Step("inner", operation, inner=tuple(_called(rest)), trips=_trips(operation, rest))
            if not kind and (work := self.work_of(name, result, shape, operation, rest)).products:
                yield Step("work", products=work.products, flops=work.flops, fp8=work.fp8)

    def walk(self, name, times=1, branch=False) -> Iterator[Collective]:
        """The collectives of a computation and of those that it calls."""
        waiting = {}  # key of a start -> (its Collective, products so far)
        for step in self.steps(name, times, branch):
            if step.what == "start" and step.collective:
                waiting[step.key] = step.collective, 0
            elif step.what == "done":
                one, products = waiting.pop(step.key)
                yield dataclasses.replace(one, products=products)
            elif step.what == "synchronous" and step.collective:
                yield step.collective
            elif step.what == "inner":
                for inner in step.inner:
                    yield from self.walk(inner, times * step.trips, branch or step.key == "conditional")
            else:
                waiting = {key: (one, products + step.products) for key, (one, products) in waiting.items()}

    def kind(self, operation, rest):
        """(kind of collective or None, "start", "done" or "synchronous")."""
        wrapped, _, phase = operation.rpartition("-")
        if wrapped in ("async", "call", "custom-call"):
            inner = [line[2] for name in _called(rest) for line in self.bodies.get(name, ())]
            found = next((name for name in inner if name in KINDS), None)
            return (found, phase) if phase in ("start", "done") else (None, "")
        for phase in ("start", "done"):
            if operation.endswith("-" + phase) and operation.removesuffix("-" + phase) in KINDS:
                return operation.removesuffix("-" + phase), phase
        return (operation, "synchronous") if operation in KINDS else (None, "")

    def groups(self, rest):
        """The line that names the groups: the operation's own, or that of the operation that an async-start wraps."""
        if "replica_groups=" in rest or "source_target_pairs=" in rest:
            return rest
        inner = [line[3] for name in _called(rest) for line in self.bodies.get(name, ()) if line[2] in KINDS]
        return inner[0] if inner else ""


def _operands(rest) -> list[str]:
    return re.findall(r"%[\w.\-]+", rest.split(")")[0])


def _dims(shape) -> list[int]:
    """The shape of the first array of a type."""
    found = _SHAPE.search(shape)
    return [int(d) for d in found[2].split(",") if d] if found else []


def _trips(operation, rest) -> int:
    found = re.search(r"known_trip_count[^\d]*(\d+)", rest) if operation == "while" else None
    return int(found[1]) if found else 1


def _called(rest) -> list[str]:
    names = re.findall(r"(?:calls|body|to_apply|true_computation|false_computation)=(%?[\w.\-]+)", rest)
    if branches := re.search(r"(?:branch|called)_computations=\{([^}]*)\}", rest):
        names += [name.strip() for name in branches[1].split(",")]
    return names


def collectives(text: str, sizes: dict[str, int]) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      text: `compiled.as_text()`, scheduled.
      sizes: of the mesh's axes, in order.
    """
    return list(_Program(text, sizes).walk("ENTRY"))


def work(text: str, rows: int | None = None) -> Work:
    """The products of a compiled program, times the trips of loops of known length; of branches, that with most FLOPs.

    rows: received by a device's experts. Their buffers have room for more, which the bfloat16 kernels skip.
    """
    return _Program(text, {}, rows).work("ENTRY")


def branches(text: str, number: int) -> list[str]:
    """The computations of the first conditional that has `number` branches."""
    for line in (line for lines in computations(text).values() for line in lines if line[2] == "conditional"):
        if len(names := _called(line[3])) == number:
            return names
    raise ValueError(f"no conditional has {number} branches")


def steps(text: str, sizes: dict[str, int], name: str) -> list[Step]:
    """The Steps of one computation, in order."""
    return list(_Program(text, sizes).steps(name))


def table(found: list[Collective]) -> list[dict]:
    """Sums by kind and axes, as JSON data.

    bytes: if each runs once; bytes_executed: times the trips of loops of known length. hidden: with products between
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
