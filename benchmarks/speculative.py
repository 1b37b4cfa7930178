"""Speculative decoding on a trained run: acceptance of MTP's drafts, the cost of drafting and verifying, and the
speed-up.

    python -m benchmarks.speculative --workdir run --batches 1 8 16 --json benchmarks/results/speculative_cpu.json

Prompts are beginnings of held-out files, continued greedily, a batch at a time. For each batch and depth of drafts:

    plain, verify, draft    milliseconds of a plain step, and of the two parts of a step with drafts, timed separately
    tokens per step         1 + accepted drafts, of one sequence
    break-even              the fraction of accepted drafts above which drafting pays
    predicted               tokens per step * plain / (verify + draft)
    measured                tokens per second over those of plain decoding, taking turns

For depths beyond the run's MTP modules, the last module is applied repeatedly.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import hardware, write_results


def texts(workdir: str, tokenizer: Any, count: int, length: int) -> list[tuple[int, ...]]:
    """Beginnings of held-out files of the run's sources, as token ids."""
    from deepseek_jax.data import corpus
    from deepseek_jax.data.prepare import Source
    from deepseek_jax.workdir import load_workdir_config

    data, rows = load_workdir_config(workdir).data, []
    for source in (Source(path, data.validation_fraction) for path, _ in data.sources):
        documents = list(corpus.read_documents(source.files))
        cut = corpus.find_cut((corpus.hash_position(d.name) for d in documents), source.validation_fraction,
                              source.path)
        held_out = (d for d in documents if cut is None or corpus.hash_position(d.name) <= cut)
        rows += [tuple([tokenizer.bos, *tokenizer.encode(d.parts[0][0][:20 * length])][:length]) for d in held_out]
    rows = [row for row in rows if len(row) == length]
    return rows[::max(1, len(rows) // count)][:count]


def repeated(body: Callable, *state: Any, steps: int = 32) -> Callable[[], float]:
    """A function that measures the seconds per call of `steps` consecutive calls of body(n, state) -> state."""
    import jax

    run = jax.jit(lambda *state: jax.lax.fori_loop(0, steps, body, state))

    def once():
        start = time.perf_counter()
        jax.block_until_ready(run(*state))
        return (time.perf_counter() - start) / steps

    once()
    return once


def parts(engine: Any) -> tuple[Callable[[], float], Callable[[], float]]:
    """(verify, draft): timers of the two parts of a full batch's step, after a context of 64 tokens."""
    import jax.numpy as jnp

    from deepseek_jax.model.layers import head_logits
    from deepseek_jax.serving import speculative
    from deepseek_jax.serving.decode_attention import TokenSlots
    from deepseek_jax.serving.decode_model import forward
    from deepseek_jax.serving.sampling import Sampling

    cfg, geometry, weights, depth, B = engine.cfg, engine.geometry, engine.weights, engine.depth, engine.max_sequences
    T, one = depth + 1, jnp.ones(B, jnp.int32)
    table_BP = jnp.arange(1, B * geometry.widths[-1] + 1, dtype=jnp.int32).reshape(B, -1)
    greedy = Sampling(*(jnp.full(B, x, t) for x, t in ((0, np.float32), (0, np.int32), (1, np.float32),
                                                       (0, np.uint32), (0, np.uint32))))

    def verify(n, state):
        cache, tokens_BT, drafts, _ = state
        slots = TokenSlots(tokens_BT, (64 + n) * one[:, None] + jnp.arange(T)[None], jnp.ones((B, T), bool), table_BP)
        hidden_BTD, cache, _ = forward(cfg, geometry, weights, cache, slots)
        logits_BTW = head_logits(hidden_BTD, weights.head)
        made_BT, _ = speculative.verify(greedy, logits_BTW, drafts, one * (65 + n))
        return cache, made_BT, drafts, hidden_BTD

    def draft(n, state):
        cache, tokens_BT, drafts, hidden_BTD = state
        settled = speculative.Settled(hidden_BTD, tokens_BT, 0 * one, one * (64 + n), one * 10**6, table_BP)
        drafts, cache = speculative.draft(cfg, geometry, weights, cache, drafts, greedy, settled)
        return cache, jnp.concatenate([drafts.token_Bd, tokens_BT[:, :1]], axis=1), drafts, hidden_BTD

    # Other tokens for every sequence, so that they choose other experts.
    tokens_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) * 97 % cfg.vocab_size
    hidden_BTD = weights.embedding[tokens_BT]
    state = (tuple(map(jnp.copy, engine._cache)), tokens_BT, speculative.no_drafts(cfg, B, depth), hidden_BTD)
    return repeated(verify, *state), repeated(draft, *state) if depth else (lambda: 0.0)


def decoding(engine: Any, prompts: list, new: int) -> tuple[float, int, int, int, int]:
    """One pass over all prompts, a batch at a time, timed while the batch is full.

    Returns (seconds after the first token of each, tokens, steps of sequences, drafted, accepted).
    """
    from deepseek_jax.serving.sequence import Request

    seconds = tokens = steps = drafted = accepted = 0
    for start in range(0, len(prompts), engine.max_sequences):
        made = [engine.submit(Request(prompt, new)) for prompt in prompts[start:start + engine.max_sequences]]
        count = lambda made=made: np.array([(len(s.made), s.steps, s.drafted, s.accepted) for s in made]).sum(axis=0)
        while not all(s.made for s in made):
            engine.step()
        before, begin = count(), time.perf_counter()
        while all(s.finish is None for s in made):
            engine.step()
        seconds += time.perf_counter() - begin
        new_tokens, new_steps, new_drafted, new_accepted = map(int, count() - before)
        tokens, steps = tokens + new_tokens, steps + new_steps
        drafted, accepted = drafted + new_drafted, accepted + new_accepted
        engine.run()
    return seconds, tokens, steps, drafted, accepted


def table(cfg: Any, variables: Any, batch: int, depths: list[int], prompts: list, new: int,
          rounds: int) -> dict[str, Any]:
    """Plain tokens per second, and a row for each depth."""
    from deepseek_jax.serving.engine import Engine, EngineConfig

    engines = {d: Engine(cfg, variables, EngineConfig(batch, 256, d)) for d in (0, *depths)}
    timers = {d: parts(engine) for d, engine in engines.items()}
    verified, drafted, passes = ({d: [] for d in engines} for _ in range(3))
    for n in range(rounds + 1):  # the first compiles
        for d, engine in engines.items():
            verify, draft = (timer() for timer in timers[d])
            row = decoding(engine, prompts, new)
            if n:
                verified[d].append(verify)
                drafted[d].append(draft)
                passes[d].append(row)
    median = statistics.median
    speed = {d: median(tokens / seconds for seconds, tokens, *_ in passes[d]) for d in engines}
    plain, rows = median(verified[0]), []
    for d in depths:
        _, tokens, steps, drafts, accepted = passes[d][0]
        verify, draft = median(verified[d]), median(drafted[d])
        rows.append({
            "depth": d, "plain_ms": 1e3 * plain, "verify_ms": 1e3 * verify, "draft_ms": 1e3 * draft,
            "tokens_per_step": tokens / steps, "acceptance": accepted / drafts,
            "break_even_acceptance": ((verify + draft) / plain - 1) / d,
            "predicted_speedup": tokens / steps * plain / (verify + draft), "measured_speedup": speed[d] / speed[0]})
        print(f"batch={batch}", " ".join(f"{name}={value:.3f}" for name, value in rows[-1].items()), flush=True)
    return {"batch": batch, "plain_tokens_per_second": speed[0], "depths": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=97)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the run's own")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    from deepseek_jax import runtime

    runtime.prepare()
    import dataclasses

    from deepseek_jax.workdir import load

    cfg, variables, tokenizer = load(args.workdir)
    cfg = dataclasses.replace(cfg, dtype=args.dtype or cfg.dtype)
    prompts = texts(args.workdir, tokenizer, args.prompts, 32)
    report = {"what": f"greedy continuations of {len(prompts)} prompts by {args.new} tokens, {cfg.dtype}",
              "date": datetime.date.today().isoformat(), "hardware": hardware(), "rounds": args.rounds,
              "batches": [table(cfg, variables, batch, args.depths, prompts, args.new, args.rounds)
                          for batch in args.batches]}
    if args.json:
        write_results(args.json, report)


if __name__ == "__main__":
    main()
