"""Clocks over a compiled program: how much of an exchange products hide, and for what the device waits."""

import pytest

from deepseek_jax.config import FP8Config, model_config
from deepseek_jax.scale import memory, traffic
from deepseek_jax.scale.compile import clock
from deepseek_jax.scale.compile.hlo import Collective, Step
from deepseek_jax.scale.hardware import Measured, hardware
from deepseek_jax.scale.layout import Split, make_layout

TOKENS, SIZES = (Collective("ragged-all-to-all", ("local",), size, 1, True, None) for size in (1000, 10))
ACROSS = Collective("ragged-all-to-all", ("node",), 1000, 1, True, None)


def started(key, collective=TOKENS):
    return Step("start", key, collective)


def work(flops, fp8=0.0):
    return Step("work", products=1, flops=flops, fp8=fp8)


def clocked(*steps):
    """Transfers take 4 s, products 1 s per FLOP, half of that in FP8. -> [(FLOPs in between, seconds waited)]"""
    found = clock.clocked(steps, lambda one: 4.0 * (one.bytes > 100), clock.Rates(bf16=1.0, fp8=2.0))
    return [(t.flops, t.waited) for t in found]


def test_products_between_start_and_done_hide_a_transfer():
    assert clocked(work(9), started("a"), work(3), work(2), Step("done", "a"), work(7)) == [(5, 0)]
    assert clocked(started("a"), work(3), Step("done", "a")) == [(3, 1)]


def test_products_in_fp8_hide_less():
    assert clocked(started("a"), work(6, fp8=4), Step("done", "a")) == [(6, 0)]
    assert clocked(started("a"), work(6, fp8=6), Step("done", "a")) == [(6, 1)]


def test_a_transfer_that_is_not_asynchronous_is_waited_for():
    assert clocked(work(3), Step("synchronous", "a", TOKENS), work(3)) == [(0, 4)]


def test_transfers_of_a_network_follow_each_other_and_those_of_two_do_not():
    two = started("a"), work(5), Step("done", "a"), Step("done", "b")
    assert clocked(two[0], started("b"), *two[1:]) == [(5, 0), (5, 3)]
    assert clocked(two[0], started("b", ACROSS), *two[1:]) == [(5, 0), (5, 0)]


def test_what_the_device_waited_for_one_transfer_passes_for_the_next():
    assert clocked(started("a"), Step("done", "a"), work(1), started("b"), work(4), Step("done", "b")) == [
        (0, 4), (4, 0)]


def test_what_takes_no_time_is_no_transfer():
    assert clocked(started("i", SIZES), Step("done", "i"), Step("synchronous", "j", SIZES)) == []


@pytest.mark.parametrize("capacity", [1.25, 5.0, None])
@pytest.mark.parametrize("expert", [8, 32, 64])
def test_an_exchange_takes_what_the_planner_counts_whatever_room_its_buffer_has(capacity, expert):
    c = model_config("v3_671b", fp8=FP8Config(enabled=True))
    layout = make_layout(c, Split(2048, 16, expert), 15360, buffers="ragged", capacity=capacity, dispatch_fp8=True)
    hw, m = hardware("h800"), Measured()
    takes, sent = clock.exchanges(c, layout, hw, m), traffic.layer_traffic(c, layout)

    rows = traffic.rooms(c, layout)
    assert [*rows.values()][-1] == memory.rows_of_experts(c, layout)[0]
    for axes, rate, where in ((("node",), m.dispatch * hw.node_bandwidth, "across"),
                              (("local",), m.local * hw.local_bandwidth, "inside")):
        if axes in rows:
            full = Collective("ragged-all-to-all", axes, int(rows[axes] * traffic.copy_bytes(c, True)), 1, True, None)
            assert takes(full) == pytest.approx(sent[f"dispatch {where}"] / rate, rel=1e-6)
    assert takes(Collective("all-gather", ("node",), 1000, 1, True, None)) == 0
    assert takes(Collective("all-to-all", ("replica", "node"), 1000, 1, True, None)) == 0


def test_a_flat_exchange_takes_as_long_as_its_slower_network():
    c = model_config("v3_671b", fp8=FP8Config(enabled=True))
    layout = make_layout(c, Split(2048, 16, 64), 15360, buffers="ragged", capacity=1.25, dispatch="flat")
    hw, m = hardware("h800"), Measured()
    (axes, rows), = traffic.rooms(c, layout).items()
    takes = clock.exchanges(c, layout, hw, m)(Collective("ragged-all-to-all", axes, 100 * rows, 1, True, None))
    n = traffic.copies(c, layout)

    assert takes == pytest.approx(100 * layout.tokens * n["across"] / (m.dispatch * hw.node_bandwidth))
