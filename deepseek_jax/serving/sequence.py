"""A request in progress: its parameters, its tokens so far, and its listener. No arrays, no device."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. Sampling as in `sampling.Sampling`.

    stop_tokens: each ends the sequence, and is not part of it. logprobs: whether to report them.
    prompt_logprobs: whether to report those of the prompt too; then all of it is read, even if it is in the cache.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0
    stop_tokens: frozenset[int] = frozenset()
    logprobs: bool = False
    prompt_logprobs: bool = False


class Token(NamedTuple):
    """A new token. `draft`: "accepted", or "rejected" (another was drafted in its place), or "none"."""

    id: int
    draft: str
    logprob: float = 0.0
    best: tuple[tuple[int, float], ...] = ()  # the likeliest tokens here and their logprobs, if requested


class Sequence:
    """A request in progress.

    finish: None until it ends: "stop", "length", "cancelled", or "error" if logits were not finite.
    scored: for each token of the prompt except the first, if requested: its logprob and the likeliest ones. routes: for
    each token that was fed, in order, if the engine reports them: its experts, int32 [MoE layers, K].
    end: the stop token that ended it, which is not part of it.
    submitted, admitted: when, in seconds of `time.monotonic`.
    """

    def __init__(self, request: Request, listen: Listener | None):
        self.request, self.listen = request, listen
        self.tokens = list(request.prompt)
        self.made: list[Token] = []
        self.finish: str | None = None
        self.cancelled = False
        self.drafted = self.accepted = self.steps = 0
        self.slot = -1
        self.fresh = True  # whether the drafts in its slot are still another sequence's
        self.filled = 0  # positions in the cache
        self.pages: list[int] = []
        self.reserved = 0
        self.registered, self.digest = 0, b""  # full pages that others can find, and the digest of the last
        self.reused = 0  # tokens of the prompt that were found in the cache
        self.scored: list[Token] = []
        self.routes: list[np.ndarray] = []
        self.end: Token | None = None
        self.submitted, self.admitted = time.monotonic(), math.nan

    @property
    def limit(self) -> int:
        """The position at which it ends: the last token is never fed."""
        return len(self.request.prompt) + self.request.max_new_tokens - 1


# Called with a sequence and its new tokens. A returned number ends it after that many of them. None: it continues.
Listener = Callable[[Sequence, list[Token]], int | None]
