"""The cost of the training loop itself on the host, with a stand-in device that computes nothing.

    python -m benchmarks.loop
    python -m benchmarks.loop --milliseconds 50
    python -m benchmarks.loop --processes 2

The stand-in runs its steps one after the other while the host does the work of a real run with the report's number of
experts: it fetches and checks metrics, writes metrics.jsonl, TensorBoard events and expert loads, and updates the
progress bar. Several processes also ask each other whether one of them has to stop.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
import types
from typing import Any

import numpy as np
import tqdm

from deepseek_jax.config import Config, TrainConfig, model_config
from deepseek_jax.data.position import beginning
from deepseek_jax.parallel.meeting import Group
from deepseek_jax.parallel.processes import SaveTimer, StopAgreement, joined
from deepseek_jax.training import loop
from deepseek_jax.training.metrics import MetricsWriter
from deepseek_jax.training.types import Metrics
from deepseek_jax.training.watching import Watching


class Pending:
    """Metrics that are ready when the device has finished its step."""

    def __init__(self, ready: float, metrics: Metrics):
        self.ready, self.metrics = ready, metrics


def overhead(steps: int, seconds: float) -> tuple[float, float, float]:
    """Mean seconds per step over `steps`: in addition to the device's; CPU time of the loop's thread; in total."""
    cfg = model_config("v3_671b")
    counts = {"bias": np.ones((cfg.num_moe_layers, cfg.num_experts), np.int32),
              "mtp_bias": np.ones((1, cfg.num_experts), np.int32)}
    run: Any = object.__new__(loop.Run)
    run.config = Config(model=cfg, train=TrainConfig(steps=steps + 1, eval_every=10**6, checkpoint_every=10**6))
    free = 0.0  # when the device has finished the steps given to it so far

    def step(state, batch, base, reference):
        nonlocal free
        free = max(free, time.perf_counter()) + seconds
        one = np.float32(1)
        return state, Pending(free, Metrics(one, one, one, one, one, one, one, one, counts, None))  # pyright: ignore[reportArgumentType]

    def fetch(pending):
        if (rest := pending.ready - time.perf_counter()) > 0:
            time.sleep(rest)
        return pending.metrics

    loop.jax.device_get = fetch
    run.loader = types.SimpleNamespace(iterate=lambda start: ((i, {"active": 1}) for i in range(steps)))
    run.runner = types.SimpleNamespace(shard_batch=lambda batch: batch, rows=8)
    run.step_fn, run.state, run.step, run.peak, run.flops = step, None, 0, 1e12, 1e6
    run.agreement, run.timer = StopAgreement(), SaveTimer(None)
    run.watching, run.position = Watching(run.config, None), beginning(run.config)
    run.checkpoints = types.SimpleNamespace(local=None)
    run.base = run.frozen_params = run.reference = run.compared = None
    with tempfile.TemporaryDirectory() as workdir, tqdm.tqdm(total=steps, file=io.StringIO(), mininterval=1.0) as bar:
        run.writer = MetricsWriter(workdir, None)
        start, own, process = time.perf_counter(), time.thread_time(), time.process_time()
        run._steps(bar)
        elapsed, own = time.perf_counter() - start, time.thread_time() - own
        run.agreement.close()
        run.writer.close()
        process = time.process_time() - process
    # The loop returns before the last step's metrics are due.
    return (elapsed - (steps - 1) * seconds) / (steps - 1), own / (steps - 1), process / (steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--milliseconds", type=float, default=0.0, help="of a step on the device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, help="this one; by default all are started")
    args = parser.parse_args()
    if args.processes == 1:
        measure(args)
    elif args.process is None:
        command = [sys.executable, "-m", "benchmarks.loop", *sys.argv[1:], "--process"]
        running = [subprocess.Popen([*command, str(i)]) for i in range(args.processes)]
        sys.exit(max(process.wait() for process in running))
    else:
        with joined(Group("localhost:9950", args.processes, args.process)):
            measure(args)


def measure(args: argparse.Namespace) -> None:
    """Prints the overhead in this process."""
    found = [[1e3 * x for x in overhead(args.steps, args.milliseconds / 1e3)] for _ in range(args.rounds)]
    waits, own, process = (statistics.median(column) for column in zip(*found))
    which = "" if args.process is None else f"process {args.process} of {args.processes}: "
    print(f"{which}a step of {args.milliseconds:g} ms takes {waits:.3f} ms more; of the processor {own:.3f} ms in the "
          f"loop's thread, {process:.3f} ms in all (medians of {args.rounds} rounds of {args.steps} steps)")


if __name__ == "__main__":
    main()
