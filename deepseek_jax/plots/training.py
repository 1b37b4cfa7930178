"""Plots of the loss, of the experts' loads, and of the bytes that devices send each other.

`loss.png` shows the training losses and, if the run was evaluated, bits per byte. `expert_load.png` shows for each MoE
layer and step the load of each expert as a multiple of the mean: white is an even share, and the report's balancing
should turn the early stripes white. Both are drawn from the files of `metrics`, so a running job can be plotted; the
run's config says which layers are MTP modules.
"""

from __future__ import annotations

import itertools
import os
import pathlib

import numpy as np
from matplotlib.colors import TwoSlopeNorm

from deepseek_jax import io, storage
from deepseek_jax.plots.style import BLUE, GREEN, GREY, PALETTE, VERMILION, new_figure, save_figure
from deepseek_jax.training.metrics import read_expert_loads, read_metrics

MAX_COLUMNS = 600  # columns of a heat map; longer runs are averaged to this many steps


def plot_loss(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Draws WORKDIR/loss.png from WORKDIR/metrics.jsonl; returns its path."""
    rows = read_metrics(workdir)
    evaluated = _series(rows, "eval_bits_per_byte")
    rated, rates = _series(rows, "lr")
    figure = new_figure(9, 5.2)
    panels = figure.subplot_mosaic("LV\nRV" if len(evaluated[0]) else "L\nR", height_ratios=(6, 1))
    losses, below = panels["L"], panels["R"]
    losses.sharex(below)
    losses.tick_params(labelbottom=False)
    for name, label, colour in (("mtp_loss", "token after next, given the next (MTP)", VERMILION),
                                ("loss", "next token", BLUE)):
        steps, values = _series(rows, name)
        if len(steps):
            losses.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            losses.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=label)
    _finish(losses, "Training", "loss, nats per token", _limits(rows))
    if losses.get_legend_handles_labels()[0]:
        losses.legend(frameon=False, reverse=True)
    if len(evaluated[0]):
        _evaluations(panels["V"], rows, evaluated[0], GREEN)
        _finish(panels["V"], f"Validation: {evaluated[1][-1]:.3f} at step {evaluated[0][-1]:.0f}", "bits per byte")
        panels["V"].set_xlabel("step")
        panels["V"].sharex(below)
    below.fill_between(rated, rates, color=GREY, alpha=0.3, linewidth=0)
    below.plot(rated, rates, color=GREY, linewidth=1)
    _finish(below, "", "learning\nrate", (0, None))
    if len(rates):
        below.set_yticks([0, rates.max()], ["0", f"{rates.max():.1e}".replace("e-0", "e-")])
    below.set_xlabel("step")
    return _saved(figure, storage.as_path(workdir) / "loss.png")


def plot_expert_load(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Draws WORKDIR/expert_load.png from WORKDIR/expert_load and the config there; returns its path."""
    steps, counts_SLE = read_expert_loads(workdir)
    S, L, E = counts_SLE.shape
    load_SLE = counts_SLE * E / np.maximum(counts_SLE.sum(-1, keepdims=True), 1)
    heights = [0.95 if L <= 8 else 0.35] * L + [2.3]
    figure = new_figure(9, sum(heights) + 0.3)
    axes = figure.subplots(L + 1, 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    if S:
        _heat_maps(figure, axes[:-1], steps, load_SLE, _layer_names(workdir, L))
        _max_vio_curves(axes[-1], steps, load_SLE.max(-1) - 1)
    else:
        axes[-1].text(0.5, 0.5, "this run has recorded no expert loads", ha="center", transform=axes[-1].transAxes)
    axes[-1].set_xlabel("step")
    return _saved(figure, storage.as_path(workdir) / "expert_load.png")


def plot_runs(runs: dict[str, list[dict]], path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws training loss and validation of several runs over the tokens that they have read. Returns the path.

    Args:
      runs: {name: rows of its metrics.jsonl}.
    """
    evaluated = any(row.get("eval_bits_per_byte") is not None for rows in runs.values() for row in rows)
    figure = new_figure(9, 3.8)
    axes = figure.subplots(1, 2 if evaluated else 1, squeeze=False)[0]
    for i, (name, rows) in enumerate(runs.items()):
        colour, tokens = PALETTE[i % len(PALETTE)], dict(_series(rows, "tokens").T)
        million = lambda steps, tokens=tokens: np.array([tokens.get(step, np.nan) for step in steps]) / 1e6
        steps, losses = _series(rows, "loss")
        axes[0].plot(million(steps), losses, color=colour, alpha=0.18, linewidth=0.8)
        axes[0].plot(million(steps), _smooth(losses), color=colour, linewidth=1.6, label=name)
        if evaluated:
            _evaluations(axes[1], rows, million(_series(rows, "eval_bits_per_byte")[0]), colour)
    _finish(axes[0], "Training: next token", "nats per token")
    axes[0].legend(frameon=False)
    if evaluated:
        _finish(axes[1], "Validation", "bits per byte")
    for axis in axes:
        axis.set_xlabel("million tokens read")
    return _saved(figure, pathlib.Path(path))


def plot_dispatch(matrices: dict[str, np.ndarray], locals_per_node: int, path: str | os.PathLike[str],
                  note: str) -> pathlib.Path:
    """Draws the number of copies that each device sends to each other, per hop: white is none, dark is many. Returns
    the path.

    Args:
      matrices: {title: int [senders, receivers]}; devices in the order of the mesh, nodes first.
      note: explanation of the patterns, below the picture.
    """
    figure = new_figure(9, 3.8)
    axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    top = max(sent.max() for sent in matrices.values())
    for axis, (title, sent) in zip(axes, matrices.items()):
        node = np.arange(len(sent)) // locals_per_node
        across = sent[node[:, None] != node[None]].sum()
        picture = axis.imshow(sent, cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
        axis.set_title(f"{title}\n{across:,} copies cross nodes", loc="left", fontsize=10)
        first = np.arange(0, len(sent), locals_per_node)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_ticks(first + (locals_per_node - 1) / 2, node[first])
            ticks.set_tick_params(length=0)
        for edge in first[1:] - 0.5:
            axis.axvline(edge, color=GREY, linewidth=0.4)
            axis.axhline(edge, color=GREY, linewidth=0.4)
        axis.set_xlabel("receiving device, by node")
    axes[0].set_ylabel("sending device, by node")
    figure.colorbar(picture, ax=list(axes), shrink=0.7, pad=0.01, label="copies of tokens")
    figure.supxlabel(f"{len(node)} devices on {node[-1] + 1} nodes. {note}", x=0.01, ha="left", fontsize=8, color="0.3")
    return _saved(figure, pathlib.Path(path))


def _layer_names(workdir, L):
    """MTP modules are the last ones."""
    modules = io.read_json(storage.as_path(workdir) / "config.json")["model"]["mtp_depth"]
    return [f"MoE {n + 1}" for n in range(L - modules)] + [f"MTP {n + 1}" if modules > 1 else "MTP"
                                                           for n in range(modules)]


def _heat_maps(figure, axes, steps, load_SLE, names):
    E = load_SLE.shape[-1]
    load_SLE = _pool(load_SLE)
    top = max(2.0, min(4.0, float(np.ceil(np.quantile(load_SLE, 0.995)))))
    for layer, (name, axis) in enumerate(zip(names, axes)):
        picture = axis.imshow(load_SLE[:, layer].T, aspect="auto", origin="lower", interpolation="nearest",
                              cmap="RdBu_r", norm=TwoSlopeNorm(1, 0, top),
                              extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, E - 0.5))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
        axis.set_yticks([0, E - 1] if len(axes) <= 8 else [])
        axis.tick_params(axis="x", bottom=False, labelbottom=False)
        axis.tick_params(axis="y", labelsize=8, length=2)
    axes[0].set_title("Load of each expert (a row) in each layer, as a multiple of the mean", loc="left")
    bar = figure.colorbar(picture, ax=list(axes), pad=0.015, fraction=0.025, aspect=24, extend="max",
                          ticks=np.arange(0, top + 1))
    bar.ax.set_yticklabels(["idle", "mean", *(f"{n}×" for n in range(2, int(top) + 1))])


def _max_vio_curves(axis, steps, vio_SL):
    for vio_S in vio_SL.T:
        axis.plot(steps, _smooth(vio_S), color=BLUE, alpha=0.3, linewidth=0.8)
    axis.plot(steps, _smooth(vio_SL.mean(1)), color=BLUE, linewidth=2, label="mean of the layers")
    axis.plot([], [], color=BLUE, alpha=0.3, linewidth=0.8, label="one layer")
    _finish(axis, "MaxVio: how far the busiest expert is above the mean", "max / mean - 1", (0, None))
    axis.legend(frameon=False, ncols=2)


def _evaluations(axis, rows, x, colour):
    """Bits per byte at the positions `x`; hollow if measured on part of the held-out text."""
    scored = [row for row in rows if row.get("eval_bits_per_byte") is not None]
    pairs = [(row["eval_bits_per_byte"], (row.get("eval_share") or 1) < 1) for row in scored]
    bits, partial = np.array(pairs, float).reshape(-1, 2).T
    axis.plot(x, bits, color=colour, linewidth=1.5)
    for hollow, label in ((1, "part of the held-out text"), (0, "all of it")):
        axis.plot(x[partial == hollow], bits[partial == hollow], "o", color=colour, markersize=4,
                  markerfacecolor="white" if hollow else colour, label=label)
    if partial.any() and not axis.get_legend():  # several runs share one legend
        axis.legend(*(some[:2] for some in axis.get_legend_handles_labels()), frameon=False)


def _finish(axis, title, ylabel, limits=(None, None)):
    axis.set_title(title, loc="left")
    axis.set_ylabel(ylabel)
    axis.set_ylim(*limits)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    axis.margins(x=0.01)


def _series(rows, name):
    """-> steps and values of the rows that have this number."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array(pairs, float).reshape(-1, 2).T


def _limits(rows):
    """Limits the loss axis to exclude the steep fall of the first steps, which would flatten the rest."""
    values = np.concatenate([_series(rows, name)[1] for name in ("loss", "mtp_loss")])
    if len(values) < 20:
        return None, None
    low, high = values.min(), np.quantile(values, 0.98)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _smooth(values):
    """Mean over a window of about a fiftieth of the run, centred on each step: it does not lag behind."""
    half = len(values) // 100
    total = np.cumsum(np.concatenate([[0.0], values]))
    here = np.arange(len(values))
    start, end = np.maximum(here - half, 0), np.minimum(here + half + 1, len(values))
    return (total[end] - total[start]) / (end - start)


def _pool(values_S):
    """Averages neighbouring steps so that at most MAX_COLUMNS remain, spread evenly over the run."""
    edges = np.linspace(0, len(values_S), min(len(values_S), MAX_COLUMNS) + 1).astype(int)
    return np.stack([values_S[a:b].mean(0) for a, b in itertools.pairwise(edges)])


def _saved(figure, path):
    save_figure(figure, path)
    return path
