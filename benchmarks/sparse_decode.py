"""Time of a decode step by context length: sparse attention of V3.2 against dense attention of V3, one sequence.

    python -m benchmarks.sparse_decode --json benchmarks/results/sparse_decode_cpu.json

The model is two layers of the preset `small`, with `--heads` heads and an indexer that chooses `--topk` tokens; weights
and cache are random numbers. Contexts and kinds of attention take turns. The report has the medians, and the best
times, which other load on the machine affects less.
"""

import argparse
import datetime
import functools
import statistics
import time

from benchmarks.machine import hardware, write_results

PAGE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--topk", type=int, default=256)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--index-heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", metavar="FILE", help="writes the results there")
    args = parser.parse_args()
    attention = {"num_heads": args.heads, "index_heads": args.index_heads, "index_head_dim": 32}
    times = measure(args.contexts, args.topk, attention, args.rounds, args.dtype)
    rows = [{"attention": kind, "context": context, "milliseconds": 1000 * statistics.median(taken),
             "best_milliseconds": 1000 * min(taken)} for (kind, context), taken in times.items()]
    for row in rows:
        print(f"{row['attention']:6s} context {row['context']:6,}: {row['milliseconds']:.2f} ms a token, at best "
              f"{row['best_milliseconds']:.2f}")
    if args.json:
        about = {"date": datetime.date.today().isoformat(), "hardware": hardware(), "model": "small, 2 layers",
                 "topk": args.topk, "dtype": args.dtype} | attention
        write_results(args.json, about | {"rows": rows})


def measure(contexts: list[int], topk: int, attention: dict[str, int], rounds: int,
            dtype: str) -> dict[tuple[str, int], list[float]]:
    """{(attention, context): seconds of each step}."""
    from deepseek_jax import runtime

    runtime.prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from deepseek_jax.config import model_config
    from deepseek_jax.model import DeepSeekV3
    from deepseek_jax.serving import latent_cache
    from deepseek_jax.serving.decode_attention import CacheGeometry, TokenSlots
    from deepseek_jax.serving.decode_model import forward
    from deepseek_jax.serving.weights import prepare

    pages = -(-(max(contexts) + 1) // PAGE)
    geometry = CacheGeometry(dtype, PAGE, tuple(sorted(-(-(context + 1) // PAGE) for context in contexts)))
    sides, rng = {}, np.random.default_rng(0)
    for kind, chosen in (("dense", None), ("sparse", topk)):
        cfg = model_config("small", num_layers=2, mtp_depth=0, dtype=dtype, index_topk=chosen, **attention)
        shapes = jax.eval_shape(DeepSeekV3(cfg).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        weights = prepare(cfg, jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes))
        cache = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype),
                             latent_cache.make(cfg, dtype, pages + 1, PAGE))
        step = jax.jit(functools.partial(forward, cfg, geometry), donate_argnums=1)
        sides[kind] = [step, weights, cache]
    times = {(kind, context): [] for kind in sides for context in contexts}
    for n in range(rounds + 3):  # the first three compile and warm up
        for (kind, context), taken in times.items():
            step, weights, cache = sides[kind]
            slots = TokenSlots(jnp.full((1, 1), n % 100), jnp.full((1, 1), context), jnp.ones((1, 1), bool),
                               1 + jnp.arange(pages)[None])
            start = time.perf_counter()
            hidden_BTD, sides[kind][2], _ = jax.block_until_ready(step(weights, cache, slots))
            taken += [time.perf_counter() - start] if n >= 3 else []
            assert jnp.isfinite(hidden_BTD).all()
    return times


if __name__ == "__main__":
    main()
