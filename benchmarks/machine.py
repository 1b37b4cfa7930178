"""Shared by all benchmarks: the paths of the checkout and of the peer's Python, and the description of the machine.

Standard library only, because the peer's environment imports it too.
"""

import os
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-peer" / "bin" / "python"


def hardware() -> dict[str, Any]:
    """A description of the machine."""
    model = platform.processor()
    cpuinfo, meminfo = pathlib.Path("/proc/cpuinfo"), pathlib.Path("/proc/meminfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = int(meminfo.read_text().split()[1]) // 2**20 if meminfo.exists() else None
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": memory, "system": platform.system()}


def shown(command: Iterable[str]) -> str:
    """The command without this machine's paths."""
    words = [pathlib.Path(word) for word in command]
    inside = [word.relative_to(ROOT) if word.is_relative_to(ROOT) else word.name for word in words]
    return " ".join(str(part) if word.is_absolute() else str(word) for word, part in zip(words, inside))


def write_results(path: str, report: dict[str, Any]) -> None:
    """Writes the file of --json; a relative path is relative to the checkout."""
    from deepseek_jax import io  # not installed in the environment of a peer

    file = ROOT / path
    file.parent.mkdir(parents=True, exist_ok=True)
    io.write_json(file, report, indent=1)
