"""The run: batches in, steps, what is written down, what survives.

    config + workdir -> data, state (fresh, fine-tuned or resumed) -> steps -> metrics, checkpoints, evaluation

The same command resumes: everything that a step depends on is in the checkpoint or a function of the step number.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import time

import chex
import jax
import numpy as np
import tqdm

from deepseek_jax.checkpoint.manager import Checkpoints, restore_items
from deepseek_jax.config import Config, ConfigError, MeshConfig, PipelineConfig, as_dict, freeze
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.prepare import claim_corpus, prepare
from deepseek_jax.parallel.dispatch import traffic_per_token
from deepseek_jax.parallel.processes import anywhere, check_same, first_then_others, is_first, wait_for_all
from deepseek_jax.parallel.runner import Devices
from deepseek_jax.pipeline.model import check, describe
from deepseek_jax.scale.costs import training_flops_per_token
from deepseek_jax.training.metrics import MetricsWriter, max_vio
from deepseek_jax.training.step import eval_step, init_state, start_state, train_step
from deepseek_jax.training.throughput import peak_flops


def all_layers(counts):
    """Counts of the MoE layers and of the MTP modules, one array [layers, E]; [0, 0] for a dense model."""
    return np.concatenate([np.asarray(c) for _, c in sorted(counts.items())]) if counts else np.zeros((0, 0), np.int32)


def claim_workdir(config: Config, workdir: str):
    """Writes the config into a work directory that has none."""
    path = pathlib.Path(workdir) / "config.json"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(as_dict(config), indent=2) + "\n")
    os.replace(beside, path)


def check_workdir(config: Config, workdir: str):
    """Raises ConfigError when the work directory holds another config; the message lists the differences."""
    if not (pathlib.Path(workdir) / "config.json").exists():
        return
    elsewhere = dict(mesh=MeshConfig(), pipeline=PipelineConfig())  # a run may go on on another mesh
    ours, theirs = (as_dict(dataclasses.replace(c, **elsewhere)) for c in (config, load_workdir_config(workdir)))
    differences = _differences(ours, theirs)
    if differences:
        raise ConfigError(f"{workdir} holds a run with another config: {'; '.join(differences)}; take that config "
                          "or another --workdir.")


def load_workdir_config(workdir: str) -> Config:
    """The config of a run. Raises ConfigError when the directory holds none."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} holds no config.json; give the --workdir of a run.")
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ConfigError(f"{path} is not JSON ({error}); restore it, or take another --workdir.") from error
    return freeze(saved)


def _differences(ours, theirs, prefix=""):
    out = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} is {b!r} there, {a!r} here")
    return out


def starting_state(config: Config, devices: Devices | None = None):
    """A fresh state, or one around the weights of the run that config.init.from names."""
    devices = devices or Devices(config)
    fresh = jax.eval_shape(functools.partial(init_state, config))
    where = devices.shardings(fresh)
    if config.init.from_ is None:
        return jax.jit(functools.partial(init_state, config), out_shardings=where)()
    abstract = devices.placed({"params": fresh.params, "router": fresh.router})
    items, _, _ = restore_items(config.init.from_, abstract=abstract)
    begin = functools.partial(start_state, config)
    if where is not None:
        begin = jax.jit(begin, out_shardings=where)
    return begin(items["params"], items["router"], jax.random.key(config.train.seed))


def evaluate(config: Config, loader: Loader, step_fn, params, router, limit=0):
    """Main-head loss over `limit` validation batches; 0: all of them.

    Returns:
      {"loss": nats per token, "bits_per_byte", "max_vio_global": balance over all of them together}.
    """
    nats = weight = 0.0
    counts = None
    for micro in loader.validation_batches(loader.rows, limit):
        sums = jax.device_get(step_fn(params, router, micro))
        nats, weight = nats + float(sums["nats"]), weight + float(sums["weight"])
        counts = sums["counts"] if counts is None else jax.tree.map(np.add, counts, sums["counts"])
    return {"loss": nats / weight, "bits_per_byte": nats / math.log(2) / loader.validation_bytes(loader.rows, limit),
            "max_vio_global": max_vio(all_layers(counts))}


def train(config: Config, workdir: str):
    """Trains to config.train.steps, resuming what the work directory holds.

    Returns:
      (state, Loader), or None when SIGTERM ended the run early (its state is saved), and in all processes but the
      first. The state of several devices has only parameters and biases, on the host, if a sample is asked for.

    Raises:
      ConfigError: bad data, another config's work directory, a mesh that does not fit, or a loss that is not finite.
      CheckpointError: a checkpoint that could not be written.
    """
    check(config)
    devices = Devices(config)
    check_same(repr(config))
    check_workdir(config, workdir)
    prepared = first_then_others(lambda: prepare(config, workdir), "prepare")
    loader = Loader(config, prepared, *devices.share())
    if is_first():
        claim_corpus(prepared, workdir)  # now that it is known to be good
        claim_workdir(config, workdir)
    run = Run(config, workdir, loader, devices)
    try:
        done = run.go()
        state = run.whole_state() if done else None
        return (state, loader) if done and is_first() else None
    finally:
        run.close()


class Run:
    """The state of a run and the files it writes."""

    def __init__(self, config: Config, workdir: str, loader: Loader, devices: Devices):
        self.config, self.loader, self.devices = config, loader, devices
        self.checkpoints = Checkpoints(workdir, config.train.checkpoints_kept)
        wait_for_all("checkpoints")  # the first one has cleaned up
        if not (pathlib.Path(workdir) / "config.json").exists():  # which the first one wrote
            raise ConfigError(f"{workdir} is not the directory of process 0; give all processes the same --workdir, "
                              "on a disk that they share.")
        abstract = devices.placed(jax.eval_shape(functools.partial(init_state, config)))
        restored = self.checkpoints.restore(abstract)
        self.state = starting_state(config, devices) if restored is None else restored[0]
        start = int(self.state.step)
        self.writer = MetricsWriter(workdir, start if restored is not None else None) if is_first() else None
        if restored is not None and is_first():
            print(f"Resuming from step {start} of {config.train.steps}.", flush=True)
        if config.mesh.pipe > 1 and is_first():
            print(describe(config), flush=True)
        # Whatever the data, a step compiles once: a second trace is a bug and raises. chex counts by the place in the
        # source, which an earlier run in this process shares.
        chex.clear_trace_counter()
        traced_once = chex.assert_max_traces(lambda state, batch: train_step(config, state, batch), n=1)
        self.step_fn = devices.jit(traced_once, abstract, donate_argnums=0)
        scored = devices.jit(chex.assert_max_traces(lambda *args: eval_step(config, *args), n=1))
        self.eval_fn = lambda params, router, micro: scored(params, router, devices.place(micro))
        self.stopping = False

    def go(self) -> bool:
        """Runs the remaining steps. False when SIGTERM ended them."""
        previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        try:
            done = self._steps()
            self.checkpoints.wait()  # a second SIGTERM must not end what the first one asked for
            return done
        finally:
            signal.signal(signal.SIGTERM, previous)

    def close(self):
        self.checkpoints.close()

    def whole_state(self):
        """What a sample is drawn from."""
        if self.devices.mesh is None or not self.config.train.sample_tokens:
            return self.state
        params, router = self.devices.fetch((self.state.params, self.state.router))
        return dataclasses.replace(self.state, params=params, router=router, opt_state=(), ema={})

    def _steps(self):
        train, start = self.config.train, int(self.state.step)
        peak = peak_flops(self.config.model.dtype, self.config.mesh.devices)
        flops = training_flops_per_token(self.config.model, train.sequence_length)
        with tqdm.tqdm(total=train.steps, initial=start, desc="train", unit="step", mininterval=1.0,
                       disable=not is_first()) as bar:
            clock = time.perf_counter()
            for index, batch in self.loader.iterate(start):
                self.state, metrics = self.step_fn(self.state, self.devices.place(batch))
                metrics = jax.device_get(metrics)
                step, now = index + 1, time.perf_counter()
                self._check_finite(step, metrics)
                tokens = int(batch["active"]) * self.devices.rows * train.sequence_length
                row = self._record(step, metrics, tokens / (now - clock), flops / peak)
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tok/s, "
                                    f"MFU {row['mfu']:.0%}, MaxVio {row['max_vio']:.2f}"
                                    + (f", {n} CHOICES DROPPED" if (n := row.get("dropped_choices")) else ""),
                                    refresh=False)
                bar.update()
                if step % train.eval_every == 0 or step == train.steps:
                    self._evaluate(step, bar)
                stopping = anywhere(self.stopping)
                if step % train.checkpoint_every == 0 or step == train.steps or stopping:
                    self._save(step)
                if stopping:
                    self.checkpoints.wait()
                    self._say(bar, f"Stopped by SIGTERM after step {step}; the same command goes on from there.")
                    return False
                clock = time.perf_counter()
        return True

    def _record(self, step, metrics, tokens_per_second, mfu_per_token):
        train = self.config.train
        counts_LE = all_layers(metrics["counts"])
        row = {"tokens": train.sequences_before(step) * train.sequence_length,
               "loss": float(metrics["loss"]), "mtp_loss": float(metrics["mtp_loss"]), "lr": float(metrics["lr"]),
               "grad_norm": float(metrics["grad_norm"]), "tokens_per_second": tokens_per_second,
               "mfu": tokens_per_second * mfu_per_token, "max_vio": max_vio(counts_LE)}
        row |= traffic_per_token(self.config.mesh, self.config.model, metrics["traffic"])
        if self.writer:
            self.writer.write(step, **row)
            self.writer.write_expert_load(step, counts_LE)
        return row

    def _say(self, bar, words):
        if is_first():
            bar.write(words)

    def _evaluate(self, step, bar):
        limit = self.config.train.eval_batches if step < self.config.train.steps else 0  # the last one takes all
        result = evaluate(self.config, self.loader, self.eval_fn, self.state.params, self.state.router, limit)
        if self.writer:
            self.writer.write(step, eval_loss=result["loss"], eval_bits_per_byte=result["bits_per_byte"],
                              max_vio_global=result["max_vio_global"])
        self._say(bar, f"step {step}: validation loss {result['loss']:.4f}, {result['bits_per_byte']:.4f} bits per "
                       f"byte, MaxVio_global {result['max_vio_global']:.3f}")

    def _save(self, step):
        meta = {"step": step, "sequences": self.config.train.sequences_before(step), "config": as_dict(self.config)}
        self.checkpoints.save(step, self.state, meta)

    def _check_finite(self, step, metrics):
        if not all(math.isfinite(metrics[name]) for name in ("loss", "mtp_loss", "grad_norm")):
            self.checkpoints.wait()
            saved = self.checkpoints.steps()
            kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "no checkpoint had been written yet"
            raise ConfigError(f"the loss or its gradient is not finite at step {step}; {kept}. Lower "
                              "optimizer.learning_rate, or set model.dtype='float32', in another --workdir.")
