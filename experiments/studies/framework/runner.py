"""Runs a study: measures missing runs, in parallel, then writes results.json and the pictures and prints verdicts.

    python -m experiments.studies.load_balance.run            resumes where it stopped
    python -m experiments.studies.load_balance.run --quick    everything once at tiny sizes, within two minutes
    python -m experiments.studies.load_balance.run --report   measures nothing: the results of the finished runs so far
    python -m experiments.studies.load_balance.run --draw     measures nothing: redraws results.json

A worker process takes one arm and runs its seeds. Every finished run is a separate file in the work directory and is
not run again as long as its config and the source that it depends on stay the same (`source`). An arm that fails does
not stop the others. Only a complete study writes results.json.
"""

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import pathlib
import sys
import threading
import time
import traceback
from typing import Any

import tqdm

from deepseek_jax import cli, io, runtime
from deepseek_jax.config import ConfigError
from experiments.studies.framework import source
from experiments.studies.framework.results import origin, provenance
from experiments.studies.framework.study import Job, Study

STUDIES = pathlib.Path(__file__).resolve().parents[1]
ROOT = STUDIES.parents[1]
# One thread per worker, so the results do not depend on the number of workers.
ONE_CORE = {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "JAX_PLATFORMS": "cpu"}


def main(study: Study) -> None:
    """The command line of one study."""
    cli.run(lambda: _main(study))


def _main(study: Study):
    parser = argparse.ArgumentParser(prog=f"python -m experiments.studies.{study.name}.run",
                                     description=f"Runs the study {study.name}, or what is missing of it.")
    parser.add_argument("--quick", action="store_true", help="tiny runs that show that all of it works")
    parser.add_argument("--report", action="store_true", help="measure nothing: print what the finished runs say")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw the pictures from results.json")
    parser.add_argument("--workdir", default=str(ROOT / ".cache" / "studies"), help="of all studies; finished runs")
    parser.add_argument("--fresh", action="store_true", help="measure everything, whatever is finished")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes side by side")
    args = parser.parse_args()
    workdir = pathlib.Path(args.workdir).resolve()
    study = study.shortened() if args.quick else study
    if args.report:
        runs = finished(study, run_folder(study, workdir), source.digest(study))
        print("\n".join(study.measure.lines(summarize(study, runs))))
        return
    if args.draw:
        draw_again(study, results_folder(study, workdir))
        return
    runs = run(study, workdir, args.workers, args.fresh)
    results, folder = summarize(study, runs), results_folder(study, workdir)
    write_results(study, results, runs, folder)
    print("\n".join(["", *study.measure.lines(results), "", f"Written: {folder / 'results.json'}"]))


def results_folder(study: Study, workdir: pathlib.Path) -> pathlib.Path:
    """The study's own folder: in the checkout, or that of the script that runs it.

    A quick run's numbers mean nothing and stay in the work directory.
    """
    if study.quick:
        return run_folder(study, workdir)
    script = pathlib.Path(getattr(sys.modules["__main__"], "__file__", None) or "run.py").resolve()
    return STUDIES / study.name if (STUDIES / study.name).is_dir() else script.parent


def run_folder(study: Study, workdir: pathlib.Path) -> pathlib.Path:
    return workdir / (f"{study.name}-quick" if study.quick else study.name)


def run(study: Study, workdir: pathlib.Path, workers: int, fresh: bool = False) -> list[dict[str, Any]]:
    """Measures missing runs (with `fresh`, all), and returns all runs.

    Raises:
      ConfigError: some arms failed; the runs of the others are kept. Or the other arms of a missing seed ran on another
        machine.
    """
    folder = run_folder(study, workdir)
    folder.mkdir(parents=True, exist_ok=True)
    code = source.digest(study)
    there = [] if fresh or not study.measure.resumes else finished(study, folder, code)
    taken = {(found["arm"], found["seed"]) for found in there}
    missing = {arm: [seed for seed in seeds if (arm, seed) not in taken] for arm, seeds in study.selected().items()}
    missing = {arm: todo for arm, todo in missing.items() if todo}
    if study.measure.resumes:
        _tell(study, folder, len(taken))
    if missing:
        here = provenance()
        # Refuses another machine now, not after hours.
        origin([*there, *({"seed": seed, "made": here} for todo in missing.values() for seed in todo)])
        study.measure.prepare(study, folder)
        measure_all(study, missing, folder, max(1, min(workers, len(missing))), code)
    return finished(study, folder, code)


def _tell(study, folder, taken):
    every = _paths(study, folder)
    paths = [path for path in every if path.exists()]
    if taken:
        newest = datetime.datetime.fromtimestamp(max(path.stat().st_mtime for path in paths))
        print(f"{taken} of {len(every)} runs are taken from {folder}, the newest of "
              f"{newest:%Y-%m-%d %H:%M}; --fresh measures them again.", file=sys.stderr)
    if len(paths) > taken:
        print(f"{len(paths) - taken} finished runs are measured again: the source that they depend on has changed, or "
              "--fresh was given.", file=sys.stderr)


def finished(study: Study, folder: pathlib.Path, code: str) -> list[dict[str, Any]]:
    """The runs of this source in the work directory, by arm and seed."""
    runs = [json.loads(path.read_text()) for path in _paths(study, folder) if path.exists()]
    return [found for found in runs if found.get("code") == code]


def _paths(study, folder):
    """The files of all runs of a study, whether they are finished or not."""
    return [study.run_path(folder, arm, seed) for arm, seeds in study.selected().items() for seed in seeds]


def summarize(study: Study, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of results.json.

    Raises:
      ConfigError: there are no runs, or they do not belong together.
    """
    if not runs:
        raise ConfigError(f"{study.name}: no run is finished yet; leave --report out to measure.")
    return study.measure.summarize(study, runs)


def measure_all(study: Study, missing: dict[str, list[int]], folder: pathlib.Path, workers: int, code: str) -> None:
    """Runs {arm: seeds} in worker processes, with a progress bar over all steps and the remaining time.

    Raises:
      ConfigError: some arms failed.
    """
    ours = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"), **({} if study.measure.alone else ONE_CORE)}
    os.environ |= {name: value for name, value in ours.items() if name not in os.environ}
    if study.measure.devices > 1:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (f"{os.environ.get('XLA_FLAGS', '')} "
                                   f"--xla_force_host_platform_device_count={study.measure.devices}")
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    queue = context.Queue()
    total = sum(study.measure.steps(study, arm) * len(seeds) for arm, seeds in missing.items())
    with tqdm.tqdm(total=total, desc=study.name, unit="step", mininterval=1.0, file=sys.stderr) as bar:
        listener = threading.Thread(target=_listen, args=(queue, bar), daemon=True)
        listener.start()
        workers = 1 if study.measure.alone else workers
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (queue,)) as pool:
            try:
                submit = lambda arm: pool.submit(_work, study, arm, missing[arm], folder, code)
                failed = _run_waves(study, missing, submit)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        queue.put(None)
        listener.join()
    if failed:
        words = "; ".join(f"{arm}: {type(error).__name__}: {error}" for arm, error in failed.items())
        raise ConfigError(f"{study.name}: {len(failed)} of {len(missing)} arms failed, and the runs of the others are "
                          f"kept. {words}")


def _run_waves(study, missing, submit) -> dict[str, BaseException]:
    """{arm: its exception} for the failed arms, without those that continue from a failed one."""
    failed = {}
    for wave in study.waves(missing):
        futures = {submit(arm): arm for arm in wave if study.measure.after.get(arm) not in failed}
        for future in concurrent.futures.as_completed(futures):
            if error := future.exception():
                traceback.print_exception(error)
                failed[futures[future]] = error
    return failed


def _listen(queue, bar):
    for steps in iter(queue.get, None):
        bar.update(steps)


_queue: Any = None  # stderr of this worker process


def _start_worker(queue):
    global _queue
    _queue = queue
    runtime.prepare()


def _work(study, arm, seeds, folder, code):
    begun = time.perf_counter()
    for result in study.measure.run(Job(study, arm, seeds, folder, _queue.put)):
        took = round(time.perf_counter() - begun, 3)
        io.write_json(study.run_path(folder, arm, result["seed"]),
                      {"arm": arm, "code": code, "seconds": took, "made": provenance(), **result}, indent=None)
        begun = time.perf_counter()


def write_results(study: Study, results: dict[str, Any], runs: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """The pictures and results.json, which is written atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    study.draw(results, runs, folder)
    io.write_text(folder / "results.json", as_json(study, results))


def draw_again(study: Study, folder: pathlib.Path) -> None:
    """Draws the pictures from the results.json in `folder`.

    Raises:
      ConfigError: there is none, or it lacks data that the study draws.
    """
    path = folder / "results.json"
    if not path.exists():
        raise ConfigError(f"{study.name}: there is no {path}; leave --draw out to measure.")
    study.draw(json.loads(path.read_text()), [], folder)


def as_json(study: Study, results: dict[str, Any]) -> str:
    """The text of results.json."""
    return json.dumps(results, indent=study.json_indent) + study.json_end
