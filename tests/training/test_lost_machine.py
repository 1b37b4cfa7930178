"""Runs of several processes that are killed and lose a machine: they continue from the state on the remaining ones."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from deepseek_jax.training.metrics import read_metrics
from tests import runs
from tests.parallel.groups import free_port

STEPS = 16
SMALL = [*runs.DENSE, f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=100",
         "--config.train.eval_every=100", "--config.train.final_eval_batches=1", "--config.train.sample_tokens=0"]
# Each process has its machine's disk in its start folder, under the same name as in all configs of a run.
LOCAL = ["--config.train.checkpoint_local=/proc/self/cwd/fast", "--config.train.checkpoint_local_every=2"]


def start(config, folder, workdir, count, *overrides):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    address, machines = f"localhost:{free_port()}", [folder / f"machine_{i}" for i in range(count)]
    for machine in machines:
        machine.mkdir(parents=True, exist_ok=True)
    return [subprocess.Popen(
        [sys.executable, "-m", "deepseek_jax.train", "--config", config, "--workdir", str(workdir), *SMALL, *overrides,
         f"--config.mesh.replica={count}", "--coordinator", address, "--processes", str(count), "--process", str(i)],
        text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=machine)
        for i, machine in enumerate(machines)]


def finish(processes):
    said = [process.communicate(timeout=570)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said[0]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_and_lost_a_machine_ends_bit_identical(tmp_path, count):
    config = runs.write_config(tmp_path)
    finish(start(config, tmp_path / "whole", tmp_path / "whole/run", count))
    processes = start(config, tmp_path, tmp_path / "run", count, *LOCAL)
    while len(read_metrics(tmp_path / "run")) < STEPS // 2 and processes[0].poll() is None:
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    said = [process.communicate()[0] for process in processes]
    assert {process.returncode for process in processes} == {-signal.SIGKILL}, said
    shutil.rmtree(tmp_path / "machine_1/fast")

    said = finish(start(config, tmp_path, tmp_path / "run", count, *LOCAL))

    step = re.search(r"Resuming from step (\d+) of", said)
    # Row 8 is written before the run waits for the state of step 6: only the state of step 4 is certain.
    assert step and STEPS // 2 - 4 <= int(step[1]) < STEPS
    giver = (1 + count // 2) % count
    assert f"Parts of step {step[1]} that machines have lost: process 1 from process {giver}." in said
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole/run", leaves=10)
