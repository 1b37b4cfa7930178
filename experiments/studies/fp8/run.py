"""FP8 against bfloat16 from the same seeds: runs what is missing, then writes results.json and the losses' pictures.

    python experiments/studies/fp8/run.py --workdir /tmp/fp8_study [--settings tiny small_calm] [--seeds 0 1 2]
    python experiments/studies/fp8/run.py --workdir /tmp/fp8_study --report        no training: what there is so far

A run that was cut off goes on where it stopped.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
VARIANTS = {
    "bf16": [],
    "bf16_two_micro_batches": ["--config.train.micro_batches=2"],  # the same sums in another order: the yardstick
    "fp8": ["--config.fp8.enabled=True"],
    "fp8_128x128": ["--config.fp8.enabled=True", "--config.fp8.gradient_tiles=128x128"],
    "fp8_tensor": ["--config.fp8.enabled=True", "--config.fp8.tiles=tensor"],
    "fp8_e5m2": ["--config.fp8.enabled=True", "--config.fp8.gradient_format=e5m2"],
}
SMOOTHING = 40  # steps of the moving average
WARM_UP = 0.25  # of the run, left out of the comparison
LIMIT = 0.0025  # the report's bound on the relative difference of the loss


# What is trained, for how many steps. At its config's own rate (3e-3) a tiny model amplifies any rounding; the report's
# peak rate (section 4.2) is where its bound was found.
CALM = ["--config.optimizer.learning_rate=2.2e-4", "--config.optimizer.warmup=0.1"]
SETTINGS = {"tiny": ("tiny", 240, []), "tiny_calm": ("tiny", 240, CALM), "small_calm": ("small", 150, CALM)}


def train(args, setting, variant, seed):
    model, steps, options = SETTINGS[setting]
    workdir = pathlib.Path(args.workdir, f"{setting}_{variant}_{seed}")
    if len(losses(workdir)) >= steps:
        return
    command = [sys.executable, "-m", "deepseek_jax.train", "--config", f"experiments/configs/{model}.py",
               "--workdir", str(workdir), f"--config.train.seed={seed}", f"--config.train.steps={steps}",
               "--config.train.batch_size=8", "--config.train.sequence_length=256", "--config.train.sample_tokens=0",
               "--config.train.eval_every=100000", "--config.train.checkpoint_every=60",
               "--config.train.checkpoints_kept=1",
               f"--config.data.cache_dir={args.workdir}/cache", *options, *VARIANTS[variant]]
    subprocess.run(command, cwd=ROOT, check=True)


def losses(workdir):
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return np.zeros(0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_step = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return np.array([by_step[step] for step in sorted(by_step)])


def smoothed(x):
    return np.convolve(x, np.ones(SMOOTHING) / SMOOTHING, "valid")


def compare(args, setting):
    """{variant: {"seeds", "mean", "worst", "final"}}: relative differences of the smoothed loss after warm-up."""
    found, curves = {}, {}
    steps = SETTINGS[setting][1]
    for variant in VARIANTS:
        for seed in args.seeds:
            curve = losses(pathlib.Path(args.workdir, f"{setting}_{variant}_{seed}"))
            if len(curve) >= steps:
                curves[variant, seed] = curve
    for variant in list(VARIANTS)[1:]:
        seeds = [s for s in args.seeds if (variant, s) in curves and ("bf16", s) in curves]
        differences = [(smoothed(curves[variant, s]) / smoothed(curves["bf16", s]) - 1)[int(WARM_UP * steps):]
                       for s in seeds]
        if differences:
            d = np.array(differences)
            found[variant] = {"seeds": seeds, "mean_over_seeds_and_steps": d.mean(), "last": d[:, -1].tolist(),
                              "worst_of_a_seed": np.abs(d).max(axis=1).tolist(),
                              "worst_of_the_mean_over_seeds": np.abs(d.mean(axis=0)).max()}
    # How far two runs drift apart that differ by nothing but their seeds is the yardstick.
    base = [smoothed(curves["bf16", s]) for s in args.seeds if ("bf16", s) in curves]
    if len(base) > 1:
        base = np.array(base)[:, int(WARM_UP * steps):]
        found["bf16_between_seeds"] = {"worst_of_a_seed": np.abs(base / base.mean(axis=0) - 1).max()}
    return found, curves


def plot(curves, setting, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, gridspec_kw=dict(height_ratios=(2, 1)))
    model, steps, options = SETTINGS[setting]
    x = np.arange(steps - SMOOTHING + 1) + SMOOTHING
    for n, variant in enumerate(VARIANTS):
        mine = {seed: smoothed(c) for (v, seed), c in curves.items() if v == variant}
        for k, (seed, curve) in enumerate(mine.items()):
            top.plot(x, curve, color=f"C{n}", alpha=0.7, lw=1, label=variant if k == 0 else None)
            if variant != "bf16" and ("bf16", seed) in curves:
                bottom.plot(x, 100 * (curve / smoothed(curves["bf16", seed]) - 1), color=f"C{n}", lw=1)
    bottom.axhspan(-100 * LIMIT, 100 * LIMIT, color="0.9")
    top.set_ylabel(f"loss, mean of {SMOOTHING} steps")
    bottom.set_ylabel("% from bf16, same seed")
    bottom.set_xlabel("step")
    top.legend()
    rate = ", the report's learning rate" if options else ""
    top.set_title(f"{model}: FP8 against bfloat16{rate}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--variants", nargs="+", default=["bf16", "bf16_two_micro_batches", "fp8", "fp8_128x128"],
                        choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) | {"smoothing": SMOOTHING, "warm_up": WARM_UP}
    for setting in args.settings:
        for seed in args.seeds:
            for variant in args.variants:
                if not args.report:
                    train(args, setting, variant, seed)
        found, curves = compare(args, setting)
        if curves:
            plot(curves, setting, HERE / f"loss_{setting}.png")
            found["steps"] = SETTINGS[setting][1]
            found["losses"] = {f"{v}_{s}": [round(float(x), 4) for x in c] for (v, s), c in curves.items()}
            results[setting] = found
    path.write_text(json.dumps(results) + "\n")
    print(json.dumps({m: {k: v for k, v in r.items() if k != "losses"} for m, r in results.items()
                      if isinstance(r, dict)}, indent=2))


if __name__ == "__main__":
    main()
