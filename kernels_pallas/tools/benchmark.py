"""Times the kernels on this machine's GPU, against XLA's products and torch's.

    python -m kernels_pallas.tools.benchmark --shapes v3-train --out FILE.json
    python -m kernels_pallas.tools.benchmark --shapes tiny --implementation reference   anywhere, to see that it runs

Every kernel is compared with its twin first (see compare.py); one that is wrong or fails is not timed (exit code 1).
Operands are random. Rates are TFLOP/s and GB/s, also as a share of the bandwidth of a plain copy in the same run;
timing.py describes the timing. `python -m benchmarks.gpu`, from a checkout, runs these cases in separate processes.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import api
from kernels_pallas.tools.compare import compare
from kernels_pallas.tools.peers import first_line, peers
from kernels_pallas.tools.shapes import SHAPES
from kernels_pallas.tools.timing import time_calls


def copy_bandwidth(calls: int) -> float:
    """Bytes per second that a plain copy reads and writes, for 512 MiB, or 16 MiB on a CPU."""
    x = jnp.zeros((2**27 if jax.default_backend() != "cpu" else 2**22,), jnp.float32)
    return 2 * x.nbytes / time_calls(jax.jit(lambda x: x + 1), (x,), calls).seconds


def check(case: Any, implementation: str) -> dict[str, Any]:
    """The first part of a row: the case, and whether it is correct by `compare`."""
    small = case.compared()
    arguments = jax.jit(small.random)(jax.random.key(0))
    # Autotuning the twin's float32 products takes longer than running them.
    options = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else {}
    lowered = jax.jit(small.call("reference")).lower(*arguments)
    try:
        twin = lowered.compile(compiler_options=options)
    except Exception:  # a product that XLA cannot select without autotuning
        twin = lowered.compile()
    found = compare(jax.jit(small.call(implementation))(*arguments), twin(*arguments))
    return {"operation": case.operation, "shape": str(case), "compared_at": str(small)} | found


def measure(case: Any, implementation: str, calls: int, bandwidth: float) -> dict[str, Any]:
    """One row: difference from the twin, time, rates, and the peers' times."""
    row = check(case, implementation)
    if not row["right"]:
        return row
    timing = time_calls(jax.jit(case.call(implementation)), jax.jit(case.random)(jax.random.key(0)), calls)
    row |= timing._asdict() | {"gb_per_second": case.bytes() / timing.seconds / 1e9,
                               "of_copy": case.bytes() / timing.seconds / bandwidth}
    if case.flops:
        row["tflops"] = case.flops / timing.seconds / 1e12
        rate = row["gb_per_second" if case.published_in == "GB/s" else "tflops"]
        row["of_published"] = case.published and rate / case.published
    try:
        return row | {"peers": peers(case, jax.random.key(1), calls)}
    except Exception as error:  # the measurement is kept, whatever a peer does
        return row | {"peers": {"all": f"refused: {first_line(error)}"}}


def attempt(case: Any, *options: Any) -> dict[str, Any]:
    """The same, or the error of a kernel that fails, so that the other rows are still measured."""
    try:
        return measure(case, *options)
    except Exception as error:
        return {"operation": case.operation, "shape": str(case), "right": False, "failed": first_line(error)}


def show(row: dict[str, Any]) -> str:
    """A row as text."""
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    if not row["right"]:
        errors = {name: row[name] for name in ("error", "scale_ulp", "steps", "moved") if name in row}
        return f"WRONG: from its twin {', '.join(f'{name} {value:.2g}' for name, value in errors.items())}"
    rate = f"{row['tflops']:8.1f} TFLOP/s" if "tflops" in row else f"{row['gb_per_second']:8.0f} GB/s   "
    share = row.get("of_published") or row["of_copy"]
    times = ", ".join(f"{name} {seconds / row['seconds']:.2f}x" if isinstance(seconds, float) else f"{name} {seconds}"
                      for name, seconds in row["peers"].items())
    return f"{rate} {share:5.2f}  {times}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tools.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["v3-train"], choices=SHAPES)
    parser.add_argument("--implementation", default="hopper", choices=["hopper", "reference", "interpreter"])
    parser.add_argument("--out", metavar="FILE", help="write all rows there, as JSON")
    parser.add_argument("--calls", type=int, default=20, help="timed, at least 2")
    args = parser.parse_args()
    device = jax.devices()[0]
    if args.implementation not in ("reference", "interpreter", api.runs_here()):
        print(f"--implementation {args.implementation} needs {api.NEEDS[args.implementation]}, and this machine has "
              f"{device.device_kind!r}; --implementation reference runs here.", file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth(args.calls)
    print(f"{device.device_kind}, jax {jax.__version__}, copy {bandwidth / 1e9:.0f} GB/s. Columns: rate, share of the "
          "published rate or of the copy, each peer's time in units of ours")
    rows = []
    for case in (case for name in args.shapes for case in SHAPES[name]):
        rows.append(attempt(case, args.implementation, args.calls, bandwidth))
        print(f"{case.operation:20} {case!s:34} {show(rows[-1])}", flush=True)
        if args.out:  # after every row, so that an interrupted run leaves its rows
            pathlib.Path(args.out).write_text(json.dumps(
                {"device": device.device_kind, "jax": jax.__version__, "implementation": args.implementation,
                 "copy_gb_per_second": bandwidth / 1e9, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
