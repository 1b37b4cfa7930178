"""The definition of a study: arms that differ in one thing, the same seeds for all, a measurement, and claims (no jax).

    Study(name, arms={"none": {...}, "bias": {"balance.bias_speed": 0.005}}, seeds=(0, 1, 2), measure=Training(...),
          claims=(Claim(...), ...))

Seeds are paired: seed s gives every arm the same random numbers, so that two arms of a seed differ only in what
distinguishes the arms. A study that trains is measured by `training.Training`; one that computes has its own `Measure`.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

QUICK_SEEDS = (0, 1)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of the report, stated as a comparison that an experiment can decide.

    says: the sentence. expected: how `metric` of `arm` compares with `against`, another arm of the same seeds or a
    number.
    """

    says: str
    metric: str
    arm: str
    against: str | float
    expected: str  # "lower" or "higher"


class Job(NamedTuple):
    """One arm and the seeds to measure it with, in one worker process.

    folder: the study's work directory. tell: called with the number of steps done.
    """

    study: Study
    arm: str
    seeds: list[int]
    folder: pathlib.Path
    tell: Callable[[int], None]


class Measure(abc.ABC):
    """How the arms of a study are measured. Subclasses define `run` and `summarize`; the rest has defaults.

    resumes: finished runs are kept and not measured again. False if measuring takes seconds.
    alone: an arm gets the machine to itself. Otherwise arms run side by side, on one core each.
    devices: of a worker process, virtual ones on a CPU.
    after: {arm: the arm that it continues from, with the same seed}; that one runs first.
    """

    resumes: ClassVar[bool] = True
    alone: ClassVar[bool] = False
    devices: ClassVar[int] = 1
    after: Mapping[str, str] = {}

    @abc.abstractmethod
    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        """Yields a result, as JSON data, for each of the job's seeds, with the key "seed".

        The runner adds "seconds", unless the result has its own.
        """

    @abc.abstractmethod
    def summarize(self, study: Study, runs: list[dict[str, Any]]) -> dict[str, Any]:
        """results.json from the finished runs, which are the results of `run` with the key "arm"."""

    def lines(self, results: dict[str, Any]) -> list[str]:
        """The text that a user reads at the end."""
        return []

    def identity(self, study: Study, arm: str) -> Any:
        """As JSON data, everything that an arm's numbers depend on except machine, versions and code."""
        return [study.arms[arm], study.quick]

    def steps(self, study: Study, arm: str) -> int:
        """Steps of a seed, for the progress bar."""
        return 1

    def prepare(self, study: Study, folder: pathlib.Path) -> None:  # noqa: B027 (most studies prepare nothing)
        """Prepares what all arms share. Called once, before the workers start."""


def draw_nothing(results: dict[str, Any], runs: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """Draws nothing; for a study without pictures."""


@dataclasses.dataclass(frozen=True)
class Study:
    """One experiment.

    arms: {name: what distinguishes it}, as JSON data that `measure` understands.
    draw: makes the pictures: draw(results, runs, folder); from `results` alone if it can, then `--draw` needs no runs.
    more_seeds: {arm: seeds beyond `seeds`}, for a claim that needs more of them than the other arms do.
    quick_arms: the arms of `--quick`; none: all. quick: whether this is that short form, whose numbers mean nothing.
    json_indent, json_end: the layout of results.json.
    """

    name: str
    arms: dict[str, Any]
    measure: Measure
    draw: Callable[[dict[str, Any], list[dict[str, Any]], pathlib.Path], None] = draw_nothing
    quick_arms: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    more_seeds: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    quick_seeds: tuple[int, ...] = QUICK_SEEDS
    quick: bool = False
    json_indent: int = 1
    json_end: str = "\n"

    def __post_init__(self):
        for claim in self.claims:
            for arm in (claim.arm, claim.against):
                if isinstance(arm, str) and arm not in self.arms:
                    raise ValueError(f"{self.name}: {claim.says!r} speaks of {arm!r}, which is no arm; there are "
                                     f"{', '.join(self.arms)}.")
        if unknown := self.more_seeds.keys() - self.arms.keys():
            raise ValueError(f"{self.name}: more_seeds names {min(unknown)!r}, which is no arm; there are "
                             f"{', '.join(self.arms)}.")
        after = self.measure.after
        if wrong := [arm for arm, first in after.items() if not {arm, first} <= self.arms.keys()]:
            raise ValueError(f"{self.name}: {wrong[0]!r} comes after {after[wrong[0]]!r}, and one of them is no arm; "
                             f"there are {', '.join(self.arms)}.")

    def shortened(self) -> Study:
        """The study as `--quick` runs it."""
        return dataclasses.replace(self, quick=True)

    def selected(self) -> dict[str, tuple[int, ...]]:
        """{arm: its seeds} of what runs."""
        if self.quick:
            return dict.fromkeys(self.quick_arms or self.arms, self.quick_seeds)
        return {arm: self.seeds + self.more_seeds.get(arm, ()) for arm in self.arms}

    def waves(self, arms: list[str] | dict[str, Any]) -> list[list[str]]:
        """The arms in groups, each after the groups that its arms continue from."""
        after = self.measure.after
        depth = lambda arm: 1 + depth(after[arm]) if arm in after else 0
        return [[arm for arm in arms if depth(arm) == n] for n in sorted({depth(arm) for arm in arms})]

    def arm_hash(self, arm: str) -> str:
        """Changes with everything that an arm's numbers depend on except machine, versions and code."""
        return _digest(self.measure.identity(self, arm))

    def config_hash(self) -> str:
        """The hash of all arms, the seeds and the claims."""
        more = [] if self.quick or not self.more_seeds else [dict(self.more_seeds)]
        return _digest([{arm: self.arm_hash(arm) for arm in self.selected()},
                        self.quick_seeds if self.quick else self.seeds,
                        [dataclasses.astuple(claim) for claim in self.claims], *more])

    def run_path(self, folder: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
        """The file of a finished run. Its name contains the arm's hash: another config is another run."""
        return folder / f"{arm.replace(' ', '_')}-{seed}-{self.arm_hash(arm)}.json"


def _digest(parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
