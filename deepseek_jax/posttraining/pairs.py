"""Preference pairs from .jsonl files, and their batches, which are a pure function of the step.

    {"prompt": [{"role": "user", "content": "1 + 1?"}], "chosen": [{"role": "assistant", "content": "2"}],
     "rejected": [{"role": "assistant", "content": "3"}]}

Messages are those of OpenAI's API and are rendered by the checkpoint's chat template. All three may be strings instead:
plain text as in rows of `prompt` and `answer`. A pair takes two rows of a batch, the chosen answer first; the rest of a
row repeats it and does not count. Pairs are kept in memory.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.chat.conversation import Turn, check_template, last_turn, told_of
from deepseek_jax.chat.messages import BadMessages, Conventions, check_messages, is_unicode
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data.corpus import find_cut, hash_position, open_lines
from deepseek_jax.data.examples import Mixture
from deepseek_jax.data.position import Position, beginning
from deepseek_jax.data.prepare import Source
from deepseek_jax.data.tokenizer import Tokenizer

SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """Two answers to one prompt, each including the prompt. name: file and line."""

    name: str
    chosen: Turn
    rejected: Turn


def read_pairs(source: Source, tokenizer: Tokenizer, text: Callable[[], Conventions]) -> Iterator[Pair]:
    """The pairs in the files of a source, in their order.

    Args:
      text: the checkpoint's tokenizer and template; loaded if there are pairs.
    Raises:
      ConfigError: a row that is not a pair, with its file and line.
    """
    for file in source.files:
        if file.fault or not file.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            raise ConfigError(f"data.sources: {file.path} {file.fault or 'is no file of pairs'}; give .jsonl files.")
        with open_lines(file.path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{file.path}, line {number}"
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    yield pair_of(f"{file.name}#{number}", row, tokenizer, text())
                except (BadMessages, ValueError, RecursionError) as error:
                    if isinstance(error, ConfigError):
                        raise
                    raise ConfigError(f"{where}: {str(error).removesuffix('.')}; a pair is an object with prompt, "
                                      "chosen and rejected, either messages or strings.") from error


def pair_of(name: str, row: Any, tokenizer: Tokenizer, text: Conventions) -> Pair:
    """A row as a pair. Raises as `turn_of`, and ValueError for answers whose prompts the template renders
    differently."""
    chosen, rejected = (turn_of(row, side, tokenizer, text) for side in SIDES)
    if chosen.ids[:chosen.start] != rejected.ids[:rejected.start]:
        raise ValueError("the chat template opens the two answers differently, because only one has reasoning_content; "
                         "give it to both, or to neither")
    return Pair(name, chosen, rejected)


def turn_of(row: Any, side: str, tokenizer: Tokenizer, text: Conventions) -> Turn:
    """A row's prompt with one of its answers. Raises BadMessages, or ValueError for a row that has neither."""
    prompt, answer = (row.get(key) for key in ("prompt", side)) if isinstance(row, dict) else (None, None)
    if isinstance(prompt, str) and isinstance(answer, str):
        if not is_unicode(prompt + answer):
            raise ValueError("it holds half a character (a lone surrogate)")
        ids = [*([tokenizer.bos] if text.begins else []), *tokenizer.encode(prompt)]
        both = [*ids, *tokenizer.encode(answer), tokenizer.eos]
        return Turn(both, len(ids), len(both))
    if not isinstance(prompt, list) or not isinstance(answer, list):
        raise ValueError(f"prompt and {side} are not two lists of messages, nor two strings")
    check_template(tokenizer, text)
    if len(answer) != 1 or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
        raise ValueError(f"{side} is not one message of the role assistant")
    checked = check_messages([*prompt, *answer], calls=True)
    turn = last_turn(checked, tokenizer, text, told_of(row.get("tools")))
    return turn._replace(ids=turn.ids[:turn.stop])


class Held(NamedTuple):
    """The pairs of a source that fit into a sequence. left_out: the number of those that do not."""

    train: list[Pair]
    validation: list[Pair]
    left_out: int


def hold(source: Source, tokenizer: Tokenizer, text: Callable[[], Conventions], longest: int) -> Held:
    """Reads the pairs of a source that have at most `longest` tokens. Raises ConfigError if none is left to train
    on."""
    pairs = list(read_pairs(source, tokenizer, text))
    fits = [pair for pair in pairs if max(len(pair.chosen.ids), len(pair.rejected.ids)) <= longest]
    if pairs and not fits:
        raise ConfigError(f"data.sources: {source.path} has no pair of at most {longest} tokens; raise "
                          "train.sequence_length.")
    cut = find_cut((hash_position(pair.name) for pair in fits), source.validation_fraction, source.path)
    assert cut is not None  # sources of a training run have a fraction
    held_out = [hash_position(pair.name) <= cut for pair in fits]
    return Held([pair for pair, out in zip(fits, held_out) if not out],
                [pair for pair, out in zip(fits, held_out) if out], len(pairs) - len(fits))


class PairLoader:
    """Batches of pairs by step, and the held-out pairs: the counterpart of `data.loader.Loader` for documents.

    Args:
      sources: pairs of each of data.sources. host, hosts: this process reads the host-th of `hosts` equal parts.
    Raises:
      ConfigError: a micro-batch does not give each process an integer number of pairs.
    """

    def __init__(self, config: Config, sources: list[Held], tokenizer: Tokenizer, host: int = 0, hosts: int = 1):
        self.config, self.sources, self.tokenizer = config, sources, tokenizer
        self.host, self.hosts = host, hosts
        rows = config.train.batch_size // config.train.accumulation_steps
        if rows % (2 * hosts):
            raise ConfigError(f"a micro-batch of {rows} sequences (train.batch_size / train.accumulation_steps) must "
                              f"be pairs for each of {hosts} processes; make it a multiple of {2 * hosts}.")
        self.pairs = rows // hosts // 2  # of a micro-batch here
        self.position = beginning(config)
        self.mixture = Mixture(tuple(weight for _, weight in config.data.sources), config.train.seed)
        self.order = functools.lru_cache(maxsize=2 * len(sources))(lambda source, epoch: np.random.default_rng(
            [config.train.seed, source, epoch]).permutation(len(sources[source].train)))

    def continue_at(self, position: Position) -> None:
        """Sets the position of a run whose batch ramp was changed, which depends on train.steps. Its sources and batch
        size are the same (`history.OF_DOCUMENTS`), and so is the order of the pairs."""
        self.position = position

    def pair(self, g: int) -> Pair:
        """The g-th pair of the run: every epoch of a source has each pair once, in a new order."""
        source, j = self.mixture.locate(g)
        pairs = self.sources[source].train
        epoch, place = divmod(j, len(pairs))
        return pairs[int(self.order(source, epoch)[place])]

    def batch(self, step: int) -> dict[str, Any]:
        """This host's part of step `step`, in the form of `data.loader.Loader.batch`."""
        train = self.config.train
        active = self.config.microbatches_at(step)
        first = self.position.sequences_before(self.config, step) // 2
        micro = [self.rows_of([self.pair(first + (m * self.hosts + self.host) * self.pairs + i)
                               for i in range(self.pairs)] if m < active else [])
                 for m in range(train.accumulation_steps)]
        return {name: np.stack([part[name] for part in micro]) for name in micro[0]} | {"active": np.int32(active)}

    def rows_of(self, pairs: list[Pair]) -> dict[str, np.ndarray]:
        """One micro-batch [2 * self.pairs, T + 1]; rows without a pair are zeros."""
        shape = 2 * self.pairs, self.config.train.sequence_length + 1
        tokens_BT, weights_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for b, turn in enumerate(turn for pair in pairs for turn in (pair.chosen, pair.rejected)):
            # Text, not one repeated token: the experts' loads are counted over the filler too.
            tokens_BT[b] = np.resize(np.asarray(turn.ids, np.int32), shape[1])
            weights_BT[b, turn.start:turn.stop] = 1
        return {"tokens": tokens_BT, "weights": weights_BT, "segment_ids": np.ones(shape, np.int32)}

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """(step, batch) from `start_step` to the end of the run."""
        return ((step, self.batch(step)) for step in range(start_step, self.config.train.steps))

    def validation_batches(self, limit: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The held-out pairs in micro-batches, `limit` of them (0: all); the last may lack pairs."""
        pairs = [pair for source in self.sources for pair in source.validation]
        together = self.pairs * self.hosts
        for number, first in enumerate(range(0, len(pairs), together)):
            if limit and number == limit:
                return
            own = pairs[first:first + together][self.host * self.pairs:(self.host + 1) * self.pairs]
            yield self.rows_of(own)
