"""Which processes a run has: told by flags, or by what started this one (Slurm, Open MPI, TPU pods, Kubernetes).

jax reads the variables of schedulers. A process that a scheduler started as one of several and that joins no others
would train alone, as each of them would, in one work directory: it is refused.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.meeting import STARTUP_TIMEOUT, Group

ALONE = "or alone with --processes=1"
FLAGS = "give --coordinator, --processes and --process"
FIRST_PORT = 61440  # jax takes a port from here to 65535, by the number of the job


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `find_group` reads."""
    group = parser.add_argument_group("several processes", "found under srun, mpirun and on TPU pods; else the same "
                                      "command for each, with its own number")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0; it listens there and on the next port")
    group.add_argument("--processes", type=int, help="how many there are; 1, without the others: run alone")
    group.add_argument("--process", type=int, help="which one this is, from 0")
    group.add_argument("--local-devices", metavar="N,N", help="the GPUs of this machine that this process uses "
                       "(default: its share of those it sees)")
    group.add_argument("--startup-timeout", type=int, metavar="SECONDS", default=STARTUP_TIMEOUT,
                       help="how long to wait for the others")


def find_group(args: argparse.Namespace) -> Group | None:
    """The processes of this run; None: it is the only one. args: the flags above.

    Raises:
      ConfigError: flags that do not go together, or a scheduler that started several tasks which jax cannot join.
    """
    told = (args.coordinator, args.processes, args.process)
    if told == (None, 1, None):
        return None
    if any(x is not None for x in told):
        if None in told:
            raise ConfigError("--coordinator, --processes and --process go together: give all three, or none; "
                              "--processes=1 alone is a run of one process.")
        group = Group(*told)
    else:
        _refuse_outside_of_srun(os.environ)
        found = _reader()
        if found is None:
            _refuse_one_of_several(os.environ)
        group = found and _detected(found, os.environ, args.startup_timeout)
        if group is None:
            return None
    if args.local_devices is None:
        return group
    if not re.fullmatch(r"\d+(,\d+)*", args.local_devices):
        raise ConfigError(f"--local-devices={args.local_devices!r} should be numbers of GPUs, such as 0,1.")
    return group._replace(devices=tuple(map(int, args.local_devices.split(","))))


def check_alone() -> None:
    """Raises ConfigError where a scheduler started this process as one of several."""
    found = _reader()
    group = found and _detected(found, os.environ, STARTUP_TIMEOUT)
    if group is not None:
        raise ConfigError(f"this is process {group.process} of {group.processes}, and the command runs in one; start "
                          "it once.")


def _detected(found: Any, environ: Mapping[str, str], timeout: int) -> Group | None:
    """What one of jax's readers says of its scheduler; None: that it has started one task."""
    try:
        processes, process, local = found.get_process_count(), found.get_process_id(), found.get_local_process_id()
        if processes == 1:
            return None
        own_port = environ.get("JAX_COORDINATOR_PORT")
        address = environ.get("JAX_COORDINATOR_ADDRESS") or found.get_coordinator_address(
            timeout_secs=timeout, override_coordinator_port=own_port)
    except Exception as error:  # of a web server, of a parser, of a missing package: whatever jax meets
        raise ConfigError(f"this is one of several processes ({found.name}), and jax cannot tell which: {error}; "
                          f"{FLAGS}.") from error
    if not own_port and "JAX_COORDINATOR_ADDRESS" not in environ:
        address = _with_room_for_two(address)
    return Group(address, processes, process, _devices(environ, local))


def _reader() -> Any:
    """The class with which jax reads the scheduler that started this process, or None.

    `jax.distributed.initialize` would read it too, but says nothing of it: here the processes meet before. The class
    is private to jax; without it a scheduler is refused below, and the flags are left.
    """
    try:
        from jax._src.clusters import ClusterEnv

        known = [each for each in ClusterEnv._cluster_types if not each.opt_in_only_method]
    except (ImportError, AttributeError):
        return None
    for each in known:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pod without the package kubernetes: it may be a pod alone
            try:
                if each.is_env_present():
                    return each
            except Exception:  # no server of metadata, or no account that may ask: not such a cluster
                continue
    return None


def _with_room_for_two(address):
    """Jobs with neighbouring numbers may share a machine, and each takes two ports."""
    host, _, port = address.rpartition(":")
    if int(port) < FIRST_PORT:
        return address
    return f"{host}:{FIRST_PORT + 2 * ((int(port) - FIRST_PORT) % 2047)}"


def _devices(environ, local) -> tuple[int, ...] | None:
    """This process's share of the GPUs of its machine: all with one task there, else as many neighbours as the others
    have. None: all that it sees, also where the scheduler has shown it its share only."""
    tasks = _tasks_here(environ)
    if local is None or tasks == 1 or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    count = len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len(visible.split(","))
    share, rest = divmod(count, tasks)
    return None if rest or not share else tuple(range(local * share, (local + 1) * share))


def _tasks_here(environ) -> int:
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        return int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    counts = []  # of each node, from a word such as 4(x2),3
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else 1


def _refuse_outside_of_srun(environ) -> None:
    """Raises ConfigError in the script of a job, or its shell, that has several tasks: each would be process 0."""
    if "SLURM_JOB_ID" not in environ or "OMPI_COMM_WORLD_SIZE" in environ:
        return
    if environ.get("SLURM_STEP_NUM_TASKS", "") == environ.get("SLURM_NTASKS", "1"):
        return
    for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"):
        if _several(environ, name):
            raise ConfigError(f"{name}={environ[name]}, and srun did not start this process; start it with srun, "
                              f"{ALONE}.")


def _refuse_one_of_several(environ) -> None:
    """Raises ConfigError where variables say that there are several tasks, and jax knows none."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS", "MEGASCALE_NUM_SLICES", "TPU_WORKER_HOSTNAMES"):
        if _several(environ, name):
            raise ConfigError(f"{name}={environ[name]}: this is one of several tasks, and jax cannot join them by "
                              f"itself; {FLAGS}, {ALONE}.")
    if "JOB_COMPLETION_INDEX" in environ:  # Kubernetes does not say of how many
        raise ConfigError("this is a pod of an indexed Job, and jax cannot join the others by itself; "
                          f"{FLAGS} $JOB_COMPLETION_INDEX, {ALONE}.")


def _several(environ, name) -> bool:
    value = environ.get(name, "")
    return "," in value or (value.isdecimal() and int(value) > 1)
