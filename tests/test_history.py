"""Which config keys of a run may change, and the record of the changes in config.json."""

import dataclasses
import json

import pytest

from deepseek_jax import history, io
from deepseek_jax.config import Config, ConfigError, FP8Config, TrainConfig, as_dict, freeze, load_config
from deepseek_jax.workdir import load_workdir_config
from tests.model import naive

CONFIG = Config(model=naive.tiny(), train=TrainConfig(steps=30))


def changed(config=CONFIG, **sections):
    """changed(train={"steps": 60})"""
    values = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(config, **values)


@pytest.fixture
def workdir(tmp_path):
    io.write_json(tmp_path / "config.json", as_dict(CONFIG))
    return tmp_path


def recorded(workdir):
    return json.loads((workdir / "config.json").read_text()).get("history")


ALLOWED = [{"train": {"steps": 60}}, {"optimizer": {"learning_rate": 1.0, "schedule_steps": 99}},
           {"data": {"sources": (("x", 1.0),)}}, {"mesh": {"local": 2}}, {"balance": {"bias_speed": 0.0}},
           {"train": {"sample_prompt": "x", "eval_every": 7, "checkpoints_kept": 1}},
           {"model": {"implementation": "xla", "fp8": FP8Config(implementation="reference")}}]
REFUSED = [({"model": {"vocab_size": 65}}, "model.vocab_size is 64 there, 65 here"),
           ({"train": {"sequence_length": 64}}, "train.sequence_length is 512 there"),
           ({"optimizer": {"kind": "muon"}}, "optimizer.kind is 'adamw' there"),
           ({"optimizer": {"moment_dtype": "bfloat16"}}, "optimizer.moment_dtype is 'float32' there"),
           ({"train": {"ema_decay": 0.9}}, "train.ema_decay"), ({"train": {"seed": 1}}, "train.seed")]


@pytest.mark.parametrize("sections", ALLOWED)
def test_what_leaves_the_state_as_it_is_may_change(sections):
    history.check_changes(CONFIG, changed(**sections), "run", "no.")


@pytest.mark.parametrize("sections, words", REFUSED)
def test_what_does_not_is_refused_in_a_line_that_names_it_and_what_is_allowed(sections, words):
    with pytest.raises(ConfigError) as error:
        history.check_changes(CONFIG, changed(**sections), "run", "take another.")
    message = str(error.value)
    assert words in message and "These may change: train.steps, " in message and message.endswith("take another.")
    assert "train.steps is" not in message


def test_pairs_keep_their_sources():
    pairs = changed(preference={"objective": "reward"})
    with pytest.raises(ConfigError, match=r"data\.sources is"):
        history.check_changes(pairs, changed(pairs, data={"sources": (("x", 1.0),)}), "run", "no.")


def test_a_run_has_at_least_the_steps_that_are_behind_it():
    history.check_steps(CONFIG, 30, "run")
    with pytest.raises(ConfigError, match=r"train\.steps=30 is less than the 31 steps that the run in run has"):
        history.check_steps(CONFIG, 31, "run")


def test_changes_are_noted_with_their_step_and_time_and_the_config_stays_one(workdir):
    longer = changed(train={"steps": 60})
    assert history.record(longer, workdir, 30, CONFIG) == ["train.steps 30 -> 60"]
    faster = changed(longer, optimizer={"learning_rate": 1.0})
    history.record(faster, workdir, 45, longer)

    first, second = recorded(workdir)
    assert first["step"] == 30 and first["changed"] == {"train.steps": [30, 60]} and first["when"].startswith("20")
    assert second["step"] == 45 and second["changed"] == {"optimizer.learning_rate": [
        CONFIG.optimizer.learning_rate, 1.0]}
    assert load_workdir_config(str(workdir)) == faster == load_config(str(workdir / "config.json"))


def test_nothing_is_written_where_nothing_changed(workdir):
    before = (workdir / "config.json").read_bytes()
    assert history.record(CONFIG, workdir, 30, CONFIG) == []
    assert (workdir / "config.json").read_bytes() == before


def test_a_start_that_was_killed_before_it_saved_leaves_one_note(workdir):
    longer = changed(train={"steps": 60})
    history.record(longer, workdir, 30, CONFIG)
    noted = recorded(workdir)
    history.record(longer, workdir, 30, CONFIG)
    assert recorded(workdir) == noted


def test_what_was_undone_before_a_step_was_taken_is_no_history(workdir):
    history.record(changed(train={"steps": 60}), workdir, 30, CONFIG)
    history.record(CONFIG, workdir, 30, CONFIG)
    assert recorded(workdir) is None and load_workdir_config(str(workdir)) == CONFIG


def test_notes_of_checkpoints_that_are_lost_are_dropped(workdir):
    longer = changed(train={"steps": 60})
    history.record(longer, workdir, 30, CONFIG)
    history.record(longer, workdir, 27, CONFIG)  # checkpoint 30 was damaged
    assert [entry["step"] for entry in recorded(workdir)] == [27]


def test_a_branch_names_its_run(workdir):
    branch = changed(init={"from_": "run@20"}, train={"steps": 40})
    history.record(branch, workdir, 20, CONFIG, "run@20")
    entry, = recorded(workdir)
    assert (entry["from"], entry["changed"]) == ("run@20", {"train.steps": [30, 40]})
    assert freeze(json.loads((workdir / "config.json").read_text())) == branch
