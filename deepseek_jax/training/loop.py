"""The training loop: data, steps, metrics, checkpoints, evaluation.

    config + workdir -> data, state (fresh, fine-tuned or resumed) -> steps -> metrics, checkpoints, evaluation

The same command resumes a run: everything that a step depends on is in the checkpoint or a function of the step number.
The host stays one step ahead of the devices: the metrics of a step are fetched while the next one runs, and a
checkpoint waits until its step's loss has been checked.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import tqdm

from deepseek_jax import stop, storage
from deepseek_jax.checkpoint.adapters import Base, merge
from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.config import Config, ConfigError, as_dict
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.overview import describe_sources
from deepseek_jax.data.position import beginning
from deepseek_jax.data.prepare import claim_corpus, prepare
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model.parts import check_parts
from deepseek_jax.parallel.dispatch import traffic_per_token
from deepseek_jax.parallel.processes import (
    SaveTimer,
    StopAgreement,
    check_same,
    first_then_others,
    is_first,
    wait_for_all,
)
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.pipeline.model import check, describe
from deepseek_jax.scale.costs import training_flops_per_token
from deepseek_jax.training.base import in_full, load_base
from deepseek_jax.training.evaluate import evaluate
from deepseek_jax.training.metrics import MetricsWriter, all_layers, balance_metrics
from deepseek_jax.training.program import describe_machine, describe_program
from deepseek_jax.training.sample import sample_on_mesh, sample_prompt
from deepseek_jax.training.selfcheck import check_device
from deepseek_jax.training.start import check_branch, check_length, check_start, restore, starting_state
from deepseek_jax.training.step import (
    Loss,
    eval_step,
    fresh_state,
    next_token_loss,
    train_step,
)
from deepseek_jax.training.throughput import peak_flops
from deepseek_jax.training.trackers import EXPERTS_EVERY, check_trackers, experts_of_layers, make_trackers
from deepseek_jax.training.types import Metrics
from deepseek_jax.training.watching import Watching
from deepseek_jax.workdir import (
    alone_in,
    check_workdir,
    claim_workdir,
)

BALANCE = ("sequence_loss", "auxiliary_loss", "bias_low", "bias_high")  # metrics of a model with experts


RunType = TypeVar("RunType", bound="Run")


class DivergedError(ConfigError):
    """The loss or its gradient is no longer finite; the last checkpoint is from before that."""


class TrainResult(NamedTuple):
    """The result of a call of `train`.

    finished: False when a signal ended it early (its state is saved). step: steps done. variables: params and router
    for a sample, for a run on one device; None unless it finished and train.sample_tokens asks for one, and for a base
    in FP8, whose device may have no room for the dequantized model. sample: already drawn, for a run on a mesh; None
    under the same conditions. held_out: the beginning of the validation text.
    """

    finished: bool
    step: int
    variables: dict[str, Any] | None
    tokenizer: Tokenizer
    held_out: str
    sample: str | None = None


def check_run(config: Config, workdir: str) -> Runner:
    """The mesh of a run, after checking that it can begin or continue in the work directory; the same in every process.

    Raises ConfigError if it cannot: own modules, mesh, devices, another config's work directory, init.from, a tracker
    that does not answer.
    """
    check_parts(config.model, config.balance)
    runner = Runner(config)
    check_device(config, runner.mesh)
    check_same(repr(config))
    check_workdir(config, workdir)
    check_start(config)
    check_branch(config, workdir)
    check_length(config, workdir)
    if is_first():
        check_trackers(config, workdir)
    return runner


def train(config: Config, workdir: str, kind: type[Run] | None = None) -> TrainResult:
    """Trains to config.train.steps, resuming the run in the work directory if there is one. kind: None: a `Run`.

    Raises:
      ConfigError: bad data, another config's work directory, or a mesh that does not fit.
      DivergedError: a loss that is not finite.
      CheckpointError: a checkpoint that could not be written.
    """
    if config.preference.objective is not None:
        raise ConfigError(f"preference.objective={config.preference.objective!r} trains on pairs, by "
                          "posttraining.preferences.train_on_pairs, not on documents.")
    if config.distill.from_ is not None and kind is None:
        raise ConfigError("distill.from names a teacher, which posttraining.distill_logits.distill trains with.")
    check(config)
    runner = check_run(config, workdir)
    prepared: Any = first_then_others(lambda: prepare(config, workdir, resumes=True), "prepare")
    loader = Loader(config, prepared, *runner.share(), runner.places())
    with contextlib.ExitStack() as held:
        if is_first():
            held.enter_context(alone_in(workdir))
            claim_corpus(prepared, workdir)  # the config is now known to be valid
            claim_workdir(config, workdir)
            print(describe_sources(config, prepared), flush=True)
        return _trained(config, workdir, loader, runner, kind or Run)


def _trained(config, workdir, loader, runner, kind: type[Run]):
    with closing(kind(config, workdir, loader, runner)) as run:
        finished = run.go()
        wanted = finished and config.train.sample_tokens and not config.lora.fp8
        held_out = loader.tokenizer.decode(loader.validation.read(0, 32).tokens_T.tolist())
        variables = run.sample_variables() if wanted and runner.mesh is None else None
        sample = run.sample(held_out) if wanted and runner.mesh is not None else None
        return TrainResult(finished, run.step, variables, loader.tokenizer, held_out, sample)


@contextlib.contextmanager
def closing(run: RunType) -> Iterator[RunType]:
    """Closes a run at the end. After an error that error is raised, and failures while closing are only printed."""
    try:
        yield run
    except BaseException as first:
        try:
            run.close(failed=True)
        except Exception as error:
            if error is not first:
                print(f"note: in closing the run, too: {error}", file=sys.stderr, flush=True)
        raise
    run.close()


class Pending(NamedTuple):
    """A dispatched step whose metrics have not been fetched yet."""

    step: int
    tokens: int
    metrics: Metrics


class Run:
    """The state of a run and the files it writes. Another kind of training overrides `loss`, `batches` and `row`.

    loss: of a step. name: of the progress bar. together: number of steps that share a batch; a run stops and saves only
    between batches. reference: variables of the frozen model that the loss compares with; compared: the identity of
    their checkpoint. writer: of the metrics, in process 0, created in `go` so that an earlier failure leaves no
    thread behind. watching: monitoring of the run, such as the limit for steps that do not end. asked: the signal
    that asked this process to stop.
    """

    loss: Loss = staticmethod(next_token_loss)
    name: str = "train"
    together: int = 1
    writer: MetricsWriter | None = None
    asked: str | None = None

    def __init__(self, config: Config, workdir: str, loader: Any, runner: Runner):
        self.config, self.loader, self.runner = config, loader, runner
        self.watching = Watching(config, workdir, jax.process_index())
        self.checkpoints = Checkpoints(workdir, config.train.checkpoints_kept, config.train.checkpoint_keep_period,
                                       config.train.checkpoint_local)
        wait_for_all("checkpoints")  # process 0 has cleaned up
        if not storage.is_file(storage.as_path(workdir) / "config.json"):  # written by process 0
            raise ConfigError(f"{workdir} is not the directory of process 0; give all processes the same --workdir, "
                              "on a disk that they share.")
        abstract = runner.with_shardings(jax.eval_shape(fresh_state(config)))
        restored = restore(config, workdir, self.checkpoints, abstract)
        self.position = beginning(config) if restored is None else restored.position
        if self.position.step and loader is not None:
            loader.continue_at(self.position)
        self.base: Base | None = None
        self.frozen: dict[str, Any] | None = None  # {"params", "router"} of the base of adapters
        if config.lora.rank is not None:
            known = None if restored is None else Base(**restored.meta["lora"])
            self.frozen, self.base = load_base(config, runner, known)
        self.frozen_params = self.frozen and self.frozen["params"]
        known = None if restored is None or "reference" not in restored.meta else Base(**restored.meta["reference"])
        self.reference, self.compared = self.find_reference(known)
        self.state = starting_state(config, runner, self.frozen) if restored is None else restored.state
        self.step = int(self.state.step)
        self.watching.mark("restored", begin=self.step)
        resumes = None if restored is None else self.step
        self.open_writer = lambda: MetricsWriter(workdir, resumes,
                                                 make_trackers(config, workdir, resumes is not None))
        if is_first():
            print(describe_machine(config) + (f"\n{describe(config)}" if config.mesh.pipe > 1 else ""), flush=True)
        # A step compiles once, whatever the data: a second trace is a bug and raises. chex counts by source location,
        # which an earlier run in this process shares.
        chex.clear_trace_counter()
        traced_once = chex.assert_max_traces(
            lambda state, batch, base, reference: train_step(config, state, batch, base, self.loss, reference), n=1)
        runner.compiling = self.watching.stall.suspended
        self.step_fn = runner.jit(traced_once, abstract, self._compiled, donate_argnums=0)
        scored = runner.jit(chex.assert_max_traces(lambda *args: eval_step(config, *args), n=1))
        self.eval_fn = lambda params, router, micro: scored(params, router, runner.shard_batch(micro),
                                                            self.frozen_params)
        self.peak = peak_flops(config.model.dtype, config.mesh.devices)
        self.flops = training_flops_per_token(config.model, config.train.sequence_length,
                                              frozen=self.frozen is not None)
        self.agreement, self.timer = StopAgreement(), SaveTimer(config.train.checkpoint_minutes)

    def find_reference(self, known: Base | None) -> tuple[dict[str, Any] | None, Base | None]:
        """The frozen model that the loss compares with, and the identity of its checkpoint. known: the run's so far."""
        return None, None

    def go(self) -> bool:
        """Runs the remaining steps. False when SIGTERM, SIGUSR1 or Ctrl-C (SIGINT) ended them."""
        self.writer = self.open_writer() if is_first() else None
        previous = {number: signal.signal(number, self._ask_to_stop) for number in (*stop.SIGNALS, signal.SIGINT)}
        try:
            with self.watching.running(), tqdm.tqdm(total=self.config.train.steps, initial=self.step, desc=self.name,
                                                    unit="step", mininterval=1.0, disable=not is_first()) as bar:
                finished = self._steps(bar)
                with self.watching.stall.suspended():
                    self._flush()
                    self._say(bar, self.watching.profiler.close(self.step, self.state))
            self.checkpoints.wait()  # a second SIGTERM must not interrupt the save that the first one requested
            self.watching.mark("stopped", step=self.step)
            if is_first():
                print(self.watching.goodput_words(), flush=True)
            return finished
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _compiled(self, program, seconds):
        self.watching.mark("compiled")
        if is_first():
            print(describe_program(program, seconds), flush=True)

    def _ask_to_stop(self, number, frame):
        if number == signal.SIGINT:
            if self.asked:
                raise KeyboardInterrupt
            print("\nStopping after this step; Ctrl-C again ends it without saving.", file=sys.stderr)
        self.asked = signal.Signals(number).name

    def close(self, failed: bool = False) -> None:
        """Waits for the last checkpoint. failed: whether the run ends with an error."""
        try:
            if not failed:
                self.agreement.close()
            self.checkpoints.close()
        finally:
            if self.writer:
                self.writer.close(failed)

    def sample_variables(self) -> dict[str, Any]:
        """Params and router for drawing a sample."""
        params, router, base = self.runner.fetch((self.state.params, self.state.router, self.frozen_params))
        if base is not None:
            params = merge(in_full(self.config, base), params, self.config.lora.scale)
        return {"params": params, "router": router}

    def sample(self, held_out: str) -> str:
        """A continuation of the prompt, drawn on the mesh by all processes together."""
        tokenizer = self.loader.tokenizer
        prompt = sample_prompt(self.config, tokenizer, held_out)
        made = sample_on_mesh(self.config, self.runner, (self.state.params, self.state.router, self.frozen_params),
                              prompt, tokenizer.eos)
        return tokenizer.decode([*prompt[1:], *made])

    def batches(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(step, batch) of the remaining steps; each is requested after the previous step."""
        return self.loader.iterate(self.step)

    def _steps(self, bar) -> bool:
        train, watching, pending, self.clock = self.config.train, self.watching, None, time.perf_counter()
        for index, batch in watching.fetched(self.batches()):
            self._say(bar, watching.profiler.before(index, self.state))
            with watching.profiler.step(index + 1), watching.spending("step"):
                self.state, metrics = self.step_fn(self.state, self.runner.shard_batch(batch), self.frozen_params,
                                                   self.reference)
            self.step = index + 1
            if pending is not None:
                self._record(pending, bar)  # while the devices work on the next step
            sequences = int(batch["active"]) * (train.batch_size // self.config.microbatches)
            pending = Pending(self.step, sequences * train.sequence_length, metrics)
            stopped_by = self.agreement.stopped_by(self.step, self.asked)
            last = self.step == train.steps
            evaluating = last or self.step % train.eval_every == 0
            between = self.step % self.together == 0
            due = self.timer.is_due(self.step) or self.step % train.checkpoint_every == 0
            saving = between and (last or stopped_by or due)
            saving_local = between and self.checkpoints.local and self.step % train.checkpoint_local_every == 0
            if evaluating or saving or saving_local:
                self._record(pending, bar)
                pending = None
            if evaluating:
                with watching.stall.suspended():
                    self._evaluate(bar)
            if saving_local:
                with watching.spending("write"):
                    self._flush()
                    self.checkpoints.save_local(self.step, self.state, self._meta())
                watching.stall.beat()
            if saving:
                with watching.spending("write"), watching.stall.suspended():
                    self._save()
            if saving and stopped_by:
                with watching.stall.suspended():
                    self.checkpoints.wait()
                self._say(bar, f"Stopped by {stopped_by} after step {self.step}; the same command continues from "
                               "there.")
                return False
            if pending is None:
                self.clock = time.perf_counter()
        return True

    def _record(self, pending: Pending, bar):
        """Fetches the metrics of a step and checks them; another thread writes and displays them."""
        with self.watching.spending("step"):
            metrics = jax.device_get(pending.metrics)
        now = time.perf_counter()
        tokens_per_second, self.clock = pending.tokens / (now - self.clock), now
        self._check_finite(pending.step, metrics)
        self.watching.stall.beat()
        if not self.watching.marked("first_step"):
            self.watching.mark("first_step")
        if self.writer:
            with self.watching.spending("write"):
                self.writer.do(self._write_down, pending, metrics, tokens_per_second, self.watching.row(), bar)

    def _write_down(self, pending: Pending, metrics: Metrics, tokens_per_second: float, seconds, bar):
        row, writer = self.row(pending, metrics, tokens_per_second) | seconds, self.writer
        assert writer is not None
        writer.write(pending.step, **row)
        writer.write_expert_load(pending.step, all_layers(metrics.counts))
        if pending.step % EXPERTS_EVERY == 0 or pending.step == self.config.train.steps:
            writer.track(pending.step, experts_of_layers(metrics.counts, metrics.biases,
                                                         self.config.model.num_dense_layers))
        bar.set_postfix_str(self.words(row), refresh=False)
        bar.update()

    def row(self, pending: Pending, metrics: Metrics, tokens_per_second: float) -> dict[str, float]:
        """The metrics of a step by name."""
        counts_LE = all_layers(metrics.counts)
        sequences = self.position.sequences_before(self.config, pending.step)
        row = {"tokens": sequences * self.config.train.sequence_length,
               "loss": float(metrics.loss), "lr": float(metrics.lr), "grad_norm": float(metrics.grad_norm),
               "tokens_per_second": tokens_per_second,
               "mfu": tokens_per_second * self.flops / self.peak, "max_vio": 0.0}
        if self.config.model.mtp_depth:
            row["mtp_loss"] = float(metrics.mtp_loss)
        row |= balance_metrics(counts_LE) | {name: float(getattr(metrics, name)) for name in BALANCE if len(counts_LE)}
        row |= {name: float(value) for name, value in metrics.own.items()}
        row |= {"force_balanced": 1} if self.config.balance.force_balanced else {}
        return row | traffic_per_token(self.config.mesh, self.config.model, metrics.traffic)

    def words(self, row: dict[str, float]) -> str:
        """The part of a row that the progress bar shows."""
        loud = f", {n} CHOICES DROPPED" if (n := row.get("dropped_choices")) else ""
        loud += ", FORCED BALANCE" if row.get("force_balanced") else ""
        return (f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tok/s, MFU {row['mfu']:.0%}, "
                f"MaxVio {row['max_vio']:.2f}{loud}")

    def _say(self, bar, words):
        if words and is_first():
            bar.write(words)

    def _evaluate(self, bar):
        train, last = self.config.train, self.step == self.config.train.steps
        limit = train.final_eval_batches if last else train.eval_batches
        score = evaluate(self.loader, self.eval_fn, self.state.params, self.state.router, limit, last and is_first())
        if self.writer:
            self.writer.write(self.step, eval_loss=score.loss, eval_bits_per_byte=score.bits_per_byte,
                              eval_share=score.share, max_vio_global=score.max_vio_global,
                              **{f"eval_loss/{source}": loss for source, loss in score.by_source.items()})
        self._say(bar, f"step {self.step}: validation loss {score.loss:.4f}, {score.bits_per_byte:.4f} bits per byte, "
                       f"MaxVio_global {score.max_vio_global:.3f}"
                       + "".join(f"\n  {source}: loss {loss:.4f}" for source, loss in score.by_source.items()))

    def _meta(self) -> dict[str, Any]:
        """The metadata of a checkpoint of this step."""
        sequences = self.position.sequences_before(self.config, self.step)
        meta: dict[str, Any] = {"step": self.step, "sequences": sequences, "config": as_dict(self.config)}
        if self.position.step:
            meta["position"] = list(self.position)
        if self.base is not None:
            meta["lora"] = self.base._asdict()
        if self.compared is not None:
            meta["reference"] = self.compared._asdict()
        return meta

    def _flush(self):
        """Flushes the metrics to the work directory, which a run that resumes from this step keeps."""
        if self.writer:
            self.writer.flush()

    def _save(self):
        self.checkpoints.wait()  # if it failed, its error is more informative than the resulting one of the metrics
        self._flush()
        self.checkpoints.save(self.step, self.state, self._meta())
        self.timer.saved(self.step)
        self.watching.mark("saving", saved=self.step)

    def _check_finite(self, step: int, metrics: Metrics):
        if all(math.isfinite(x) for x in (metrics.loss, metrics.mtp_loss, metrics.grad_norm)):
            return
        with self.watching.stall.suspended():
            self.checkpoints.wait()
        saved = self.checkpoints.steps()
        kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "no checkpoint had been written yet"
        raise DivergedError(f"the loss or its gradient is not finite at step {step}; {kept}. Lower "
                            "optimizer.learning_rate, or set model.dtype='float32', in another --workdir.")
