"""Greedy decoding beside transformers' generate: the same weights and prompts, float32, taking turns.

    python benchmarks/decode.py --json benchmarks/results/decode_cpu.json

The weights are the preset `small` without multi-token prediction at random values, exported for the peer. Every start
is a fresh process that generates once untimed, then `--repeats` times; the prompt's reading is part of the time. Also
our time per token at a context of 64 and of 2,048, and whether both sides say the same tokens. `--ours DIR` is what
the processes of our side run.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import sys
import tempfile
import time

from run import ALLOCATOR, HERE, PEER, hardware, start

PROMPT, NEW = 32, 128


def prompts(batch):
    """Fixed token ids, the same on both sides."""
    return [[(7919 * (b + 1) + 104729 * i) % 8000 + 100 for i in range(PROMPT)] for b in range(batch)]


def ours(folder, batch, repeats, dtype):
    """Prints a row a repeat, then one for each context."""
    from deepseek_jax import command

    command.reuse_memory()
    import jax

    from deepseek_jax.interop import load_hf
    from deepseek_jax.serving.engine import Engine, Request

    cfg, variables = load_hf(folder, dtype=dtype)
    variables = jax.tree.map(jax.numpy.asarray, variables)
    engine = Engine(cfg, variables, max_sequences=batch, max_length=4096, most_steps=16)

    def generate(prompt_of, new):
        engine.pool.forget()  # no repeat finds its prompts in the cache
        made = [engine.submit(Request(tuple(prompt), new)) for prompt in prompt_of]
        while any(len(s.made) == 0 for s in made):
            engine.step()
        before, start = sum(len(s.made) for s in made), time.perf_counter()
        engine.run()
        return made, time.perf_counter() - start, sum(len(s.made) for s in made) - before

    generate(prompts(batch), NEW)
    for _ in range(repeats):
        start = time.perf_counter()
        made, *_ = generate(prompts(batch), NEW)
        seconds = time.perf_counter() - start
        print(json.dumps({"tokens_per_second": batch * NEW / seconds, "batch": batch, "dtype": dtype,
                          "tokens": [[t.id for t in s.made] for s in made],
                          "versions": {"jax": jax.__version__}}), flush=True)
    contexts = {}
    for context in (64, 2048):
        long = [[1 + (i * (b + 3)) % 8000 for i in range(context - 56)] for b in range(batch)]
        runs = [generate(long, 112) for _ in range(1 + repeats)][1:]
        contexts[context] = min(seconds / (count / batch) for _, seconds, count in runs)
    print(json.dumps({"seconds_per_step": contexts, "tokens_per_second": batch / contexts[64], "contexts": True}))


def export(folder):
    import jax
    import numpy as np

    from deepseek_jax.config import model_config
    from deepseek_jax.interop import save_hf
    from deepseek_jax.model import DeepSeekV3

    cfg = model_config("small", mtp_depth=0, dtype="float32")
    init = jax.jit(lambda: DeepSeekV3(cfg).init(jax.random.key(0), np.zeros((1, 4), np.int32)))
    save_hf(folder, cfg, init())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--starts", type=int, default=3, help="processes a side")
    parser.add_argument("--repeats", type=int, default=3, help="rows a process")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--ours", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        ours(args.ours, args.batches[0], args.repeats, args.dtype)
        return

    report = {"what": f"greedy decoding, {PROMPT} prompt and {NEW} new tokens, preset small, float32",
              "date": datetime.date.today().isoformat(), "hardware": hardware(), "environment": ALLOCATOR,
              "batches": {}}
    with tempfile.TemporaryDirectory() as folder:
        export(folder + "/model")
        for batch in args.batches:
            flags = [f"--repeats={args.repeats}", "--batches", str(batch)]
            sides = {"deepseek_jax": [sys.executable, "benchmarks/decode.py", "--ours", folder + "/model", *flags]}
            sides["deepseek_jax_bfloat16"] = [*sides["deepseek_jax"], "--dtype=bfloat16"]
            if PEER.exists():
                sides["transformers"] = [str(PEER), "benchmarks/decode_transformers.py", folder + "/model", *flags]
            rows = {name: [] for name in sides}
            for _ in range(args.starts):
                for name, command in sides.items():
                    rows[name] += start(name, command)
            report["batches"][batch] = summary(rows)
            print(json.dumps({batch: report["batches"][batch]}, indent=1), flush=True)
    if args.json:
        pathlib.Path(HERE.parent, args.json).write_text(json.dumps(report, indent=1) + "\n")


def summary(rows):
    """Medians, ratios, and how many of the peer's tokens are ours."""
    timed = {name: [r for r in side if "tokens" in r] for name, side in rows.items()}
    speed = {name: statistics.median(r["tokens_per_second"] for r in side) for name, side in timed.items()}
    out = {"tokens_per_second": speed, "settings": timed[list(timed)[-1]][0].get("settings")}
    for name in ("deepseek_jax", "deepseek_jax_bfloat16"):
        steps = [r["seconds_per_step"] for r in rows[name] if "contexts" in r]
        medians = {context: statistics.median(s[context] for s in steps) for context in ("64", "2048")}
        out[name] = {"seconds_per_step_at_context": medians,
                     "2048_over_64": statistics.median(s["2048"] / s["64"] for s in steps)}
    if "transformers" in speed:
        out["ratio"] = speed["deepseek_jax"] / speed["transformers"]
        pairs = [(a, b) for x, y in zip(timed["deepseek_jax"][0]["tokens"], timed["transformers"][0]["tokens"])
                 for a, b in zip(x, y)]
        out["same_tokens"] = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
    return out


if __name__ == "__main__":
    main()
