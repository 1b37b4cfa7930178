"""The validator accepts a table exactly when executing it computes the step."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline import ScheduleError, make_schedule, validate
from deepseek_jax.pipeline.schedule import NAMES
from tests.pipeline import oracle

SMALL = [make_schedule(name, ranks, microbatches) for name, ranks, microbatches in
         [("gpipe", 3, 4), ("1f1b", 3, 5), ("zb1p", 3, 5), ("dualpipe", 4, 8), ("dualpipe", 2, 6), ("dualpipev", 2, 5),
          ("dualpipev", 3, 6)]]
SLOTS = ("message", "activation", "deferred")


@given(st.sampled_from(NAMES), st.integers(1, 4), st.integers(0, 6), st.integers(1, 40), st.integers(1, 40),
       st.integers(1, 40), st.integers(1, 80))
@settings(max_examples=80)
def test_makespan_is_the_longest_path_at_any_costs(name, half, more, f, bi, w, fb):
    microbatches = 4 * half + 2 * more
    schedule = make_schedule(name, 2 * half if name != "dualpipev" else half, microbatches)
    costs = {"f": f, "b": bi + w, "w": w, "fb": fb}

    report = validate(schedule, costs)

    assert report.makespan == oracle.makespan(schedule, costs)


def all_ops(table):
    return [(t, r, i) for t, row in enumerate(table) for r, cell in enumerate(row) for i in range(len(cell))]


def lose(rng, table, schedule):
    t, r, i = rng.choice(all_ops(table))
    del table[t][r][i]


def repeat(rng, table, schedule):
    t, r, i = rng.choice(all_ops(table))
    rng.choice(table)[r].append(table[t][r][i])


def rename(rng, table, schedule):
    t, r, i = rng.choice(all_ops(table))
    op = table[t][r][i]
    field, values = rng.choice([("kind", ["F", "B", "Bi", "W"]), ("microbatch", range(schedule.microbatches + 1)),
                                ("direction", [0, 1])])
    table[t][r][i] = op._replace(**{field: rng.choice([v for v in values if v != getattr(op, field)])})


def point_elsewhere(rng, table, schedule):
    t, r, i = rng.choice(all_ops(table))
    op, field = table[t][r][i], rng.choice(SLOTS)
    values = [v for v in range(-1, max(schedule.slots) + 1) if v != getattr(op, field)]
    table[t][r][i] = op._replace(**{field: rng.choice(values)})


def share_a_slot(rng, table, schedule):
    """Moves a value, where it is written and read, to another slot, which may or may not be free."""
    t, r, i = rng.choice([(t, r, i) for t, r, i in all_ops(table) if table[t][r][i].kind == "F"])
    new = rng.randrange(schedule.slots.activations)
    for row in table:
        row[r] = [op._replace(activation=new) if op[1:3] == table[t][r][i][1:3] and op.kind != "W" else op
                  for op in row[r]]


def swap_cells(rng, table, schedule):
    r, (a, b) = rng.randrange(schedule.ranks), rng.sample(range(len(table)), 2)
    table[a][r], table[b][r] = table[b][r], table[a][r]


def swap_ranks(rng, table, schedule):
    t, (a, b) = rng.randrange(len(table)), rng.sample(range(schedule.ranks), 2)
    table[t][a], table[t][b] = table[t][b], table[t][a]


def swap_ticks(rng, table, schedule):
    a, b = rng.sample(range(len(table)), 2)
    table[a], table[b] = table[b], table[a]


def merge_cells(rng, table, schedule):
    r, a = rng.randrange(schedule.ranks), rng.randrange(len(table) - 1)
    table[a][r], table[a + 1][r] = table[a][r] + table[a + 1][r], []


def split_a_cell(rng, table, schedule):
    """Legal in itself: the halves of an overlapped cell one after the other, each in its own tick."""
    t, r = rng.choice([(t, r) for t, r, _ in all_ops(table)])
    second = table[t][r][1:]
    del table[t][r][1:]
    table.insert(t + 1, [second if rank == r else [] for rank in range(schedule.ranks)])


def fewer_slots(rng, table, schedule):
    return dataclasses.replace(schedule, slots=schedule.slots._replace(
        **{rng.choice([name for name in schedule.slots._fields if getattr(schedule.slots, name)]): 0}))


CORRUPTIONS = [lose, repeat, rename, point_elsewhere, share_a_slot, swap_cells, swap_ranks, swap_ticks, merge_cells,
               split_a_cell, fewer_slots]


def corrupted(corruption, rng, schedule):
    table = [[list(cell) for cell in row] for row in schedule.table]
    schedule = corruption(rng, table, schedule) or schedule
    return dataclasses.replace(schedule, table=tuple(tuple(map(tuple, row)) for row in table))


def accepted(schedule):
    try:
        validate(schedule)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupted_table_is_accepted_only_if_it_still_computes_the_step(corruption):
    rng = random.Random(corruption.__name__)
    verdicts = []
    for _ in range(500):
        schedule = corrupted(corruption, rng, rng.choice(SMALL))
        verdicts.append(accepted(schedule))
        assert verdicts[-1] == oracle.computes_the_step(schedule), schedule
    assert not all(verdicts)
    if corruption in (lose, repeat, rename, fewer_slots):
        assert not any(verdicts)


@pytest.mark.parametrize("seed", range(2))
def test_several_corruptions_at_once_do_not_hide_each_other(seed):
    rng = random.Random(seed)
    for _ in range(500):
        schedule = rng.choice(SMALL)
        for corruption in rng.choices(CORRUPTIONS[:-1], k=3):
            schedule = corrupted(corruption, rng, schedule)
        assert accepted(schedule) == oracle.computes_the_step(schedule), schedule


def test_the_untouched_tables_are_accepted():
    assert all(accepted(schedule) and oracle.computes_the_step(schedule) for schedule in SMALL)


def edited(schedule, tick, rank, cell):
    rows = [list(row) for row in schedule.table]
    rows[tick][rank] = cell
    return dataclasses.replace(schedule, table=tuple(map(tuple, rows)))


def first(schedule, rank, kind):
    return next((t, row[rank]) for t, row in enumerate(schedule.table) if row[rank] and row[rank][0].kind == kind)


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("lost", "F of micro-batch 0 in direction 0 on rank 1 is missing"),
        ("twice", "F of micro-batch 0 in direction 0 on rank 1 runs twice, first at tick 1"),
        ("foreign", "F of micro-batch 4 in direction 0 on rank 1 does not belong there"),
        ("early", "tick 0: F of micro-batch 0 in direction 0 on rank 1 needs F of micro-batch 0 in direction 0 on rank "
                  "0, which runs at tick 0, not before"),
        ("deadlock", "deadlock: B of micro-batch 0 in direction 0 on rank 1 waits for ever for F of micro-batch 0"),
        ("overwritten", "activations slot|activation slot 0 on rank 0 is overwritten for B of micro-batch"),
    ],
)
def test_the_complaint_says_what_is_wrong(what, complaint):
    schedule = make_schedule("1f1b", 2, 4)
    tick, cell = first(schedule, 1, "F")
    bad = {
        "lost": lambda: edited(schedule, tick, 1, ()),
        "twice": lambda: edited(schedule, len(schedule.table) - 1, 1, cell),
        "foreign": lambda: edited(schedule, tick, 1, (cell[0]._replace(microbatch=4),)),
        "early": lambda: edited(edited(schedule, tick, 1, ()), 0, 1, cell),
        "deadlock": lambda: edited(edited(schedule, tick, 1, first(schedule, 1, "B")[1]),
                                   first(schedule, 1, "B")[0], 1, cell),
        "overwritten": lambda: dataclasses.replace(schedule, table=tuple(
            tuple(tuple(op._replace(activation=0) for op in cell) for cell in row) for row in schedule.table)),
    }[what]()

    with pytest.raises(ScheduleError, match=complaint):
        validate(bad)


@pytest.mark.parametrize(
    ("costs", "complaint"),
    [
        ({"f": 1, "b": 2}, "costs lack w"),
        ({"f": 1, "b": 2, "w": 1, "bw": 1}, "costs have no bw"),
        ({"f": -1, "b": 2, "w": 1}, "must be finite and not negative"),
        ({"f": 1, "b": float("nan"), "w": 1}, "must be finite and not negative"),
        ({"f": 1, "b": float("inf"), "w": 1}, "must be finite and not negative"),
        ({"f": 1, "b": 1, "w": 2}, "part of the backward pass"),
    ],
)
def test_costs_that_make_no_sense_are_refused(costs, complaint):
    with pytest.raises(ConfigError, match=complaint):
        validate(SMALL[0], costs)
