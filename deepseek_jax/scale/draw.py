"""A picture of the bytes per device: a stacked bar for each way of counting, and a line at the size of the memory.

The planner groups bytes by purpose; XLA only distinguishes the arguments of a step from everything else. Arguments are
blue in every bar, so these parts and the totals can be compared.
"""

from __future__ import annotations

from typing import Any

from deepseek_jax.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    OLIVE,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    new_figure,
    save_figure,
)
from deepseek_jax.scale.memory import LABELS

SEEN = 0.006  # share of the axis: smaller groups are too thin to be seen, and are drawn together
CLOSE = 0.2  # share of the memory: if all bars are shorter, the axis ends after them, without the line
COLOURS = {
    # The planner's groups; the training state is blue.
    "masters": BLUE, "moments": SKY, "averages": "#A6D8F0", "working": ORANGE, "gradients": VERMILION, "kept": GREEN,
    "buffers": PURPLE, "experts' products": OLIVE, "passing": "#8C5B3F",
    # The arguments of a decode step.
    "weights": BLUE, "cache": SKY, "drafts": "#A6D8F0", "batch": "#D3ECF8",
    # XLA's.
    "arguments": "#2B95C9", "temporaries": GREY, "outputs": BLACK, "code": "#C4C4C4",
    "smaller groups": "#E4E4E4",
}
BARS = {"planned": "planned, by what the bytes are for", "given": "what the step is given",
        "bytes": "counted by XLA after compiling; blue is what is blue above"}


def draw_memory(path: str, bars: dict[str, dict[str, float]], memory: float, title: str,
                labels: dict[str, str] = LABELS) -> None:
    """Writes a picture of stacked bars, each with its own legend.

    Args:
      bars: {title of a bar: {group: bytes}}.
      memory: bytes of a device.
      labels: display names of groups.
    """
    largest = max(sum(groups.values()) for groups in bars.values())
    line = largest >= CLOSE * memory
    end = 1.12 * (max(memory, largest) if line else largest)
    shown = {name: _grouped(groups, SEEN * end) for name, groups in bars.items()}
    heights = [0.5 + 0.19 * max(len(groups), 2) for groups in shown.values()]
    figure = new_figure(10.5, 0.9 + sum(heights), dpi=130)
    axes = figure.subplots(len(bars), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, height, (name, groups) in zip(axes, heights, shown.items()):
        left = 0.0
        for group, size in groups.items():
            axis.barh(0, size / 1e9, left=left, height=0.4 / height, color=COLOURS[group], edgecolor="white",
                      linewidth=0.5, label=f"{labels.get(group, group)}: {_gigabytes(size)}")
            left += size / 1e9
        axis.text(left + 0.004 * end / 1e9, 0, _gigabytes(1e9 * left), va="center", fontsize=9, zorder=3,
                  bbox=dict(facecolor="white", edgecolor="none", pad=1))
        if line:
            axis.axvline(memory / 1e9, color=BLACK, linestyle="--", linewidth=1)
        axis.set(ylim=(-0.5, 0.5), yticks=[], xlim=(0, end / 1e9))
        axis.set_title(name, loc="left", fontsize=9)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    has = f"{memory / 1e9:.0f} GB"
    axes[-1].set_xlabel(f"GB on each device; dashed: what it has, {has}" if line else f"GB on each device, of {has}")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _grouped(groups, least):
    """The groups with at least that many bytes, and the others combined."""
    large = {group: size for group, size in groups.items() if size >= least}
    rest = sum(groups.values()) - sum(large.values())
    return large | ({"smaller groups": rest} if rest >= least / 10 else {})


def _gigabytes(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.2g} GB"


def draw_report(path: str, report: dict[str, Any]) -> None:
    """Draws a report of `deepseek_jax.compile`, as it returns or writes it."""
    program = report.get("program", "train")
    if program == "decode":
        title = (f"{report['model']}, a decode step of {report['sequences']} x {report['length']} tokens; compiled for "
                 f"{report['target']}, each device with a complete copy")
    else:
        what = (f"{'FP8' if report['fp8'] else 'bf16'}, remat {report['remat']}, {report['sequence_length']} tokens, "
                f"capacity {report['mesh']['capacity']}")
        title = f"{report['model']} on {report['target']}, {program}, {what}\n{report['layout']}"
    given = {"train": "masters, moments, batch", "decode": "weights, cache, batch"}.get(program, "masters, batch")
    labels = LABELS | {"arguments": f"arguments ({given})", "temporaries": "all else (temporaries)",
                       "cache": "latent cache"}
    bars = {name: report[key] for key, name in BARS.items() if isinstance(report.get(key), dict)}
    draw_memory(path, bars, report["memory"], title, labels)
