"""Seconds of a training step of each kind on all cores, which equal time is computed from.

    python -m experiments.studies.dense.timing        writes seconds.json; the study's steps follow from it

The kinds take turns, so that a machine whose speed drifts is equally fast for all of them; the figure is the median.
"""

import dataclasses
import functools
import statistics
import time

import jax
import numpy as np

from deepseek_jax import cli, io
from deepseek_jax.training.step import init_state, train_step
from experiments.studies.dense.kinds import KINDS, SECONDS
from experiments.studies.framework.results import provenance
from experiments.studies.framework.study import Study
from experiments.studies.framework.training import Training

TURNS, TIMED = 30, 10  # turns of each kind, and the steps of one


def main() -> None:
    steps = {kind: _stepper(kind) for kind in KINDS}
    found = {kind: [] for kind in KINDS}
    for _ in range(TURNS):
        for kind, step in steps.items():
            begun = time.perf_counter()
            for _ in range(TIMED):
                step()
            found[kind].append((time.perf_counter() - begun) / TIMED)
    middle = {kind: round(statistics.median(one), 5) for kind, one in found.items()}
    quartiles = {kind: [round(x, 5) for x in statistics.quantiles(one, n=4)[::2]] for kind, one in found.items()}
    io.write_json(SECONDS, {"seconds": middle, "quartiles": quartiles, "turns": TURNS, "steps_a_turn": TIMED,
                            "command": "python -m experiments.studies.dense.timing", **provenance()}, indent=1)
    print("\n".join(f"{kind}: {1000 * middle[kind]:.1f} ms a step, {middle[kind] / middle['mixture']:.2f} of the "
                    "mixture's" for kind in KINDS))


def _stepper(kind):
    """A function that takes one step of `kind` and waits for it."""
    measure = Training()
    config = measure.config(Study("timing", KINDS, measure), kind)
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


if __name__ == "__main__":
    cli.run(main)
