"""Two slow, independent checks of a schedule: the times of its operations, and the result of executing its table.

Neither uses code of the validator: dependencies follow from counting stages here, not from routes.
"""

import functools


def stage_of(schedule, rank, direction):
    last = {"dualpipe": schedule.ranks - 1, "dualpipev": 2 * schedule.ranks - 1}.get(schedule.name)
    return rank if direction == 0 else last - rank


def last_stage(schedule):
    return (2 if schedule.name == "dualpipev" else 1) * schedule.ranks - 1


def makespan(schedule, costs):
    """The longest path through the operations, by recursion from the end; messages take no time."""
    time = {"F": costs["f"], "B": costs["b"], "Bi": costs["b"] - costs["w"], "W": costs["w"],
            "F&B": costs.get("fb", costs["f"] + costs["b"])}
    orders = [[row[rank] for row in schedule.table if row[rank]] for rank in range(schedule.ranks)]
    place = {}
    for rank, cells in enumerate(orders):
        for i, cell in enumerate(cells):
            for op in cell:
                place[op.kind[0], stage_of(schedule, rank, op.direction), op.microbatch] = rank, i

    @functools.cache
    def end(rank, i):
        before = [end(rank, i - 1)] if i else []
        for op in orders[rank][i]:
            stage = stage_of(schedule, rank, op.direction)
            inputs = {"F": [("F", stage - 1)], "W": [("B", stage)]}.get(op.kind, [("B", stage + 1), ("F", stage)])
            before += [end(*place[kind, s, op.microbatch]) for kind, s in inputs if 0 <= s <= last_stage(schedule)]
        return max(before, default=0) + time["&".join(op.kind for op in orders[rank][i])]

    for i in range(max(map(len, orders))):  # shallow first, so that the recursion stays shallow
        for rank, cells in enumerate(orders):
            if i < len(cells):
                end(rank, i)
    return max(end(rank, len(cells) - 1) for rank, cells in enumerate(orders))


def computes_the_step(schedule):
    """Executes the table with labels instead of numbers: is every gradient computed once, from the right inputs?

    Buffers are lists with the last written values. An overlapped cell may write before it reads.
    """
    top, ranks = last_stage(schedule), range(schedule.ranks)
    if not schedule.name.startswith("dual") and any(op.direction for row in schedule.table for c in row for op in c):
        return False
    buffers = {name: [[None] * getattr(schedule.slots, name) for _ in ranks]
               for name in ("activations", "deferred", "messages")}
    readers = {}  # (kind, stage, microbatch) -> [(rank, slot)], where its result must arrive
    for row in schedule.table:
        for rank, op in ((rank, op) for rank, cell in enumerate(row) for op in cell):
            if op.kind != "W":
                stage = stage_of(schedule, rank, op.direction)
                readers.setdefault((op.kind[0], stage, op.microbatch), []).append((rank, op.message))
    forwards, inputs, gradients = [], [], []

    def write(name, rank, slot, value):
        if not 0 <= slot < len(buffers[name][rank]):
            raise IndexError
        buffers[name][rank][slot] = value

    def read(name, rank, slot, expected):
        if not 0 <= slot < len(buffers[name][rank]) or buffers[name][rank][slot] != expected:
            raise ValueError

    def run(rank, op, sent):
        stage, m = stage_of(schedule, rank, op.direction), op.microbatch
        for slot, used in ((op.message, op.kind in ("B", "Bi") or (op.kind == "F" and stage > 0)),
                           (op.activation, op.kind != "W"), (op.deferred, op.kind in ("Bi", "W"))):
            if not used and slot != -1:
                raise ValueError
        if op.kind == "F":
            forwards.append((stage, m))
            if stage:
                read("messages", rank, op.message, ("F", stage - 1, m))
            write("activations", rank, op.activation, (stage, m))
            sent.append((("F", stage, m), ("F", stage + 1, m) if stage < top else ("B", top, m)))
        elif op.kind in ("B", "Bi"):
            came = ("B", stage + 1, m) if stage < top else ("F", top, m)
            read("messages", rank, op.message, came)
            read("activations", rank, op.activation, (stage, m))
            sent.append((("B", stage, m), ("B", stage - 1, m)))
            inputs.append((stage, m))
            if op.kind == "B":
                gradients.append((stage, m))
            else:
                write("deferred", rank, op.deferred, (stage, m))
        else:
            read("deferred", rank, op.deferred, (stage, m))
            gradients.append((stage, m))

    try:
        for row in schedule.table:
            sent = []
            for rank, cell in enumerate(row):
                if "&".join(op.kind for op in cell) not in ("", "F", "B", "Bi", "W", "F&B"):
                    return False
                for op in cell:
                    run(rank, op, sent)
            for what, reader in sent:
                for rank, slot in readers.get(reader, []):
                    write("messages", rank, slot, what)
    except (IndexError, ValueError):
        return False
    everything = [(stage, m) for stage in range(top + 1) for m in range(schedule.microbatches)]
    return all(sorted(done) == everything for done in (forwards, inputs, gradients))
