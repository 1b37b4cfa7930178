"""Trains one arm of a study, seed after seed: the library's own step, loader and evaluation, compiled once.

Runs in a worker process. What a seed gives is a dictionary that JSON can hold.
"""

import contextlib
import functools
import importlib
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from deepseek_jax import io
from deepseek_jax.data.loader import Loader
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.training.evaluate import evaluate
from deepseek_jax.training.metrics import all_layers, max_vio
from deepseek_jax.training.step import eval_step, start_state, train_step
from experiments.studies.framework.corpora import located, prepare_data
from experiments.studies.framework.runner import result_path, weights_path
from experiments.studies.framework.study import Study

EVERY = 10  # steps that a point of a curve averages
LAST = 50  # steps whose mean is the balance of a batch at the end of a run


def find(name: str):
    """"module:function" -> function."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


class Arm:
    """The compiled programs of an arm."""

    def __init__(self, study: Study, arm: str, quick: bool, workdir: pathlib.Path):
        self.study, self.arm, self.quick, self.workdir = study, arm, quick, workdir
        self.prepared, self.corpus = prepare_data(study, arm, quick, workdir)
        config = located(study.config(arm, 0, quick), workdir)

        def start(key, weights=None):
            rng, init = jax.random.split(key)
            weights = weights or DeepSeekV3(config.model).init(init, jnp.zeros((1, 8), jnp.int32), logits=False)
            return start_state(config, weights["params"], weights.get("router", {}), rng)

        # Nothing but the start and the order of the text depends on the seed.
        self.start = jax.jit(start)
        self.step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
        self.score = jax.jit(functools.partial(eval_step, config))
        self.probe = find(study.probe) if study.probe else None

    def run(self, seed: int, tell=lambda steps: None) -> dict:
        """One whole run. `tell` hears of every step."""
        config = located(self.study.config(self.arm, seed, self.quick), self.workdir)
        loader, begun = Loader(config, self.prepared), time.perf_counter()
        first = self.study.after.get(self.arm)
        state = self.start(jax.random.key(seed), first and load(self._weights(first, seed)))
        losses, vio, probes = [], [], Probes()
        steps = config.train.steps
        for index in range(steps):
            state, metrics = self.step(state, loader.batch(index))
            metrics = jax.device_get(metrics)
            losses.append(float(metrics.loss))
            vio.append(max_vio(all_layers(metrics.counts)))
            # At equal distances, the last one at the end.
            if self.probe and (index + 1) * self.study.probes // steps > index * self.study.probes // steps:
                probes.add(index + 1, self.probe(config, state.params, state.router, loader, index + 1 == steps))
            tell(1)
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"{self.study.name}, {self.arm}, seed {seed}: the loss is not finite.")
        if self.arm in self.study.after.values():
            save(self._weights(self.arm, seed), {"params": state.params, "router": state.router})
        scored = evaluate(loader, self.score, state.params, state.router, config.train.eval_batches)
        return {"metrics": {**scored._asdict(), "max_vio_batch": float(np.mean(vio[-LAST:])),
                            "train_loss": float(np.mean(losses[-LAST:])), **probes.scalars()},
                "curves": {"train_loss": thinned(losses), "max_vio_batch": thinned(vio)},
                "probes": probes.curves(), "arrays": probes.arrays(),
                "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
                "first_loss": losses[0], "corpus": self.corpus, "seconds": round(time.perf_counter() - begun, 1)}

    def _weights(self, arm, seed):
        return weights_path(self.study, arm, seed, self.quick, self.workdir)


def save(path: pathlib.Path, weights):
    with io.replacing(path) as partial:
        safetensors.numpy.save_file(traverse_util.flatten_dict(jax.device_get(weights), sep="/"), partial)


def load(path: pathlib.Path):
    return traverse_util.unflatten_dict(safetensors.numpy.load_file(path), sep="/")


class Probes:
    """What was measured of a model at several steps: floats become metrics and curves, nested lists stay arrays."""

    def __init__(self):
        self.steps, self.found = [], {}

    def add(self, step: int, values: dict):
        self.steps.append(step)
        for name, value in values.items():
            self.found.setdefault(name, []).append(value)

    def scalars(self) -> dict:
        """The last value of each float, and under NAME_gained what it gained since the first."""
        floats = {name: values for name, values in self.found.items() if isinstance(values[-1], float)}
        gained = {f"{name}_gained": values[-1] - values[0] for name, values in floats.items() if len(values) > 1}
        return {name: values[-1] for name, values in floats.items()} | gained

    def curves(self) -> dict:
        """The floats that were measured every time, by step."""
        whole = {name: values for name, values in self.found.items()
                 if isinstance(values[-1], float) and len(values) == len(self.steps)}
        return {"step": self.steps, **whole} if whole else {}

    def arrays(self) -> dict:
        return {name: values[-1] for name, values in self.found.items() if not isinstance(values[-1], float)}


def thinned(values):
    """Means of EVERY steps, the rest at the end in one."""
    return [float(np.mean(values[i:i + EVERY])) for i in range(0, len(values), EVERY)]


def run_arm(study: Study, arm: str, seeds, quick: bool, workdir: pathlib.Path, tell=lambda steps: None):
    """Runs the seeds of an arm and writes each one's file as it ends."""
    network = find(study.network)(arm) if study.network else contextlib.nullcontext()
    with network:
        compiled = Arm(study, arm, quick, workdir)
        for seed in seeds:
            result = {"arm": arm, "seed": seed, **compiled.run(seed, tell)}
            path = result_path(study, arm, seed, quick, workdir)
            io.write_json(path, result, indent=None)

