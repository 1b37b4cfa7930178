"""The stages, in the order of their worth. No jax here: the cases of a stage are imported in its own process.

Their limits add up to more than there is: what comes late gets what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Cases = Iterable[tuple[str, Callable[[], dict[str, Any]]]]  # (name, what measures it and returns a row)


class Stage(NamedTuple):
    """Cases that run in a process of their own.

    cases: module:function of (rehearse) -> Cases. limit: seconds of all. silence: seconds of one, then it hangs.
    beforehand: a stage that runs next to those before this one, from the first on, and has ended when this one starts.
    """

    name: str
    cases: str
    limit: int
    silence: int
    beforehand: Stage | None = None


MACHINE = Stage("machine", "benchmarks.gpu.machine:cases", 150, 150)
SMOKE = Stage("smoke", "benchmarks.gpu.kernels:smoke", 120, 60)
# Minutes of the CPU, which the kernels' stages hardly need: by their end the steps are in the cache.
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
COMPILE = Stage("compile", "benchmarks.gpu.compiling:cases", 1200, 120)  # of a rehearsal: a GPU compiles what it runs
