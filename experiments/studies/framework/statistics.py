"""Means of few seeds with honest intervals, and what they allow to say (no jax).

    mean +- t(0.975, n - 1) * s / sqrt(n)

With 3 seeds t is 4.30, not 1.96. Between arms the differences of the same seed are averaged, so that what a seed
makes, usually more than what an arm makes, drops out.
"""

import math
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


def estimate(values) -> Estimate:
    """Of one number a seed."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


def difference(ours: dict, theirs) -> Estimate:
    """Of two arms, {seed: value} each, over the seeds that both have; or of an arm and a number.

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
    """What an interval of a difference allows to say of "lower" or "higher": nothing while it holds zero."""
    if expected not in ("lower", "higher"):
        raise ValueError(f"expected={expected!r} is unknown; take 'lower' or 'higher'.")
    below, above = found.high < 0, found.low > 0
    if not below and not above:
        return NOT_VISIBLE
    return REPRODUCED if below == (expected == "lower") else CONTRADICTED
