"""FP8 against bfloat16 from the same seeds, and sums of few bits: runs what is missing, then results and pictures.

    python -m experiments.studies.fp8.run            goes on where it was cut off
    python -m experiments.studies.fp8.run --quick    a few steps that show that it works
    python -m experiments.studies.fp8.run --report   no training: what there is so far
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

from deepseek_jax import cli, io
from experiments.studies.fp8 import config as study
from experiments.studies.framework import plots, runner
from experiments.studies.framework.statistics import difference, estimate, verdict

HERE = pathlib.Path(__file__).resolve().parent
QUICK = {"tiny": ("tiny", 4, ["--config.model.num_layers=2", "--config.model.mtp_depth=0",
                              "--config.model.vocab_size=1024"])}


def run_folder(workdir, setting, variant, seed):
    return workdir / f"{setting}_{variant}_{seed}"


def train(workdir, settings, setting, variant, seed):
    model, steps, options = settings[setting]
    folder = run_folder(workdir, setting, variant, seed)
    if len(losses(folder)) >= steps:
        return
    subprocess.run([sys.executable, "-m", "deepseek_jax.train", "--config", f"experiments/configs/{model}.py",
                    "--workdir", str(folder), f"--config.train.seed={seed}", f"--config.train.steps={steps}",
                    *study.COMMON, f"--config.data.cache_dir={workdir}/cache", *options, *study.VARIANTS[variant]],
                   cwd=runner.ROOT, check=True)


def losses(folder):
    path = folder / "metrics.jsonl"
    if not path.exists():
        return np.zeros(0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_step = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return np.array([by_step[step] for step in sorted(by_step)])


def smoothed(x):
    window = min(study.SMOOTHING, len(x))
    return np.convolve(x, np.ones(window) / window, "valid")


def gather(workdir, settings, setting, variants, seeds):
    """{variant: {seed: losses}} of the runs that are whole."""
    steps, curves = settings[setting][1], {}
    for variant in variants:
        for seed in seeds:
            curve = losses(run_folder(workdir, setting, variant, seed))
            if len(curve) >= steps:
                curves.setdefault(variant, {})[seed] = curve
    return curves


def after_warm_up(x, steps):
    return x[min(int(study.WARM_UP * steps), len(x) - 1):]


def compared(curves) -> dict:
    """{variant: ...}: relative differences of the smoothed loss from bfloat16 of the same seed, after warm-up."""
    found = {}
    for variant, mine in curves.items():
        far = {seed: after_warm_up(smoothed(curve) / smoothed(curves["bf16"][seed]) - 1, len(curve))
               for seed, curve in mine.items() if seed in curves["bf16"]}
        if variant == "bf16" or not far:
            continue
        worst = {seed: float(np.abs(d).max()) for seed, d in far.items()}
        below = difference(worst, study.LIMIT)
        found[variant] = {
            "largest": {str(seed): x for seed, x in worst.items()},
            "largest_mean": runner.interval(estimate(list(worst.values()))),
            "mean": runner.interval(estimate([d.mean() for d in far.values()])),
            "last": {str(seed): float(d[-1]) for seed, d in far.items()},
            "stays_below_the_limit": verdict(below, "lower")}
    return found


def accumulation(seeds) -> dict:
    """{"cut every 32": {"promoted every 128": estimate of the worst relative error of 32 x 32 sums}, ...}."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas import api

    def worst(seed, every, group):
        rng = np.random.default_rng(seed)
        a, b = (api.quantize(rng.random((32, study.K), np.float32), implementation="reference") for _ in range(2))
        model = api.Accumulator(bits=14, promote_every=every, group=group)
        y = jax.jit(lambda a, b: api.fp8_matmul(a, b, out_dtype=jnp.float32, accumulator=model,
                                                implementation="reference"))(a, b)
        exact = [np.asarray(api.dequantize(q), np.float64) for q in (a, b)]
        return float(np.abs(np.asarray(y, np.float64) / (exact[0] @ exact[1].T) - 1).max())

    return {f"cut every {group}": {f"promoted every {every}" if every else "never promoted":
                                   runner.interval(estimate([worst(seed, every, group) for seed in seeds]))
                                   for every in study.PROMOTED} for group in study.GROUPS}


def draw(curves, title, path):
    figure, (top, bottom) = plots.figure(11, 3.9, 2)
    for colour, (variant, mine) in zip(plots.COLOURS, curves.items()):
        for n, (seed, curve) in enumerate(mine.items()):
            y = smoothed(curve)
            x = np.arange(len(curve) - len(y), len(curve)) + 1
            top.plot(x, y, color=colour, linewidth=1, label=variant.replace("_", " ") if n == 0 else None)
            if variant != "bf16" and seed in curves["bf16"]:
                bottom.plot(x, 100 * (y / smoothed(curves["bf16"][seed]) - 1), color=colour, linewidth=1)
    bottom.axhspan(-100 * study.LIMIT, 100 * study.LIMIT, color="0.9", zorder=0)
    bottom.axvline(study.WARM_UP * len(curve), color="0.7", linestyle=":")
    top.legend(frameon=False, fontsize=8)
    plots.finish(top, f"Loss of {title}, means of {study.SMOOTHING} steps", "step", "nats a token")
    plots.finish(bottom, "Away from bfloat16 of the same seed", "step", "%")
    plots.save(figure, path)


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.fp8.run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of two arms; nothing is written beside")
    parser.add_argument("--workdir", default=str(runner.ROOT / ".cache" / "studies"), help="of all studies")
    parser.add_argument("--settings", nargs="+", choices=study.SETTINGS, default=list(study.SETTINGS))
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    settings = QUICK if args.quick else {name: study.SETTINGS[name] for name in args.settings}
    variants, seeds = (("bf16", "fp8"), study.SEEDS[:1]) if args.quick else (study.STUDIED, study.SEEDS)
    workdir = pathlib.Path(args.workdir).resolve() / ("fp8-quick" if args.quick else "fp8")
    workdir.mkdir(parents=True, exist_ok=True)
    folder = workdir if args.quick else HERE
    before = {} if args.quick else json.loads((HERE / "results.json").read_text())["settings"]
    results = {"config": study.CONFIG, "accumulation": accumulation(seeds), "settings": before, **runner.provenance()}
    for setting, (model, _, options) in settings.items():
        for seed in seeds:
            for variant in variants if not args.report else ():
                train(workdir, settings, setting, variant, seed)
        curves = gather(workdir, settings, setting, variants, seeds)
        if "bf16" in curves:
            draw(curves, model + " at the report's rate" * bool(options), folder / f"loss_{setting}.png")
            results["settings"][setting] = {"compared": compared(curves), "losses": {
                variant: {seed: [round(float(x), 4) for x in curve] for seed, curve in mine.items()}
                for variant, mine in curves.items()}}
    io.write_json(str(folder / "results.json"), results)
    said = {name: found["compared"] for name, found in results["settings"].items()}
    print(json.dumps({"accumulation": results["accumulation"], **said}, indent=1))


if __name__ == "__main__":
    cli.run(main)
