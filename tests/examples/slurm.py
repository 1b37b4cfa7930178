"""Slurm on this machine: one controller and two nodes on loopback, in a separate folder."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

from tests.parallel.groups import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 Port={first} CPUs=8 Gres=gpu:4
NodeName=zz NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=8 Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GPUS = "".join(f"Name=gpu File=/dev/{device}\n" for device in ("full", "null", "random", "zero"))  # not one is opened


def why_not() -> str | None:
    """Why Slurm cannot be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"no {missing[0]} here: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return "the name of this machine is no address"
    return None


@contextlib.contextmanager
def started(folder: pathlib.Path):
    """Runs a cluster within the `with` block; yields the environment variables with which Slurm's commands reach it."""
    host = socket.gethostname().split(".")[0]
    ports = {name: free_port() for name in ("controller", "first", "second")}
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, **ports))
    (folder / "gres.conf").write_text(GPUS)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    environ = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = ["munged", "--force", *(f"--{name}={folder}/munge.{end}" for name, end in (
        ("key-file", "key"), ("socket", "socket"), ("log-file", "log"), ("pid-file", "pid"), ("seed-file", "seed")))]
    try:
        for command in (munge, ["slurmctld"], ["slurmd", "-N", host], ["slurmd", "-N", "zz"]):
            subprocess.run(command, env=environ, check=True, capture_output=True, timeout=60)
        ends = time.monotonic() + 60
        while "2 idle" not in (said := _idle(environ)) and time.monotonic() < ends:
            time.sleep(0.2)
        assert "2 idle" in said, said + (folder / "slurmctld.log").read_text()
        yield environ
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=environ, check=False)
    finally:
        for name in (host, "zz", "slurmctld", "munge"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)


def _idle(environ):
    return subprocess.run(["sinfo", "--noheader", "--format=%D %t"], env=environ, capture_output=True, text=True,
                          check=False).stdout
