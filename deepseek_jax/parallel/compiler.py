"""XLA's options for steps on several GPUs: what hides collectives behind products (no jax).

With its defaults XLA runs one collective at a time and starts it late: an exchange of tokens waits for one of a few
bytes, and has few products left to hide behind (experiments/studies/pipeline).
"""

import contextlib
import os
import pathlib

GPU: dict[str, bool | int] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4}
# XLA makes collectives synchronous in a program that takes more than this percentage of four fifths of the memory: 95
# by default, which is right for jax's default of three quarters.
MEMORY = "xla_gpu_memory_limit_slop_factor"
OLDEST = (0, 11, 2)  # the first jax whose compiler is known to take them


def compiler_options(platform: str, version: tuple[int, ...], memory: float | None = None) -> dict[str, bool | int]:
    """`compiler_options` of jax's `compile`; {} where there are none to set.

    Args:
      platform: of the devices. version: of jax. What the user says in XLA_FLAGS wins.
      memory: the share of a device's memory that a program may take; None: what XLA_PYTHON_CLIENT_MEM_FRACTION says.
    """
    if platform not in ("gpu", "cuda") or version < OLDEST:
        return {}
    with contextlib.suppress(ValueError):  # jax refuses what is no number itself
        memory = memory or float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0))
    options = GPU | ({MEMORY: round(100 * memory / 0.8)} if memory else {})
    theirs = {flag.removeprefix("--").partition("=")[0] for flag in xla_flags()}
    return {name: value for name, value in options.items() if name not in theirs}


def xla_flags() -> list[str]:
    """The flags in XLA_FLAGS, or in the file that it names."""
    said = os.environ.get("XLA_FLAGS", "").strip()
    if said and not said.startswith("-"):
        with contextlib.suppress(OSError):  # XLA says itself that it cannot read it
            said = pathlib.Path(said).read_text()
    return said.replace("'", "").replace('"', "").split()
