"""The kernels: checked at small shapes, then timed at V3's, each compared with peers; last, other tuning configs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.gpu.stages import Cases
from kernels_pallas.hopper import grouped_matmul, mla_decode
from kernels_pallas.tools import benchmark
from kernels_pallas.tools.shapes import SHAPES, Case, Decode, Grouped
from kernels_pallas.tools.timing import time_calls

CALLS = 20
MATMULS = (Case("fp8_matmul", 4096, 7168, 4096), Case("fp8_matmul", 4096, 7168, 2112),
           Case("fp8_matmul", 64, 7168, 4096))
FP8_GROUPED = (Case("fp8_grouped_matmul", 32768, 7168, 4096, groups=8),
               Case("fp8_grouped_matmul", 32768, 2048, 7168, groups=8),
               Case("fp8_grouped_matmul", 4096, 32768, 7168, groups=8, form="tiles"))
GROUPED = Grouped(32768, 7168, 2048, groups=8), Grouped(32768, 2048, 7168, groups=8, form="weights")
DECODES = (Decode(128, 4096, 128), Decode(4, 32768, 128), Decode(128, 4096, 16, packed=True))


def implementation(rehearse: bool) -> str:
    return "interpreter" if rehearse else "hopper"


def smoke(rehearse: bool) -> Cases:
    """Every kernel at its tiny shapes, compared with its twin, not timed."""
    for case in SHAPES["tiny"]:
        yield name(case), functools.partial(benchmark.check, case, implementation(rehearse))


def name(case: Any) -> str:
    return f"{case.operation} {case}"


def _timed(operations: tuple[str, ...], rehearse: bool) -> Cases:
    sets = ("tiny",) if rehearse else ("v3-train", "v3-decode")
    chosen = [case for shapes in sets for case in SHAPES[shapes] if case.operation in operations]
    for case in chosen[:1] if rehearse else chosen:
        yield name(case), functools.partial(_measure, case, rehearse)


@functools.cache
def _bandwidth():
    return benchmark.copy_bandwidth(CALLS)


def _measure(case, rehearse):
    return benchmark.measure(case, implementation(rehearse), 2 if rehearse else CALLS, _bandwidth())


def dense(rehearse: bool) -> Cases:
    return _timed(("fp8_matmul",), rehearse)


def grouped(rehearse: bool) -> Cases:
    return _timed(("fp8_grouped_matmul", "grouped_matmul"), rehearse)


def quantizers(rehearse: bool) -> Cases:
    return _timed(("quantize", "swiglu_quantize"), rehearse)


def attention(rehearse: bool) -> Cases:
    return _timed(("mla_attention",), rehearse)


def decode(rehearse: bool) -> Cases:
    return _timed(("mla_decode",), rehearse)


def sweep(rehearse: bool) -> Cases:
    """Times other tuning configs next to the default, without checks: the default has passed them by now."""
    for case in MATMULS:
        for changes in ({}, {"pair": False, "tile_n": 128, "split": "rows"}, {"pair": False, "tile_n": 64},
                        {"stages": 3}, {"stages": 4}, {"snake": 1}, {"snake": 4}, {"snake": 16}):
            yield from _tuned(case, case.tuning(), changes, rehearse)
    for case in FP8_GROUPED:
        for changes in ({}, {"pair": False}, {"snake": 1}, {"snake": 16}):
            yield from _tuned(case, case.tuning(), changes, rehearse)
    for case in GROUPED:
        for changes in ({}, {"tile_n": 128, "stages": 4}, {"tile_n": 128}, {"snake": 1}, {"snake": 16}):
            yield from _tuned(case, grouped_matmul.TuningConfig(), changes, rehearse)
    for case in DECODES:
        for splits in (None, 1, 2, 4, 8, 16, 33):
            yield from _tuned(case, mla_decode.TuningConfig(), {"splits": splits}, rehearse)


def _tuned(case, default, changes, rehearse) -> Cases:
    config = dataclasses.replace(default, **changes)
    if rehearse and changes:
        return
    small = case if not rehearse else next(c for c in SHAPES["tiny"] if c.operation == case.operation)
    words = " ".join(f"{key}={value}" for key, value in changes.items()) or "default"
    yield f"{name(case)}: {words}", functools.partial(_time, small, config, rehearse)


def _time(case: Any, config: Any, rehearse: bool) -> dict[str, Any]:
    run: Callable = case.call(implementation(rehearse), config=config)
    timing = time_calls(jax.jit(run), jax.jit(case.random)(jax.random.key(0)), 2 if rehearse else CALLS)
    return timing._asdict() | {"tflops": case.flops / timing.seconds / 1e12}
