"""Whether answers depend on the rest of the batch, with and without deterministic decoding, and what the latter costs.

    python -m benchmarks.company --workdir run --json benchmarks/results/company_cpu.json

Continues held-out texts, sampling every second one, first one at a time and then in several kinds of batches, and
counts the continuations whose tokens differ, and those whose logprobs differ in any bit. Speed: tokens per second of
full batches, both ways in turns, with random weights of the preset `small`.
"""

import argparse
import datetime
import importlib.metadata
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.machine import hardware, write_results
from benchmarks.speculative import texts

NEW = 40  # tokens of each continuation
COMPANIES = {"16 at once": ({"max_sequences": 16}, 16), "48 at once": ({"max_sequences": 48}, 48),
             "8 at once, chunks of 64": ({"max_sequences": 8, "chunk": 64}, 8)}
SPEED_NEW, SPEED_PROMPT = 96, 32  # tokens


def requests(workdir: str, tokenizer: Any, count: int) -> list[Any]:
    """`count` requests of 1 to 89 prompt tokens; every fifth continues the prompt before it, for reused pages."""
    from deepseek_jax.serving.sequence import Request

    rng, found = np.random.default_rng(0), texts(workdir, tokenizer, count, 96)
    made = []
    for i in range(count):
        row = found[i % len(found)][int(rng.integers(0, 6)):]
        prompt = made[-1].prompt + row[:7] if i % 5 == 4 else row[:int(rng.integers(1, 90))]
        made.append(Request(tuple(prompt), NEW, temperature=float(i % 2), seed=i, logprobs=True))
    return made


def answers(engine: Any, asked: list[Any], at_once: int) -> list[Any]:
    """The results of the requests, with `at_once` of them submitted together."""
    made = []
    for first in range(0, len(asked), at_once):
        some = [engine.submit(request) for request in asked[first:first + at_once]]
        engine.run()
        made += [sequence.made for sequence in some]
    return made


def changed(cfg: Any, variables: Any, asked: list[Any], deterministic: bool) -> dict[str, Any]:
    """For each kind of batch, how many answers differ from those made alone."""
    from deepseek_jax.serving.engine import Engine, EngineConfig

    def engine(**options):
        return Engine(cfg, variables, EngineConfig(max_length=256, deterministic=deterministic, **options))

    alone, found = answers(engine(max_sequences=16), asked, 1), {}
    for name, (options, at_once) in COMPANIES.items():
        pairs = list(zip(alone, answers(engine(**options), asked, at_once), strict=True))
        found[name] = {field: sum([getattr(t, key) for t in a] != [getattr(t, key) for t in b] for a, b in pairs)
                       for field, key in (("tokens", "id"), ("logprobs", "logprob"))}
        print(f"deterministic={deterministic} {name}: {found[name]} of {len(asked)} change", flush=True)
    return found


def speeds(batches: list[int], rounds: int) -> dict[int, dict[str, Any]]:
    """Tokens per second of full batches by default and deterministic, medians of `rounds` in turns."""
    import jax
    import jax.numpy as jnp

    from deepseek_jax.config import model_config
    from deepseek_jax.model import DeepSeekV3
    from deepseek_jax.serving.engine import Engine, EngineConfig
    from deepseek_jax.serving.sequence import Request

    cfg = model_config("small", mtp_depth=0)
    variables = jax.jit(lambda: DeepSeekV3(cfg).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))()
    found = {}
    for batch in batches:
        prompts = [tuple(np.random.default_rng(i).integers(1, cfg.vocab_size, SPEED_PROMPT).tolist())
                   for i in range(batch)]
        engines = {name: Engine(cfg, variables, EngineConfig(max_sequences=batch, max_length=256, deterministic=on))
                   for name, on in (("default", False), ("deterministic", True))}
        made = {name: [] for name in engines}
        for n in range(rounds + 1):
            for name, engine in engines.items():
                for prompt in prompts:
                    engine.submit(Request(prompt, SPEED_NEW))
                start = time.perf_counter()
                engine.run()
                if n:  # the first round compiles
                    made[name].append(batch * SPEED_NEW / (time.perf_counter() - start))
                engine.pool.clear()
        found[batch] = {name: {"median": statistics.median(x), "lowest": min(x), "highest": max(x)}
                        for name, x in made.items()}
        print(f"batch={batch}", {name: round(x["median"], 1) for name, x in found[batch].items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run of deepseek_jax.train")
    parser.add_argument("--continuations", type=int, default=200)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16], help="of the speeds; none: not timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    from deepseek_jax import runtime

    runtime.prepare()
    from deepseek_jax.workdir import load

    cfg, variables, tokenizer = load(args.workdir, on_host=True)
    asked = requests(args.workdir, tokenizer, args.continuations)
    report: dict[str, Any] = {
        "what": f"{len(asked)} continuations by {NEW} tokens, {cfg.dtype}: how many change between running alone and "
                f"in company; tokens per second of {SPEED_NEW} new tokens, preset small",
        "date": datetime.date.today().isoformat(), "hardware": hardware(), "jax": importlib.metadata.version("jax"),
        "rounds": args.rounds, "changed": {}}
    for name, on in (("default", False), ("deterministic", True)):
        report["changed"][name] = changed(cfg, variables, asked, on)
        if args.json:  # the results so far
            write_results(args.json, report)
    report["tokens_per_second"] = speeds(args.batches, args.rounds)
    if args.json:
        write_results(args.json, report)


if __name__ == "__main__":
    main()
