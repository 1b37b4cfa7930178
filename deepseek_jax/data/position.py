"""The position of a run in its sources, even after its mixture or batch size was changed, and the mixtures of its
stages.

Sequences are numbered over the run, and for each source over all that were taken from it. A change is recorded as a
mark: its first step and sequence, and the sequences taken from each source until then. Sources keep the number that
seeds their order, so no sequence is repeated before a source's next epoch.
"""

from __future__ import annotations

import bisect
from typing import Any, NamedTuple

from deepseek_jax.config import Config
from deepseek_jax.data.examples import Mixture


class Stages:
    """Consecutive mixtures; each continues its sources where the earlier ones left them."""

    def __init__(self, mixtures: list[Mixture]):
        self.mixtures, self.firsts = mixtures, [mixture.first for mixture in mixtures]

    def at(self, g: int) -> Mixture:
        """The mixture of the g-th sequence of the run."""
        return self.mixtures[bisect.bisect_right(self.firsts, g) - 1]

    def locate(self, g: int) -> tuple[int, int]:
        """(source, number of the sequence in that source) of the g-th sequence."""
        return self.at(g).locate(g)

    def given_before(self, g: int) -> list[int]:
        """For each source, the number of its sequences among those before the g-th."""
        return self.at(g).given_before(g)


class Position(NamedTuple):
    """The last change of a run's data settings.

    step, sequence: the first ones that it applies to. sources: paths of all sources ever read, by number. used:
    sequences taken from each.
    """

    step: int
    sequence: int
    sources: tuple[str, ...]
    used: tuple[int, ...]

    def sequences_before(self, config: Config, step: int) -> int:
        """Sequences that a run has read before `step`, which must not be before the change."""
        return self.sequence + config.sequences_before(step) - config.sequences_before(self.step)

    def mixture(self, config: Config) -> Stages:
        """The mixtures from the change on."""
        used, seed = [self.used[self.sources.index(path)] for path, _ in config.data.sources], config.train.seed
        made = [Mixture(config.data.weights_at(self.step), seed, self.sequence, tuple(used))]
        for step in (step for step, _ in config.data.stages if step > self.step):
            first = self.sequences_before(config, step)
            made.append(Mixture(config.data.weights_at(step), seed, first, tuple(made[-1].given_before(first))))
        return Stages(made)

    def number(self, path: str) -> int:
        """The number that seeds the order of a source."""
        return self.sources.index(path)

    def after(self, before: Config, config: Config, step: int) -> Position:
        """The position from `step` on, when `config` replaces `before`; unchanged if both read the same data."""
        if _reads(before) == _reads(config):
            return self
        sequence, used = self.sequences_before(before, step), dict(zip(self.sources, self.used))
        used |= {path: 0 for path, _ in config.data.sources if path not in used}
        given = self.mixture(before).given_before(sequence)
        used |= {path: count for (path, _), count in zip(before.data.sources, given)}
        return Position(step, sequence, tuple(used), tuple(used.values()))


def beginning(config: Config) -> Position:
    """The position of a run whose settings never changed."""
    paths = tuple(path for path, _ in config.data.sources)
    return Position(0, 0, paths, (0,) * len(paths))


def position_of(meta: dict[str, Any], config: Config) -> Position:
    """The position in the meta of a checkpoint. config: the one that it was saved with."""
    if "position" not in meta:
        return beginning(config)
    step, sequence, sources, used = meta["position"]
    return Position(step, sequence, tuple(sources), tuple(used))


def _reads(config: Config):
    """The settings that determine the sequences of a step."""
    train = config.train
    ramp = () if train.ramp_from is None else (train.ramp_until, config.ramp_levels, config.schedule_steps)
    return config.data.sources, config.data.stages, train.batch_size, ramp
