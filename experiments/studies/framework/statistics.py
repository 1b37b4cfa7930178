"""Means over few seeds with 95 % intervals, and the verdicts that follow (no jax).

    mean +- t(0.975, n - 1) * s / sqrt(n)

With 3 seeds t is 4.30, not 1.96. Two arms are compared by the mean difference of equal seeds, so that the effect of the
seed, which is often larger than that of the arm, cancels.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

REPRODUCED, NOT_VISIBLE, CONTRADICTED = "reproduced", "not visible at this scale", "contradicted"


class Estimate(NamedTuple):
    """A mean and its 95 % interval; low and high are infinite for a single value."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and interval of one number per seed."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


def difference(ours: dict, theirs: dict | float) -> Estimate:
    """Mean difference of two arms, {seed: value} each, over their common seeds; or of an arm and a number.

    Raises:
      ValueError: no seed is in both.
    """
    if not isinstance(theirs, dict):
        theirs = dict.fromkeys(ours, theirs)
    paired = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not paired:
        raise ValueError(f"no seed is in both: {sorted(ours)} and {sorted(theirs)}; run the same seeds for all arms.")
    return estimate(paired)


def verdict(found: Estimate, expected: str) -> str:
    """The verdict on a claim that a difference is "lower" or "higher" than zero.

    If the interval contains zero, it is NOT_VISIBLE.
    """
    if expected not in ("lower", "higher"):
        raise ValueError(f"expected={expected!r} is unknown; take 'lower' or 'higher'.")
    below, above = found.high < 0, found.low > 0
    if not below and not above:
        return NOT_VISIBLE
    return REPRODUCED if below == (expected == "lower") else CONTRADICTED
