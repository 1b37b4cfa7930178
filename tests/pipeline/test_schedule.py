"""Schedules match the published numbers and the formulas, and no placement is faster in lock step."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline import make_schedule, validate
from deepseek_jax.pipeline.orders import ORDERS, Route, kind_of
from deepseek_jax.pipeline.schedule import NAMES
from deepseek_jax.pipeline.tables import stacked, tabulate
from deepseek_jax.pipeline.ticks import NOMINAL, assign_ticks, color, sources

UNIT = {"f": 1, "b": 2, "w": 1, "fb": 3}


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "fb", "makespan", "idle"),
    [
        ("dualpipe", 8, 20, 3, 66, [6] * 8),
        ("dualpipe", 8, 20, 2.5, 59, [3.5, 4, 4.5, 4.5, 4.5, 4.5, 4, 3.5]),
        ("dualpipe", 16, 60, 3, 194, [14] * 16),
        ("dualpipev", 4, 10, 3, 66, [6] * 4),
    ],
)
def test_makespan_idle_and_peak_are_those_of_upstreams_schedules(name, ranks, microbatches, fb, makespan, idle):
    schedule = make_schedule(name, ranks, microbatches)

    report = validate(schedule, UNIT | {"fb": fb})

    assert report.makespan == makespan
    assert list(report.idle) == idle
    assert report.peak_activations == (schedule.stages + 1,) * ranks


def test_at_other_costs_the_simulation_differs_from_the_formula():
    report = validate(make_schedule("dualpipe", 8, 20), {"f": 1, "b": 2.2, "w": 0.9})

    assert report.bubble == pytest.approx(8.1)
    assert max(report.idle) == pytest.approx(7.2)


def test_ranks_near_the_ends_defer_more_weight_gradients():
    schedule = make_schedule("dualpipe", 8, 20)

    deferred = [sum(kind_of(cell) == "W" for cell in schedule.order(rank)) for rank in range(4)]

    assert deferred == [7, 6, 5, 4]


def test_a_rank_of_zb1p_defers_one_weight_gradient_for_each_rank_before_it_and_the_one_at_hand():
    assert validate(make_schedule("zb1p", 8, 24), UNIT).peak_deferred == (1, 2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize("name", ["zb1p", "dualpipe", "dualpipev"])
def test_weight_gradients_are_computed_in_the_order_in_which_they_were_put_off(name):
    schedule = make_schedule(name, 4, 12)
    for rank in range(4):
        done = {kind: [(op.direction, op.microbatch) for cell in schedule.order(rank) for op in cell
                       if op.kind == kind] for kind in ("Bi", "W")}
        assert done["W"] == done["Bi"] and len(done["W"]) > 1


@pytest.mark.parametrize(("name", "costs"), [("zb1p", 1.6), ("dualpipe", 1.12), ("dualpipev", 1.12)])
def test_fewer_weight_gradients_wait_where_one_says_so(name, costs):
    """DualPipe loses little, because F&B continues meanwhile; the ranks of ZB1P have nothing else to do."""
    free = validate(make_schedule(name, 8, 64), UNIT)
    for most in (0, 1, 2):
        schedule = make_schedule(name, 8, 64, deferred=most)
        report = validate(schedule, UNIT)

        assert schedule.slots.deferred == most
        assert 1 < report.lockstep_makespan / free.lockstep_makespan < costs


def test_the_report_s_schedule_without_waiting_gradients_is_4_percent_longer():
    lockstep = {most: validate(make_schedule("dualpipe", 16, 120, most), UNIT).lockstep_makespan
                for most in (0, 1, None)}

    assert lockstep == {0: 395, 1: 387, None: 380}


@pytest.mark.parametrize("ranks", [2, 4, 6, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_idle_time_and_activations_follow_the_formulas(name, ranks):
    for microbatches in sorted({2 * ranks, 2 * ranks + 2, 3 * ranks, 4 * ranks}):
        schedule = make_schedule(name, ranks, microbatches)
        report = validate(schedule, UNIT)
        peak = {"gpipe": microbatches, "1f1b": ranks, "zb1p": ranks}.get(name, schedule.stages + 1)
        assert set(report.idle) == {report.bubble}
        assert max(report.peak_activations) == peak


@pytest.mark.parametrize(
    ("ranks", "microbatches", "ticks", "greedy", "lockstep"),
    [(4, 20, 28, 62, 62), (8, 20, 38, 72, 68), (8, 64, 82, 204, 200), (16, 60, 98, 212, 200),
     (16, 120, 158, 392, 380), (10, 26, 49, 95, 89), (12, 30, 58, 112, 104)],
)
def test_lock_step_beats_starting_everything_at_once(ranks, microbatches, ticks, greedy, lockstep):
    report = validate(make_schedule("dualpipe", ranks, microbatches), UNIT)

    assert as_soon_as_possible("dualpipe", ranks, microbatches) == (ticks, greedy)
    assert (report.ticks, report.lockstep_makespan) == (ticks, lockstep)


def as_soon_as_possible(name, ranks, microbatches):
    """(ticks, lock-step makespan) of the placement that never waits, to which the published figures refer."""
    orders, route = orders_of(name, ranks, microbatches)
    done, at, lengths = set(), [0] * ranks, []
    while any(at[rank] < len(orders[rank]) for rank in range(ranks)):
        running = [(rank, cells[i]) for rank, (cells, i) in enumerate(zip(orders, at)) if i < len(cells)
                   and all(s in done for op in cells[i] for s in sources(op, rank, route))]
        for rank, cell in running:
            at[rank] += 1
            done |= {(op.kind[0], rank, op.direction, op.microbatch) for op in cell}
        lengths.append(max(NOMINAL[kind_of(cell)] for _, cell in running))
    return len(lengths), sum(lengths)


def orders_of(name, ranks, microbatches):
    route = Route(ranks, name.startswith("dualpipe"), name == "dualpipev")
    return [ORDERS[name](rank, ranks, microbatches) for rank in range(ranks)], route


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [
    ("dualpipe", 8, 20), ("dualpipe", 12, 30), ("dualpipe", 16, 60), ("dualpipev", 4, 12), ("dualpipev", 8, 24),
    ("1f1b", 8, 24), ("zb1p", 8, 24), ("gpipe", 8, 24)])
def test_no_placement_of_the_orders_is_shorter(name, ranks, microbatches):
    """The beam search gives the same result without pruning; and every pruned tick ran all operations that fitted."""
    def length(beam):
        rows = assign_ticks(*orders_of(name, ranks, microbatches), beam=beam)
        return sum(max(NOMINAL[kind_of(cell)] for cell in row if cell) for row in rows)

    assert length(32) == length(10**9)


def test_running_what_fits_into_a_tick_is_never_worse_than_leaving_some_of_it():
    """All placements of a small schedule, also those where a rank waits without need."""
    orders, route = orders_of("dualpipe", 4, 8)
    where = {(op.kind[0], rank, op.direction, op.microbatch): (rank, i) for rank, cells in enumerate(orders)
             for i, cell in enumerate(cells) for op in cell if op.kind != "W"}
    end, best, moments = tuple(map(len, orders)), {(0,) * 4: 0}, {0: {(0,) * 4}}
    now = 0
    while end not in moments.get(now, ()):
        for state in moments.pop(now, ()):
            if best[state] < now:
                continue
            ready = [rank for rank, i in enumerate(state) if i < end[rank] and all(
                state[where[s][0]] > where[s][1] for op in orders[rank][i] for s in sources(op, rank, route))]
            for some in itertools.chain(*(itertools.combinations(ready, n + 1) for n in range(len(ready)))):
                later = now + max(NOMINAL[kind_of(orders[rank][state[rank]])] for rank in some)
                after = tuple(i + (rank in some) for rank, i in enumerate(state))
                if best.get(after, 10**9) > later:
                    best[after] = later
                    moments.setdefault(later, set()).add(after)
        now += 1

    assert validate(make_schedule("dualpipe", 4, 8), UNIT).lockstep_makespan == now


@st.composite
def sizes(draw):
    name = draw(st.sampled_from(NAMES))
    ranks = 2 * draw(st.integers(1, 5)) if name == "dualpipe" else draw(st.integers(1, 8))
    fewest = 2 * ranks if name.startswith("dualpipe") else 1
    microbatches = draw(st.integers(fewest, fewest + 12))
    return name, ranks, microbatches + (name == "dualpipe" and microbatches % 2)


@given(sizes())
@settings(max_examples=60)
def test_every_schedule_of_any_size_is_proven_and_uses_no_slot_in_vain(size):
    name, ranks, microbatches = size
    schedule = make_schedule(name, ranks, microbatches)

    report = validate(schedule)

    assert max(report.peak_activations) == schedule.slots.activations
    assert report.makespan <= report.lockstep_makespan
    assert all(any(row) for row in schedule.table)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), max_size=20))
def test_slots_are_as_many_as_live_at_once_and_never_shared(spans):
    intervals = [(key, first, first + length) for key, (first, length) in enumerate(spans)]

    slots, used = color(intervals)

    assert used == max((sum(a <= t <= b for _, a, b in intervals) for t in range(30)), default=0)
    for (key, a, b), (other, c, d) in itertools.combinations(intervals, 2):
        assert slots[key] != slots[other] or b < c or d < a


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "complaint"),
    [
        ("dualpipe", 5, 20, "ranks=5 must be even; take 6, or dualpipev"),
        ("dualpipe", 4, 9, "microbatches=9 must be even; take 10"),
        ("dualpipe", 8, 14, "needs at least 16 micro-batches"),
        ("dualpipev", 4, 7, "needs at least 8 micro-batches"),
        ("dualpip", 4, 8, "take one of gpipe, 1f1b, zb1p, dualpipe, dualpipev"),
        ("1f1b", 0, 8, "ranks=0 must be a whole number of at least 1"),
        ("1f1b", 4, 2.5, "microbatches=2.5 must be a whole number"),
    ],
)
def test_impossible_sizes_are_refused_with_what_would_do(name, ranks, microbatches, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make_schedule(name, ranks, microbatches)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe"])
def test_tables_of_several_schedules_are_those_of_each_and_idle_behind_its_end(name):
    """Also if they have other branches and other numbers of slots; no idle branch writes to a slot in use."""
    schedules = [make_schedule(name, 4, n) for n in ((2, 4, 12) if name != "dualpipe" else (8, 10, 16))]
    tables, most = stacked(schedules), max(one.slots.messages for one in schedules)
    if name != "dualpipe":
        assert len({one.slots for one in schedules}) > 1
    for i, schedule in enumerate(schedules):
        alone, ticks = tabulate(schedule), len(schedule.table)
        cells = lambda made, branch: [[made.branches[b] for b in row] for row in branch]
        assert cells(tables, tables.ranks.branch[i, :ticks]) == cells(alone, alone.ranks.branch)
        assert not any(map(any, cells(tables, tables.ranks.branch[i, ticks:])))
        assert (tables.ranks.arrivals[i, ticks:] == most).all()
        for found, expected in zip(tables.ranks[1:], alone.ranks[1:]):
            assert (found[i, :ticks] == expected).all()
        for found, expected in zip(tables.ends, alone.ends):
            assert (found[i, :ticks] == expected).all() and (found[i, ticks:] == -1).all()
        assert tables.ranks.arrivals.max() <= most and tables.ranks.branch[i].shape == (len(schedules[-1].table), 4)
