"""Common to all pictures: one palette, figures without pyplot (which keeps them alive), files written atomically."""

from __future__ import annotations

import os
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepseek_jax import io
from deepseek_jax.config import ConfigError

# Okabe and Ito's palette, which can be distinguished with any colour vision.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY, BLACK, OLIVE = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#000000", "#B8A800")


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """An empty figure; `width` and `height` in inches."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], **options: Any) -> None:
    """Writes a picture; its format follows the name. Raises ConfigError for a format that matplotlib cannot write."""
    kind = os.path.splitext(path)[1].removeprefix(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ConfigError(f"cannot draw {os.fspath(path)}: .{kind} is no format of pictures; take one of "
                          f"{', '.join(sorted(known))}.")
    with io.replacing(path) as partial:
        figure.savefig(partial, format=kind, **options)
