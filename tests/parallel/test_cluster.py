"""The processes of a run, determined by flags and by environment variables as real schedulers set them."""

import argparse
import inspect

import pytest
from jax._src.clusters import ClusterEnv

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel import cluster
from deepseek_jax.parallel.meeting import Group

STEP = {  # set by `srun` in a job of four tasks on two nodes: the second task of the first node
    "SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
BODY = {  # set for the script that sbatch runs
    "SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0"}
MPIRUN = {"OMPI_MCA_orte_hnp_uri": "8192000.0;tcp://10.0.0.7:34911", "OMPI_COMM_WORLD_SIZE": "4",
          "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}


@pytest.fixture
def find(monkeypatch):
    """find_group with these variables and flags, on a machine without GPUs of its own."""
    monkeypatch.setattr(cluster.glob, "glob", lambda _: [])
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)

    def call(environ, *flags):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return cluster.find_group(parser.parse_args(flags))

    return call


def test_srun_starts_a_run_without_flags(find):
    assert find(STEP) == Group("n1:61458", 4, 1)


def test_mpirun_starts_a_run_without_flags(find):
    assert find(MPIRUN | BODY) == Group("10.0.0.7:65440", 4, 3)  # also within a Slurm job


def test_a_launcher_without_others_is_a_run_alone(find):
    assert find(STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find(MPIRUN | BODY | {"OMPI_COMM_WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize("environ", [
    BODY, {"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "2"},
    STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}])  # the last: salloc's shell, if it runs as a step
def test_a_job_of_several_tasks_outside_of_srun_is_refused_at_once(find, environ):
    with pytest.raises(ConfigError, match="srun did not start this process; start it with srun, or alone with --proc"):
        find(environ)
    assert find(environ, "--processes=1") is None


@pytest.mark.parametrize("environ", [{"PMI_SIZE": "4"}, {"TPU_WORKER_HOSTNAMES": "a,b"}, {"JOB_COMPLETION_INDEX": "0"},
                                     {"SLURM_NTASKS": "2"}])
def test_one_of_several_that_jax_cannot_join_is_refused(find, environ):
    with pytest.raises(ConfigError, match="jax cannot join.*--coordinator, --processes and --process.*, or alone"):
        find(environ)


@pytest.mark.parametrize("broken", [lambda *_: (None,) * 4, lambda: None])
def test_when_jax_reads_schedulers_in_another_way_they_are_refused_and_flags_work(find, monkeypatch, broken):
    monkeypatch.setattr("jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params", broken)
    with pytest.raises(ConfigError, match="SLURM_NTASKS=4: this is one of several tasks"):
        find(STEP)
    assert find(STEP, "--coordinator=a:9900", "--processes=2", "--process=1") == Group("a:9900", 2, 1)


def test_what_jax_misses_is_said(find, monkeypatch):
    def fails(*_):
        raise RuntimeError("Open MPI 5\nneeds mpi4py")

    monkeypatch.setattr("jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params", fails)
    assert find({}) is None
    with pytest.raises(ConfigError, match=r"_SIZE=4: .* by itself \(Open MPI 5 needs mpi4py\); give"):
        find(MPIRUN)


def test_a_command_of_one_process_is_refused_in_several(monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")  # possibly of one pod
    cluster.check_alone()
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="this is process 1 of 4, and the command runs in one"):
        cluster.check_alone()


@pytest.mark.parametrize(("tasks", "visible", "expected"), [
    ("2(x2)", "0,1", (1,)), ("2(x2)", "0,1,2,3", (2, 3)), ("2(x2)", "5", None), ("1(x4)", "0,1,2,3", None),
    ("2(x2)", None, None)])
def test_tasks_of_one_machine_share_its_gpus_and_one_task_has_all(find, monkeypatch, tasks, visible, expected):
    environ = STEP | {"SLURM_STEP_TASKS_PER_NODE": tasks}
    assert find(environ | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})).devices == expected
    assert find(environ, "--local-devices=3,1").devices == (3, 1)


def test_variables_for_jax_are_taken_as_they_are(find):
    if "override_coordinator_port" in inspect.signature(ClusterEnv.get_coordinator_address).parameters:  # not jax 0.7
        assert find(STEP | {"JAX_COORDINATOR_PORT": "7000"}).coordinator == "n1:7000"
    assert find(STEP | {"JAX_COORDINATOR_ADDRESS": "head:8000"}).coordinator == "head:8000"
    assert find({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "0"}).devices is None  # jax reads it itself


def test_neighbouring_jobs_on_one_machine_have_ports_apart(find):
    ports = [int(find(STEP | {"SLURM_JOB_ID": str(job)}).coordinator.split(":")[1]) for job in range(2040, 2060)]
    assert all(61440 <= port < 65535 for port in ports)
    assert len({p for port in ports for p in (port, port + 1)}) == 2 * len(ports)


@pytest.mark.parametrize(("flags", "words"), [
    (["--coordinator=a:9900"], "give all three, or none"), (["--processes=2"], "give all three, or none"),
    (["--coordinator=a:9900", "--processes=2", "--process=0", "--local-devices=a"], "should be numbers of GPUs")])
def test_flags_that_say_too_little_are_one_line(find, flags, words):
    with pytest.raises(ConfigError, match=words):
        find({}, *flags)


def test_a_process_alone_is_not_told_its_devices_in_vain(find):
    with pytest.raises(ConfigError, match="one alone takes CUDA_VISIBLE_DEVICES=1"):
        find({}, "--local-devices=1")
