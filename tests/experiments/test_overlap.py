"""Two clocks over a compiled program: what products hide of a transfer, and what the device waits for."""

import json
import pathlib

import pytest

from deepseek_jax.scale.compile.hlo import Collective, Step
from experiments.studies.pipeline import overlap

TOKENS, IDS = (Collective("all-to-all", ("local",), size, 1, True, None) for size in (1000, 10))
RESULTS = pathlib.Path(overlap.__file__).parent / "overlap.json"


def started(key, collective=TOKENS):
    return Step("start", key, collective)


def work(flops):
    return Step("work", products=1, flops=flops)


def clocked(*steps):
    """Transfers take 4 s, products a second a FLOP. -> [(FLOPs between, seconds waited)]"""
    found = overlap.clocked(steps, lambda one: one.bytes > 100, seconds=4.0, rate=1.0)
    return [(t.flops, t.waited) for t in found]


def test_products_between_start_and_done_hide_a_transfer():
    assert clocked(work(9), started("a"), work(3), work(2), Step("done", "a"), work(7)) == [(5, 0)]
    assert clocked(started("a"), work(3), Step("done", "a")) == [(3, 1)]


def test_a_transfer_that_is_not_asynchronous_is_waited_for():
    assert clocked(work(3), Step("synchronous", "a", TOKENS), work(3)) == [(0, 4)]


def test_transfers_follow_each_other():
    assert clocked(started("a"), started("b"), work(5), Step("done", "a"), Step("done", "b")) == [(5, 0), (5, 3)]


def test_what_the_device_waited_for_one_transfer_passes_for_the_next():
    assert clocked(started("a"), Step("done", "a"), work(1), started("b"), work(4), Step("done", "b")) == [
        (0, 4), (4, 0)]


def test_ids_and_gates_take_no_time():
    assert clocked(started("i", IDS), Step("done", "i"), Step("synchronous", "j", IDS)) == []


def test_products_over_the_rows_of_all_experts_count_once():
    rows = overlap.CAPACITY * 1024 * overlap.MODEL.experts_per_token
    one = 2 * rows * overlap.MODEL.d_model * overlap.MODEL.expert_ffn_dim

    assert overlap.worth(4 * one, 1024) == one
    assert overlap.worth(one / 2, 1024) == one / 2


def test_the_compiled_layouts_are_those_of_the_schedules():
    for schedule in overlap.CELLS:
        layout = overlap.layout_of(schedule, 1024)
        assert (layout.mesh.devices, layout.pipeline.name, layout.tokens) == (128, schedule, 1024)


def test_exposed_shares_are_those_of_the_committed_transfers():
    for row in json.loads(RESULTS.read_text())["rows"]:
        waited, seconds = (sum(t[name] for t in row["transfers"]) for name in ("waited", "seconds"))
        assert row["exposed"] == pytest.approx(waited / seconds)
