"""The memory for fine-tuning all parameters on one device, for every remat policy (no jax).

Bytes are those of `memory` for a mesh of one device: float32 masters and gradients, Adam's moments, and the policy's
residuals for the backward pass. No parameter is frozen.
"""

import dataclasses
from collections.abc import Callable

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.scale import memory
from deepseek_jax.scale.hardware import HARDWARE, Hardware, device, smallest
from deepseek_jax.scale.layout import Layout, Split, make_layout
from deepseek_jax.scale.serve import RESERVE

REMATS = ("none", "report", "full")
UNIT, MOST = 128, 1 << 20  # tokens of a step of the search for the longest context; steps, and sequences, tried
STATE = ("masters", "moments", "gradients")  # groups that do not depend on context or policy


@dataclasses.dataclass(frozen=True)
class Step:
    """sequences: of a step. rows: of a micro-batch; fewer than `sequences` are accumulated. moments: their type."""

    sequences: int = 1
    rows: int = 1
    context: int = 4096
    moments: str = "float32"


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """One policy: bytes by group, and the maximum that fits: tokens per sequence, and sequences per micro-batch at the
    step's context; 0: none."""

    remat: str
    bytes: dict[str, float]
    usable: float
    longest: int
    most_sequences: int

    @property
    def total(self) -> float:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


def layout(c: ModelConfig, step: Step) -> Layout:
    """The step on a mesh of one device. Raises ConfigError for sequences that do not fill micro-batches."""
    made = make_layout(c, Split(1), step.sequences, step.rows, step.context)
    return dataclasses.replace(made, moment_dtype=step.moments)


def finetune(c: ModelConfig, hw: Hardware, step: Step) -> list[Finetuned]:
    """Plans one device under each remat policy."""
    return [_under(dataclasses.replace(c, remat=remat), hw, step) for remat in REMATS]


def _under(c, hw, step):
    usable = (1 - RESERVE) * hw.memory
    needed = lambda changed: memory.bytes_per_device(c, layout(c, changed), hw.kernels)
    fits = lambda **changes: sum(needed(dataclasses.replace(step, **changes)).values()) <= usable
    return Finetuned(c.remat, needed(step), usable, UNIT * _most(lambda n: fits(context=UNIT * n)),
                     _most(lambda n: fits(sequences=n, rows=n)))


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, up to MOST; 0: not even 1."""
    least, top = 0, MOST
    while least < top:
        middle = (least + top + 1) // 2
        least, top = (middle, top) if fits(middle) else (least, middle - 1)
    return least


def instead(c: ModelConfig, hw: Hardware, step: Step, rows: list[Finetuned]) -> str:
    """If no policy fits: how much memory the nearest one lacks, and what would fit."""
    nearest = min(rows, key=lambda row: row.total)
    would = []
    if nearest.longest:
        would.append(f"a context of {nearest.longest:,} tokens")
    if nearest.most_sequences:
        would.append(f"--rows {nearest.most_sequences}, which accumulates micro-batches")
    fits = lambda machine, changed: any(row.fits for row in finetune(c, machine, changed))
    if step.moments != "bfloat16" and fits(hw, dataclasses.replace(step, moments="bfloat16")):
        would.append("--moments bfloat16 (train: --config.optimizer.moment_dtype=bfloat16)")
    larger = [name for name in HARDWARE if device(name).memory > hw.memory and fits(device(name), step)]
    if larger:
        would.append(f"--hardware {smallest(larger)}")
    if devices := _devices(c, hw, step):
        would.append(f"{devices} devices (instead of --finetune: --devices {devices} --expert {devices} --sequences "
                     f"{devices} --remat full --no-fp8)")
    fixed = sum(nearest.bytes[name] for name in STATE)
    return (f"lacks {(nearest.total - nearest.usable) / 1e9:,.1f} GB with remat {nearest.remat}; masters, moments and "
            f"gradients alone take {fixed / 1e9:,.1f} GB; what would fit: " + ("; ".join(would) or "nothing known"))


def _devices(c: ModelConfig, hw: Hardware, step: Step) -> int | None:
    """The smallest power of two of devices that hold the step, if they share experts and state; None: up to 256."""
    model = dataclasses.replace(c, remat="full")
    for devices in (1 << i for i in range(1, 9)):
        split = Split(devices, expert=devices, node_size=hw.node_size)
        try:
            made = make_layout(model, split, devices, 1, step.context, buffers="ragged", capacity=1.25)
        except ConfigError:  # does not divide the experts
            continue
        made = dataclasses.replace(made, moment_dtype=step.moments)
        if sum(memory.bytes_per_device(model, made, hw.kernels).values()) <= (1 - RESERVE) * hw.memory:
            return devices
    return None
