"""Predicts rates of the Hopper kernels from their tile plans and their machine code. Nothing is measured.

    python -m kernels_pallas.tools.predict [--shapes v3-train v3-decode] [--rows FILE] [--json FILE]

Requires what compile_report.py requires, or with --rows the file that it wrote on a machine with a disassembler.
Assumptions, of an H100 SXM: 132 SMs at 1.755 GHz; a clock of an SM multiplies 8,192 FLOP in FP8, 4,096 in bfloat16; the
L2 cache delivers 5,120 bytes a clock to all SMs, 64 to one at most; what two SMs share (multicast) it delivers once,
and both take it in; device memory has 3.35 TB/s, of which a copy takes 0.92. A slice of a product takes the longest of:
the tensor core; the issue slots of two warpgroups, a warp of each on a scheduler; its bytes from L2; and one group's
chain of product, wait (60 clocks) and sums. A tile takes its slices and the time in which its output leaves at 32 bytes
a clock; tiles come in waves; a launch takes 2 microseconds. Quantizers wait for memory, 800 clocks, with as many blocks
on an SM as registers and shared memory allow.

Attention and decoding: a WGMMA takes what the tensor core needs, or what its operands in shared memory do at 128 bytes
a clock, which is more where it has 32 columns. Attention's groups take turns or overlap by chance, so a step takes the
longest of its products, the issue slots, one group's chain and the L2 cache; a block also waits once for memory, loads
what it keeps, and writes it out. What XLA adds around the kernels (delta) is not there. Decoding's two groups meet
twice a step, so all is in series: products, waits, and issue slots.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

import jax.numpy as jnp

from kernels_pallas.formats import BLOCK
from kernels_pallas.tools import compile_report
from kernels_pallas.tools.shapes import SHAPES, Attention, Case, Decode, Grouped

SMS, CLOCK, LAUNCH, LATENCY, WAIT = 132, 1.755e9, 2e-6, 800, 60
RATE = {"fp8": 8192, "bf16": 4096}  # FLOP per clock of an SM
L2, L2_PORT, MEMORY, COPY = 5120, 64, 3.35e12, 0.92
REGISTERS, SHARED = 65536, 227 * 1024  # of an SM; a thread's registers come in eights
SHARED_PORT = 128  # bytes a clock that the tensor core reads of shared memory


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


def wgmma(rows: int, columns: int, depth: int, in_registers: bool = False) -> float:
    """Clocks of bfloat16 [rows, depth] @ [depth, columns], 64 rows at a time; in_registers: the left operand."""
    shared = rows / 64 * 2 * depth * (columns + 64 * (not in_registers)) / SHARED_PORT
    return max(2 * rows * columns * depth / RATE["bf16"], shared)


def attention(case: Attention, kernels: dict[str, dict[str, Any]]) -> float:
    """Seconds of the forward pass, and of dq and dkv where they are among the kernels."""
    from kernels_pallas.hopper.mla_attention import ROWS, TuningConfig

    config, A, V = TuningConfig(), case.A, case.V
    # Of each: what passes by at a time, its products, how often a group waits for one, numbers a row that stay.
    n, m = config.dq_keys, config.dkv_queries
    plans = {"attention_forward": (ROWS, wgmma(ROWS, ROWS, A) + wgmma(ROWS, V, ROWS, True), 2, A),
             "attention_dq": (n, wgmma(ROWS, n, A) + wgmma(ROWS, n, V) + wgmma(ROWS, A, n, True), 3, A + V),
             "attention_dkv": (m, wgmma(ROWS, m, A) + wgmma(ROWS, m, V) + wgmma(ROWS, V, m, True)
                               + wgmma(ROWS, A, m, True), 4, A + V)}
    tiles, took = math.ceil(case.T / ROWS), 0.0
    for kernel, row in kernels.items():
        width, products, waits, stays = plans[kernel]
        loop = row["loop_instructions"]
        step = max(products, 2 * loop, products / 2 + waits * WAIT + loop, 2 * width * (A + V) / (L2 / SMS))
        around = LATENCY + 2 * ROWS * stays / (L2 / SMS) + 2 * ROWS * stays / 32
        steps = tiles * (tiles + 1) / 2 * ROWS / width
        took += LAUNCH + case.B * case.H * (steps * step + tiles * around) / SMS / CLOCK
    return took


def decoding(case: Decode, row: dict[str, Any]) -> float:
    """Seconds of the kernel, without the merge of shares."""
    heads, steps = math.ceil(case.H / 64), math.ceil(case.T / 64)
    splits = max(1, min(steps, SMS // (case.B * heads)))
    rounds = case.C // 64 // 2 if case.packed else 1  # rounds of the inner loop, which dequantizes 64 columns
    issue = 2 * (row["loop_instructions"] + (rounds - 1) * row["inner_instructions"])
    products = 2 * (wgmma(64, 32, case.C + 64) + wgmma(64, case.C // 2, 64))
    l2 = 64 * (656 if case.packed else 2 * (case.C + 64)) / (L2 / SMS)
    step = max(products + 4 * WAIT + issue, l2)
    waves = math.ceil(case.B * heads * splits / SMS)
    return LAUNCH + max(waves * (math.ceil(steps / splits) * step + LATENCY) / CLOCK, case.bytes() / (MEMORY * COPY))


def seconds(case: Any, kernels: dict[str, dict[str, Any]]) -> float | None:
    """The predicted seconds of a case; kernels: its compiled ones by name. None: there is no prediction for it."""
    row = next(iter(kernels.values()))
    memory = case.bytes() / (MEMORY * COPY)
    if isinstance(case, Attention):
        return max(attention(case, kernels), memory)
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
        resident = min(REGISTERS // (256 * math.ceil(row["registers"] / 8) * 8), SHARED // row["shared_bytes"])
        issue, blocks = 2 * row["instructions"], math.ceil(case.M / BLOCK) * math.ceil(case.K / BLOCK)
        return LAUNCH + max(memory, blocks / SMS * max(issue, (LATENCY + issue) / resident) / CLOCK)
    return decoding(case, row) if isinstance(case, Decode) else None


def predict(names: list[str], compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every case of these shapes that has a plan: predicted seconds, rates, and the published rate."""
    of, rows = {}, []
    for row in (row for row in compiled if row.get("instructions")):
        of.setdefault((row["operation"], row["shape"]), {})[row["kernel"]] = row
    for case in (case for name in names for case in SHAPES[name]):
        kernels = of.get((case.operation, str(case)))
        if kernels and isinstance(case, Attention) and case.backward:
            # A kernel that an earlier case had as well is compiled, and reported, once.
            kernels = of.get((case.operation, str(dataclasses.replace(case, backward=False))), {}) | kernels
        took = kernels and seconds(case, kernels)
        if took:
            tflops = case.flops / took / 1e12 if case.flops else None
            rate = case.bytes() / took / 1e9 if case.published_in == "GB/s" else tflops
            rows.append({"operation": case.operation, "shape": str(case), "seconds": took, "tflops": tflops,
                         "published": case.published, "published_in": case.published_in,
                         "of_copy": case.bytes() / took / (MEMORY * COPY),
                         "of_published": rate / case.published if rate and case.published else None})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tools.predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["v3-train", "v3-decode"], choices=SHAPES)
    parser.add_argument("--rows", metavar="FILE", help="that compile_report --json wrote, instead of compiling")
    parser.add_argument("--json", metavar="FILE", help="also write the predictions there")
    args = parser.parse_args()
    try:
        compiled = (json.loads(pathlib.Path(args.rows).read_text())["rows"] if args.rows
                    else compile_report.compile_kernels(args.shapes))
    except compile_report.NoCompiler as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{args.rows} is no report of compile_report --json: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    rows = predict(args.shapes, compiled)
    if not rows:
        print("no row has machine code of these shapes; nvidia-cuda-nvdisasm (extra aot) reads it while compiling.",
              file=sys.stderr)
        return 2
    for row in rows:
        rate = f"{row['tflops']:7.0f} TFLOP/s" if row["tflops"] else f"{row['of_copy']:7.2f} of a copy"
        share = (f"{row['of_published']:6.2f} of {row['published']:.0f} {row['published_in']}"
                 if row["of_published"] else "")
        print(f"{row['operation']:20} {row['shape']:40} {rate:16} {share}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
