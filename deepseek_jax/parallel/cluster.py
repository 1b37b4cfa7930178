"""The processes of a run, from flags or from the scheduler (Slurm, Open MPI, TPU pods, Kubernetes).

jax reads the variables of schedulers. If a scheduler starts several processes that do not join each other, each would
train alone in the same work directory: this is refused.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import warnings
from collections.abc import Mapping

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.meeting import STARTUP_TIMEOUT, Group

ALONE = "or alone with --processes=1"
FLAGS = "give --coordinator, --processes and --process"
FIRST_PORT = 61440  # jax chooses a port from here to 65535, by the job's number


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
    """The processes of this run; None: there is only this one. args: the flags above.

    Raises:
      ConfigError: contradictory flags, or a scheduler that started several tasks which jax cannot join.
    """
    group = _told_or_detected(args)
    if args.local_devices is None:
        return group
    if group is None:
        raise ConfigError("--local-devices is for several processes; one alone takes CUDA_VISIBLE_DEVICES="
                          f"{args.local_devices}.")
    if not re.fullmatch(r"\d+(,\d+)*", args.local_devices):
        raise ConfigError(f"--local-devices={args.local_devices!r} should be numbers of GPUs, such as 0,1.")
    return group._replace(devices=tuple(map(int, args.local_devices.split(","))))


def _told_or_detected(args):
    told = (args.coordinator, args.processes, args.process)
    if told == (None, 1, None):
        return None
    if None not in told:
        return Group(*told)
    if any(x is not None for x in told):
        raise ConfigError("--coordinator, --processes and --process go together: give all three, or none; "
                          "--processes=1 alone is a run of one process.")
    _refuse_outside_of_srun(os.environ)
    group, why = _detected(os.environ, args.startup_timeout)
    if group is None:
        _refuse_one_of_several(os.environ, why)
    return group if group and group.processes > 1 else None


def check_alone() -> None:
    """Raises ConfigError if a scheduler started this process as one of several."""
    group, _ = _detected(os.environ, STARTUP_TIMEOUT)
    if group and group.processes > 1:
        raise ConfigError(f"this is process {group.process} of {group.processes}, and the command runs in one; start "
                          "it once.")


def _detected(environ: Mapping[str, str], timeout: int) -> tuple[Group | None, Exception | None]:
    """What jax reads from the scheduler, None if it knows none; and the exception that it raised, if any.

    `jax.distributed.initialize` reads it in the same way but does not return it, and the processes connect before that.
    """
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    processes = process = local = why = None
    try:
        from jax._src.clusters import ClusterEnv  # private to jax: without it only the flags remain

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a pod without the package kubernetes, which may be a single pod
            found = ClusterEnv.auto_detect_unset_distributed_params(address, None, None, None, None, timeout)
        address, processes, process, local = found
    except Exception as error:  # from a web server, a parser, a missing package, a changed signature
        why = error
    if processes is None or process is None or address is None:
        return None, why
    if not {"JAX_COORDINATOR_PORT", "JAX_COORDINATOR_ADDRESS"} & environ.keys():
        address = _with_room_for_two(address)
    return Group(address, processes, process, _devices(environ, local[0] if local else None)), None


def _with_room_for_two(address):
    """Two ports per job: jobs with neighbouring numbers may share a machine."""
    host, _, port = address.rpartition(":")
    if int(port) < FIRST_PORT:
        return address
    return f"{host}:{FIRST_PORT + 2 * ((int(port) - FIRST_PORT) % 2047)}"


def _devices(environ, local) -> tuple[int, ...] | None:
    """This process's share of its machine's GPUs: all if it is the only task there, otherwise an equal number of
    adjacent ones. None: all visible ones, also if the scheduler already restricts the process to its share."""
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
    counts = []  # tasks per node, from a string such as 4(x2),3
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else 1


def _refuse_outside_of_srun(environ) -> None:
    """Raises ConfigError in the script or shell of a job with several tasks: each would be process 0."""
    if "SLURM_JOB_ID" not in environ or "OMPI_COMM_WORLD_SIZE" in environ:
        return
    if environ.get("SLURM_STEP_NUM_TASKS", "") == environ.get("SLURM_NTASKS", "1"):
        return
    for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"):
        if _several(environ, name):
            raise ConfigError(f"{name}={environ[name]}, and srun did not start this process; start it with srun, "
                              f"{ALONE}.")


def _refuse_one_of_several(environ, why) -> None:
    """Raises ConfigError if variables show several tasks, but jax detects none. why: the exception of jax."""
    itself = "by itself" if why is None else f"by itself ({' '.join(str(why).split())})"
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS", "MEGASCALE_NUM_SLICES", "TPU_WORKER_HOSTNAMES"):
        if _several(environ, name):
            raise ConfigError(f"{name}={environ[name]}: this is one of several tasks, and jax cannot join them "
                              f"{itself}; {FLAGS}, {ALONE}.")
    if "JOB_COMPLETION_INDEX" in environ:  # Kubernetes does not give their number
        raise ConfigError(f"this is a pod of an indexed Job, and jax cannot join the others {itself}; {FLAGS} "
                          f"$JOB_COMPLETION_INDEX, {ALONE}.")


def _several(environ, name) -> bool:
    value = environ.get(name, "")
    return "," in value or (value.isdecimal() and int(value) > 1)
