"""Facts about the machine: device, driver, versions, and the requirements for compiling kernels. One case, before all
others."""

import importlib.metadata
import pathlib
import platform
import shutil
import subprocess
from typing import Any

from benchmarks.gpu.stages import Cases
from benchmarks.machine import ROOT, hardware

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "numpy", "torch",
            "nvidia-cuda-nvcc", "nvidia-cublas", "nvidia-cudnn-cu13", "pytest", "ml-collections")
LIBDEVICE = "nvvm/libdevice/libdevice.10.bc"  # Mosaic links it into every kernel


def cases(rehearse: bool) -> Cases:
    yield "machine", facts


def facts() -> dict[str, Any]:
    """Facts for the results, and `kernels`: the folder of the kernels that run on this machine."""
    import jax

    from kernels_pallas import api

    device = jax.devices()[0]
    return {"device": device.device_kind, "devices": jax.device_count(), "kernels": api.runs_here(),
            "driver": _said("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit,memory.total",
                            "--format=csv,noheader"),
            "cuda": _said("nvcc", "--version"), "libdevice": libdevices(), "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES}, "hardware": hardware(),
            "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD")}


def version(package: str) -> str | None:
    """The version of an installed package; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def libdevices() -> list[str]:
    """The paths of libdevice, in the toolkits of the system and of the wheels."""
    folders = [*pathlib.Path("/usr/local").glob("cuda*")]
    for entry in importlib.metadata.files("nvidia-nvvm") or [] if version("nvidia-nvvm") else []:
        if entry.name == "libdevice.10.bc":
            return [str(entry), *(str(f / LIBDEVICE) for f in folders if (f / LIBDEVICE).exists())]
    return [str(folder / LIBDEVICE) for folder in folders if (folder / LIBDEVICE).exists()]


def _said(*command):
    """The last line that a program prints; None if it does not exist or fails."""
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else None
