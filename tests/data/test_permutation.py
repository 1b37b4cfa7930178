"""The permutation contains every position once, and looks random."""

import numpy as np
import pytest

from deepseek_jax.data.permutation import permuted


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_place_is_taken_once(size):
    for seed in range(3):
        assert sorted(permuted(i, size, seed, 7) for i in range(size)) == list(range(size))


def test_every_part_of_the_seed_gives_another_order():
    order = lambda *seed: tuple(permuted(i, 100, *seed) for i in range(100))
    orders = [order(0, 0, 0), order(1, 0, 0), order(0, 1, 0), order(0, 0, 1), order(0, 0, 2)]
    assert len(set(orders)) == 5 and order(0, 0, 0) == orders[0]
    same = [np.mean(np.equal(a, b)) for a in orders for b in orders if a is not b]
    assert max(same) < 0.06  # of 100, on average one stays in its place by chance


def test_it_is_the_same_on_every_machine():
    assert [permuted(i, 1_000_003, 1, 2, 3) for i in range(3)] == [828146, 826563, 918741]


def test_no_place_correlates_with_its_number_or_with_that_of_its_neighbours():
    """Correlations of 20,000 positions are normal with a standard deviation of 0.0071; none of the 40 exceeds 5 of
    them.
    """
    size = 20_000
    for seed in range(4):
        places = np.array([permuted(i, size, seed) for i in range(size)])
        found = [np.corrcoef(np.arange(size), places)[0, 1]]
        found += [np.corrcoef(places[:-lag], places[lag:])[0, 1] for lag in (1, 2, 3, 4, 8, 64, 1024, 4096, 16384 // 2)]
        assert np.abs(found).max() < 5 * size**-0.5


def test_places_are_spread_evenly():
    """Chi square of the new positions of 1,000 in a row, in 50 bins: 49 degrees of freedom, so mean 49, deviation 10.
    """
    for seed in range(5):
        places = [permuted(i, 10**12 + 39, seed) for i in range(1000)]
        counts = np.histogram(places, 50, (0, 10**12 + 39))[0]
        assert 15 < ((counts - 20) ** 2 / 20).sum() < 100


def test_of_five_every_order_comes_up():
    """Too few rounds of the network would show in small domains: 120 orders, 6,000 seeds, so about 50 of each order."""
    seen = {}
    for seed in range(6000):
        order = tuple(permuted(i, 5, seed) for i in range(5))
        seen[order] = seen.get(order, 0) + 1
    chi = sum((n - 50) ** 2 / 50 for n in seen.values())
    assert len(seen) == 120 and chi < 119 + 5 * 238**0.5
