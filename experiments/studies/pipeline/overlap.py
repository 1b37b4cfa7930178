"""Does the compiler hide the experts' all-to-alls? Read off XLA's own schedule for 16 x 8 H100s, without having them.

    python -m experiments.studies.pipeline.overlap --programs FOLDER        (needs the extra `aot`; no GPU)

One MoE layer a stage at v3_671b's widths, four experts a device as in the report's 64-way layout, bf16. For every
all-to-all of tokens in the cells that fill a step (F&B of DualPipe, F and B of 1F1B): the products that XLA put between
its start and its done. Two clocks, one of products and one of transfers, then show how long the device waits, at the
rates of `scale.hardware`. Other operations take no time here, which underestimates how much is hidden. Programs that
are in FOLDER already are not compiled again.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from deepseek_jax import cli, io
from deepseek_jax.config import model_config
from deepseek_jax.pipeline.tables import tabulate
from deepseek_jax.scale.compile import hlo
from deepseek_jax.scale.hardware import Measured, hardware
from deepseek_jax.scale.layout import Layout, Split, make_layout
from deepseek_jax.scale.traffic import layer_traffic
from experiments.studies.framework.results import provenance

TARGET, RANKS, LOCAL, MICROBATCHES, CAPACITY = "h100:128", 16, 8, 32, 1.25
MODEL = model_config("v3_671b", num_layers=RANKS, num_experts=4 * LOCAL, num_dense_layers=0, mtp_depth=0,
                     remat="report")
CELLS = {"dualpipe": ("F&B",), "1f1b": ("F", "B")}
MACHINES = ("h100", "h800")  # the same chip; its NVLink sends 450 and 160 GB/s
KINDS = ("all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One all-to-all of tokens. Seconds; flops: of the products between its start and its done."""

    asynchronous: bool
    flops: float
    seconds: float
    waited: float


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
    """Useful FLOPs of a product: XLA:GPU implements `ragged_dot` as a product of all rows by every expert."""
    rows = CAPACITY * tokens * MODEL.experts_per_token
    expanded = flops > 2 * rows * MODEL.d_model * MODEL.expert_ffn_dim * 1.5
    return flops * LOCAL / MODEL.num_experts if expanded else flops


def clocked(steps: Iterable[hlo.Step], of_tokens: Callable[[hlo.Collective], bool], seconds: float,
            rate: float) -> list[Transfer]:
    """Simulates a device that executes `steps`.

    Args:
      of_tokens: whether a collective is an all-to-all of tokens; the others take no time.
      seconds: of one such transfer; they do not overlap each other. rate: FLOP/s of products.
    Returns:
      the transfers, in the order of completion.
    """
    now = network = done = 0.0
    under_way, transfers = {}, []  # key -> (when it ends, FLOPs done before its start)
    for step in steps:
        if step.what == "work":
            now, done = now + step.flops / rate, done + step.flops
        elif step.what in ("start", "synchronous") and step.collective and of_tokens(step.collective):
            network = max(now, network) + seconds
            if step.what == "start":
                under_way[step.key] = network, done
            else:
                transfers.append(Transfer(False, 0.0, seconds, network - now))
                now = network
        elif step.key in under_way:
            ends, before = under_way.pop(step.key)
            transfers.append(Transfer(True, done - before, seconds, max(0.0, ends - now)))
            now = max(now, ends)
    return transfers


def cells(schedule: str, text: str, tokens: int, machine: str) -> dict[str, list[Transfer]]:
    """The transfers of each kind of cell that fills a step; of F&B's two directions, one."""
    layout, measured, hw = layout_of(schedule, tokens), Measured(), hardware(machine)
    assert layout.pipeline is not None
    branches = tabulate(layout.pipeline).branches
    names = {"&".join(kind for kind, _ in branch): name
             for branch, name in zip(branches, hlo.branches(text, len(branches)), strict=True)}
    sizes = {axis: getattr(layout.mesh, axis) for axis in ("pipe", "replica", "node", "local", "tensor")}
    seconds = layer_traffic(MODEL, layout)["dispatch inside"] / (measured.local * hw.local_bandwidth)
    of_tokens = lambda one: one.kind in KINDS and one.bytes > tokens * MODEL.d_model  # ids and gates: far fewer
    found = {}
    for cell in CELLS[schedule]:
        steps = [step._replace(flops=worth(step.flops, tokens)) for step in hlo.steps(text, sizes, names[cell])]
        found[cell] = clocked(steps, of_tokens, seconds, measured.product_bf16 * hw.bf16)
    return found


def rows_of(programs: dict[str, str], tokens: int) -> list[dict]:
    """A row for each cell and machine. JSON-able."""
    rows = []
    for machine in MACHINES:
        for schedule, text in programs.items():
            for cell, transfers in cells(schedule, text, tokens, machine).items():
                rows.append({"machine": machine, "schedule": schedule, "cell": cell,
                             "exposed": sum(t.waited for t in transfers) / sum(t.seconds for t in transfers),
                             "transfers": [dataclasses.asdict(t) for t in transfers]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.pipeline.overlap", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", required=True, type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch on one device")
    args = parser.parse_args()
    rows = rows_of({name: program(name, args.tokens, args.programs) for name in CELLS}, args.tokens)
    print(f"{'':6}{'':10}{'cell':6}{'asynchronous':>13}{'TFLOP between':>15}{'transfer, ms':>14}{'waited, ms':>12}")
    for row in rows:
        for t in row["transfers"]:
            print(f"{row['machine']:6}{row['schedule']:10}{row['cell']:6}{t['asynchronous']!s:>13}"
                  f"{t['flops'] / 1e12:15.2f}{1e3 * t['seconds']:14.3f}{1e3 * t['waited']:12.3f}")
        print(f"{'':22}exposed: {row['exposed']:.0%}")
    result = {"command": f"python -m experiments.studies.pipeline.overlap --tokens {args.tokens}", "target": TARGET,
              "tokens": args.tokens, "rows": rows, **provenance()}
    io.write_json(pathlib.Path(__file__).parent / "overlap.json", result)


if __name__ == "__main__":
    cli.run(main)
