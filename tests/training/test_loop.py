"""Runs: however a run is stopped and resumed, its results equal those of the uninterrupted one to the bit."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from deepseek_jax import io, stop
from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.manager import restore_items
from deepseek_jax.config import load_config
from deepseek_jax.training.loop import starting_state
from deepseek_jax.training.metrics import read_expert_loads, read_metrics
from tests import runs

pytestmark = pytest.mark.slow  # complete runs and commands


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted run."""
    config, workdir, result = runs.finished_run()
    assert result.code == 0, result
    return workdir


@pytest.fixture(scope="module")
def config():
    return runs.finished_run()[0]


def train(config, workdir, *overrides):
    return runs.run("train", "--config", config, "--workdir", workdir, *overrides)


def signal_after(config, workdir, rows, which, *overrides):
    """Starts or resumes the run, and sends a signal once the metrics have the given number of rows."""
    process = runs.start_training(config, workdir, *overrides)
    while process.poll() is None:
        if len(read_metrics(workdir)) >= rows:
            process.send_signal(which)
            break
        time.sleep(0.002)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def test_a_run_leaves_metrics_loads_pictures_and_checkpoints(whole):
    said = runs.finished_run()[2].out
    trained = [row for row in runs.rows(whole) if "loss" in row]
    evaluated = [row for row in runs.rows(whole) if "eval_loss" in row]

    assert [row["step"] for row in trained] == list(range(1, runs.STEPS + 1))
    assert {"step", "tokens", "loss", "mtp_loss", "lr", "tokens_per_second", "max_vio", "mfu", "grad_norm",
            "load_entropy", "idle_experts", "sequence_loss", "auxiliary_loss", "bias_low", "bias_high", "seconds_data",
            "seconds_step", "seconds_write", "device_bytes_peak"} == set(read_metrics(whole)[0])
    assert trained[-1]["tokens"] == (6 * 2 + (runs.STEPS - 6) * 4) * 32  # two sequences per step during the ramp
    assert [row["step"] for row in evaluated] == [10, 20, 30]
    assert set(evaluated[0]) == {"step", "eval_loss", "eval_bits_per_byte", "eval_share", "max_vio_global"}
    assert evaluated[0]["eval_share"] == evaluated[1]["eval_share"] < evaluated[2]["eval_share"] == 1
    assert trained[-1]["loss"] < trained[0]["loss"] - 1
    steps, counts_SLE = read_expert_loads(whole)
    assert list(steps) == list(range(1, runs.STEPS + 1)) and counts_SLE.shape[1:] == (2, 8)  # one MoE layer, one MTP
    assert (counts_SLE.sum((1, 2)) * 32 // (2 * 2 * 32) == np.diff([0, *(r["tokens"] for r in trained)])).all()
    assert runs.checkpoints(whole) == [24, 27, 30]
    for picture in ("loss.png", "expert_load.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")
    assert any("tfevents" in p.name and p.stat().st_size for p in (whole / "tensorboard").iterdir())
    assert "source" in said and "held out" in said and "epochs" in said
    assert "Sample:\ndef " in said and "gzip each" in said and "xz concatenated" in said


def test_a_finished_run_started_again_changes_nothing(config, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    again = train(config, workdir)

    assert again.code == 0 and "Resuming from step 30 of 30" in again.out and "Sample:" in again.out
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    runs.assert_same_run(workdir, whole)


def kill_and_resume(config, whole, workdir, kills):
    pick, killed = random.Random(), []
    for _ in range(kills):
        rows = len(read_metrics(workdir)) + pick.randint(1, runs.STEPS // 3)
        code, out = signal_after(config, workdir, rows, signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0), out
        killed += [code == -signal.SIGKILL]
    code, out = signal_after(config, workdir, 10**9, signal.SIGKILL)
    assert code == 0, out
    assert any(killed)  # a run that ends between two checks of this test is not killed
    runs.assert_same_run(workdir, whole)


def test_killed_at_random_steps_and_resumed_a_run_ends_bit_identical(config, whole, tmp_path):
    kill_and_resume(config, whole, tmp_path / "run", kills=2)


@pytest.mark.slow
def test_killed_many_times_a_run_ends_bit_identical(config, whole, tmp_path):
    kill_and_resume(config, whole, tmp_path / "run", kills=8)


def test_killed_it_continues_from_the_state_on_this_machine_bit_identical(config, whole, tmp_path):
    local = [f"--config.train.checkpoint_local={tmp_path / 'fast'}", "--config.train.checkpoint_local_every=2",
             "--config.train.checkpoint_every=100"]
    code, _ = signal_after(config, tmp_path / "run", 12, signal.SIGKILL, *local)
    assert code == -signal.SIGKILL
    newest = max(int(p.name) for p in (tmp_path / "fast").glob("*/process_0/*") if p.name.isdecimal())
    code, said = signal_after(config, tmp_path / "run", 10**9, signal.SIGKILL, *local)
    assert code == 0 and f"Resuming from step {newest} of 30" in said
    runs.assert_same_run(tmp_path / "run", whole)


def test_checkpoints_by_the_clock_and_those_that_are_kept_for_good(config, tmp_path):
    result = train(config, tmp_path / "run", "--config.train.steps=8", "--config.train.checkpoint_every=100",
                   "--config.train.checkpoint_minutes=1e-9", "--config.train.checkpoints_kept=1",
                   "--config.train.checkpoint_keep_period=3", "--config.train.sample_tokens=0")
    assert result.code == 0 and runs.checkpoints(tmp_path / "run") == [3, 6, 8]


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_ends_well_and_the_same_command_goes_on(config, whole, tmp_path, which):
    code, out = signal_after(config, tmp_path / "run", 4, which)
    assert code == stop.STOPPED and f"Stopped by {which.name} after step" in out and "Traceback" not in out
    saved, rows = runs.checkpoints(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert 4 <= saved[-1] == rows[-1]["step"] < runs.STEPS

    resumed = train(config, tmp_path / "run")
    assert resumed.code == 0 and f"Resuming from step {saved[-1]} of" in resumed.out
    runs.assert_same_run(tmp_path / "run", whole)


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_goes_on(config, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    biggest = max((p for p in (workdir / "checkpoints/30").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(biggest, biggest.stat().st_size // 2)
    (workdir / "loss.png").unlink()

    resumed = train(config, workdir)

    assert resumed.code == 0 and "resuming from 27 instead" in resumed.out
    assert "Resuming from step 27" in resumed.out and (workdir / "loss.png").exists()
    runs.assert_same_run(workdir, whole)


def test_a_loss_that_is_not_finite_ends_the_run_and_the_checkpoint_before_it_stays(config, tmp_path):
    result = train(config, tmp_path / "run", *runs.DENSE, "--config.train.checkpoint_every=1",
                   "--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup=0")

    kept = runs.checkpoints(tmp_path / "run")
    result.assert_error(f"not finite at step {kept[-1] + 1}; the checkpoint of step {kept[-1]} is kept",
                        "optimizer.learning_rate")
    assert not list(manifest.damages(tmp_path / f"run/checkpoints/{kept[-1]}"))
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == kept  # no files of the step that failed


def test_a_dense_model_without_mtp_trains_and_is_drawn(config, tmp_path):
    result = train(config, tmp_path / "run", *runs.DENSE)

    assert result.code == 0, result
    rows = runs.rows(tmp_path / "run")
    assert rows[-1]["max_vio_global"] == 0 and not any("mtp_loss" in row for row in rows)
    assert rows[-2]["loss"] < rows[0]["loss"] - 1
    assert (tmp_path / "run/loss.png").exists() and not (tmp_path / "run/expert_load.png").exists()
    score = runs.run("evaluate", "--workdir", tmp_path / "run")
    assert score.code == 0 and f"{rows[-1]['eval_bits_per_byte']:.4f}" in score.out


def test_a_full_disk_while_saving_is_one_line_and_the_older_checkpoint_survives(config, whole, tmp_path, monkeypatch):
    workdir, write_json = tmp_path / "run", io.write_json

    def full_from_step_9(path, value, **options):
        if isinstance(value, dict) and value.get("step", 0) >= 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_json(path, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(io, "write_json", full_from_step_9)
        result = train(config, workdir)
    result.assert_error("checkpoint 9 was not written", "no space left", "The checkpoint of step 6 is untouched")
    assert runs.checkpoints(workdir) == [3, 6]

    assert train(config, workdir).code == 0  # once there is space again
    runs.assert_same_run(workdir, whole)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a tiny disk")
def test_a_disk_that_is_really_full_ends_the_run_in_one_line(config, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        workdir = shutil.copytree(whole, disk / "run")
        shutil.rmtree(workdir / "checkpoints/30")
        space = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(space.f_bavail * space.f_bsize - 60_000))
        result = train(config, workdir)
        result.assert_error("pace left")
        assert runs.checkpoints(workdir)[-1] == 27 and not list(manifest.damages(workdir / "checkpoints/27"))
        (disk / "filler").unlink()
        assert train(config, workdir).code == 0
        runs.assert_same_run(workdir, whole)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)  # lazily: token shards may still be mapped


def test_a_full_disk_under_the_metrics_names_the_file(config, whole, tmp_path, monkeypatch):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/30")
    (workdir / "metrics.jsonl").unlink()
    os.symlink("/dev/full", workdir / "metrics.jsonl")
    monkeypatch.setattr("deepseek_jax.training.metrics._drop_rows", lambda *_: [])

    train(config, workdir).assert_error("metrics.jsonl: No space left on device")


def test_a_work_directory_with_another_config_shows_the_difference(config, whole, tmp_path):
    before = (whole / "metrics.jsonl").read_bytes()
    result = train(config, whole, "--config.train.seed=1", "--config.model.yarn={'factor': 2}")

    result.assert_error("a run with another config", "train.seed is 0 there, 1 here", "model.yarn is None there")
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_work_directory_is_only_claimed_once_its_data_is_good(config, tmp_path):
    train(config, tmp_path / "run", "--config.train.sequence_length=10000000").assert_error("fewer than")
    assert not (tmp_path / "run/config.json").exists()


def test_fine_tuning_starts_from_the_weights_with_a_fresh_optimizer(config, whole, tmp_path):
    runs.write_questions(tmp_path / "questions.jsonl")
    overrides = [f"--config.init.from={whole}", f"--config.data.sources=[('{tmp_path}/questions.jsonl', 1)]"]
    state = starting_state(load_config(config, overrides))
    trained, _, _ = restore_items(whole)

    for name, found in (("params", state.params), ("router", state.router), ("params", state.ema)):
        jax.tree.map(np.testing.assert_array_equal, found, trained[name])
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert state.step == 0 and moments and not any(np.asarray(x).any() for x in moments)
    assert np.abs(trained["router"]["bias"]).max() > 0

    result = train(config, tmp_path / "run", *overrides)
    assert result.code == 0, result
    rows = runs.rows(tmp_path / "run")
    assert rows[-2]["loss"] < 1 < rows[0]["loss"]  # the answers; the prompts' random numbers cannot be predicted
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


def test_fine_tuning_from_where_nothing_was_trained_says_so(config, tmp_path):
    result = train(config, tmp_path / "run", f"--config.init.from={tmp_path}/nothing")
    result.assert_error("nothing holds no config.json")


def test_the_config_of_a_run_is_json_that_any_program_reads(whole):
    saved = json.loads((whole / "config.json").read_text())
    assert saved["train"]["steps"] == runs.STEPS and saved["init"] == {"from": None}


def test_forced_balance_is_named_in_every_row_and_loads_are_even(config, tmp_path):
    done = train(config, tmp_path / "run", "--config.balance.force_balanced=True", "--config.train.steps=2")
    assert done.code == 0, done
    trained = [row for row in runs.rows(tmp_path / "run") if "loss" in row]
    assert len(trained) == 2 and all(row["force_balanced"] == 1 for row in trained)
    assert all(row["max_vio"] < 0.01 and row["idle_experts"] == 0 for row in trained)
