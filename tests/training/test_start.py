"""The state with which a run begins, and that its checkpoints record its position in the sources."""

import dataclasses
import types

import jax.numpy as jnp
import pytest

from deepseek_jax import io
from deepseek_jax.config import Config, ConfigError, DataConfig, InitConfig, OptimizerConfig, TrainConfig, as_dict
from deepseek_jax.data.position import Position
from deepseek_jax.training import start
from deepseek_jax.training.optimizer import learning_rate
from deepseek_jax.training.step import mtp_weight
from tests.model import naive
from tests.training.test_loop_order import run_of

RAMP = dict(batch_size=8, accumulation_steps=4, ramp_from=2, ramp_until=0.5)


def config_of(**train):
    return Config(model=naive.tiny(), train=TrainConfig(**train), data=DataConfig(sources=(("a", 1.0),)))


def test_with_a_length_that_is_given_nothing_depends_on_how_long_the_run_is():
    short, long = (dataclasses.replace(config_of(steps=steps, **RAMP), optimizer=OptimizerConfig(schedule_steps=40))
                   for steps in (20, 40))
    alone = config_of(steps=40, **RAMP)
    for step in range(20):
        found = [(c.microbatches_at(step), c.sequences_before(step), float(mtp_weight(c, jnp.int32(step))),
                  float(learning_rate(c.optimizer, c.schedule_steps)(jnp.int32(step)))) for c in (short, long, alone)]
        assert found[0] == found[1] == found[2]
    assert config_of(steps=20, **RAMP).microbatches_at(8) != short.microbatches_at(8)


@pytest.fixture
def restored(monkeypatch, tmp_path):
    """restore(config): what is read from which checkpoint, for a run whose saved config has 30 steps."""
    asked, saved = [], config_of(steps=30)
    io.write_json(tmp_path / "config.json", as_dict(saved))
    monkeypatch.setattr(start, "find_checkpoint", lambda folder, step=None: asked.append((folder, step)) or "path")
    monkeypatch.setattr(start, "restore_state", lambda path, abstract: (
        types.SimpleNamespace(step=20), {"config": as_dict(saved)}))
    nothing = types.SimpleNamespace(restore=lambda abstract: None)
    return lambda config: (start.restore(config, str(tmp_path), nothing, None), asked)


def test_a_branch_begins_with_the_checkpoint_that_is_named(restored, capsys):
    config = dataclasses.replace(config_of(steps=40), init=InitConfig("elsewhere@20"))
    found, asked = restored(config)
    assert asked == [("elsewhere", 20)] and found.state.step == 20
    assert "Branching off elsewhere@20" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_begins_anew(restored):
    assert restored(dataclasses.replace(config_of(steps=40), init=InitConfig("elsewhere"))) == (None, [])


def test_a_state_of_another_config_is_refused_wherever_it_was(tmp_path):
    saved, now = config_of(steps=30), config_of(steps=30, seed=7)
    io.write_json(tmp_path / "config.json", as_dict(now))
    local = types.SimpleNamespace(restore=lambda abstract: (types.SimpleNamespace(step=20), {"config": as_dict(saved)}))
    with pytest.raises(ConfigError, match="train.seed is .* there, 7 here"):
        start.restore(now, str(tmp_path), local, None)


def test_a_run_whose_states_are_gone_begins_with_its_config_of_now(restored, tmp_path):
    assert restored(config_of(steps=40))[0] is None
    assert io.read_json(tmp_path / "config.json")["train"]["steps"] == 40


def test_a_branch_with_fewer_steps_than_it_has_is_one_line(restored):
    with pytest.raises(ConfigError, match="less than the 20 steps that the run in elsewhere@20 has"):
        restored(dataclasses.replace(config_of(steps=10), init=InitConfig("elsewhere@20")))


def test_a_run_with_fewer_steps_than_it_has_is_one_line_before_its_state_is_read(tmp_path):
    config = config_of(steps=10)
    start.check_length(config, str(tmp_path))
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    with pytest.raises(ConfigError, match="less than the 12 steps that the run in"):
        start.check_length(config, str(tmp_path))
    with pytest.raises(ConfigError, match="less than the 20 steps that the run in elsewhere@20 has"):
        start.check_length(dataclasses.replace(config, init=InitConfig("elsewhere@20")), str(tmp_path / "branch"))


def test_another_batch_size_holds_from_the_step_of_the_checkpoint_on(restored):
    config = dataclasses.replace(config_of(steps=40, batch_size=16), init=InitConfig("elsewhere@20"))
    assert restored(config)[0].position == Position(20, 160, ("a",), (160,))


@pytest.mark.parametrize(("words", "folder", "step"), [("run@20", "run", 20), ("a@b/run", "a@b/run", None),
                                                       ("gs://b/x@7", "gs://b/x", 7), (None, None, None)])
def test_a_run_and_a_step_are_told_apart(words, folder, step):
    assert (InitConfig(words).folder, InitConfig(words).step) == (folder, step)


def test_a_checkpoint_after_a_change_has_its_place(monkeypatch):
    run, _ = run_of(monkeypatch, [3.0])
    metas = []
    run.checkpoints = types.SimpleNamespace(wait=lambda: None, save=lambda step, state, meta: metas.append(meta))
    run._save()
    run.position = Position(20, 160, ("a",), (160,))
    run._save()
    assert "position" not in metas[0] and metas[1]["position"] == [20, 160, ("a",), (160,)]
