"""The scripts of examples/cluster: real Slurm and Open MPI start them; for the others, the command lines parse."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from deepseek_jax import stop, train
from deepseek_jax.config import load_config
from deepseek_jax.training.metrics import read_metrics
from tests import runs
from tests.examples import slurm

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples/cluster"
TRAIN = [*runs.DENSE, "--config.train.sample_tokens=0", "--config.train.checkpoint_every=1000"]


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    """Environment of the scripts: a small config, this Python, and a CPU instead of GPUs."""
    folder = tmp_path_factory.mktemp("cluster")
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    return {"CONFIG": runs.write_config(folder), "PATH": path, "PYTHONPATH": str(EXAMPLES.parents[1]),
            "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def cluster(variables, tmp_path_factory):
    if reason := slurm.why_not():
        pytest.skip(reason)
    with slurm.started(tmp_path_factory.mktemp("slurm")) as environ:
        yield environ | variables | {"PATH": f"{variables['PATH']}:/usr/sbin"}


def arguments(devices, steps=3):
    return " ".join([*TRAIN, f"--config.mesh.local={devices}", f"--config.train.steps={steps}",
                     f"--config.train.batch_size={devices}"])


def submit(cluster, workdir, devices, *options, steps=3, count=1):
    """Starts sbatch --wait. Returns its process, and the file of the job's output."""
    environ = cluster | {"WORKDIR": str(workdir), "ARGS": arguments(devices, steps),
                         "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    out = workdir.with_suffix(".out")
    return subprocess.Popen(["sbatch", "--wait", f"--output={out}", "--cpus-per-task=1", *options], env=environ), out


def assert_trained(workdir, processes, said):
    assert [row["step"] for row in read_metrics(workdir) if "loss" in row] == [1, 2, 3], said
    assert f"connected peer ranks is : {processes - 1}" in said and said.count("source ") == 1, said


def commands(path):
    """The arguments of `deepseek_jax.train` in a file of examples/cluster."""
    text = path.read_text()
    if path.suffix != ".yaml":
        lines = re.findall(r"deepseek_jax\.train (.*)", text)
        return [shlex.split(line.removesuffix('"') if line.count('"') % 2 else line) for line in lines]
    [job] = yaml.safe_load(text)["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "deepseek_jax.train"]
    return [container["args"]]


VALUES = {"$CONFIG": "tiny", "$WORKDIR": "run", "$(JOB_COMPLETION_INDEX)": "1"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_the_command_of_an_example_is_one_that_train_understands(path, monkeypatch):
    found = commands(path)
    assert found
    for words in found:
        words = [word for word in words if word != "$ARGS"]
        for name, value in VALUES.items():
            words = [word.replace(name, value) for word in words]
        monkeypatch.setattr(sys, "argv", ["train", *words])
        args, overrides = train.parse()
        mesh = load_config(args.config, overrides).mesh
        assert path.suffix in (".sbatch", ".sh") or mesh.devices in (16, 64)
    if path.suffix != ".yaml":
        subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.slow
def test_slurm_starts_four_processes_one_for_each_gpu_of_two_nodes(cluster, tmp_path):
    job, out = submit(cluster, tmp_path / "run", 4, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2",
                      EXAMPLES / "task_per_gpu.sbatch")
    assert job.wait(500) == 0, out.read_text()
    assert_trained(tmp_path / "run", 4, out.read_text())


@pytest.mark.slow
def test_slurm_starts_a_process_for_each_node_with_all_of_its_devices_and_continues_after_a_signal(cluster, tmp_path):
    job, out = submit(cluster, tmp_path / "run", 4, "--nodes=2", "--gpus-per-node=2", EXAMPLES / "task_per_node.sbatch",
                      steps=3000, count=2)
    ends = time.monotonic() + 400
    while len(read_metrics(tmp_path / "run")) < 3 and time.monotonic() < ends:
        time.sleep(0.1)
    number = subprocess.run(["squeue", "--noheader", "--format=%i"], env=cluster, capture_output=True, text=True,
                            check=True).stdout.strip()
    subprocess.run(["scancel", "--signal=USR1", number], env=cluster, check=True)  # as --signal=USR1@300 does
    while "Stopped by SIGUSR1" not in out.read_text() and time.monotonic() < ends:
        time.sleep(0.1)
    said = out.read_text()
    assert "connected peer ranks is : 1" in said and "Stopped by SIGUSR1 after step" in said
    saved = runs.checkpoints(tmp_path / "run")
    assert saved and saved[-1] == read_metrics(tmp_path / "run")[-1]["step"] < 3000
    while f"Resuming from step {saved[-1]}" not in out.read_text() and time.monotonic() < ends:
        time.sleep(0.1)
    assert f"Resuming from step {saved[-1]}" in out.read_text(), out.read_text()
    subprocess.run(["scancel", number], env=cluster, check=True)
    job.wait(60)


@pytest.mark.slow
def test_a_job_that_forgets_srun_ends_at_once_in_one_line(cluster, tmp_path):
    wrapped = "python -m deepseek_jax.train --config $CONFIG --workdir $WORKDIR $ARGS"
    job, out = submit(cluster, tmp_path / "run", 4, "--ntasks=4", "--wrap", wrapped)
    assert job.wait(60) == stop.MISTAKE
    assert out.read_text().strip() == ("error: SLURM_NTASKS=4, and srun did not start this process; start it with "
                                       "srun, or alone with --processes=1.")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here: apt-get install openmpi-bin")
@pytest.mark.parametrize("processes", [2, 4])
def test_open_mpi_starts_processes(variables, tmp_path, processes):
    environ = os.environ | variables | {
        "WORKDIR": str(tmp_path / "run"), "ARGS": arguments(processes), "HOSTS": f"localhost:{processes}",
        "XLA_FLAGS": "", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    done = subprocess.run([EXAMPLES / "open_mpi.sh"], env=environ, capture_output=True, text=True, timeout=500,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_trained(tmp_path / "run", processes, done.stdout + done.stderr)
