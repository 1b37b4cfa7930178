"""Bytes per device as a picture: a stacked bar for each way of counting, and a line at the size of the memory."""

from __future__ import annotations

import matplotlib

from deepseek_jax.plots.style import new_figure, save_figure

COLOURS = [matplotlib.colormaps["tab20"](n) for n in range(20)]  # more groups than the common palette has


def draw_memory(path: str, bars: dict[str, dict[str, float]], memory: float, title: str) -> None:
    """Writes a picture of stacked bars.

    Args:
      bars: {name of a bar: {group: bytes}}.
      memory: bytes of a device.
    """
    figure = new_figure(9, 1.4 + 0.8 * len(bars), dpi=130)
    axes = figure.subplots()
    colours: dict[str, tuple] = {}
    for row, (name, groups) in enumerate(bars.items()):
        left = 0.0
        for group, size in groups.items():
            new = group not in colours
            colour = colours.setdefault(group, COLOURS[len(colours) % len(COLOURS)])
            if size / 1e9 >= 0.005 * memory / 1e9:
                axes.barh(name, size / 1e9, left=left, color=colour, edgecolor="white",
                          label=group if new else None)
            elif new:
                del colours[group]
            left += size / 1e9
        axes.text(left, row, f" {left:.1f} GB", va="center", fontsize=9)
    axes.axvline(memory / 1e9, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.12 * max(memory / 1e9, *(sum(g.values()) / 1e9 for g in bars.values())))
    axes.invert_yaxis()
    axes.set(xlabel=f"GB per device; the line is what it has, {memory / 1e9:.0f} GB", title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    save_figure(figure, path)
