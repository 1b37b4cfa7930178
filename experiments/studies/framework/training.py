"""Studies that train: the arms differ in config keys, and each seed of an arm is a complete run in one process.

    Training(base={"train.steps": 360}, probe=acceptance, probes=6)

Step, loader and evaluation are the library's own, compiled once for all seeds of an arm. The result of a seed is a
dictionary that JSON can represent.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from deepseek_jax import io
from deepseek_jax.config import Config, as_dict, default_config, freeze
from deepseek_jax.config.load import RENAMED
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.prepare import OLD_ORDER, Prepared, prepare
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.training.evaluate import evaluate
from deepseek_jax.training.metrics import LAST_STEPS, all_layers, max_vio
from deepseek_jax.training.step import eval_step, start_state, train_step
from experiments.studies.framework import corpora
from experiments.studies.framework.results import by_arm, verdict_lines
from experiments.studies.framework.study import Job, Measure, Study

EVERY = 10  # steps that a point of a curve averages

# Small enough that one seed takes under a minute on one core, without compilation, and still a complete DeepSeek-V3.
MODEL = {"vocab_size": 1024, "d_model": 128, "num_layers": 3, "num_dense_layers": 1, "num_heads": 4, "q_rank": 48,
         "kv_rank": 32, "nope_head_dim": 16, "rope_head_dim": 16, "v_head_dim": 16, "dense_ffn_dim": 256,
         "expert_ffn_dim": 64, "num_experts": 16, "experts_per_token": 2, "num_groups": 1, "groups_kept": 1,
         "mtp_depth": 0, "dtype": "float32", "attention_block": 128}
BASE = {
    **{f"model.{name}": value for name, value in MODEL.items()},
    "data.validation_fraction": 0.15, "data.fim_rate": 0.0,
    "data.split_punctuation_rate": 0.0,  # so that every seed reads the same tokens, in its own order
    "train.steps": 300, "train.batch_size": 8, "train.sequence_length": 128,
    "train.eval_batches": 48,  # 49,152 held-out tokens, the same for every arm and seed
    "optimizer.learning_rate": 3e-3, "optimizer.warmup": 0.05, "optimizer.constant_until": 0.4,
    "balance.bias_speed": 0.005,  # 0.001 could move a bias by only 0.4 in a run of this length
    "balance.sequence_loss_weight": 0.0,  # so that arms differ in only one way of balancing
}
QUICK = {"model.vocab_size": 384, "model.d_model": 32, "model.num_layers": 2, "model.q_rank": 16, "model.kv_rank": 16,
         "model.dense_ffn_dim": 64, "model.expert_ffn_dim": 32, "data.sources": (("corpus/quick", 1.0),),
         "train.steps": 12, "train.batch_size": 4, "train.sequence_length": 64, "train.eval_batches": 2}

# Keys that are newer than the committed results, with the values that correspond to the earlier behaviour.
SINCE = (("data", "packing", "stream"), ("data", "tokenizer", None), ("data", "validation", None),
         ("data", "stages", ()), ("data", "validation_tokens", None),
         ("balance", "force_balanced", False), ("model", "latent_norm_eps", 1e-6), ("model", "index_topk", None),
         ("model", "index_heads", 64), ("model", "index_head_dim", 128), ("model", "index_warmup", False),
         ("train", "indexer_loss_weight", 1.0), ("train", "checkpoint_minutes", None),
         ("train", "checkpoint_keep_period", None), ("train", "checkpoint_local", None),
         ("train", "checkpoint_local_every", 10), ("lora", "fp8", False), ("mesh", "context", 1),
         ("mesh", "context_node", 1), ("model", "implementation", "auto"),
         ("optimizer", "schedule_steps", None), ("optimizer", "kind", "adamw"), ("optimizer", "qk_clip", None),
         ("train", "tracker", None),
         ("train", "prometheus", None), ("train", "profile", ""), ("train", "stall_minutes", None))

Probe = Callable[[Config, Any, Any, Loader, bool], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Training(Measure):
    """Trains each arm. Keys of `base`, `quick` and of the study's arms are those of config files, with dots.

    probe: further measurements of the model, at equal distances during training and at the end: probe(config, params,
      router, loader, final) -> {name: float or nested list}. probes: how often.
    corpus: a function of corpora.py that writes the texts of sources named "corpus/...".
    network: network(arm) -> config keys of the parts that the arm's model is built with, such as model.attention.
    after: {arm: the arm whose final weights, of the same seed, it starts from}. Parameters that only the arm has, such
      as the indexer of sparse attention, are initialized at random.
    """

    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    quick: dict[str, Any] = dataclasses.field(default_factory=dict)
    probe: Probe | None = None
    probes: int = 1
    corpus: Callable[[pathlib.Path], None] | None = None
    network: Callable[[str], dict[str, str]] | None = None
    after: dict[str, str] = dataclasses.field(default_factory=dict)

    def config(self, study: Study, arm: str, seed: int = 0) -> Config:
        """The complete config of one run."""
        config = default_config("tiny")
        for part in (BASE, self.base, study.arms[arm], {**QUICK, **self.quick} if study.quick else {}):
            for name, value in part.items():
                section, key = name.split(".")
                config[section][key] = value
        config.train.seed = seed
        return freeze(config)

    def located(self, study: Study, arm: str, seed: int, folder: pathlib.Path) -> Config:
        """The config with its "corpus/..." sources and its caches in the study's work directory."""
        config = self.config(study, arm, seed)
        sources = tuple((str(folder / path) if path.startswith("corpus/") else path, weight)
                        for path, weight in config.data.sources)
        data = dataclasses.replace(config.data, sources=sources, cache_dir=str(folder.parent / "cache"))
        network = self.network(arm) if self.network else {}
        parts: Any = {name.removeprefix("model."): part for name, part in network.items()}
        return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, **parts))

    def prepared(self, study: Study, arm: str, folder: pathlib.Path) -> Prepared:
        """The arm's tokens and their tokenizer."""
        config = self.located(study, arm, 0, folder)
        # A directory for each vocabulary, because it contains the tokenizer.
        made = prepare(config, str(folder / f"tokens-{config.model.vocab_size}"))
        return dataclasses.replace(made, order=OLD_ORDER)  # as in the committed results

    def identity(self, study: Study, arm: str) -> Any:
        config = as_dict(self.config(study, arm))
        del config["pipeline"], config["train"]["final_eval_batches"]  # not part of an arm's run
        del config["distill"], config["preference"], config["rollout"], config["grpo"]
        # So that results of earlier versions stay valid for their arms.
        for section, key, value in SINCE:
            if config[section][key] == value:
                del config[section][key]
        if config["lora"]["rank"] is None:
            del config["lora"]
        config["train"]["sample_prompt"] = "def "
        for old, new in RENAMED.items():
            section, name = old.split(".")
            config[section][name] = config[section].pop(new.split(".")[1])
        for name in ("router", "attention"):  # the name of `network` represents them
            del config["model"][name]
        parts = [config, _name(self.probe), self.probes, self.corpus and self.corpus.__name__, _name(self.network)]
        if arm in self.after:
            parts.append(study.arm_hash(self.after[arm]))
        return parts

    def steps(self, study: Study, arm: str) -> int:
        return self.config(study, arm).train.steps

    def prepare(self, study: Study, folder: pathlib.Path) -> None:
        """Writes the texts of the sources named "corpus/...", and tokenizes what the arms read, once."""
        if study.quick:
            corpora.quick(folder / "corpus")
        if self.corpus:
            self.corpus(folder / "corpus")
        for arm in study.selected():
            self.prepared(study, arm, folder)

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        arm = Arm(self, job)
        for seed in job.seeds:
            yield {"seed": seed, **arm.run(seed)}

    def summarize(self, study: Study, runs: list[dict[str, Any]]) -> dict[str, Any]:
        return by_arm(study, runs)

    def lines(self, results: dict[str, Any]) -> list[str]:
        return verdict_lines(results)


def _name(function) -> str | None:
    return function and f"{function.__module__}:{function.__name__}"


class Arm:
    """The compiled programs of an arm."""

    def __init__(self, measure: Training, job: Job):
        self.measure, self.job = measure, job
        self.text = measure.prepared(job.study, job.arm, job.folder)
        config = measure.located(job.study, job.arm, 0, job.folder)

        initial: Callable[..., Any] = DeepSeekV3(config.model).init

        def start(key, weights=None):
            rng, init = jax.random.split(key)
            drawn = initial(init, jnp.zeros((1, 8), jnp.int32), logits=False)
            weights = over(drawn, weights or {})
            return start_state(config, weights["params"], weights.get("router", {}), rng)

        # Only the initial state and the order of the text depend on the seed.
        self.start = jax.jit(start)
        self.step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
        self.score = jax.jit(functools.partial(eval_step, config))

    def run(self, seed: int) -> dict[str, Any]:
        """One complete run.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        measure, (study, arm, _, folder, tell) = self.measure, self.job
        config, after = measure.located(study, arm, seed, folder), measure.after
        loader, begun = Loader(config, self.text), time.perf_counter()
        state = self.start(jax.random.key(seed), load(self._weights(after[arm], seed)) if arm in after else None)
        losses, vio, probes = [], [], Probes()
        steps = config.train.steps
        for index in range(steps):
            state, metrics = self.step(state, loader.batch(index))
            metrics = jax.device_get(metrics)
            losses.append(float(metrics.loss))
            vio.append(max_vio(all_layers(metrics.counts)))
            # At equal distances, the last one at the end.
            if measure.probe and (index + 1) * measure.probes // steps > index * measure.probes // steps:
                probes.add(index + 1, measure.probe(config, state.params, state.router, loader, index + 1 == steps))
            tell(1)
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"{study.name}, {arm}, seed {seed}: the loss is not finite.")
        if arm in after.values():
            save(self._weights(arm, seed), {"params": state.params, "router": state.router})
        scored = evaluate(loader, self.score, state.params, state.router, config.train.eval_batches)
        return {"metrics": {"loss": scored.loss, "bits_per_byte": scored.bits_per_byte,
                            "max_vio_global": scored.max_vio_global, "max_vio_batch": float(np.mean(vio[-LAST_STEPS:])),
                            "train_loss": float(np.mean(losses[-LAST_STEPS:])), **probes.scalars()},
                "curves": {"train_loss": thinned(losses), "max_vio_batch": thinned(vio)},
                "probes": probes.curves(), "arrays": probes.arrays(),
                "parameters": sum(x.size for x in jax.tree.leaves(state.params)), "first_loss": losses[0],
                "corpus": [source["digest"] for source in self.text.sources],
                "seconds": round(time.perf_counter() - begun, 1)}

    def _weights(self, arm, seed):
        return self.job.study.run_path(self.job.folder, arm, seed).with_suffix(".safetensors")


def save(path: pathlib.Path, weights: dict[str, Any]) -> None:
    """Writes a file of weights atomically."""
    with io.replacing(path) as partial:
        flat: Any = traverse_util.flatten_dict(jax.device_get(weights), sep="/")
        safetensors.numpy.save_file(flat, partial)


def load(path: pathlib.Path) -> dict[str, Any]:
    return traverse_util.unflatten_dict(safetensors.numpy.load_file(path), sep="/")


def over(drawn: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """`weights`, completed by entries of `drawn` that they lack."""
    flat = traverse_util.flatten_dict
    return traverse_util.unflatten_dict(flat(drawn) | flat(weights))


class Probes:
    """Measurements of a model at several steps: floats become metrics and curves, nested lists stay arrays."""

    def __init__(self):
        self.steps, self.found = [], {}

    def add(self, step: int, values: dict[str, Any]) -> None:
        self.steps.append(step)
        for name, value in values.items():
            self.found.setdefault(name, []).append(value)

    def scalars(self) -> dict[str, float]:
        """The last value of each float, and under NAME_gained its increase since the first."""
        floats = {name: values for name, values in self.found.items() if isinstance(values[-1], float)}
        gained = {f"{name}_gained": values[-1] - values[0] for name, values in floats.items() if len(values) > 1}
        return {name: values[-1] for name, values in floats.items()} | gained

    def curves(self) -> dict[str, list]:
        """The floats that were measured at every step, by step."""
        complete = {name: values for name, values in self.found.items()
                    if isinstance(values[-1], float) and len(values) == len(self.steps)}
        return {"step": self.steps, **complete} if complete else {}

    def arrays(self) -> dict[str, list]:
        return {name: values[-1] for name, values in self.found.items() if not isinstance(values[-1], float)}


def thinned(values: list[float]) -> list[float]:
    """Means of EVERY steps; the last one averages what remains."""
    return [float(np.mean(values[i:i + EVERY])) for i in range(0, len(values), EVERY)]
