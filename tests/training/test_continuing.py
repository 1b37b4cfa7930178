"""Runs that continue with another config: longer, from a branch, with other sources; exact if nothing changed."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from deepseek_jax.training.metrics import read_metrics
from tests import runs

pytestmark = pytest.mark.slow  # complete runs

SHORT = ["--config.train.steps=12", "--config.optimizer.schedule_steps=24", "--config.train.final_eval_batches=1"]
LONG = ["--config.train.steps=24", *SHORT[1:]]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuing")
    return runs.write_config(folder)


@pytest.fixture(scope="module")
def short(config, tmp_path_factory):
    """A run of 12 steps with a learning rate schedule of 24."""
    return trained(config, tmp_path_factory.mktemp("short") / "run", *SHORT)


@pytest.fixture(scope="module")
def long(config, tmp_path_factory):
    """The run that had 24 steps from the start."""
    return trained(config, tmp_path_factory.mktemp("long") / "run", *LONG)


def trained(config, workdir, *overrides):
    result = runs.run("train", "--config", config, "--workdir", workdir, *overrides)
    assert result.code == 0, result
    return workdir


def training_rows(workdir):
    return [row for row in runs.rows(workdir) if "loss" in row]


def history(workdir):
    return json.loads((workdir / "config.json").read_text())["history"]


def contents(workdir):
    return {str(p.relative_to(workdir)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(workdir.rglob("*")) if p.is_file()}


def test_a_continued_run_equals_the_one_that_was_meant_to_be_that_long(config, short, long, tmp_path):
    workdir = shutil.copytree(short, tmp_path / "run")
    trained(config, workdir, *LONG)

    assert training_rows(workdir)[:12] == training_rows(short)
    assert training_rows(workdir) == training_rows(long)
    (step, loads, bits), (step2, loads2, bits2) = runs.final_bits(workdir), runs.final_bits(long)
    assert (step, loads) == (step2, loads2) and bits == bits2 and len(bits) > 30
    entry, = history(workdir)
    assert (entry["step"], entry["changed"]) == (12, {"train.steps": [12, 24]})


def test_without_the_length_it_was_meant_for_the_shape_is_stretched_over_the_new_one(config, tmp_path):
    workdir = trained(config, tmp_path / "run", "--config.train.steps=6")
    before = read_metrics(workdir)
    trained(config, workdir, "--config.train.steps=9")
    after = read_metrics(workdir)

    assert after[:len(before)] == before
    assert [row["step"] for row in after if "loss" in row] == list(range(1, 10))
    rows = training_rows(workdir)
    assert rows[5]["lr"] < rows[6]["lr"]  # the tail of 6 steps, then step 7 of 9
    batches = np.diff([0, *(row["tokens"] for row in rows)])
    assert set(batches) == {64, 128}  # the ramp of 9 steps is over, and nothing is counted twice


def test_a_branch_is_its_run_to_the_bit_and_leaves_it_untouched(config, long, tmp_path):
    before, branch = contents(long), tmp_path / "branch"
    start = ["--config", config, "--workdir", branch, f"--config.init.from={long}@21", *LONG]
    assert "Branching off" in runs.run("train", *start).out

    assert contents(long) == before
    assert training_rows(branch) == training_rows(long)[21:]
    assert runs.final_bits(branch)[2] == runs.final_bits(long)[2]
    entry, = history(branch)
    assert (entry["step"], entry["from"], entry["changed"]) == (21, f"{long}@21", {})

    shutil.move(long, tmp_path / "gone")  # once it has saved a checkpoint, a branch no longer needs its run
    try:
        assert "Resuming from step 24" in runs.run("train", *start).out
    finally:
        shutil.move(tmp_path / "gone", long)


def test_another_learning_rate_and_mixture_hold_from_the_step_of_the_checkpoint_on(config, short, tmp_path):
    workdir = shutil.copytree(short, tmp_path / "run")
    own, other = f"{config.removesuffix('config.py')}corpus", tmp_path / "other"
    runs.write_corpus(other)
    mixture = f"--config.data.sources=(('{own}',1.0),('{other}',3.0))"
    changes = [mixture, "--config.optimizer.learning_rate=5e-3", "--config.train.steps=16", *SHORT[1:]]
    trained(config, workdir, *changes)
    rows = training_rows(workdir)
    assert rows[:12] == training_rows(short)
    assert rows[12]["lr"] == pytest.approx(training_rows(short)[11]["lr"] / 2, rel=0.05)
    assert list(history(workdir)[0]["changed"]) == ["data.sources", "optimizer.learning_rate", "train.steps"]

    # The checkpoint records the change: however often the run starts after it, it reads the same data.
    shutil.rmtree(workdir / "checkpoints" / "16")
    trained(config, workdir, *changes)
    assert training_rows(workdir) == rows

    assert [json.loads((workdir / "checkpoints/16/meta.json").read_text())["meta"]["position"]] == [
        [12, rows[11]["tokens"] // 32, [own, str(other)], [rows[11]["tokens"] // 32, 0]]]


def test_what_a_run_or_a_branch_may_not_change_is_one_line(config, short, tmp_path):
    result = runs.run("train", "--config", config, "--workdir", short, *LONG, "--config.model.vocab_size=320")
    result.assert_error("model.vocab_size is 288 there, 320 here", "These may change: train.steps,")
    result = runs.run("train", "--config", config, "--workdir", short, *SHORT[1:], "--config.train.steps=11")
    result.assert_error("train.steps=11 is less than the 12 steps")

    branch = ["--config", config, "--workdir", tmp_path / "branch", *LONG]
    runs.run("train", *branch, f"--config.init.from={short}@7").assert_error("no checkpoint of step 7; there are: 6, 9")
    runs.run("train", *branch, f"--config.init.from={short}@9", "--config.model.d_model=64").assert_error(
        "model.d_model is 32 there, 64 here")
    runs.run("train", *branch, f"--config.init.from={short}@9", "--config.lora.rank=2").assert_error(
        "branches a run", f"init.from={short}.")
    assert not (tmp_path / "branch").exists()


def test_a_staged_run_is_the_same_however_often_it_starts_and_branches(config, tmp_path):
    own, other = f"{config.removesuffix('config.py')}corpus", tmp_path / "other"
    runs.write_corpus(other)
    staged = [f"--config.data.sources=(('{own}',1.0),('{other}',0.0))",
              f"--config.data.stages=((5,(('{other}',1.0),)),(10,(('{own}',1.0),('{other}',3.0))))"]
    once = trained(config, tmp_path / "once", *staged, *SHORT)
    parts = trained(config, tmp_path / "parts", *staged, *SHORT[1:], "--config.train.steps=6")
    trained(config, parts, *staged, *SHORT)
    assert training_rows(parts) == training_rows(once)
    assert runs.final_bits(parts)[2] == runs.final_bits(once)[2]
    branch = tmp_path / "branch"
    trained(config, branch, f"--config.init.from={once}@9", *staged, *SHORT)
    assert training_rows(branch) == training_rows(once)[9:]
    assert runs.final_bits(branch)[2] == runs.final_bits(once)[2]


def test_muon_continues_to_the_bit_and_not_as_another_kind(config, tmp_path):
    muon = ["--config.optimizer.kind=muon", "--config.optimizer.qk_clip=0.5", "--config.optimizer.schedule_steps=6",
            "--config.train.final_eval_batches=1"]
    at_once = trained(config, tmp_path / "at_once", *muon, "--config.train.steps=6")
    workdir = trained(config, tmp_path / "run", *muon, "--config.train.steps=3")
    other = runs.run("train", "--config", config, "--workdir", workdir, *muon[1:], "--config.train.steps=6")
    other.assert_error("optimizer.kind is 'muon' there, 'adamw' here")

    trained(config, workdir, *muon, "--config.train.steps=6")

    assert training_rows(workdir) == training_rows(at_once) and "max_logit" in training_rows(workdir)[0]
    assert runs.final_bits(workdir)[2] == runs.final_bits(at_once)[2]
