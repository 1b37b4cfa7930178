"""XLA's options for steps on several GPUs, which hide collectives behind products (no jax).

With its defaults XLA runs one collective at a time and starts it late: an exchange of tokens waits for one of a few
bytes, and few products are left to hide it (experiments/studies/pipeline).
"""

import contextlib
import os
import pathlib

GPU: dict[str, bool | int] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4}
# XLA makes collectives synchronous in a program that needs more than this percentage of 80 % of the memory: 95 by
# default, which matches jax's default of 75 % of the memory.
MEMORY = "xla_gpu_memory_limit_slop_factor"
OLDEST = (0, 11, 2)  # the first jax whose compiler is known to accept them


def compiler_options(platform: str, version: tuple[int, ...], memory: float | None = None) -> dict[str, bool | int]:
    """`compiler_options` for jax's `compile`; {} if there are none to set.

    Args:
      platform: of the devices. version: of jax. Flags that the user sets in XLA_FLAGS win.
      memory: the share of a device's memory that a program may take; None: XLA_PYTHON_CLIENT_MEM_FRACTION.
    """
    if platform not in ("gpu", "cuda") or version < OLDEST:
        return {}
    with contextlib.suppress(ValueError):  # jax itself refuses a value that is not a number
        memory = memory or float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0))
    options = GPU | ({MEMORY: round(100 * memory / 0.8)} if memory else {})
    theirs = {flag.removeprefix("--").partition("=")[0] for flag in xla_flags()}
    return {name: value for name, value in options.items() if name not in theirs}


def xla_flags() -> list[str]:
    """The flags in XLA_FLAGS, or in the file that it names."""
    said = os.environ.get("XLA_FLAGS", "").strip()
    if said and not said.startswith("-"):
        with contextlib.suppress(OSError):  # XLA itself reports that it cannot read it
            said = pathlib.Path(said).read_text()
    return said.replace("'", "").replace('"', "").split()
