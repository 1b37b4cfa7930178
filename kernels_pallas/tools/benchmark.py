"""Times the kernels on this machine's GPU, against XLA's bfloat16 product, cuBLASLt's FP8 product and torch's.

    python -m kernels_pallas.tools.benchmark --shapes v3-train --out FILE.json
    python -m kernels_pallas.tools.benchmark --shapes tiny --implementation reference   anywhere, to see that it runs

Every kernel is checked against its twin first; one that is wrong or fails is not timed (exit code 1). Operands are
random. Products are in TFLOP/s, quantizers in GB/s, also as a share of the bandwidth of a plain copy in the same run.
torch and its `_scaled_mm` are timed if torch is installed with CUDA; otherwise the row says what is missing.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import api
from kernels_pallas.formats import E4M3
from kernels_pallas.tools.shapes import SHAPES


def seconds(function: Callable, arguments: tuple, rounds: int, calls: int) -> float:
    """Seconds of a call: median over rounds of the mean of `calls` consecutive calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def worst_error(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees, relative to the largest magnitude; Quantized is dequantized first."""
    def numbers(tree):
        is_pair = lambda x: isinstance(x, api.Quantized)
        return [np.asarray(api.dequantize(x) if is_pair(x) else x, np.float64)
                for x in jax.tree.leaves(tree, is_leaf=is_pair)]

    return max(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30) for x, y in zip(numbers(ours), numbers(theirs)))


def xla_peers(case: Any, key: jax.Array) -> dict[str, tuple[Callable, tuple]]:
    """{name: (function, arguments)}: the same product by XLA, in bfloat16 and in FP8 with one scale."""
    if case.operation.startswith("mla"):
        return {"xla": (jax.jit(case.call("reference")), case.random(key))}
    if case.operation != "fp8_matmul":
        return {}
    a, b = (jax.random.normal(k, shape, jnp.bfloat16)
            for k, shape in zip(jax.random.split(key), ((case.M, case.K), (case.N, case.K))))

    def dot(a, b):
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def scaled(a, b, s):  # the form that XLA hands to cuBLASLt
        wide = lambda x: x.astype(jnp.bfloat16) * s.astype(jnp.bfloat16)
        return dot(wide(a), wide(b)).astype(jnp.bfloat16)

    return {"xla_bf16": (jax.jit(lambda a, b: dot(a, b).astype(jnp.bfloat16)), (a, b)),
            "cublaslt_fp8_one_scale": (jax.jit(scaled), (a.astype(E4M3), b.astype(E4M3), jnp.float32(1)))}


def torch_peers(case: Any) -> dict[str, float | str]:
    """{name: seconds per call} of torch on the same GPU; or {"missing": why}."""
    if case.operation != "fp8_matmul":
        return {}
    try:
        import torch  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        return {"missing": "torch is not installed"}
    if not torch.cuda.is_available():
        return {"missing": "torch has no CUDA here"}
    make = lambda rows: torch.randn(rows, case.K, device="cuda").to(torch.float8_e4m3fn)
    a, b = make(case.M), make(case.N)
    one = torch.ones((), device="cuda")
    rows = lambda n: torch.ones(n, 1, device="cuda")
    blocked = (torch.ones(case.K // 128, case.M, device="cuda").t(),
               torch.ones(case.K // 128, -(-case.N // 128), device="cuda"))
    scales = {"torch_scaled_mm_128x128": blocked, "torch_scaled_mm_rows": (rows(case.M), rows(case.N).t()),
              "torch_scaled_mm_one_scale": (one, one)}
    found = {}
    for name, (sa, sb) in scales.items():
        run = lambda sa=sa, sb=sb: torch._scaled_mm(a, b.t(), sa, sb, out_dtype=torch.bfloat16)
        try:
            run()
        except (RuntimeError, ValueError) as error:
            found[name] = f"refused: {str(error).splitlines()[0][:120]}"
            continue
        times = []
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(20):
                run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 20 / 1000)
        found[name] = statistics.median(times)
    return found


def copy_bandwidth(rounds: int, calls: int) -> float:
    """Bytes per second that a plain copy of 512 MiB reads and writes."""
    x = jnp.zeros((2**27,), jnp.float32) if jax.default_backend() != "cpu" else jnp.zeros((2**22,), jnp.float32)
    return 2 * x.nbytes / seconds(jax.jit(lambda x: x + 1), (x,), rounds, calls)


def measure(case: Any, implementation: str, rounds: int, calls: int, bandwidth: float) -> dict[str, Any]:
    """One row: error against the twin, time, rate, and the peers' times."""
    function = jax.jit(case.call(implementation))
    arguments = case.compared().random(jax.random.key(0))
    error = worst_error(function(*arguments), jax.jit(case.call("reference"))(*arguments))
    row = {"operation": case.operation, "shape": str(case), "error": float(error), "right": bool(error < 0.01)}
    if not row["right"]:
        return row
    arguments = case.random(jax.random.key(0))
    row["seconds"] = seconds(function, arguments, rounds, calls)
    peers = {name: seconds(peer, operands, rounds, calls)
             for name, (peer, operands) in xla_peers(case, jax.random.key(1)).items()}
    row["peers"] = peers | torch_peers(case)
    if case.flops:
        row["tflops"] = case.flops / row["seconds"] / 1e12
        row["of_published"] = case.published and row["tflops"] / case.published
    else:
        row["gb_per_second"] = case.bytes() / row["seconds"] / 1e9
        row["of_copy"] = case.bytes() / row["seconds"] / bandwidth
    return row


def attempt(case: Any, *options: Any) -> dict[str, Any]:
    """The same, or the error of a kernel that fails, so that the other rows are still measured."""
    try:
        return measure(case, *options)
    except Exception as error:
        why = (str(error).strip() or "no message").splitlines()[0][:200]
        return {"operation": case.operation, "shape": str(case), "right": False,
                "failed": f"{type(error).__name__}: {why}"}


def show(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    if not row["right"]:
        return f"WRONG: {row['error']:.1e} from its twin"
    rate = f"{row['tflops']:8.1f} TFLOP/s" if "tflops" in row else f"{row['gb_per_second']:8.0f} GB/s   "
    share = row.get("of_published") or row.get("of_copy")
    peers = ", ".join(f"{name} {row['seconds'] and seconds / row['seconds']:.2f}x" if isinstance(seconds, float)
                      else f"{name}: {seconds}" for name, seconds in row["peers"].items())
    return f"{rate} {f'{share:.2f}' if share else '':>5}  {peers}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tools.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["v3-train"], choices=SHAPES)
    parser.add_argument("--implementation", default="hopper", choices=["hopper", "reference"])
    parser.add_argument("--out", metavar="FILE", help="write all rows there, as JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=20)
    args = parser.parse_args()
    device = jax.devices()[0]
    if args.implementation not in ("reference", api.runs_here()):
        print(f"--implementation {args.implementation} needs {api.NEEDS[args.implementation]}, and this machine has "
              f"{device.device_kind!r}; --implementation reference runs here.", file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth(args.rounds, args.calls)
    print(f"{device.device_kind}, jax {jax.__version__}, copy {bandwidth / 1e9:.0f} GB/s. Columns: rate, share of the "
          "published rate or of the copy, each peer's time in units of ours")
    rows = []
    for case in (case for name in args.shapes for case in SHAPES[name]):
        rows.append(attempt(case, args.implementation, args.rounds, args.calls, bandwidth))
        print(f"{case.operation:20} {case!s:34} {show(rows[-1])}", flush=True)
        if args.out:  # after every row, so that an interrupted run leaves its rows
            pathlib.Path(args.out).write_text(json.dumps(
                {"device": device.device_kind, "jax": jax.__version__, "implementation": args.implementation,
                 "copy_gb_per_second": bandwidth / 1e9, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
