"""`generate`: continues prompts in one call, with its own engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from deepseek_jax.config import ModelConfig
from deepseek_jax.serving.engine import Engine, EngineConfig, Request, check_request

MOST_SEQUENCES = 16  # of one call that run at once; the others wait


class Generation(NamedTuple):
    """Continuations, and how many tokens were drafted and accepted."""

    tokens: list[list[int]]  # the NEW ids of each prompt, without eos_id
    drafted: int
    accepted: int


def generate(cfg: ModelConfig, variables: dict[str, Any], prompts: Sequence[Sequence[int]], max_new_tokens: int,
             speculative: bool = False, temperature: float = 0.0, seed: int = 0,
             eos_id: int | None = None) -> Generation:
    """Continues each prompt.

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
    requests = [Request(tuple(map(int, prompt)), max_new_tokens, temperature, seed=seed, stream=i, stop_tokens=stop)
                for i, prompt in enumerate(prompts)]
    for request in requests:
        check_request(cfg, request)
    if not requests:
        return Generation([], 0, 0)
    longest = max(len(r.prompt) for r in requests) + max_new_tokens
    # Powers of two, so that calls that differ little share their compiled programs.
    engine = Engine(cfg, variables, EngineConfig(
        max_sequences=_round(min(len(requests), MOST_SEQUENCES)), max_length=_round(max(longest, 128)),
        depth=max(1, cfg.mtp_depth) if speculative else 0))
    sequences = [engine.submit(request) for request in requests]
    engine.run()
    return Generation([[token.id for token in s.made] for s in sequences], sum(s.drafted for s in sequences),
                      sum(s.accepted for s in sequences))


def _round(n: int) -> int:
    return 1 << (n - 1).bit_length()
