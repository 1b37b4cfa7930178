"""Whether the experts' all-to-alls are hidden, from XLA's schedule for 16 x 8 H100s, without having them.

    python -m experiments.studies.pipeline.overlap --programs FOLDER        (needs the extra `aot`; no GPU)

One MoE layer per stage at v3_671b's widths, four experts per device as in the report's 64-way layout, bf16. For every
all-to-all of tokens in the cells that fill a step (F&B of DualPipe, F and B of 1F1B): the products that XLA scheduled
between its start and its done, and the time that the device waits by the simulation of `scale.compile.clock`, at the
rates of `scale.hardware`. Programs that are already in FOLDER are not compiled again.
"""

import argparse
import dataclasses
import pathlib

from deepseek_jax import cli, io
from deepseek_jax.config import model_config
from deepseek_jax.scale.compile import clock
from deepseek_jax.scale.hardware import Measured, hardware
from deepseek_jax.scale.layout import Layout, Split, make_layout
from deepseek_jax.scale.traffic import layer_traffic
from experiments.studies.framework.results import provenance

TARGET, RANKS, LOCAL, MICROBATCHES, CAPACITY = "h100:128", 16, 8, 32, 1.25
MODEL = model_config("v3_671b", num_layers=RANKS, num_experts=4 * LOCAL, num_dense_layers=0, mtp_depth=0,
                     remat="report")
CELLS = {"dualpipe": ("F&B",), "1f1b": ("F", "B")}
TOKENS = (1024, 4096)  # of a micro-batch on one device
MACHINES = ("h100", "h800")  # the same chip; its NVLink sends 450 and 160 GB/s


def layout_of(schedule: str, tokens: int) -> Layout:
    return make_layout(MODEL, Split(RANKS * LOCAL, RANKS, LOCAL, node_size=LOCAL), MICROBATCHES * LOCAL,
                       sequence_length=tokens, schedule=schedule, buffers="ragged", capacity=CAPACITY)


def program(schedule: str, tokens: int, folder: pathlib.Path) -> str:
    """The compiled step, as text."""
    path = folder / f"{schedule}_{tokens}.hlo"
    if not path.exists():
        from deepseek_jax.scale.compile import aot

        compiled, facts = aot.compile_step(aot.config_of(MODEL, layout_of(schedule, tokens)), TARGET)
        size = sum(aot.bytes_of(compiled).values()) / 1e9
        print(f"{schedule}: compiled in {facts['seconds']['compiling']:.0f} s, {size:.1f} GB a device", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        io.write_text(path, compiled.as_text())
    return path.read_text()


def worth(flops: float, tokens: int) -> float:
    """FLOPs of a product on rows that hold tokens: the experts' products skip the empty rows that a capacity leaves."""
    rows = CAPACITY * tokens * MODEL.experts_per_token
    one = 2 * rows * MODEL.d_model * MODEL.expert_ffn_dim
    return flops / CAPACITY if one <= flops < 1.1 * one else flops  # a kernel processes a few more rows


def cells(schedule: str, text: str, tokens: int, machine: str) -> dict[str, list[clock.Transfer]]:
    """The transfers of each kind of cell that fills a step; for F&B, one of the two directions."""
    layout, measured, hw = layout_of(schedule, tokens), Measured(), hardware(machine)
    takes = layer_traffic(MODEL, layout)["dispatch inside"] / (measured.local * hw.local_bandwidth)
    of_tokens = lambda one: takes if one.kind in clock.KINDS and one.bytes > tokens * MODEL.d_model else 0.0
    steps = clock.cell_steps(text, layout)
    worthy = lambda step: step._replace(flops=worth(step.flops, tokens))
    return {cell: clock.clocked(map(worthy, steps[cell]), of_tokens, clock.rates_of(hw, measured))
            for cell in CELLS[schedule]}


def rows_of(programs: dict[str, str], tokens: int) -> list[dict]:
    """A row for each cell and machine, as JSON data."""
    rows = []
    for machine in MACHINES:
        for schedule, text in programs.items():
            for cell, transfers in cells(schedule, text, tokens, machine).items():
                rows.append({"tokens": tokens, "machine": machine, "schedule": schedule, "cell": cell,
                             "exposed": sum(t.waited for t in transfers) / sum(t.seconds for t in transfers),
                             "transfers": [dataclasses.asdict(t) for t in transfers]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.pipeline.overlap", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", required=True, type=pathlib.Path, metavar="FOLDER")
    args = parser.parse_args()
    rows = [row for tokens in TOKENS
            for row in rows_of({name: program(name, tokens, args.programs) for name in CELLS}, tokens)]
    print(f"{'tokens':8}{'':6}{'':10}{'cell':6}{'asynchronous':>13}{'TFLOP between':>15}{'transfer, ms':>14}"
          f"{'waited, ms':>12}")
    for row in rows:
        for t in row["transfers"]:
            print(f"{row['tokens']:<8}{row['machine']:6}{row['schedule']:10}{row['cell']:6}{t['asynchronous']!s:>13}"
                  f"{t['flops'] / 1e12:15.2f}{1e3 * t['seconds']:14.3f}{1e3 * t['waited']:12.3f}")
        print(f"{'':30}exposed: {row['exposed']:.0%}")
    result = {"command": "python -m experiments.studies.pipeline.overlap --programs FOLDER", "target": TARGET,
              "rows": rows, **provenance()}
    io.write_json(pathlib.Path(__file__).parent / "overlap.json", result)


if __name__ == "__main__":
    cli.run(main)
