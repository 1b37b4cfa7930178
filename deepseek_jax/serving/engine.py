"""Continuous batching: sequences join and leave at any step, and share the pages of a common prefix.

First come, first served. A sequence is admitted when there is a slot and all the pages that it could ever need, so a
running sequence is never preempted. Each `step` reads at most one chunk, of one prompt or shared by several short ones,
then decodes all other sequences: a long prompt delays the running streams by one chunk at a time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import ConfigError, FP8Config, ModelConfig
from deepseek_jax.model.parts import check_parts
from deepseek_jax.model.router import check_routes_alone
from deepseek_jax.serving import latent_cache
from deepseek_jax.serving.decode import Batch, PromptChunk, Scores, Steps, decode, prefill
from deepseek_jax.serving.decode_attention import CacheGeometry
from deepseek_jax.serving.expert_placement import Placement, apply
from deepseek_jax.serving.page_pool import Pages, digests
from deepseek_jax.serving.sampling import Sampling
from deepseek_jax.serving.sequence import Listener, Request, Sequence, Token
from deepseek_jax.serving.speculative import no_drafts
from deepseek_jax.serving.tiles import TILE
from deepseek_jax.serving.weights import prepare, share_out


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The capacity of an engine.

    max_sequences: sequences that run at once.
    max_length: tokens of prompt and continuation together, rounded up to full pages.
    depth: tokens drafted in each step, by the MTP modules; 0: plain decoding.
    pages: of the cache; None: enough for max_sequences of full length.
    cache: format of the latents: float32, bfloat16 or fp8; None: as the model computes.
    chunk: maximum prompt tokens read in one step.
    most_steps: decoding steps run at once while no sequence waits: streams get their tokens that often.
    deterministic: results of a sequence do not depend, to the last bit, on other sequences, on chunks, on the cache or,
      at temperature 0, on drafts; slower (see `tiles`). Without it this holds up to rounding.
    routes: whether to report the experts of every token; prompts are then always read, even if they are in the cache.
    """

    max_sequences: int = 8
    max_length: int = 2048
    depth: int = 0
    pages: int | None = None
    page_size: int = 32
    cache: str | None = None
    chunk: int = 256
    most_steps: int = 8
    deterministic: bool = False
    routes: bool = False


class Engine:
    """Generation for one model. `step` is for one thread; `submit` and `cancel` may be called from any.

    Args:
      mesh: a mesh of `parallel.mesh.make_mesh`, whose `node` and `local` axes share the experts; None: one device.
    Raises:
      ConfigError: a model or a cache that cannot be served.
    """

    def __init__(self, cfg: ModelConfig, variables: dict[str, Any], options: EngineConfig = EngineConfig(),
                 mesh: jax.sharding.Mesh | None = None):
        depth, max_sequences, page_size, chunk = (options.depth, options.max_sequences, options.page_size,
                                                  options.chunk)
        check_servable(cfg)
        if depth and not cfg.mtp_depth:
            raise ConfigError("this model has no MTP module (model.mtp_depth=0), so there is nothing to draft with; "
                              "draft none (--depth 0, or no --speculative).")
        # The FP8 recipe is for training: it does not cover absorbed products.
        self.cfg = cfg = dataclasses.replace(cfg, fp8=FP8Config())
        if cfg.index_warmup:  # then attention is dense
            self.cfg = cfg = dataclasses.replace(cfg, index_topk=None, index_warmup=False)
        self.depth, self.max_sequences = depth, max_sequences
        self.modules = min(depth, cfg.mtp_depth)
        width = -(-options.max_length // page_size)
        self.max_length = width * page_size
        pages = width * max_sequences if options.pages is None else options.pages
        kind = options.cache or cfg.dtype
        latent_cache.check_room(cfg, kind, pages * page_size, self.modules)
        self.pool = Pages(pages, page_size)
        self.geometry = CacheGeometry(kind, page_size, widths(width, page_size), options.deterministic,
                                      options.routes)
        self.sizes = batch_sizes(max_sequences, TILE if options.deterministic else 1)
        self.chunks = tuple(sorted({min(c, chunk) for c in (16, 64, chunk)}))
        self.most_rows = {c: min(chunk // c, max_sequences) for c in self.chunks}  # prompts read at once
        self.most_steps = options.most_steps
        self.mesh = mesh
        self.weights = share_out(prepare(cfg, variables, self.modules), mesh)
        self._cache = share_out(latent_cache.make(cfg, kind, self.pool.total + 1, page_size, self.modules), mesh)
        self._drafts = share_out(no_drafts(cfg, max_sequences + 1, depth), mesh)  # the last slot pads batches
        self._slots = list(range(max_sequences - 1, -1, -1))
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.reading: list[Sequence] = []
        self.running: list[Sequence] = []
        self.loads_LE = np.zeros((cfg.num_moe_layers, cfg.num_experts), np.int64)
        # tokens, drafted, accepted, steps, prompt_tokens, reused_tokens, errors
        self.totals = collections.Counter()
        self._news = threading.Condition()

    def submit(self, request: Request, listen: Listener | None = None) -> Sequence:
        """Queues a request. `listen` is called from `step`, and a last time without tokens when the sequence has ended
        (from `cancel` if that ends it while it waits).

        Raises:
          ConfigError: a request that this engine can never run.
        """
        check_request(self.cfg, request)
        if len(request.prompt) + request.max_new_tokens > self.max_length:
            raise ConfigError(f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones are "
                              f"more than the {self.max_length} that this engine holds.")
        sequence = Sequence(request, listen)
        if self.pool.pages_of(sequence.limit) > self.pool.total:
            raise ConfigError(f"{sequence.limit} tokens need more than the {self.pool.total} pages of the cache.")
        with self._news:
            self.waiting.append(sequence)
            self._news.notify_all()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence: a waiting one at once, which frees its place, others before the next step."""
        with self._news:
            sequence.cancelled = True
            waits = sequence in self.waiting
            if waits:
                self.waiting.remove(sequence)
            self._news.notify_all()
        if waits:
            _finish(sequence, "cancelled")

    def cancel_all(self) -> None:
        """Ends every sequence before the next step."""
        for sequence in (*self.waiting, *self.reading, *self.running):
            self.cancel(sequence)

    def place(self, sequence: Sequence) -> int:
        """Its place in the queue, from 1; 0 once it has been admitted."""
        with self._news:
            return self.waiting.index(sequence) + 1 if sequence in self.waiting else 0

    @property
    def busy(self) -> bool:
        """Whether any sequence waits, reads its prompt or runs."""
        return bool(self.waiting or self.reading or self.running)

    def wait(self, timeout: float | None = None) -> None:
        """Sleeps until there is something to do, at most `timeout` seconds."""
        with self._news:
            self._news.wait_for(lambda: self.busy, timeout)

    def run(self) -> None:
        """Steps until everything submitted has ended."""
        while self.busy:
            self.step()

    def step(self) -> None:
        """Ends cancelled sequences, admits those that fit, reads one chunk of a prompt, decodes all others."""
        for sequence in [s for s in (*self.reading, *self.running) if s.cancelled]:
            self._end(sequence, "cancelled")
        self._admit()
        if self.reading:
            self._read()
        if self.running:
            self._decode()

    def warm_up(self, report: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Compiles every program that requests can need; calls `report(done, of)` after each."""
        programs = [functools.partial(self._prefill, [], [], length, rows) for length in self.chunks
                    for rows in sorted({1, self.most_rows[length]})]
        programs += [functools.partial(self._run, [], size, 1, True) for size in self.sizes]
        for i, program in enumerate(programs):
            report(i, len(programs))
            program()
        report(len(programs), len(programs))

    def apply_placement(self, placement: Placement) -> None:
        """Applies a placement of experts. A different number of places recompiles the next steps; see `warm_up`."""
        self.weights = share_out(apply(self.weights, placement), self.mesh)

    def _in_use(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def live_bytes(self) -> int:
        """Bytes of the pages that sequences own."""
        row = sum(math.prod(pages.shape[2:]) * pages.dtype.itemsize for pages in jax.tree.leaves(self._cache))
        return self.pool.owned * self.pool.page_size * row

    def _next(self) -> Sequence | None:
        with self._news:
            return self.waiting[0] if self.waiting else None

    def _admit(self):
        while self._slots and (sequence := self._next()) is not None:
            prompt, size = sequence.request.prompt, self.pool.page_size
            # The last token is always fed; a second module that drafts needs the one before it to be read again.
            shared = self.pool.find(prompt)[:(len(prompt) - 1 - max(0, self.modules - 1)) // size]
            if sequence.request.prompt_logprobs or self.geometry.routes:  # pages do not have these
                shared = []
            needed = self.pool.pages_of(sequence.limit) - len(shared)
            if needed + sum(map(self.pool.idle, shared)) > self.pool.available:
                return
            with self._news:
                if sequence.cancelled:  # this removes it from the queue
                    continue
                self.waiting.popleft()
            for page in shared:
                self.pool.share(page)
            self.pool.reserve(needed)
            sequence.pages, sequence.reserved = shared, needed
            sequence.slot, sequence.fresh, sequence.admitted = self._slots.pop(), True, time.monotonic()
            sequence.filled = sequence.reused = len(shared) * size
            sequence.registered = len(shared)
            sequence.digest = [b"", *digests(prompt[:sequence.filled], size)][-1]
            self.totals["reused_tokens"] += sequence.reused
            unread = sequence.filled < len(prompt) - 1
            if sequence.request.max_new_tokens == 0 and not (unread and sequence.request.prompt_logprobs):
                self._end(sequence, "length")
            elif unread:
                self.reading.append(sequence)
            else:
                self.running.append(sequence)

    def _read(self):
        """One chunk: as much of the first prompt as fits, and parts of others that fit next to it."""
        left = lambda s: len(s.request.prompt) - 1 - s.filled
        length = next(c for c in self.chunks if c >= min(left(self.reading[0]), self.chunks[-1]))
        rows = 1 if len(self.reading) == 1 else self.most_rows[length]
        batch = self.reading[:rows]
        counts = [min(left(s), length) for s in batch]
        for sequence, count in zip(batch, counts):
            self._grow(sequence, sequence.filled + count)
        self._prefill(batch, counts, length, rows)
        for sequence, count in zip(batch, counts):
            sequence.filled += count
            self.totals["prompt_tokens"] += count
            self._register(sequence)
            if left(sequence) > 0:
                continue
            if sequence.request.max_new_tokens == 0:
                self._end(sequence, "length")
            else:
                self.reading.remove(sequence)
                self.running.append(sequence)

    def _prefill(self, batch: list[Sequence], counts: list[int], length: int, rows: int):
        """Calls the compiled program on `counts` tokens of each prompt, padded to `length` and `rows`."""
        ahead = max(1, self.modules)
        tokens_BX: Any = np.zeros((rows, length + ahead), np.int32)
        for row, sequence, count in zip(tokens_BX, batch, counts):
            part = sequence.request.prompt[sequence.filled:sequence.filled + count + ahead]
            row[:len(part)] = part
        of = lambda values, fill=0: _padded(values, rows, np.int32, fill)
        chunk = PromptChunk(
            tokens_BX=tokens_BX, position_B=of(s.filled for s in batch), length_B=of(counts),
            known_B=of(len(s.request.prompt) for s in batch), slot_B=of((s.slot for s in batch), self.max_sequences),
            table_BP=self._tables(batch, rows), scored=np.bool_(any(s.request.prompt_logprobs for s in batch)))
        with self._in_use():
            self._cache, self._drafts, routed, scores = prefill(
                self.cfg, self.geometry, self.weights, self._cache, self._drafts, chunk)
        self.loads_LE += np.asarray(routed.counts)
        if routed.chosen is not None:
            for sequence, count, chosen_TLK in zip(batch, counts, np.asarray(routed.chosen)):
                sequence.routes += list(chosen_TLK[:count])
        if chunk.scored:
            scores = Scores(*map(np.asarray, scores))
            for b, (sequence, count) in enumerate(zip(batch, counts)):
                if sequence.request.prompt_logprobs:
                    sequence.scored += [_scored(tokens_BX[b, t + 1], scores, (b, t)) for t in range(count)]

    def _decode(self):
        """Some steps of every sequence whose prompt has been read."""
        left = [s.limit + 1 - len(s.tokens) for s in self.running]
        steps = min(self.most_steps, max(left))
        if self.reading:
            steps = 1
        elif self.waiting:
            steps = min(steps, min(left))
        batch = list(self.running)
        for sequence in batch:
            self._grow(sequence, min(sequence.limit, len(sequence.tokens) - 1 + steps * (self.depth + 1)))
        size = next(b for b in self.sizes if b >= len(batch))
        made = self._run(batch, size, steps, any(s.request.logprobs for s in batch))
        self.totals["steps"] += int((made.count_NB > 0).any(axis=1).sum())
        for b, sequence in enumerate(batch):
            sequence.fresh = False
            self._take(sequence, b, made, steps)

    def _run(self, batch: list[Sequence], size: int, steps: int, logprobs: bool) -> Steps:
        """Calls the compiled program on a batch padded to `size`; results as NumPy arrays, logprobs if requested."""
        of = lambda get, dtype, fill=0: _padded(map(get, batch), size, dtype, fill)
        sampling = Sampling(*(of(lambda s, name=name: getattr(s.request, name), dtype, fill) for name, dtype, fill in (
            ("temperature", np.float32, 0), ("top_k", np.int32, 0), ("top_p", np.float32, 1), ("seed", np.uint32, 0),
            ("stream", np.uint32, 0))))
        rows = Batch(
            slot_B=of(lambda s: s.slot, np.int32, self.max_sequences), token_B=of(lambda s: s.tokens[-1], np.int32),
            position_B=of(lambda s: len(s.tokens) - 1, np.int32), limit_B=of(lambda s: s.limit, np.int32),
            fresh_B=of(lambda s: s.fresh, bool, True), table_BP=self._tables(batch, size),
            sampling=sampling, steps=np.int32(steps), logprobs=np.bool_(logprobs))
        with self._in_use():
            self._cache, self._drafts, made = decode(
                self.cfg, self.geometry, self.most_steps, self.weights, self._cache, self._drafts, rows)
        fetch = lambda x: jax.tree.map(np.asarray, x)
        # Logprobs that nobody requested stay on the device.
        made = made._replace(scores=fetch(made.scores) if logprobs else made.scores,
                             **{name: fetch(x) for name, x in made._asdict().items() if name != "scores"})
        self.loads_LE += made.counts_LE
        return made

    def _take(self, sequence: Sequence, b: int, made: Steps, steps: int):
        """Adds the new tokens to a sequence, up to where it stops or its listener stops it."""
        new, finish, taken = [], None, []  # taken: for each step, its first token's index in `new`, drafted, accepted
        for n in range(steps):
            count, drafted, accepted = (int(x[n, b]) for x in (made.count_NB, made.drafted_NB, made.accepted_NB))
            if not made.finite_NB[n, b]:
                finish = "error"
                break
            taken += [(len(new), drafted, accepted)] if count else []
            if made.chosen_NBTLK is not None:
                sequence.routes += list(np.asarray(made.chosen_NBTLK[n, b, :count]))
            for t in range(count):
                draft = "accepted" if t < accepted else "rejected" if t < drafted else "none"
                token = Token(int(made.tokens_NBT[n, b, t]), draft)
                if sequence.request.logprobs:
                    token = _scored(token.id, made.scores, (n, b, t), draft)
                if token.id in sequence.request.stop_tokens:
                    sequence.end, finish = token, "stop"
                    break
                new.append(token)
                sequence.tokens.append(token.id)
            if finish:
                break
        if finish is None and len(sequence.tokens) > sequence.limit:
            finish = "length"
        self._register(sequence)
        if new and sequence.listen is not None:
            kept = sequence.listen(sequence, new)
            if kept is not None:  # tokens after that are neither part of it nor counted
                taken = [(first, drafted, min(accepted, kept - first)) for first, drafted, accepted in taken
                         if first < max(kept, 1)]
                new, finish = new[:kept], "stop"
        drafted, accepted = (sum(step[i] for step in taken) for i in (1, 2))
        sequence.made += new
        sequence.steps += len(taken)
        sequence.drafted += drafted
        sequence.accepted += accepted
        self.totals.update(tokens=len(new), drafted=drafted, accepted=accepted, errors=finish == "error")
        if finish:
            self._end(sequence, finish)

    def _end(self, sequence: Sequence, finish: str):
        """Releases everything that a sequence owns."""
        for queue in (self.reading, self.running):
            if sequence in queue:
                queue.remove(sequence)
        for page in reversed(sequence.pages):  # the end of a prefix is dropped before its beginning
            self.pool.release(page)
        self.pool.cancel(sequence.reserved)
        sequence.pages, sequence.reserved = [], 0
        if sequence.slot >= 0:
            self._slots.append(sequence.slot)
            sequence.slot = -1
        _finish(sequence, finish)

    def _grow(self, sequence: Sequence, positions: int):
        """Takes the pages that the first `positions` positions need."""
        while len(sequence.pages) < self.pool.pages_of(positions):
            sequence.pages.append(self.pool.take())
            sequence.reserved -= 1

    def _tables(self, batch: list[Sequence], size: int) -> Any:
        """The pages of each sequence, padded to `size` rows."""
        table_BP = np.zeros((size, self.geometry.widths[-1]), np.int32)
        for row, sequence in zip(table_BP, batch):
            row[:len(sequence.pages)] = sequence.pages
        return table_BP

    def _register(self, sequence: Sequence):
        """Makes pages available to other sequences once all their latents are final: module k looks k tokens ahead."""
        size = self.pool.page_size
        final = min(sequence.filled if sequence in self.reading else math.inf,
                    len(sequence.tokens) - max(1, self.modules))
        while (sequence.registered + 1) * size <= final:
            start = sequence.registered * size
            (sequence.digest,) = digests(sequence.tokens[start:start + size], size, sequence.digest)
            self.pool.register(sequence.pages[sequence.registered], sequence.digest)
            sequence.registered += 1


def _finish(sequence: Sequence, finish: str):
    sequence.finish = finish
    if sequence.listen is not None:
        sequence.listen(sequence, [])


def _scored(token: int, scores: Scores, at: tuple[int, ...], draft: str = "none") -> Token:
    """A token with its logprob and the likeliest ones at that place."""
    best = zip(scores.best_BTX[at].tolist(), scores.best_logprob_BTX[at].tolist())
    return Token(int(token), draft, float(scores.logprob_BT[at]), tuple(best))


def check_servable(cfg: ModelConfig) -> None:
    """Raises ConfigError for a model with parts that decoding does not support."""
    if cfg.attention != "mla":
        raise ConfigError(f"model.attention={cfg.attention!r} trains only: decoding reads a cache of MLA's latents.")
    check_parts(cfg)
    check_routes_alone(cfg, "decoding")


def check_request(cfg: ModelConfig, request: Request) -> None:
    """Raises ConfigError, naming the field, for a request that no engine of this model can run."""
    r = request
    if not r.prompt or not all(0 <= t < cfg.vocab_size for t in r.prompt):
        raise ConfigError(f"a prompt must hold at least one token id, each in [0, {cfg.vocab_size}).")
    if r.max_new_tokens < 0 or not 0 <= r.temperature < math.inf:
        raise ConfigError(f"max_new_tokens={r.max_new_tokens}, temperature={r.temperature}: neither can be negative, "
                          "or infinite.")
    if not 0 <= r.top_k < 2**31 or not 0 < r.top_p <= 1:
        raise ConfigError(f"top_k={r.top_k} must lie in [0, 2^31), and top_p={r.top_p} in (0, 1].")
    if not 0 <= r.seed < 2**32:
        raise ConfigError(f"seed={r.seed} must lie in [0, 2^32).")


def _padded(values: Iterable, size: int, dtype: Any, fill: Any) -> Any:
    """A NumPy array of `size` values, which a compiled program accepts like a jax.Array."""
    array = np.full(size, fill, dtype)
    for i, value in enumerate(values):
        array[i] = value
    return array


def batch_sizes(most: int, unit: int = 1) -> tuple[int, ...]:
    """The compiled sizes: powers of two and the largest, each times `unit`; enough for `most` sequences."""
    most = -(-most // unit)
    return tuple(unit * size for size in sorted({min(1 << i, most) for i in range(most.bit_length() + 1)}))


def widths(pages: int, page_size: int) -> tuple[int, ...]:
    """Table lengths that attention is compiled for: about 64 tokens, then doubling."""
    first = max(1, 64 // page_size)
    return tuple(sorted({min(first << i, pages) for i in range(pages.bit_length() + 1)}))
