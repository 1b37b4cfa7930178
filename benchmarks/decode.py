"""Greedy decoding against transformers' generate: the same weights and prompts, on one machine, taking turns.

    python -m benchmarks.decode --json benchmarks/results/decode_cpu.json

The weights are the preset `small` without multi-token prediction at random values, exported for the peer. Each side is
one process that warms up and then waits; in every round each side generates once, reading the prompts included.
The report has medians over the rounds, whether both sides give the same tokens, and, for the smallest batch, our time
per token after a context of 64 and of 2,048. Without .venv-peer, which `make bench` makes, our side is timed alone.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.machine import PEER, ROOT, hardware, write_results

PROMPT, NEW, CONTEXTS = 32, 128, (64, 2048)


def prompts(batch: int) -> list[list[int]]:
    """Fixed token ids, the same on both sides."""
    return [[(7919 * (b + 1) + 104729 * i) % 8000 + 100 for i in range(PROMPT)] for b in range(batch)]


def answer(generate: Callable, context: Callable | None = None) -> None:
    """The loop of one side: for each line {"batch", "context"} on stdin, one JSON row on stdout."""
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["context"] and context:
            row = {"seconds_per_step": context(**asked)}
        else:
            start = time.perf_counter()
            tokens = generate(asked["batch"])
            row = {"tokens_per_second": asked["batch"] * NEW / (time.perf_counter() - start), "tokens": tokens}
        print(json.dumps(row), flush=True)


def ours(folder: str, dtype: str, batches: list[int]) -> None:
    from deepseek_jax import runtime

    runtime.prepare()
    import jax

    from deepseek_jax.interop import load_hf
    from deepseek_jax.serving.engine import Engine, EngineConfig
    from deepseek_jax.serving.sequence import Request

    cfg, variables = load_hf(folder, dtype=dtype)
    variables = jax.tree.map(jax.numpy.asarray, variables)
    engines = {batch: Engine(cfg, variables, EngineConfig(batch, 2304, most_steps=32))
               for batch in batches}

    def generate(batch):
        engines[batch].pool.clear()  # no round finds its prompts in the cache
        made = [engines[batch].submit(Request(tuple(prompt), NEW)) for prompt in prompts(batch)]
        engines[batch].run()
        return [[t.id for t in s.made] for s in made]

    def context(batch, context):
        """Seconds per step, from 48 tokens before to 48 after the context; the first call fills the cache."""
        engine = engines[batch]
        rows = [[1 + (i * (b + 3)) % 8000 for i in range(context - 48)] for b in range(batch)]
        made = [engine.submit(Request(tuple(row), 97)) for row in rows]
        while any(len(s.made) == 0 for s in made):
            engine.step()
        before, start = sum(len(s.made) for s in made), time.perf_counter()
        engine.run()
        return (time.perf_counter() - start) * batch / (97 * batch - before)

    answer(generate, context)


class Side:
    """One process. Its first row, which compiles, does not count."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.log)
        assert self.process.stdin and self.process.stdout  # pipes
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def ask(self, batch: int, context: int | None = None) -> dict[str, Any]:
        try:
            print(json.dumps({"batch": batch, "context": context}), file=self.stdin, flush=True)
            for line in self.stdout:
                if line.startswith("{"):
                    return json.loads(line)
        except BrokenPipeError:
            pass
        self.log.seek(0)
        sys.exit(f"{self.name} ended: {(self.log.read().strip() or 'it said nothing').splitlines()[-1]}")

    def end(self) -> None:
        self.stdin.close()
        self.process.wait()


def export(folder: str) -> None:
    import jax
    import numpy as np

    from deepseek_jax.config import model_config
    from deepseek_jax.interop import save_hf
    from deepseek_jax.model import DeepSeekV3

    cfg = model_config("small", mtp_depth=0, dtype="float32")
    init = jax.jit(lambda: DeepSeekV3(cfg).init(jax.random.key(0), np.zeros((1, 4), np.int32)))
    save_hf(folder, cfg, init())


def compare(sides: list[Side], batch: int, rounds: int, contexts: tuple[int, ...]) -> dict[str, Any]:
    """Medians, ratios, how many of the peer's tokens equal ours, and the cost of a long context."""
    rows = {side.name: [] for side in sides}
    steps = {side.name: {context: [] for context in contexts} for side in sides if side.name != "transformers"}
    for n in range(rounds + 1):
        for side in sides:
            row = side.ask(batch)
            if n:
                rows[side.name].append(row)
            for context in steps.get(side.name, ()):
                seconds = side.ask(batch, context)["seconds_per_step"]
                if n:
                    steps[side.name][context].append(seconds)
    speeds = {name: [r["tokens_per_second"] for r in made] for name, made in rows.items()}
    report = {"tokens_per_second": {name: statistics.median(x) for name, x in speeds.items()},
              "lowest_and_highest": {name: (min(x), max(x)) for name, x in speeds.items()}}
    if contexts:
        report["seconds_per_step_at_context"] = {name: {c: statistics.median(x) for c, x in by.items()}
                                                 for name, by in steps.items()}
        report["long_over_short_context"] = {name: statistics.median(b / a for a, b in zip(*by.values()))
                                             for name, by in steps.items()}
    if "transformers" in rows:
        report["times_as_fast_as_transformers"] = {
            name: statistics.median(a / b for a, b in zip(speeds[name], speeds["transformers"])) for name in steps}
        pairs = [(a, b) for x, y in zip(rows["float32"][0]["tokens"], rows["transformers"][0]["tokens"])
                 for a, b in zip(x, y)]
        report["same_tokens_in_float32"] = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--side", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        folder, dtype = args.side
        ours(folder, dtype, args.batches)
        return
    report = {"what": f"greedy decoding, {PROMPT} prompt and {NEW} new tokens, preset small without MTP",
              "date": datetime.date.today().isoformat(), "hardware": hardware(),
              "peer": "transformers in float32, attention and experts at their fastest (see decode_transformers.py)",
              "rounds": args.rounds, "batches": {}}
    with tempfile.TemporaryDirectory() as folder:
        export(folder + "/model")
        batches = ["--batches", *map(str, args.batches)]
        sides = [Side(dtype, [sys.executable, "-m", "benchmarks.decode", "--side", folder + "/model", dtype, *batches])
                 for dtype in ("float32", "bfloat16")]
        if PEER.exists():
            sides.append(Side("transformers", [str(PEER), "-m", "benchmarks.decode_transformers", folder + "/model"]))
        for batch in args.batches:
            report["batches"][batch] = compare(sides, batch, args.rounds,
                                               CONTEXTS if batch == min(args.batches) else ())
            print(json.dumps({batch: report["batches"][batch]}, indent=1), flush=True)
        for side in sides:
            side.end()
    if args.json:
        write_results(args.json, report)


if __name__ == "__main__":
    main()
