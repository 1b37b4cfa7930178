"""Runs a study: what is missing of it, in parallel, then results.json, the picture and the verdicts (no jax here).

    python -m experiments.studies.load_balance.run            goes on where it was cut off
    python -m experiments.studies.load_balance.run --quick    everything once, tiny, within two minutes

A worker process takes an arm, compiles it once and runs its seeds. Every finished run is a file of its own in the
work directory and is never run again while the config it came from stays. Only a whole study writes results.json.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import platform
import sys
import threading

import tqdm

from deepseek_jax import cli, io, runtime
from deepseek_jax.config import ConfigError
from experiments.studies.framework import corpora
from experiments.studies.framework.statistics import Estimate, difference, estimate, verdict
from experiments.studies.framework.study import Study

STUDIES = pathlib.Path(__file__).resolve().parents[1]
ROOT = STUDIES.parents[1]
# One thread a worker: the numbers do not depend on how many run side by side.
THREADS = {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(study: Study, draw):
    """The command line of one study. `draw(results, path)` makes its picture."""
    cli.run(lambda: _main(study, draw))


def _main(study, draw):
    parser = argparse.ArgumentParser(prog=f"python -m experiments.studies.{study.name}.run",
                                     description=f"Runs the study {study.name}, or what is missing of it.")
    parser.add_argument("--quick", action="store_true", help="tiny runs that show that all of it works")
    parser.add_argument("--workdir", default=str(ROOT / ".cache" / "studies"), help="of all studies; finished runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes side by side")
    args = parser.parse_args()
    results = run(study, args.quick, pathlib.Path(args.workdir).resolve(), args.workers)
    folder = results_folder(study, args.quick, pathlib.Path(args.workdir).resolve())
    write_results(results, folder, draw)
    print("\n".join(["", *said(results), "", f"Written: {folder / 'results.json'}, {study.name}.png"]))


def results_folder(study: Study, quick: bool, workdir: pathlib.Path) -> pathlib.Path:
    """Beside the study; a quick run's numbers mean nothing and stay in the work directory."""
    return run_folder(study, quick, workdir) if quick else STUDIES / study.name


def run_folder(study: Study, quick: bool, workdir: pathlib.Path) -> pathlib.Path:
    return workdir / (f"{study.name}-quick" if quick else study.name)


def run(study: Study, quick: bool, workdir: pathlib.Path, workers: int) -> dict:
    """Runs what is missing, and gathers all of it."""
    folder = run_folder(study, quick, workdir)
    folder.mkdir(parents=True, exist_ok=True)
    arms, seeds = study.selected(quick)
    missing = {arm: [s for s in seeds if not result_path(study, arm, s, quick, folder).exists()] for arm in arms}
    missing = {arm: todo for arm, todo in missing.items() if todo}
    if missing:
        corpora.write(study, quick, folder)
        train_all(study, missing, quick, folder, max(1, min(workers, len(missing))))
    runs = [json.loads(result_path(study, arm, seed, quick, folder).read_text()) for arm in arms for seed in seeds]
    return gather(study, runs, quick)


def result_path(study: Study, arm: str, seed: int, quick: bool, folder: pathlib.Path) -> pathlib.Path:
    """Where a finished run lies. The name holds the hash of its config: another config is another run."""
    return folder / f"{arm.replace(' ', '_')}-{seed}-{study.arm_hash(arm, quick)}.json"


def weights_path(study: Study, arm: str, seed: int, quick: bool, folder: pathlib.Path) -> pathlib.Path:
    """Where the weights lie that another arm begins with."""
    return result_path(study, arm, seed, quick, folder).with_suffix(".safetensors")


def train_all(study, missing, quick, folder, workers):
    """Runs {arm: seeds} in worker processes, with a bar over all of their steps and the time that is left."""
    os.environ |= {name: value for name, value in THREADS.items() if name not in os.environ}
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.parent / "compiled"))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    queue = context.Queue()
    total = sum(study.config(arm, 0, quick).train.steps * len(seeds) for arm, seeds in missing.items())
    with tqdm.tqdm(total=total, desc=study.name, unit="step", mininterval=1.0, file=sys.stderr) as bar:
        listener = threading.Thread(target=_listen, args=(queue, bar), daemon=True)
        listener.start()
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (queue,)) as pool:
            try:
                for wave in study.waves(missing):
                    futures = [pool.submit(_work, study, arm, missing[arm], quick, folder) for arm in wave]
                    for future in concurrent.futures.as_completed(futures):
                        future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        queue.put(None)
        listener.join()


def _listen(queue, bar):
    for steps in iter(queue.get, None):
        bar.update(steps)


_queue = None  # of this worker process


def _start_worker(queue):
    global _queue
    _queue = queue
    runtime.prepare()


def _work(study, arm, seeds, quick, folder):
    from experiments.studies.framework.training import run_arm  # jax, in workers only
    run_arm(study, arm, seeds, quick, folder, _queue.put)


def gather(study: Study, runs: list[dict], quick: bool) -> dict:
    """What is known when all runs are there: results.json.

    Raises:
      ConfigError: the runs did not all read the same text.
    """
    if len({json.dumps(run["corpus"]) for run in runs}) > 1:
        raise ConfigError(f"{study.name}: some of the finished runs read another text than the others (another Python, "
                          "or corpora.py has changed); take another --workdir, or delete the study's folder in it.")
    arms = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = {run["seed"]: run for run in runs if run["arm"] == arm}
        first = next(iter(mine.values()))
        arms[arm] = {
            "config": study.arms[arm], "parameters": first["parameters"],
            "metrics": {name: {**interval(estimate([run["metrics"][name] for run in mine.values()])),
                               "seeds": {str(seed): run["metrics"][name] for seed, run in mine.items()}}
                        for name in first["metrics"]},
            "curves": {name: _means([run["curves"][name] for run in mine.values()]) for name in first["curves"]},
            "probes": {name: _means([run["probes"][name] for run in mine.values()]) for name in first["probes"]},
            "arrays": first["arrays"]}
    seconds = sum(run["seconds"] for run in runs)
    return {"study": study.name, "quick": quick, "config_hash": study.config_hash(quick),
            "seeds": sorted({run["seed"] for run in runs}), "steps": study.config(runs[0]["arm"], 0, quick).train.steps,
            "claims": judged(study, runs), "arms": arms, "corpus": runs[0]["corpus"],
            "command": f"python -m experiments.studies.{study.name}.run" + (" --quick" if quick else ""),
            "training_seconds_on_one_core": round(seconds), **provenance()}


def judged(study: Study, runs) -> list[dict]:
    """The claims whose arms are there, with the paired difference and what it allows to say."""
    values = {}  # metric -> arm -> seed -> value
    for run in runs:
        for name, value in run["metrics"].items():
            values.setdefault(name, {}).setdefault(run["arm"], {})[run["seed"]] = value
    claims = []
    for claim in study.claims:
        there = values.get(claim.metric, {})
        if claim.arm in there and (claim.against in there or not isinstance(claim.against, str)):
            against = there[claim.against] if isinstance(claim.against, str) else claim.against
            found = difference(there[claim.arm], against)
            claims.append({**dataclasses.asdict(claim), "difference": interval(found),
                           "verdict": verdict(found, claim.expected)})
    return claims


def interval(found: Estimate) -> dict:
    bound = lambda x: x if math.isfinite(x) else None  # JSON has no infinity
    return {"mean": found.mean, "low": bound(found.low), "high": bound(found.high)}


def _means(curves):
    return [sum(column) / len(column) for column in zip(*curves, strict=True)]


def provenance() -> dict:
    """Where and with what numbers were made."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers")
    return {"date": datetime.date.today().isoformat(), "hardware": f"{cpu_model()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}}


def cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_results(results: dict, folder: pathlib.Path, draw):
    """results.json and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(results, folder / f"{results['study']}.png")
    io.write_json(folder / "results.json", results, indent=1)


def said(results: dict) -> list[str]:
    """The claims as lines to print."""
    lines = []
    for claim in results["claims"]:
        d = claim["difference"]
        interval = "no interval" if d["low"] is None else f"[{d['low']:+.4g}, {d['high']:+.4g}]"
        lines.append(f"{claim['verdict'].upper()}: {claim['says']}\n  {claim['metric']} of {claim['arm']} minus "
                     f"{claim['against']}: {d['mean']:+.4g} {interval} over {len(results['seeds'])} seeds")
    return lines
