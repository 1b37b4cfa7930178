"""Does the compiler hide the experts' all-to-alls? Read off XLA's own schedule for 16 x 8 H100s that are not here.

    python -m experiments.studies.pipeline.overlap --hlo FOLDER        (needs the extra `aot`; minutes, no GPU)

One MoE layer a stage at v3_671b's widths, in bf16. For every all-to-all of values in the cells that fill a step (F&B of
DualPipe, F and B of 1F1B): the products that XLA put between its start and its done. Two clocks, one of products and
one of transfers, at the rates of `scale.hardware`, then say how long the device waits. What is no product takes no
time here, which understates what hides. FOLDER keeps the programs; what is there already is not compiled again.
"""

import argparse
import pathlib
from typing import NamedTuple

from deepseek_jax import command
from deepseek_jax.config import model_config
from deepseek_jax.pipeline.orders import kind_of
from deepseek_jax.pipeline.tables import tabulate
from deepseek_jax.scale import hlo
from deepseek_jax.scale.hardware import Measured, hardware
from deepseek_jax.scale.layout import make_layout
from deepseek_jax.scale.traffic import layer_traffic

TARGET, RANKS, LOCAL, MICROBATCHES = "h100:128", 16, 8, 32
MODEL = dict(num_layers=RANKS, num_dense_layers=0, mtp_depth=0, remat="report")
CELLS = {"dualpipe": ("F&B",), "1f1b": ("F", "B")}
KINDS = ("all-to-all", "ragged-all-to-all")


class Transfer(NamedTuple):
    """One all-to-all of values. Seconds; flops: of the products between its start and its done."""

    asynchronous: bool
    flops: float
    seconds: float
    waited: float


def layout_of(schedule, sequence_length):
    return make_layout(model_config("v3_671b", **MODEL), RANKS * LOCAL, RANKS, LOCAL, LOCAL, MICROBATCHES * LOCAL,
                       schedule=schedule, sequence_length=sequence_length, buffers="ragged", capacity=1.25)


def program(schedule, sequence_length, folder: pathlib.Path) -> str:
    """The compiled step, as text."""
    path = folder / f"{schedule}_{sequence_length}.hlo"
    if not path.exists():
        from deepseek_jax.scale import aot

        config = aot.config_of(model_config("v3_671b", **MODEL), layout_of(schedule, sequence_length))
        text = aot.compile_step(config, TARGET)[0].as_text()
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path.read_text()


def clocked(steps, values, seconds, rate) -> list[Transfer]:
    """Lets a device go through `steps`.

    Args:
      values: which collectives are all-to-alls of values; others take no time.
      seconds: that one of those takes, one after the other. rate: FLOP/s of products.
    """
    now = network = 0.0
    began, transfers = {}, []  # key -> (when it ends, FLOPs until its start); in the order of their dones
    flops = 0.0
    for step in steps:
        if step.what == "work":
            now, flops = now + step.flops / rate, flops + step.flops
        elif step.what in ("start", "whole") and values(step.collective):
            network = max(now, network) + seconds
            if step.what == "start":
                began[step.key] = network, flops
            else:
                transfers.append(Transfer(False, 0.0, seconds, network - now))
                now = network
        elif step.key in began:
            ends, before = began.pop(step.key)
            transfers.append(Transfer(True, flops - before, seconds, max(0.0, ends - now)))
            now = max(now, ends)
    return transfers


def cells(schedule, text, sequence_length, bandwidth, rate) -> dict[str, list[Transfer]]:
    """The transfers of each kind of cell that fills a step; of F&B's two directions, the first."""
    layout = layout_of(schedule, sequence_length)
    model = model_config("v3_671b", **MODEL)
    branches = tabulate(layout.pipeline).branches
    sizes = {name: getattr(layout.mesh, name) for name in ("pipe", "replica", "node", "local", "tensor")}
    names = dict(zip(reversed(["&".join(kind for kind, _ in branch) for branch in branches]),
                     reversed(hlo.branches(text, len(branches)))))
    large = layout.tokens * model.d_model  # bytes: a row of ids or gates is far smaller
    values = lambda one: one.kind in KINDS and one.bytes > large
    sent = layer_traffic(model, layout)["dispatch inside"]
    return {cell: clocked(hlo.steps(text, sizes, names[cell]), values, sent / bandwidth, rate)
            for cell in CELLS[schedule]}
