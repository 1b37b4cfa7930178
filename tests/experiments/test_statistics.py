"""Intervals and verdicts of studies, held to published tables."""

import math

import pytest

from experiments.studies.framework.statistics import (
    CONTRADICTED,
    NOT_VISIBLE,
    REPRODUCED,
    Estimate,
    difference,
    estimate,
    verdict,
)


def test_three_seeds_take_their_quantile_from_students_table():
    found = estimate([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.3027 in any table
    assert found.mean == 2 and found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_five_seeds_take_theirs():
    found = estimate([2.0, 4.0, 4.0, 4.0, 6.0])  # s = sqrt(2), t(0.975, 4) = 2.7764
    assert found.high - 4 == pytest.approx(2.7764 * math.sqrt(2 / 5), abs=1e-4)


def test_one_seed_says_nothing():
    assert estimate([3.0]) == (3.0, -math.inf, math.inf)
    assert verdict(estimate([-3.0]), "lower") == NOT_VISIBLE


def test_pairing_takes_out_what_a_seed_makes():
    ours, theirs = {0: 1.1, 1: 5.12, 2: 9.11}, {0: 1.0, 1: 5.0, 2: 9.0}
    assert difference(ours, theirs).low > 0 > estimate(list(ours.values())).low


def test_only_seeds_that_both_arms_have_are_compared():
    assert difference({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.0, 0: 0.5, 8: -9.0}).mean == pytest.approx(0.75)
    with pytest.raises(ValueError, match="no seed is in both"):
        difference({0: 1.0}, {1: 1.0})


def test_a_number_stands_for_an_arm_without_seeds():
    assert difference({0: 0.9, 1: 0.7}, 0.5).mean == pytest.approx(0.3)


@pytest.mark.parametrize(("low", "high", "expected", "says"), [
    (-2, -1, "lower", REPRODUCED), (1, 2, "lower", CONTRADICTED), (-1, 2, "lower", NOT_VISIBLE),
    (1, 2, "higher", REPRODUCED), (-2, -1, "higher", CONTRADICTED), (-2, 1, "higher", NOT_VISIBLE),
    (0, 1, "higher", NOT_VISIBLE), (-1, 0, "lower", NOT_VISIBLE),
])
def test_a_verdict_needs_an_interval_without_zero(low, high, expected, says):
    assert verdict(Estimate((low + high) / 2, low, high), expected) == says


def test_a_claim_has_a_direction():
    with pytest.raises(ValueError, match="take 'lower' or 'higher'"):
        verdict(Estimate(0, -1, 1), "equal")
