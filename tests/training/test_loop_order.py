"""The host is one step ahead: metrics are fetched while the next step runs; a save waits for the check of its step."""

import types

import jax.numpy as jnp
import pytest

from deepseek_jax.config import Config, ConfigError, TrainConfig
from deepseek_jax.data.position import beginning
from deepseek_jax.parallel.processes import SaveTimer, StopAgreement
from deepseek_jax.storage import StorageError
from deepseek_jax.training import loop
from deepseek_jax.training.evaluate import Score
from deepseek_jax.training.types import Metrics
from deepseek_jax.training.watching import Watching
from tests.model import naive


class Bar:
    """A progress bar that prints nothing."""

    def update(self):
        pass

    def write(self, words):
        pass

    def set_postfix_str(self, words, refresh):
        pass


def run_of(monkeypatch, losses, **train):
    """(a Run over steps that are not computed, the list of its actions in order)."""
    done = []
    config = Config(model=naive.tiny(), train=TrainConfig(steps=len(losses), batch_size=1, **train))

    def step(state, batch, base, reference):
        done.append(f"dispatch {state + 1}")
        return state + 1, Metrics(losses[state], 0.0, 1e-3, 1.0, 0.0, 0.0, 0.0, 0.0, {"bias": jnp.ones((1, 4))}, None)

    def fetch(metrics):
        done.append("fetch")
        return metrics

    monkeypatch.setattr(loop.jax, "device_get", fetch)
    run = object.__new__(loop.Run)
    run.config, run.state, run.step, run.writer, run.peak, run.flops = config, 0, 0, None, 1, 1
    run.loader = types.SimpleNamespace(iterate=lambda start: ((i, {"active": 1}) for i in range(start, len(losses))))
    run.runner = types.SimpleNamespace(shard_batch=lambda batch: batch, rows=1)
    run.step_fn, run.eval_fn, run.agreement = step, None, StopAgreement()
    run.timer, run.watching, run.position = SaveTimer(None), Watching(config, None), beginning(config)
    run.base, run.frozen, run.frozen_params, run.reference, run.compared = None, None, None, None, None
    run.checkpoints = types.SimpleNamespace(save=lambda step, *_: done.append(f"save {step}"), wait=lambda: None,
                                            steps=list, local=None)
    monkeypatch.setattr(loop.Run, "_evaluate", lambda self, bar: done.append("evaluate"))
    return run, done


def test_the_metrics_of_a_step_are_fetched_after_the_next_one_was_dispatched(monkeypatch):
    run, done = run_of(monkeypatch, [3.0, 2.0, 1.0], eval_every=10, checkpoint_every=10)
    assert run._steps(Bar())
    assert done == ["dispatch 1", "dispatch 2", "fetch", "dispatch 3", "fetch", "fetch", "evaluate", "save 3"]


def test_a_checkpoint_is_saved_after_the_check_of_its_own_step(monkeypatch):
    run, done = run_of(monkeypatch, [3.0, 2.0, 1.0], eval_every=10, checkpoint_every=2)
    assert run._steps(Bar())
    assert done[:5] == ["dispatch 1", "dispatch 2", "fetch", "fetch", "save 2"]


def test_a_diverged_step_is_never_saved(monkeypatch):
    run, done = run_of(monkeypatch, [3.0, float("nan"), 1.0], eval_every=10, checkpoint_every=2)
    with pytest.raises(loop.DivergedError, match="not finite at step 2"):
        run._steps(Bar())
    assert not [word for word in done if word.startswith("save")]


def test_the_last_evaluation_has_a_bound_and_a_bar_of_its_own(monkeypatch):
    evaluation = loop.Run._evaluate
    run, _ = run_of(monkeypatch, [3.0, 2.0, 1.0], eval_every=1, eval_batches=2, final_eval_batches=5)
    seen = []
    monkeypatch.setattr(loop.Run, "_evaluate", evaluation)
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: seen.append(arguments[4:]) or Score(1.0, 1.0, 0.0, {}))
    run.state = types.SimpleNamespace(params=None, router=None)
    metrics = Metrics(1.0, 0.0, 1e-3, 1.0, 0.0, 0.0, 0.0, 0.0, {"bias": jnp.ones((1, 4))}, None)
    run.step_fn = lambda state, batch, base, reference: (state, metrics)
    assert run._steps(Bar())
    assert seen == [(2, False), (2, False), (5, True)]


def test_sigterm_saves_the_step_that_was_dispatched_last(monkeypatch):
    run, done = run_of(monkeypatch, [3.0, 2.0, 1.0], eval_every=10, checkpoint_every=10)
    run.asked = "SIGTERM"
    assert not run._steps(Bar())
    assert done == ["dispatch 1", "fetch", "save 1"]


def test_of_several_processes_each_asks_when_the_step_before_is_fetched_and_saves_the_step_they_agree_on(monkeypatch):
    run, done = run_of(monkeypatch, [3.0, 2.0, 1.0], eval_every=10, checkpoint_every=10)
    run.agreement = types.SimpleNamespace(
        stopped_by=lambda step, asked: done.append(f"ask {step}") or ("SIGUSR1" if step == 2 else None))
    assert not run._steps(Bar())
    assert done == ["dispatch 1", "ask 1", "dispatch 2", "fetch", "ask 2", "fetch", "save 2"]


def test_a_diverged_run_is_a_config_error_for_the_command_line():
    assert issubclass(loop.DivergedError, ConfigError)


def test_what_a_store_refuses_in_closing_hides_nothing_that_came_first():
    def refuse(failed=False):
        raise StorageError("the store is full.")

    run = types.SimpleNamespace(close=refuse)
    with pytest.raises(ZeroDivisionError), loop.closing(run):
        _ = 1 / 0
    with pytest.raises(StorageError), loop.closing(run):
        pass


def test_what_the_thread_of_the_metrics_could_not_write_hides_no_divergence(capsys):
    def refuse(failed):
        assert failed
        raise OSError("no space left")

    with pytest.raises(loop.DivergedError), loop.closing(types.SimpleNamespace(close=refuse)):
        raise loop.DivergedError("the loss is not finite")
    assert "in closing the run, too: no space left" in capsys.readouterr().err
