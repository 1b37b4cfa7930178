"""Complete runs of two processes: their losses are those of one process, and when one ends, so does the other."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from deepseek_jax import stop
from deepseek_jax.training.metrics import read_metrics
from tests import runs
from tests.parallel.groups import free_port

OVERRIDES = ["--config.train.steps=12", "--config.train.batch_size=16", "--config.train.ramp_from=None",
             "--config.train.sample_tokens=2"]
MESH = ["--config.mesh.node=2", "--config.mesh.local=4"]
TRAFFIC = {"nodes_per_token", "leaving_node", "cross_node_bytes", "inside_node_bytes", "flat_cross_node_bytes"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return runs.write_config(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The rows of metrics of a run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    result = runs.run("train", "--config", config, "--workdir", workdir, *OVERRIDES, *MESH)
    assert result.code == 0, result
    return runs.rows(workdir)


def start_two(config, workdir, devices=4, second=()):
    """`second`: additional arguments of process 1."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    address = f"localhost:{free_port()}"
    return [subprocess.Popen(
        [sys.executable, "-m", "deepseek_jax.train", "--config", config, "--workdir", str(workdir), *OVERRIDES, *MESH,
         "--coordinator", address, "--processes", "2", "--process", str(i), *(second if i else ())],
        text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]


def assert_same_losses(workdir, alone):
    found = runs.rows(workdir)
    assert [row.keys() for row in found] == [row.keys() for row in alone]
    for row, expected in zip(found, alone):
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-5, err_msg=f"{name} of step {row['step']}")


@pytest.mark.slow
def test_two_processes_train_to_the_losses_of_one(config, alone, tmp_path):
    both = start_two(config, tmp_path / "run")
    said = [process.communicate(timeout=570)[0] for process in both]

    assert [process.returncode for process in both] == [0, 0], said
    assert "Sample:" in said[0] and "Sample:" not in said[1] and "step 12:" not in said[1]
    assert_same_losses(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_with_a_clear_line_and_both_resume(config, alone, tmp_path, victim):
    both = start_two(config, tmp_path / "run")
    while len(read_metrics(tmp_path / "run")) < 5 and both[0].poll() is None:
        time.sleep(0.05)
    both[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said, _ = both[1 - victim].communicate(timeout=60)
    both[victim].communicate()

    assert time.monotonic() - killed < 60 and both[1 - victim].returncode == stop.PEER_LOST, said
    assert f"error: process {victim} of 2 has ended" in said and "start all of them again" in said

    again = start_two(config, tmp_path / "run")
    said = [process.communicate(timeout=570)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert "Resuming from step 3 of 12" in said[0] or "Resuming from step 6 of 12" in said[0], said[0]
    assert_same_losses(tmp_path / "run", alone)


@pytest.mark.slow
def test_sigterm_to_one_saves_and_ends_both(config, tmp_path):
    both = start_two(config, tmp_path / "run")
    while len(read_metrics(tmp_path / "run")) < 2 and both[0].poll() is None:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[0] for process in both]

    assert [process.returncode for process in both] == [stop.STOPPED] * 2, said
    assert "Stopped by SIGTERM after step" in said[0]
    assert runs.checkpoints(tmp_path / "run")[-1] == read_metrics(tmp_path / "run")[-1]["step"]


@pytest.mark.slow
def test_a_mesh_of_too_many_devices_ends_all_processes_in_one_line(config, tmp_path):
    both = start_two(config, tmp_path / "run", devices=2)
    said = [process.communicate(timeout=120)[0] for process in both]

    assert [process.returncode for process in both] == [stop.MISTAKE] * 2, said
    assert any("is for 8 devices, and 4 are here" in words for words in said)
    assert all("Traceback" not in words for words in said), said


@pytest.mark.slow
@pytest.mark.parametrize(("second", "complaint"), [("--config.train.steps=6", "were given different configs"),
                                                   ("--workdir=elsewhere", "is not the directory of process 0")])
def test_processes_that_were_not_told_the_same_end_in_one_line(config, tmp_path, second, complaint):
    both = start_two(config, tmp_path / "run", second=[second.replace("elsewhere", str(tmp_path / "elsewhere"))])
    said = [process.communicate(timeout=300)[0] for process in both]

    assert [process.returncode for process in both] == [stop.MISTAKE] * 2, said
    assert complaint in said[1] and all("Traceback" not in words for words in said), said


ALONE = """
import sys, time
from deepseek_jax.parallel.processes import Group, first_then_others, is_first, joined
with joined(Group(sys.argv[1], 2, int(sys.argv[2]))):
    start = time.monotonic()
    first_then_others(lambda: time.sleep(35 * is_first()), "prepare")
    print(time.monotonic() - start > 34, flush=True)
"""


@pytest.mark.slow
def test_the_others_wait_while_the_first_works_for_longer_than_gloo_would():
    address = f"localhost:{free_port()}"
    both = [subprocess.Popen([sys.executable, "-c", ALONE, address, str(i)], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT) for i in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]

    assert all("True" in words for words in said), said


@pytest.mark.slow
def test_what_a_capacity_drops_is_in_the_metrics_and_on_the_screen(config, tmp_path):
    result = runs.run("train", "--config", config, "--workdir", tmp_path / "run", *OVERRIDES, *MESH,
                      "--config.mesh.capacity=0.5", "--config.train.steps=2")

    dropped = [row["dropped_choices"] for row in runs.rows(tmp_path / "run") if "loss" in row]  # not evaluations
    assert len(dropped) == 2 and min(dropped) > 0
    assert f"{dropped[-1]} CHOICES DROPPED" in result.err, result


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(config, alone, tmp_path):
    train = lambda mesh: runs.run("train", "--config", config, "--workdir", tmp_path / "run", *OVERRIDES, *mesh)
    assert train(MESH).code == 0
    for step in (9, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))

    resumed = train(["--config.mesh.replica=2", "--config.mesh.local=2", "--config.mesh.tensor=2"])

    assert resumed.code == 0 and "Resuming from step 6 of 12" in resumed.out, resumed
    for row, expected in zip(runs.rows(tmp_path / "run"), alone, strict=True):
        for name in expected.keys() - TRAFFIC:  # it belongs to another mesh
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, err_msg=f"{name} of step {row['step']}")

