"""Batches: a pure function of the step, so that a resumed run continues exactly where it stopped.

Step s holds the global sequences that follow `Position.sequences_before(s)`. They fill its micro-batches in order, and
each host reads the rows of a micro-batch that its devices hold: more hosts or a restart change who reads a row, not
which.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data.blocks import BlockStream
from deepseek_jax.data.examples import Fim, Packed, Stream, Window, sequence
from deepseek_jax.data.packing import WholeDocuments
from deepseek_jax.data.position import Position, beginning
from deepseek_jax.data.prepare import OLD_ORDER, Prepared
from deepseek_jax.data.validation import Validation, WholeValidation


class Loader:
    """Training batches by step, and the validation set.

    Args:
      host, hosts: this process reads the host-th of `hosts` equal parts of every micro-batch.
      places: the positions of its rows in a micro-batch, in order; None: contiguous.
    """

    def __init__(self, config: Config, prepared: Prepared, host: int = 0, hosts: int = 1,
                 places: Sequence[int] | None = None):
        train, tokenizer = config.train, prepared.tokenizer
        self.config, self.prepared = config, prepared
        self.train, self.prefetch, self.host, self.hosts = train, config.data.prefetch, host, hosts
        rows = train.batch_size // train.accumulation_steps
        if rows % hosts:
            raise ConfigError(f"a micro-batch of {rows} sequences (train.batch_size / train.accumulation_steps) cannot "
                              f"be shared by {hosts} hosts; make it a multiple.")
        self.tokenizer = tokenizer
        self.rows = rows // hosts
        self.places = range(host * self.rows, (host + 1) * self.rows) if places is None else places
        self.validation = _validation(config, prepared)
        self.sources = short_names([meta["source"] for meta in prepared.sources])
        self.streams = []
        if prepared.train:
            self.continue_at(beginning(config))

    def continue_at(self, position: Position) -> None:
        """Sets the position of a run whose config was changed."""
        self.position, self.mixture = position, position.mixture(self.config)
        self.streams = _streams(self.config, self.prepared, position)

    def sequence(self, g: int) -> Window:
        """The g-th sequence of the run, as a Window of T + 1 tokens."""
        source, j = self.mixture.locate(g)
        stream, length = self.streams[source], self.train.sequence_length
        if isinstance(stream, WholeDocuments):
            return stream.sequence(j)
        return sequence(stream, stream.shuffled(j, length), length)

    def batch(self, step: int) -> dict[str, Any]:
        """This host's part of step `step`.

        Returns:
          tokens, segment_ids: int32 [accumulation_steps, rows, T + 1]; segments count documents within a row, from 1;
            0 is filling.
          weights: float32, same shape: 1 where a token is a target; 0 for prompts and for the first of a row, which
            is the last target of the sequence before.
          active: int32, how many micro-batches this step uses: accumulation steps, or micro-batches of a pipeline with
            a batch ramp. The rows of the others are all zeros.
        """
        shape = (self.train.accumulation_steps, self.rows, self.train.sequence_length + 1)
        tokens_MBT, segments_MBT = np.zeros((2, *shape), np.int32)
        weights_MBT = np.zeros(shape, np.float32)
        active = self.config.microbatches_at(step)
        first = self.position.sequences_before(self.config, step)
        count = self.config.sequences_at(step)
        for m in range(self.train.accumulation_steps):
            for row, place in enumerate(self.places):
                at = m * self.hosts * self.rows + place
                if at >= count:
                    continue
                window = self.sequence(first + at)
                tokens_MBT[m, row], segments_MBT[m, row] = window.tokens_T, window.segments_T
                weights_MBT[m, row, 1:] = window.predicted_T[1:]
        return {"tokens": tokens_MBT, "weights": weights_MBT, "segment_ids": segments_MBT, "active": np.int32(active)}

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, batch as `batch` returns it) from `start_step` to the end of the run, read ahead in threads."""
        steps = grain.MapDataset.range(start_step, self.train.steps).map(lambda step: (int(step), self.batch(step)))
        # Two threads hide page faults of the memory map; more would only wait for Python's lock.
        options = grain.ReadOptions(num_threads=min(2, self.prefetch), prefetch_buffer_size=self.prefetch)
        return iter(steps.to_iter_dataset(options))

    def validation_batches(self, rows: int, limit: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Batches of tokens, weights, segment_ids [rows, T + 1] of this host: `limit` of them, evenly spread (0:
        all)."""
        return self.validation.batches(rows, limit, self.host, self.hosts)

    def weights_by_source(self, batch: int, rows: int, weights_BT: np.ndarray) -> dict[str, np.ndarray]:
        """The weights of validation batch number `batch`, separately for each source with targets in it.

        All hosts get the same sources, each with its own rows. None if the held-out text has a single source.
        """
        if len(self.validation.shards) == 1:
            return {}
        inside = self.validation.sources_of(batch, rows * self.hosts)
        first = (batch * self.hosts + self.host) * rows
        return {self.sources[s]: self.validation.only(s, weights_BT, first) for s in inside}

    def validation_bytes(self, rows: int, limit: int = 0) -> int:
        """UTF-8 bytes of the tokens that `validation_batches(rows, limit)` scores, over all hosts."""
        return self.validation.bytes(rows * self.hosts, limit)


def short_names(paths: Sequence[str]) -> list[str]:
    """Names for different paths, independent of their order: for each, the shortest unique end of the path.

    A path without a unique end keeps its full name.
    """
    parts = [pathlib.PurePath(path).parts for path in paths]

    def name(path, own):
        others = [other for other, theirs in zip(parts, paths) if theirs != path]
        enough = (n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        n = next(enough, None)
        return path if n is None else pathlib.PurePath(*own[-n:]).as_posix()

    return [name(path, own) for path, own in zip(paths, parts)]


def _validation(config, prepared) -> Validation:
    length, byte_lengths_W = config.train.sequence_length, prepared.tokenizer.byte_lengths_W
    if config.data.packing == "stream":
        return Validation(prepared.validation, length, byte_lengths_W)
    held_out = [WholeDocuments(shard, 0, 0, length) for shard in prepared.validation]
    if not any(source.rows for source in held_out):
        raise ConfigError(f"data.sources: no held-out document has at most train.sequence_length={length} tokens; "
                          "raise it, or add some.")
    return WholeValidation(held_out, length, byte_lengths_W)


def _streams(config, prepared, position) -> Sequence[Packed] | list[WholeDocuments]:
    data, train, tokenizer = config.data, config.train, prepared.tokenizer
    numbers = [position.number(path) for path, _ in data.sources]
    if data.packing == "whole":
        made = [WholeDocuments(shard, train.seed, i, train.sequence_length)
                for i, shard in zip(numbers, prepared.train)]
        for (path, _), source in zip(data.sources, made):
            if not source.rows:
                raise ConfigError(f"data.sources: {path} has no training document of at most "
                                  f"train.sequence_length={train.sequence_length} tokens; raise it, or add some.")
        return made
    fim = Fim()
    if data.fim_rate > 0:
        if not tokenizer.has_fim:
            raise ConfigError("the tokenizer has no <|fim_begin|>, <|fim_hole|> and <|fim_end|>; add them or set "
                              "data.fim_rate=0.")
        fim = Fim(data.fim_rate, tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end)
    for (path, _), shard in zip(data.sources, prepared.train):
        if len(shard.tokens) < train.sequence_length + 1:
            raise ConfigError(f"data.sources: the training documents of {path} hold {len(shard.tokens)} tokens, fewer "
                              f"than the {train.sequence_length + 1} of one sequence; add text or set "
                              f"train.sequence_length={max(1, len(shard.tokens) - 1)} or less.")
    kind = Stream if prepared.order == OLD_ORDER else BlockStream
    return [kind(shard, train.seed, i, fim) for i, shard in zip(numbers, prepared.train)]
