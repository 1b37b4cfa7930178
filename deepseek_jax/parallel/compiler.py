"""XLA's options for steps on several GPUs: what hides collectives behind products (no jax).

With its defaults XLA runs one collective at a time and starts it late: an exchange of tokens waits for one of a few
bytes, and has few products left to hide behind (experiments/studies/pipeline).
"""

import os

GPU: dict[str, bool | int] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    # Percent of four fifths of the memory. Of what takes more, XLA makes collectives synchronous: 95 by default.
    "xla_gpu_memory_limit_slop_factor": 118}
OLDEST = (0, 11, 2)  # the first jax whose compiler is known to take them


def compiler_options(platform: str, version: tuple[int, ...]) -> dict[str, bool | int]:
    """`compiler_options` of jax's `compile`; {} where there are none to set.

    Args:
      platform: of the devices. version: of jax. What the user says in XLA_FLAGS wins.
    """
    if platform not in ("gpu", "cuda") or version < OLDEST:
        return {}
    theirs = {flag.removeprefix("--").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in GPU.items() if name not in theirs}
