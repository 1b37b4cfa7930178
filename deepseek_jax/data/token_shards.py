"""Tokens of one source on disk, memory-mapped: the result of tokenization, made once per corpus and tokenizer.

    shards-<key>/meta.json           counts and the options that made the key
    shards-<key>/{train,validation}/tokens.bin     flat uint16 or uint32: BOS tokens EOS, document after document
                                    documents.npy  int64 [N, 2]: tokens and UTF-8 bytes of each document
                                    predicted.bin  one bool a token, only where some part is not predicted

The key hashes everything the tokens depend on, so a change makes new shards; the folder is committed atomically, so an
interrupted one is never read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from deepseek_jax import io
from deepseek_jax.chat.conversation import conversation_ids
from deepseek_jax.chat.messages import PLAIN, BadMessages, Conventions
from deepseek_jax.data import corpus
from deepseek_jax.data.tokenizer import Tokenizer, split_tokens

_FORMAT = 3  # raise when the layout or the meaning of the files changes
_BATCH_BYTES = 4 << 20  # text tokenized at once
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """The documents of one split of one source. Document i is tokens[offsets_N[i]:offsets_N[i + 1]]."""

    tokens: np.ndarray
    offsets_N: np.ndarray  # int64, one more than there are documents
    bytes_N: np.ndarray  # int64, UTF-8 bytes
    predicted: np.ndarray | None = None  # bool per token; None: all

    @property
    def lengths_N(self) -> np.ndarray:
        return np.diff(self.offsets_N)

    def is_predicted(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, bool) if self.predicted is None else np.asarray(self.predicted[start:stop])

    @property
    def whole_N(self) -> np.ndarray:
        """bool: documents of which every token is predicted. Only those may be rearranged for FIM."""
        if self.predicted is None or not len(self.lengths_N):
            return np.ones(len(self.lengths_N), bool)
        return np.logical_and.reduceat(self.predicted, self.offsets_N[:-1])


@dataclasses.dataclass(frozen=True)
class Options:
    """How documents become tokens, apart from the tokenizer."""

    cut: int | None  # documents placed up to here are validation (corpus.find_cut); None: all of them
    split_rate: float = 0.0  # of punctuation-newline tokens, in training documents
    seed: int = 0
    text: Callable[[], Conventions] = lambda: PLAIN  # what the checkpoint says about chats; asked if there are any


def key(files_digest: str, tokenizer: Tokenizer, **options: Any) -> str:
    """The name of the shards that a corpus, a tokenizer and options make."""
    parts = json.dumps([_FORMAT, files_digest, tokenizer.digest, options], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def read(folder: str) -> tuple[dict[str, Shard], dict]:
    """The shards in a complete folder, by split, and meta.json."""
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
        meta = json.load(f)
    shards = {}
    for split in SPLITS:
        documents = np.load(os.path.join(folder, split, "documents.npy"))
        offsets_N = np.concatenate([[0], np.cumsum(documents[:, 0])])
        predicted = None
        if meta[split]["prompts"]:
            predicted = _map(os.path.join(folder, split, "predicted.bin"), bool)
        tokens = _map(os.path.join(folder, split, "tokens.bin"), meta["dtype"])
        shards[split] = Shard(tokens, offsets_N, documents[:, 1], predicted)
    return shards, meta


def _map(path, dtype):
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if os.path.getsize(path) else np.zeros(0, dtype)


def write(folder: str, documents: Iterable[corpus.Document], tokenizer: Tokenizer, options: Options, meta: dict,
          progress: tuple[str, int] = ("", 0)) -> None:
    """Tokenizes `documents` into `folder`, which appears only when it is complete.

    Args:
      meta: kept in meta.json, with what is counted here.
        A conversation that the chat template cannot take is logged, and counted as skipped.
      progress: what the progress line is called, and the bytes of text to expect.
    """
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    warn, meta = corpus.Warnings(), dict(meta)
    with io.building(folder, shared=True) as partial, contextlib.ExitStack() as files:
        files.callback(warn.close)
        writers = {}
        for split in SPLITS:
            writers[split] = _Writer(os.path.join(partial, split), dtype)
            files.callback(writers[split].abandon)
        with tqdm(total=progress[1], desc=progress[0], unit="B", unit_scale=True, leave=False) as line:
            for document, parts in _tokenized(documents, tokenizer):
                validation = options.cut is None or corpus.hash_position(document.name) <= options.cut
                try:
                    ids_T, predicted_T = _ids(document, parts, tokenizer, options, validation)
                except BadMessages as error:
                    warn(f"skipped {document.name}: {error}")
                    meta |= {"skipped": meta.get("skipped", 0) + 1, "documents": meta.get("documents", 1) - 1}
                    continue
                writers["validation" if validation else "train"].add(ids_T, predicted_T, document.bytes)
                line.update(document.bytes)
        meta = {**meta, "dtype": dtype, **{split: w.close() for split, w in writers.items()}}
        io.write_json(os.path.join(partial, "meta.json"), meta, indent=1)


def _tokenized(documents, tokenizer) -> Iterator[tuple[corpus.Document, list[list[int]]]]:
    """Each document with the ids of its parts. The library tokenizes a batch at a time, on all cores."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.bytes
        if size >= _BATCH_BYTES:
            yield from _tokenize_batch(batch, tokenizer)
            batch, size = [], 0
    yield from _tokenize_batch(batch, tokenizer)


def _tokenize_batch(batch, tokenizer):
    ids = iter(tokenizer.encode_batch([text for document in batch for text, _ in document.parts]))
    for document in batch:
        yield document, [next(ids) for _ in document.parts]


def _ids(document, parts, tokenizer, options: Options, validation) -> tuple[np.ndarray, np.ndarray]:
    if document.messages is None:
        return _join(document, parts, tokenizer, 0.0 if validation else options.split_rate, options.seed)
    ids, predicted = conversation_ids(list(document.messages), tokenizer, options.text(), list(document.tools))
    return np.array(ids, np.int64), np.array(predicted)


def _join(document, parts, tokenizer, split_rate, seed) -> tuple[np.ndarray, np.ndarray]:
    """BOS, the parts' ids, EOS; and which of them are predicted. BOS goes with the first part, EOS with the last."""
    flags = [flag for _, flag in document.parts]
    ids_T = np.array([tokenizer.bos, *(i for ids in parts for i in ids), tokenizer.eos], np.int64)
    lengths = [1, *map(len, parts), 1]
    predicted_T = np.repeat([flags[0], *flags, flags[-1]], lengths)
    if split_rate > 0:
        # Seeded by the name: a document is split the same way in every corpus.
        rng = np.random.default_rng([seed, corpus.hash_position(document.name)])
        ids_T, origin_T = split_tokens(ids_T, tokenizer.splits, split_rate, rng)
        predicted_T = predicted_T[origin_T]
    return ids_T, predicted_T


class _Writer:
    """Appends documents to the files of one split."""

    def __init__(self, folder, dtype):
        os.makedirs(folder)
        self.folder, self.dtype, self.documents, self.prompts = folder, dtype, [], False
        self.tokens = open(os.path.join(folder, "tokens.bin"), "wb")  # noqa: SIM115 (closed in close and abandon)
        self.predicted = open(os.path.join(folder, "predicted.bin"), "wb")  # noqa: SIM115

    def add(self, ids_T, predicted_T, size):
        ids_T.astype(self.dtype).tofile(self.tokens)
        predicted_T.tofile(self.predicted)
        self.prompts |= not predicted_T.all()
        self.documents.append((len(ids_T), size))

    def close(self) -> dict:
        """Completes the files; what meta.json says of them."""
        self.abandon()
        if not self.prompts:
            os.remove(os.path.join(self.folder, "predicted.bin"))
        documents = np.array(self.documents, np.int64).reshape(-1, 2)
        np.save(os.path.join(self.folder, "documents.npy"), documents)
        tokens, size = documents.sum(axis=0).tolist()
        return {"documents": len(documents), "tokens": tokens, "bytes": size, "prompts": bool(self.prompts)}

    def abandon(self):
        self.tokens.close()
        self.predicted.close()
