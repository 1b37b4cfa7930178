"""The stages, the most important first. No jax here: the cases of a stage are imported in its own process.

Their time limits add up to more than a run has: late stages get the remaining time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Cases = Iterable[tuple[str, Callable[[], dict[str, Any]]]]  # (name, function that measures it and returns a row)


class Stage(NamedTuple):
    """Cases that run in a separate process.

    cases: module:function of (rehearse) -> Cases. limit: seconds for all. silence: seconds for one; then it is killed.
    beforehand: a stage that runs in parallel to all stages before this one, and has ended when this one starts.
    """

    name: str
    cases: str
    limit: int
    silence: int
    beforehand: Stage | None = None


MACHINE = Stage("machine", "benchmarks.gpu.machine:cases", 150, 150)
SMOKE = Stage("smoke", "benchmarks.gpu.kernels:smoke", 120, 60)
# Takes minutes of CPU time, which the kernels' stages hardly use: when they end, the steps are in the cache.
TRAINING_COMPILE = Stage("training_compile", "benchmarks.gpu.training:compilations", 960, 480)
STAGES = (
    SMOKE,
    Stage("tests", "benchmarks.gpu.suite:cases", 240, 120),
    Stage("fp8_matmul", "benchmarks.gpu.kernels:dense", 240, 60),
    Stage("fp8_grouped_matmul", "benchmarks.gpu.kernels:grouped", 120, 60),
    Stage("quantize", "benchmarks.gpu.kernels:quantizers", 60, 40),
    Stage("attention", "benchmarks.gpu.kernels:attention", 120, 60),
    Stage("decode", "benchmarks.gpu.kernels:decode", 120, 60),
    Stage("training", "benchmarks.gpu.training:cases", 480, 300, TRAINING_COMPILE),
    Stage("engine", "benchmarks.gpu.engine:cases", 240, 120),
    Stage("sweep", "benchmarks.gpu.kernels:sweep", 600, 60),
)
COMPILE = Stage("compile", "benchmarks.gpu.compiling:cases", 1200, 120)  # only in a rehearsal
