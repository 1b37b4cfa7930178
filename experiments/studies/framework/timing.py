"""Seconds of a training step on all cores, for several configs in turns.

Studies that compare at equal time compute their number of steps from a file of these. Since the configs are timed in
turns, a drift in the machine's speed affects all of them equally; a figure is the median of the first config's turns
times the median of the ratios to it within a turn.
"""

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from deepseek_jax import io
from deepseek_jax.config import Config
from deepseek_jax.training.step import init_state, train_step
from experiments.studies.framework.results import provenance
from experiments.studies.framework.study import Study
from experiments.studies.framework.training import Training

TIMED = 10  # steps of one turn


def write_seconds(name: str, arms: dict[str, dict], path: pathlib.Path, turns: int = 30) -> None:
    """Measures {arm: keys of its config} and writes {"seconds": {arm: of a step}, ...}; prints them.

    name: of the study, whose module `timing` calls this.
    """
    measure = Training()
    study = Study("timing", arms, measure)
    steps = {arm: stepper(measure.config(study, arm)) for arm in arms}
    found = {arm: [] for arm in arms}
    for _ in range(turns):
        for arm, step in steps.items():
            begun = time.perf_counter()
            for _ in range(TIMED):
                step()
            found[arm].append((time.perf_counter() - begun) / TIMED)
    first = next(iter(found))
    ratios = {arm: [x / base for x, base in zip(one, found[first], strict=True)] for arm, one in found.items()}
    base = statistics.median(found[first])
    middle = {arm: round(base * statistics.median(one), 5) for arm, one in ratios.items()}
    spread = {arm: [round(x, 3) for x in statistics.quantiles(one, n=4)[::2]] for arm, one in ratios.items()}
    quartiles = {arm: [round(x, 5) for x in statistics.quantiles(one, n=4)[::2]] for arm, one in found.items()}
    io.write_json(path, {"seconds": middle, "quartiles": quartiles, "quartiles_of_ratios": spread, "turns": turns,
                         "steps_a_turn": TIMED,
                         "command": f"python -m experiments.studies.{name}.timing", **provenance()}, indent=1)
    print("\n".join(f"{arm}: {1000 * x:.1f} ms a step, {x / middle[first]:.2f} of that of {first}"
                    for arm, x in middle.items()))


def stepper(config: Config) -> Callable[[], None]:
    """A function that takes one step of its own model, on random tokens, and waits for it."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=10_000))
    rows = config.train.batch_size, config.train.sequence_length + 1
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, *rows), np.int32)
    batch = {"tokens": tokens, "weights": np.ones(tokens.shape, np.float32),
             "segment_ids": np.zeros(tokens.shape, np.int32), "active": np.int32(1)}
    state = [jax.jit(functools.partial(init_state, config))()]
    program = jax.jit(functools.partial(train_step, config), donate_argnums=0)

    def step():
        state[0], metrics = program(state[0], batch)
        jax.block_until_ready(metrics)

    step()
    return step
