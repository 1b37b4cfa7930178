"""Predicts rates of the Hopper kernels from their tile plans and their machine code. Nothing is measured.

    python -m kernels_pallas.tools.predict [--shapes v3-train v3-decode] [--rows FILE] [--json FILE]

Has the same requirements as compile_report.py, or with --rows uses the rows that it wrote on a machine with a
disassembler. Assumptions, of an H100 SXM: 132 SMs at 1.755 GHz; an SM does 8,192 FLOP per clock in FP8, 4,096 in
bfloat16; the L2 cache delivers 5,120 bytes per clock to all SMs, and at most 64 to one; data shared by two SMs
(multicast) is delivered once and received by both; device memory has 3.35 TB/s, of which a copy reaches 0.92. The time
of a slice of a product is the longest of: the tensor core; the issue slots of two warpgroups, with a warp of each per
scheduler; its bytes from L2; and one group's chain of product, wait (60 clocks) and sums. The time of a tile is that of
its slices plus the store of its output at 32 bytes per clock; tiles run in waves; a launch takes 2 microseconds.
Quantizers and decoding wait for memory, 800 clocks, with as many blocks per SM as registers and shared memory allow.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from typing import Any

import jax.numpy as jnp

from kernels_pallas.formats import BLOCK
from kernels_pallas.tools import compile_report
from kernels_pallas.tools.shapes import SHAPES, Case, Decode, Grouped

SMS, CLOCK, LAUNCH, LATENCY, WAIT = 132, 1.755e9, 2e-6, 800, 60
RATE = {"fp8": 8192, "bf16": 4096}  # FLOP per clock of an SM
L2, L2_PORT, MEMORY, COPY = 5120, 64, 3.35e12, 0.92
REGISTERS, SHARED = 65536, 227 * 1024  # of an SM


# The plan of a product, and its machine code.
def product(tiles: int, block: tuple[int, int], slices: float, depth: int, size: int, out_size: int,
            instructions: int, sms: int = 1) -> float:
    """Seconds of a product in tiles of `block` rows and columns; a slice has `depth` numbers of `size` bytes along K.

    sms: the SMs that share the rows of a tile, of which each loads its part for all.
    """
    rows, columns = block
    tensor = 2 * rows * columns * depth / RATE["fp8" if size == 1 else "bf16"]
    # All rows enter through the port of each SM, including those that another one requested.
    l2 = depth * size * max((rows + columns) / L2_PORT, (rows / sms + columns) / (L2 / min(tiles, SMS)))
    a_slice = max(tensor, 2 * instructions, l2, tensor / 2 + WAIT + instructions)
    leaves = rows * columns * out_size / 32
    return math.ceil(tiles / SMS) * (slices * a_slice + leaves + LATENCY) / CLOCK


def seconds(case: Any, row: dict[str, Any]) -> float | None:
    """Seconds of a case; row: of its compiled kernel. None: attention, and operations without a plan here."""
    memory = case.bytes() / (MEMORY * COPY)
    if isinstance(case, Grouped):
        from kernels_pallas.hopper.grouped_matmul import ROWS, SLICE, TuningConfig

        wide, share = TuningConfig().tile_n, case.R / case.groups
        rows, depth = (case.D, share) if case.form == "weights" else (share, case.D)
        tiles = case.groups * math.ceil(rows / ROWS) * math.ceil(case.F / wide)
        busy = product(tiles, (ROWS, wide), depth / SLICE, SLICE, 2, 4 if case.form == "weights" else 2,
                       row["loop_instructions"])
        return LAUNCH + max(busy, memory)
    if isinstance(case, Case) and case.N:
        config = case.tuning()
        grouped_k = case.groups if case.form == "tiles" and case.groups else 1
        tiles = grouped_k * math.ceil(case.M / config.block_m) * math.ceil(case.N / config.columns) * config.sms
        busy = product(tiles, (config.block_m, config.block_n), case.K / grouped_k / BLOCK, BLOCK, 1,
                       jnp.dtype(case.out_dtype).itemsize, row["loop_instructions"], config.sms)
        return LAUNCH + max(busy, memory)
    if isinstance(case, Case):  # a quantizer: 8 warps on 4 schedulers
        resident = min(REGISTERS // (256 * row["registers"]), SHARED // row["shared_bytes"])
        issue, blocks = 2 * row["instructions"], math.ceil(case.M / BLOCK) * math.ceil(case.K / BLOCK)
        return LAUNCH + max(memory, blocks / SMS * max(issue, (LATENCY + issue) / resident) / CLOCK)
    if isinstance(case, Decode):
        heads, steps = math.ceil(case.H / 64), math.ceil(case.T / 64)
        splits = max(1, min(steps, SMS // (case.B * heads)))
        tensor = 2 * 64 * 64 * (2 * case.C + 64) / RATE["bf16"]
        l2 = 64 * (656 if case.packed else 2 * (case.C + 64)) / (L2 / SMS)
        step = max(tensor, 2 * row["loop_instructions"], l2)
        waves = math.ceil(case.B * heads * splits / SMS)
        return LAUNCH + max(waves * (math.ceil(steps / splits) * step + LATENCY) / CLOCK, memory)
    return None


def predict(names: list[str], compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every case of these shapes that has a plan: predicted seconds, rates, and the published rate."""
    of = {(row["operation"], row["shape"]): row for row in compiled if row.get("instructions")}
    rows = []
    for case in (case for name in names for case in SHAPES[name]):
        row = of.get((case.operation, str(case)))
        took = row and seconds(case, row)
        if took:
            tflops = case.flops / took / 1e12 if case.flops else None
            rows.append({"operation": case.operation, "shape": str(case), "seconds": took, "tflops": tflops,
                         "published": case.published, "of_copy": case.bytes() / took / (MEMORY * COPY),
                         "of_published": tflops / case.published if tflops and case.published else None})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tools.predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["v3-train", "v3-decode"], choices=SHAPES)
    parser.add_argument("--rows", metavar="FILE", help="of compile_report --json, instead of compiling")
    parser.add_argument("--json", metavar="FILE", help="also write the predictions there")
    args = parser.parse_args()
    try:
        compiled = (json.loads(pathlib.Path(args.rows).read_text()) if args.rows
                    else compile_report.compile_kernels(args.shapes))
    except compile_report.NoCompiler as error:
        print(error, file=sys.stderr)
        return 2
    rows = predict(args.shapes, compiled)
    for row in rows:
        rate = f"{row['tflops']:7.0f} TFLOP/s" if row["tflops"] else f"{row['of_copy']:7.2f} of a copy"
        share = f"{row['of_published']:6.2f} of {row['published']:.0f}" if row["of_published"] else ""
        print(f"{row['operation']:20} {row['shape']:40} {rate:16} {share}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
