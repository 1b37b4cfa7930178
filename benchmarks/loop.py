"""What the training loop itself costs on the host: a step that takes 50 ms on a device which computes nothing.

    python -m benchmarks.loop

The stand-in for a device runs its steps one after the other while the host does what it does in a real run: it fetches
and checks metrics, writes metrics.jsonl, TensorBoard events and expert loads, and moves the progress bar.
"""

import argparse
import io
import statistics
import tempfile
import time
import types
from typing import Any

import numpy as np
import tqdm

from deepseek_jax.config import Config, TrainConfig, model_config
from deepseek_jax.parallel.processes import SaveTimer, StopAgreement
from deepseek_jax.training import loop
from deepseek_jax.training.metrics import MetricsWriter
from deepseek_jax.training.types import Metrics


class Pending:
    """Metrics that are ready when the device has done its step."""

    def __init__(self, ready: float, metrics: Metrics):
        self.ready, self.metrics = ready, metrics


def overhead(steps: int, seconds: float) -> float:
    """Seconds a step beyond those of the device, mean over `steps`."""
    cfg = model_config("small")
    counts = {"bias": np.ones((cfg.num_moe_layers, cfg.num_experts), np.int32),
              "mtp_bias": np.ones((1, cfg.num_experts), np.int32)}
    run: Any = object.__new__(loop.Run)
    run.config = Config(model=cfg, train=TrainConfig(steps=steps + 1, eval_every=10**6, checkpoint_every=10**6))
    free = 0.0  # when the device has done all it was given

    def step(state, batch, base, reference):
        nonlocal free
        free = max(free, time.perf_counter()) + seconds
        one = np.float32(1)
        return state, Pending(free, Metrics(one, one, one, one, one, one, one, one, counts, None))  # pyright: ignore[reportArgumentType]

    def fetch(pending):
        time.sleep(max(0.0, pending.ready - time.perf_counter()))
        return pending.metrics

    loop.jax.device_get = fetch
    run.loader = types.SimpleNamespace(iterate=lambda start: ((i, {"active": 1}) for i in range(steps)))
    run.runner = types.SimpleNamespace(shard_batch=lambda batch: batch, rows=8)
    run.step_fn, run.state, run.step, run.peak, run.flops = step, None, 0, 1e12, 1e6
    run.agreement, run.timer = StopAgreement(), SaveTimer(None)
    run.checkpoints = types.SimpleNamespace(local=None)
    run.base = run.frozen_params = run.reference = run.compared = None
    with tempfile.TemporaryDirectory() as workdir, tqdm.tqdm(total=steps, file=io.StringIO(), mininterval=1.0) as bar:
        run.writer = MetricsWriter(workdir, None)
        start = time.perf_counter()
        run._steps(bar)
        elapsed = time.perf_counter() - start
    return (elapsed - (steps - 1) * seconds) / (steps - 1)  # the loop returns before the last step's metrics are due


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--milliseconds", type=float, default=50.0, help="of a step on the device")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = [1e3 * overhead(args.steps, args.milliseconds / 1e3) for _ in range(args.rounds)]
    print(f"host overhead a step of {args.milliseconds:g} ms: median {statistics.median(found):.3f} ms, "
          f"{min(found):.3f} to {max(found):.3f} over {args.rounds} rounds of {args.steps} steps")


if __name__ == "__main__":
    main()
