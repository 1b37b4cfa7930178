"""`generate` continues prompts in a single call, with its own engine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from deepseek_jax.config import ModelConfig
from deepseek_jax.serving.engine import Engine, EngineConfig, check_request
from deepseek_jax.serving.sequence import Listener, Request, Sequence

MOST_SEQUENCES = 16  # sequences of one call that run at once; the others wait


class Generation(NamedTuple):
    """Continuations, and how many tokens were drafted and accepted."""

    tokens: list[list[int]]  # the NEW ids of each prompt, without eos_id
    drafted: int
    accepted: int


class Continued(NamedTuple):
    """The results of the requests, in their order, and the time it took.

    seconds: of all steps, compilation included. tokens_per_second: of the steps that neither read a prompt nor compiled
    a program; None if there was none.
    """

    sequences: list[Sequence]
    seconds: float
    tokens_per_second: float | None

    def speed(self) -> str:
        """The speed in one line; without compilation if there are steps without it."""
        tokens, rate = sum(len(sequence.made) for sequence in self.sequences), self.tokens_per_second
        return f"{tokens} tokens in {self.seconds:.1f} s" + (
            ", compilation included." if rate is None else f"; once compiled, {rate:.1f} tokens/s.")


def generate(cfg: ModelConfig, variables: dict[str, Any], prompts: Iterable[Iterable[int]], max_new_tokens: int,
             speculative: bool = False, temperature: float = 0.0, seed: int = 0,
             eos_id: int | None = None) -> Generation:
    """Continues each prompt; `run_requests` has more ways to choose tokens.

    Args:
      prompts: lists of token ids, each at least one long.
      max_new_tokens: new tokens per prompt.
      speculative: draft with the MTP modules, one token for each. The greedy continuation is the same, and so is the
        distribution of samples.
      temperature: 0 is greedy.
      seed: of the samples; each prompt has its own random stream.
      eos_id: ends a sequence; None never stops early.
    Raises:
      ConfigError: an empty prompt, an id outside the vocabulary, drafts without an MTP module.
    """
    stop = frozenset() if eos_id is None else frozenset([eos_id])
    made = run_requests(cfg, variables, [
        Request(tuple(map(int, prompt)), max_new_tokens, temperature, seed=seed, stream=i, stop_tokens=stop)
        for i, prompt in enumerate(prompts)], speculative).sequences
    return Generation([[token.id for token in s.made] for s in made], sum(s.drafted for s in made),
                      sum(s.accepted for s in made))


def run_requests(cfg: ModelConfig, variables: dict[str, Any], requests: list[Request], speculative: bool = False,
                 listeners: Iterable[Listener | None] = (), deterministic: bool = False) -> Continued:
    """Runs requests to their ends, at most MOST_SEQUENCES at once. speculative: as in `generate`.

    Args:
      listeners: one per request, called as in `Engine.submit`; may be empty.
      deterministic: as in `EngineConfig`.
    Raises:
      ConfigError: as `generate`.
    """
    for request in requests:
        check_request(cfg, request)
    if not requests:
        return Continued([], 0.0, None)
    longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
    # Powers of two, so that calls that differ little share their compiled programs.
    engine = Engine(cfg, variables, EngineConfig(
        max_sequences=_round(min(len(requests), MOST_SEQUENCES)), max_length=_round(max(longest, 128)),
        depth=max(1, cfg.mtp_depth) if speculative else 0, deterministic=deterministic))
    listeners = list(listeners) or [None] * len(requests)
    sequences = [engine.submit(request, listen) for request, listen in zip(requests, listeners, strict=True)]
    timed = [_timed_step(engine) for _ in iter(lambda: engine.busy, False)]
    seen, tokens, seconds = set(), 0, 0.0
    for step in timed:  # the first step of a batch size compiles its program
        if step.decoding in seen:
            tokens, seconds = tokens + step.tokens, seconds + step.seconds
        seen.add(step.decoding)
    return Continued(sequences, sum(step.seconds for step in timed), tokens / seconds if tokens else None)


class _TimedStep(NamedTuple):
    decoding: int  # sequences; 0 where a prompt was read
    tokens: int
    seconds: float


def _timed_step(engine: Engine) -> _TimedStep:
    decoding = 0 if engine.waiting or engine.reading else len(engine.running)
    before, start = engine.totals["tokens"], time.perf_counter()
    engine.step()
    return _TimedStep(decoding, engine.totals["tokens"] - before, time.perf_counter() - start)


def _round(n: int) -> int:
    return 1 << (n - 1).bit_length()
