"""FP8 against bfloat16 from the same seeds, and sums whose partial results have few bits (report section 3.3).

Two kinds of arms: training runs of `deepseek_jax.train`, each variant at two settings, and sums of K products under the
model of a tensor core's accumulator. Every difference is relative to bfloat16 of the same setting and seed.
"""

import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.framework import plots
from experiments.studies.framework.results import interval, provenance
from experiments.studies.framework.runner import ROOT
from experiments.studies.framework.statistics import difference, estimate, verdict
from experiments.studies.framework.study import Job, Measure, Study
from kernels_pallas import api

VARIANTS = {
    "bf16": [],
    "bf16_two_micro_batches": ["--config.train.micro_batches=2"],  # the same sums in another order: a baseline
    "fp8": ["--config.fp8.enabled=True"],
    "fp8_128x128": ["--config.fp8.enabled=True", "--config.fp8.gradient_tiles=128x128"],
}
LABELS = {"bf16": "bfloat16", "bf16_two_micro_batches": "Yardstick: bfloat16 in two micro-batches", "fp8": "FP8",
          "fp8_128x128": "FP8, 128 x 128 on gradients"}
# At its config's rate (3e-3) a tiny model amplifies any rounding; the report's bound was found at its peak rate
# (section 4.2).
CALM = ["--config.optimizer.learning_rate=2.2e-4", "--config.optimizer.warmup=0.1"]
# setting -> (config file, steps, options)
SETTINGS = {"tiny": ("tiny", 240, []), "small_calm": ("small", 150, CALM)}
QUICK = {"tiny": ("tiny", 4, ["--config.model.num_layers=2", "--config.model.mtp_depth=0",
                              "--config.model.vocab_size=1024", "--config.train.final_eval_batches=1"])}
COMMON = ["--config.train.batch_size=8", "--config.train.sequence_length=256", "--config.train.sample_tokens=0",
          "--config.train.eval_every=100000", "--config.train.checkpoint_every=60", "--config.train.checkpoints_kept=1"]
SEEDS = (0, 1, 2)
SMOOTHING = 40  # steps of the moving average
WARM_UP = 0.25  # share of the run, not compared
LIMIT = 0.0025  # the report's bound on the relative difference of the loss

# Sums of K products with 14 bits: truncated after every `group` products, added in float32 every `promoted` (0: never).
K, PROMOTED, GROUPS = 4096, (32, 64, 128, 256, 0), (32, 4)

CONFIG = {"variants": VARIANTS, "settings": {name: list(setting) for name, setting in SETTINGS.items()},
          "seeds": list(SEEDS), "common": COMMON, "smoothing": SMOOTHING, "warm_up": WARM_UP, "limit": LIMIT,
          "accumulation": [K, list(PROMOTED), list(GROUPS)]}
SUMS = {f"cut {group} promoted {every}": {"group": group, "promoted": every} for group in GROUPS for every in PROMOTED}
ARMS = {**SUMS, **{f"{setting} {variant}": {"setting": setting, "variant": variant}
                   for setting in SETTINGS for variant in VARIANTS}}
Curves = dict[str, dict[int, np.ndarray]]  # {variant: {seed: losses}}


class Precision(Measure):
    """Losses of a training run, or the worst relative error of a sum."""

    alone = True  # a run of `deepseek_jax.train` uses all cores

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        arm = job.study.arms[job.arm]
        for seed in job.seeds:
            if "setting" in arm:
                losses = train(job, arm["setting"], arm["variant"], seed)
                yield {"seed": seed, "losses": losses.tolist()}
            else:
                yield {"seed": seed, "error": worst_error(seed, arm["promoted"], arm["group"])}
            job.tell(1)

    def identity(self, study: Study, arm: str) -> Any:
        return [study.arms[arm], study.quick, CONFIG]

    def summarize(self, study: Study, runs: list[dict[str, Any]]) -> dict[str, Any]:
        errors = {}
        for run in runs:
            arm = study.arms[run["arm"]]
            if "group" in arm:
                name = f"promoted every {arm['promoted']}" if arm["promoted"] else "never promoted"
                errors.setdefault(f"cut every {arm['group']}", {}).setdefault(name, []).append(run["error"])
        return {"config": CONFIG,
                "accumulation": {group: {name: interval(estimate(found)) for name, found in by_name.items()}
                                 for group, by_name in errors.items()},
                "settings": {name: {"compared": compared(curves), "losses": {
                    variant: {str(seed): [round(float(x), 4) for x in curve] for seed, curve in mine.items()}
                    for variant, mine in curves.items()}} for name, curves in curves_of(runs).items()},
                **provenance()}

    def lines(self, results: dict[str, Any]) -> list[str]:
        compared = {name: found["compared"] for name, found in results["settings"].items()}
        return [json.dumps({"accumulation": results["accumulation"], **compared}, indent=1)]


def curves_of(runs: list[dict[str, Any]]) -> dict[str, Curves]:
    """{setting: losses of its training runs}."""
    settings: dict[str, Curves] = {}
    for run in runs:
        arm = ARMS[run["arm"]]
        if "setting" in arm:
            curves = settings.setdefault(arm["setting"], {})
            curves.setdefault(arm["variant"], {})[run["seed"]] = np.array(run["losses"])
    return settings


def train(job: Job, setting: str, variant: str, seed: int) -> np.ndarray:
    """The losses of a run of `deepseek_jax.train`, which resumes from its own checkpoints."""
    model, steps, options = (QUICK if job.study.quick else SETTINGS)[setting]
    folder = job.folder / f"{setting}_{variant}_{seed}"
    if len(losses(folder)) < steps:
        subprocess.run([sys.executable, "-m", "deepseek_jax.train", "--config", f"experiments/configs/{model}.py",
                        "--workdir", str(folder), f"--config.train.seed={seed}", f"--config.train.steps={steps}",
                        *COMMON, f"--config.data.cache_dir={job.folder}/cache", *options, *VARIANTS[variant]],
                       cwd=ROOT, check=True)
    return losses(folder)


def losses(folder: pathlib.Path) -> np.ndarray:
    """The loss of every step that a run has finished."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return np.zeros(0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_step = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return np.array([by_step[step] for step in sorted(by_step)])


def smoothed(x: np.ndarray) -> np.ndarray:
    """Moving average over SMOOTHING steps."""
    window = min(SMOOTHING, len(x))
    return np.convolve(x, np.ones(window) / window, "valid")


def after_warm_up(x: np.ndarray, steps: int) -> np.ndarray:
    return x[min(int(WARM_UP * steps), len(x) - 1):]


def compared(curves: Curves) -> dict[str, Any]:
    """{variant: ...}: relative differences of the smoothed loss from bfloat16 of the same seed, after warm-up."""
    found, baseline = {}, curves.get("bf16", {})
    for variant, mine in curves.items():
        away = {seed: after_warm_up(smoothed(curve) / smoothed(baseline[seed]) - 1, len(curve))
                for seed, curve in mine.items() if seed in baseline}
        if variant == "bf16" or not away:
            continue
        worst = {seed: float(np.abs(d).max()) for seed, d in away.items()}
        below = difference(worst, LIMIT)
        found[variant] = {
            "largest": {str(seed): x for seed, x in worst.items()},
            "largest_mean": interval(estimate(list(worst.values()))),
            "mean": interval(estimate([d.mean() for d in away.values()])),
            "last": {str(seed): float(d[-1]) for seed, d in away.items()},
            "stays_below_the_limit": verdict(below, "lower")}
    return found


def worst_error(seed: int, every: int, group: int) -> float:
    """The worst relative error of 32 x 32 sums of K products of numbers in [0, 1)."""
    rng = np.random.default_rng(seed)
    a, b = (api.quantize(jnp.asarray(rng.random((32, K), np.float32)), implementation="reference") for _ in range(2))
    model = api.Accumulator(bits=14, promote_every=every, group=group)
    y = jax.jit(lambda a, b: api.fp8_matmul(a, b, out_dtype=jnp.float32, accumulator=model,
                                            implementation="reference"))(a, b)
    exact = [np.asarray(api.dequantize(q), np.float64) for q in (a, b)]
    return float(np.abs(np.asarray(y, np.float64) / (exact[0] @ exact[1].T) - 1).max())


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    """A picture for each setting: the losses, and their differences from bfloat16."""
    for setting, found in results["settings"].items():
        curves = {variant: {int(seed): np.array(curve) for seed, curve in mine.items()}
                  for variant, mine in found["losses"].items()}
        model, _, options = SETTINGS[setting]
        draw_setting(curves, model + " at the report's rate" * bool(options), folder / f"loss_{setting}.png")


def draw_setting(curves: Curves, title: str, path: pathlib.Path) -> None:
    """The mean losses, and for each variant the differences of its seeds from bfloat16 of the same seed."""
    steps, baseline = len(next(iter(curves["bf16"].values()))), curves["bf16"]
    colours = dict(zip(curves, plots.PALETTE))
    figure, (loss, *apart) = plots.figure(3 * math.ceil(len(curves) / 2), 2, math.ceil(len(curves) / 2))
    for variant, mine in curves.items():
        mean = np.mean([smoothed(curve) for curve in mine.values()], axis=0)
        behind = {"linewidth": 4, "alpha": 0.35} if variant == "bf16" else {"linewidth": 1.4}
        loss.plot(_steps(mean, steps), mean, color=colours[variant], label=LABELS[variant], **behind)
    plots.legend(loss)
    plots.finish(loss, f"Loss of {title}, mean of {len(baseline)} seeds", "step", "nats per token")
    for axis, variant in zip(apart, [variant for variant in curves if variant != "bf16"]):
        for style, (seed, curve) in zip(("-", "--", ":"), curves[variant].items()):
            away = 100 * (smoothed(curve) / smoothed(baseline[seed]) - 1)
            axis.plot(_steps(away, steps), away, style, color=colours[variant], linewidth=1.4)
        axis.axhspan(-100 * LIMIT, 100 * LIMIT, color="0.9", zorder=0)
        axis.axvline(WARM_UP * steps, color="0.5", linewidth=1)
        plots.finish(axis, LABELS[variant], "step", "difference from bfloat16, %")
    widest = max(np.abs(axis.get_ylim()).max() for axis in apart)
    for axis in apart:
        axis.set_ylim(-widest, widest)
    plots.save(figure, path, f"Means of {SMOOTHING} steps. Solid, dashed, dotted: seeds. Grey: within "
               f"{100 * LIMIT:g} %, the report's bound. Vertical line: compared from here on.")


def _steps(y, steps):
    """The last steps, one for each number of a moving average."""
    return np.arange(steps - len(y), steps) + 1


STUDY = Study(
    name="fp8",
    arms=ARMS,
    measure=Precision(),
    draw=draw,
    quick_arms=(*SUMS, "tiny bf16", "tiny fp8"),
    seeds=SEEDS,
    quick_seeds=SEEDS[:1],
    json_indent=2,
    json_end="")
