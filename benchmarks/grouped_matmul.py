"""The experts' grouped product on this machine, compared with a dense product of equal FLOPs and `jax.lax.ragged_dot`.

    python -m benchmarks.grouped_matmul --json benchmarks/results/grouped_matmul.json

Each row is forward and backward (the gradients of the rows and of the weights) from float32 masters. GFLOP/s count only
useful rows: the padding of tiles costs time and is not counted. The sides take turns; medians over the turns.
"""

import argparse
import datetime
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import hardware, shown, write_results
from deepseek_jax import runtime
from deepseek_jax.model import layers, permute
from deepseek_jax.model.grouped_matmul import grouped_matmul, row_alignment

SHAPES = ((8192, 256, 512, 32), (8192, 256, 128, 64), (16384, 512, 256, 64))  # tokens x k, D, F, E
LOADS = ("balanced", "skewed")


def loads(name: str, rows: int, num_experts: int) -> np.ndarray:
    """Rows of each expert. "skewed": they fall with the square of the rank, and the busiest has 3 times the mean."""
    share = np.ones(num_experts) if name == "balanced" else (1 - np.arange(num_experts) / num_experts) ** 2
    counts = np.floor(share / share.sum() * rows).astype(np.int32)
    counts[0] += rows - counts.sum()
    return counts


def arranged(counts: np.ndarray, align: int, even: bool, draw: np.random.Generator,
             width: int) -> tuple[np.ndarray, jax.Array]:
    """Random rows, sorted by expert, and the size of each expert's group."""
    chosen_NK = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[:, None]
    sorted_rows = jax.jit(permute.sort_by_expert, static_argnums=(1, 2, 3))(chosen_NK, len(counts), align, even)
    filled_R1 = np.asarray(sorted_rows.choice_R < len(chosen_NK))[:, None]
    return draw.standard_normal((len(filled_R1), width), np.float32) * filled_R1, sorted_rows.sizes_E


def sides(rows: int, d: int, f: int, num_experts: int, dtype: str, load: str) -> dict[str, Callable]:
    """name -> a function without arguments that runs that side once, forward and backward."""
    draw = np.random.default_rng(0)
    counts = loads(load, rows, num_experts)
    w = jnp.asarray(draw.standard_normal((num_experts, d, f), np.float32))

    def both_ways(product, x, w, *more):
        @jax.jit
        def run(x, w, dy, *more):
            y, pull = jax.vjp(lambda x, w: product(x, w, *more), x, w)
            return y, pull(dy)

        dy = jnp.ones((x.shape[0], f), dtype)
        return lambda: jax.block_until_ready(run(x, w, dy, *more))

    made = {"dense": both_ways(layers.linear, jnp.asarray(draw.standard_normal((rows, d)), dtype), w[0])}
    for name, implementation in (("cpu", "cpu"), ("ragged_dot", "ragged")):
        align = row_alignment(implementation, rows, num_experts)
        x, sizes = arranged(counts, align, align > 1, draw, d)
        product = functools.partial(grouped_matmul, align=align, implementation=implementation)
        made[name] = both_ways(lambda x, w, sizes, product=product: product(x, w, sizes_E=sizes),
                               jnp.asarray(x, dtype), w, sizes)
    return made


def seconds(run: Callable, least: float = 0.1) -> float:
    """Seconds per call, averaged over enough calls to fill `least` seconds."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < least:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls


def measure(shape: tuple[int, int, int, int], dtype: str, load: str, turns: int) -> dict[str, Any]:
    rows, d, f, _ = shape
    made = sides(*shape, dtype, load)
    for run in made.values():
        run()
    times = {name: [] for name in made}
    for _ in range(turns):
        for name, run in made.items():
            times[name].append(seconds(run))
    speed = {name: 3 * 2 * rows * d * f / statistics.median(t) / 1e9 for name, t in times.items()}
    return {"rows": rows, "D": d, "F": f, "experts": shape[3], "dtype": dtype, "load": load,
            "gflops_per_second": {name: round(value, 1) for name, value in speed.items()},
            "of_dense": round(speed["cpu"] / speed["dense"], 3),
            "times_ragged_dot": round(speed["cpu"] / speed["ragged_dot"], 1)}


def line(row: dict[str, Any]) -> str:
    g = row["gflops_per_second"]
    shape = f"({row['rows']}, {row['D']}, {row['F']}, {row['experts']})"
    return (f"{shape:22} {row['dtype']:9} {row['load']:9} {g['dense']:8.0f} {g['cpu']:8.0f} {g['ragged_dot']:8.1f}"
            f"   {row['of_dense']:.2f} of dense   {row['times_ragged_dot']:.0f} x ragged_dot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the report here")
    args = parser.parse_args()
    runtime.prepare()
    print(f"{'(rows, D, F, experts)':42} {'dense':>8} {'cpu':>8} {'ragged':>8}   GFLOP/s")
    rows = []
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            for load in LOADS:
                rows.append(measure(shape, dtype, load, args.turns))
                print(line(rows[-1]), flush=True)
    report = {"what": "grouped product of experts, forward and backward, useful GFLOP/s; medians",
              "date": datetime.date.today().isoformat(), "hardware": hardware(), "jax": jax.__version__,
              "load_at_end": round(os.getloadavg()[0], 2), "turns": args.turns,
              "command": shown(["python", "-m", "benchmarks.grouped_matmul", *sys.argv[1:]]), "rows": rows}
    if args.json:
        write_results(args.json, report)


if __name__ == "__main__":
    main()
