"""Tokens of one source on disk, memory-mapped: the result of tokenization, made once per corpus and tokenizer.

    shards-<key>/meta.json           counts and the options that made the key
    shards-<key>/files.jsonl         name, start of the stretch and SHA-256 of each file or stretch that was read
    shards-<key>/{train,validation}/tokens.bin     flat uint16 or uint32: BOS tokens EOS, document after document
                                    documents.npy  int64 [N, 2]: tokens and UTF-8 bytes of each document
                                    offsets.npy    int64 [N + 1]: tokens before each document (not in old ones)
                                    whole.npy      int64 [N + 1]: documents before each of which every token is
                                                   predicted; with predicted.bin only (not in old ones)
                                    predicted.bin  one bool a token, only where some part is not predicted

Shards that were made ahead (`ahead`) have their tokens in parts-<key>/00000/, 00001/, ..., each of which is such a
folder; shards-<key> is made when all parts are there, and holds the .npy of all of them.

The key hashes everything the tokens depend on, so a change makes new shards; the folder is committed atomically, so an
interrupted one is never read.
"""

from __future__ import annotations

import array
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from deepseek_jax import io, storage, working_files
from deepseek_jax.chat.conversation import conversation_ids
from deepseek_jax.chat.messages import PLAIN, BadMessages, Conventions
from deepseek_jax.config import ConfigError
from deepseek_jax.data import corpus
from deepseek_jax.data.permutation import permuted
from deepseek_jax.data.tokenizer import Tokenizer, split_tokens

FORMAT = 3  # raise when the layout or the meaning of the files changes
_BATCH_BYTES = 4 << 20  # text tokenized at once
SPLITS = ("train", "validation")
OPENED = 64  # parts of an array at once


class Joined:
    """The concatenation of arrays in parts; each is opened when it is read, since a mapped one keeps a file open.

    Args:
      lengths: of the arrays.
      part: function from a number to its array.
    """

    def __init__(self, lengths: Sequence[int], part: Callable[[int], np.ndarray]):
        self.starts = [0, *itertools.accumulate(lengths)]
        self._part = functools.lru_cache(maxsize=OPENED)(part)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        first = min(bisect.bisect_right(self.starts, start), len(self.starts) - 1) - 1
        last = max(bisect.bisect_left(self.starts, stop), first + 1)
        found = [self._part(i)[max(start - begin, 0):max(stop - begin, 0)]
                 for i, begin in enumerate(self.starts[first:last], first)]
        return found[0] if len(found) == 1 else np.concatenate(found)


Flat = np.ndarray | Joined


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """The documents of one split of one source. Document i is tokens[offsets_N[i]:offsets_N[i + 1]]."""

    tokens: Flat
    offsets_N: np.ndarray  # int64, one more than there are documents
    bytes_N: np.ndarray  # int64, UTF-8 bytes
    predicted: Flat | None = None  # bool per token; None: all
    whole_before_N: np.ndarray | None = None  # int64, N + 1: how many before each are in `whole_N`

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
        if self.whole_before_N is not None:
            return np.diff(self.whole_before_N) > 0
        return np.logical_and.reduceat(self.predicted[:], self.offsets_N[:-1])


def bounded(shard: Shard, most: int) -> Shard:
    """The first `most` tokens of the documents in a random order, returned in their original order; all if there are
    fewer.

    Only the parts that are read are in memory.
    """
    count, left = len(shard.offsets_N) - 1, most
    if not count or int(shard.offsets_N[-1]) <= most:
        return shard
    lengths: dict[int, int] = {}
    for i in range(count):
        document = permuted(i, count, 0)
        start, stop = shard.offsets_N[document:document + 2].tolist()
        lengths[document] = min(stop - start, left)
        if not (left := left - lengths[document]):
            break
    chosen_N = np.array(sorted(lengths))
    starts, sizes = shard.offsets_N[chosen_N].tolist(), [lengths[i] for i in chosen_N.tolist()]
    part = lambda array: Joined(sizes, lambda i: array[starts[i]:starts[i] + sizes[i]])
    whole_N = None if shard.whole_before_N is None else [shard.whole_before_N[i + 1] - shard.whole_before_N[i]
                                                         for i in chosen_N]
    return Shard(part(shard.tokens), np.concatenate([[0], np.cumsum(sizes)]), shard.bytes_N[chosen_N],
                 None if shard.predicted is None else part(shard.predicted),
                 None if whole_N is None else np.concatenate([[0], np.cumsum(whole_N)]))


@dataclasses.dataclass(frozen=True)
class Options:
    """How documents become tokens, apart from the tokenizer."""

    cut: int | None  # documents whose position is up to this are validation (corpus.find_cut); None: all of them
    split_rate: float = 0.0  # of punctuation-newline tokens, in training documents
    seed: int = 0
    text: Callable[[], Conventions] = lambda: PLAIN  # the checkpoint's chat settings; used if there are any chats
    trained: bool = True  # keep documents after `cut`; otherwise they are left out
    one_thread: bool = False  # cores for tokenizing: the others are used by other processes


def key(files_digest: str, tokenizer: Tokenizer, **options: Any) -> str:
    """The name of the shards for a corpus, a tokenizer and options."""
    return hash_of(FORMAT, files_digest, tokenizer.digest, options)


def hash_of(*values: Any) -> str:
    """A name for the result of these values, all JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read(folder: str) -> tuple[dict[str, Shard], dict]:
    """The shards in a complete folder, by split, and meta.json. Those in a bucket are copied to this machine's disk, to
    be mapped; parts are copied when they are first read."""
    there, shards = working_files.on_disk(folder), {}
    with open(os.path.join(there, "meta.json"), encoding="utf-8") as f:
        meta = json.load(f)
    for split in SPLITS:
        index = lambda name, split=split: _mapped_index(os.path.join(there, split, f"{name}.npy"))
        documents, offsets_N, whole_before_N = index("documents"), index("offsets"), index("whole")
        if offsets_N is None:
            offsets_N = np.concatenate([[0], np.cumsum(documents[:, 0])])
        tokens, predicted = _flat(folder, split, meta)
        shard = Shard(tokens, offsets_N, documents[:, 1], predicted, whole_before_N)
        if predicted is not None and whole_before_N is None:
            shard = dataclasses.replace(shard, whole_before_N=np.concatenate([[0], np.cumsum(shard.whole_N)]))
        shards[split] = shard
    return shards, meta


def _mapped_index(path) -> Any:
    """The array in a .npy, not in memory unless it is small; None where there is none."""
    if not os.path.isfile(path):
        return None
    return np.load(path, mmap_mode="r" if os.path.getsize(path) > 1 << 16 else None)


def _flat(folder, split, meta) -> tuple[Flat, Flat | None]:
    """The tokens, and which are predicted."""
    file = lambda folder, name, dtype: _map(os.path.join(working_files.on_disk(folder), split, name), dtype)
    if "parts" not in meta:
        flags = file(folder, "predicted.bin", bool) if meta[split]["prompts"] else None
        return file(folder, "tokens.bin", meta["dtype"]), flags
    lengths, prompts = zip(*(part[split] for part in meta["parts"]))
    tokens = Joined(lengths, lambda i: file(part_folder(folder, i), "tokens.bin", meta["dtype"]))
    flags = Joined(lengths, lambda i: file(part_folder(folder, i), "predicted.bin", bool) if prompts[i]
                   else np.broadcast_to(np.True_, lengths[i]))
    return tokens, flags if any(prompts) else None


def part_folder(folder: str, i: int) -> str:
    """Where part i of the shards in `folder` is kept."""
    root, name = os.path.split(folder)
    return os.path.join(root, name.replace("shards-", "parts-"), f"{i:05}")


def join(folder: str, count: int, meta: dict, hashes: Iterable[tuple[str, int, str]] = ()) -> None:
    """Writes the index `folder` of its parts, which stay where they are. meta, hashes: as in `write`."""
    parts = [io.read_json(os.path.join(part_folder(folder, i), "meta.json")) for i in range(count)]
    total = {key: sum(part[key] for part in parts) for key in parts[0] if isinstance(parts[0][key], int)}
    splits = {split: {key: sum(part[split][key] for part in parts) for key in ("documents", "tokens", "bytes")}
              | {"prompts": any(part[split]["prompts"] for part in parts)} for split in SPLITS}
    held = [{split: (part[split]["tokens"], part[split]["prompts"]) for split in SPLITS} for part in parts]
    with io.building(folder, shared=True) as partial:
        for split in SPLITS:
            os.makedirs(os.path.join(partial, split))
            _join_index(os.path.join(partial, split), [os.path.join(part_folder(folder, i), split)
                                                       for i in range(count)], splits[split])
        _write_hashes(partial, hashes)
        io.write_json(os.path.join(partial, "meta.json"),
                      {**meta, **total, "dtype": parts[0]["dtype"], **splits, "parts": held})


def _map(path, dtype):
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if os.path.getsize(path) else np.zeros(0, dtype)


def write(folder: str, documents: Iterable[corpus.Document], tokenizer: Tokenizer, options: Options, meta: dict,
          progress: tuple[str, int] = ("", 0), hashes: Iterable[tuple[str, int, str]] = ()) -> None:
    """Tokenizes `documents` into `folder`, which appears only when it is complete.

    Args:
      hashes: of the files, for `read_hashes`.
      meta: kept in meta.json, with what is counted here.
        A conversation that the chat template cannot take is logged, and counted as skipped.
      progress: the label of the progress line, and the bytes of text to expect; "": no progress line.
    """
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    warn, meta = corpus.Warnings(), dict(meta)
    with io.building(folder, shared=True) as partial, contextlib.ExitStack() as files:
        files.callback(warn.close)
        writers = {}
        for split in SPLITS:
            writers[split] = _Writer(os.path.join(partial, split), dtype)
            files.callback(writers[split].abandon)
        with tqdm(total=progress[1], desc=progress[0], unit="B", unit_scale=True, leave=False,
                  disable=not progress[0]) as line:
            held_out = lambda document: options.cut is None or corpus.hash_position(document.name) <= options.cut
            kept = documents if options.trained else filter(held_out, documents)
            for document, parts in _tokenized(kept, tokenizer, options.one_thread):
                validation = held_out(document)
                try:
                    ids_T, predicted_T = _ids(document, parts, tokenizer, options, validation)
                except BadMessages as error:
                    warn(f"skipped {document.name}: {error}")
                    meta |= {"skipped": meta.get("skipped", 0) + 1, "documents": meta.get("documents", 1) - 1}
                    continue
                size = document.bytes
                if document.ids is not None:  # not known before
                    size = int(tokenizer.byte_lengths_W[ids_T].sum())
                    meta["bytes"] = meta.get("bytes", 0) + size
                writers["validation" if validation else "train"].add(ids_T, predicted_T, size)
                line.update(size)
        meta = {**meta, "dtype": dtype, **{split: w.close() for split, w in writers.items()}}
        _write_hashes(partial, hashes)
        io.write_json(os.path.join(partial, "meta.json"), meta, indent=1)


def _loaded(path) -> np.ndarray:
    with storage.open_file(path) as file:
        return np.load(file)


def _join_index(folder, parts, total):
    """Writes the .npy of all parts, one part in memory at a time."""
    size, tokens, whole = total["documents"], 0, 0
    with contextlib.ExitStack() as files:
        begin = lambda name, shape: files.enter_context(_begin_index(os.path.join(folder, f"{name}.npy"), shape))
        documents, offsets = begin("documents", (size, 2)), begin("offsets", (size + 1,))
        before = begin("whole", (size + 1,)) if total["prompts"] else None
        for file in (offsets, *([before] if before else [])):
            np.zeros(1, "<i8").tofile(file)
        for part in parts:
            load = lambda name, part=part: _loaded(os.path.join(part, f"{name}.npy")).astype("<i8", copy=False)
            found = load("documents")
            found.tofile(documents)
            (load("offsets")[1:] + tokens).tofile(offsets)
            tokens += int(found[:, 0].sum())
            if before:
                has = storage.is_file(os.path.join(part, "whole.npy"))
                added = load("whole")[1:] if has else np.arange(1, len(found) + 1, dtype="<i8")
                (added + whole).tofile(before)
                whole += int(added[-1]) if len(added) else 0


def _begin_index(path, shape) -> BinaryIO:
    file = open(path, "wb")  # noqa: SIM115 (closed by its caller)
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file


def _write_hashes(folder, hashes):
    with open(os.path.join(folder, "files.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in hashes)


def read_hashes(folder: str) -> list[tuple[str, int, str]]:
    """The files that the shards in `folder` were made from (`corpus.content_hashes`); empty for older versions."""
    path = os.path.join(folder, "files.jsonl")
    if not storage.is_file(path):
        return []
    with storage.open_file(path) as lines:
        return [(name, start, found) for name, start, found in map(json.loads, lines)]


def _tokenized(documents, tokenizer, one_thread) -> Iterator[tuple[corpus.Document, list[list[int]]]]:
    """Each document with the ids of its parts. The library tokenizes a batch at a time, on all cores."""
    encode = tokenizer.encode_on_one_thread if one_thread else tokenizer.encode_batch
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.bytes if document.ids is None else document.ids.nbytes
        if size >= _BATCH_BYTES:
            yield from _tokenize_batch(batch, encode)
            batch, size = [], 0
    yield from _tokenize_batch(batch, encode)


def _tokenize_batch(batch, encode):
    ids = iter(encode([text for document in batch for text, _ in document.parts]))
    for document in batch:
        yield document, [next(ids) for _ in document.parts]


def _ids(document, parts, tokenizer, options: Options, validation) -> tuple[np.ndarray, np.ndarray]:
    if document.ids is not None:
        return _given(document, tokenizer)
    if document.messages is None:
        return _join(document, parts, tokenizer, 0.0 if validation else options.split_rate, options.seed)
    ids, predicted = conversation_ids(list(document.messages), tokenizer, options.text(), list(document.tools))
    return np.array(ids, np.int64), np.array(predicted)


def _given(document, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Given ids, between BOS and EOS. Raises ConfigError if they must come from another tokenizer."""
    least, most = int(document.ids.min()), int(document.ids.max())
    if least < 0 or most >= tokenizer.vocab_size:
        raise ConfigError(f"{document.name} has the token id {least if least < 0 else most}, and the tokenizer's are 0 "
                          f"to {tokenizer.vocab_size - 1}; give the tokenizer that made them as data.tokenizer=PATH.")
    begin = [] if document.ids[0] == tokenizer.bos else [tokenizer.bos]
    end = [] if document.ids[-1] == tokenizer.eos else [tokenizer.eos]
    ids_T = np.concatenate([begin, document.ids, end]).astype(np.int64)
    return ids_T, np.ones(len(ids_T), bool)


def _join(document, parts, tokenizer, split_rate, seed) -> tuple[np.ndarray, np.ndarray]:
    """BOS, the parts' ids, EOS; and which of them are predicted. BOS goes with the first part, EOS with the last."""
    flags = [flag for _, flag in document.parts]
    ids_T = np.concatenate([[tokenizer.bos], *parts, [tokenizer.eos]], dtype=np.int64, casting="unsafe")
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
        self.folder, self.dtype, self.prompts = folder, dtype, False
        self.documents = array.array("q")  # tokens and bytes of each
        self.whole = array.array("b")
        self.tokens = open(os.path.join(folder, "tokens.bin"), "wb")  # noqa: SIM115 (closed in close and abandon)
        self.predicted = open(os.path.join(folder, "predicted.bin"), "wb")  # noqa: SIM115

    def add(self, ids_T, predicted_T, size):
        self.tokens.write(ids_T.astype(self.dtype).data)
        self.predicted.write(predicted_T.data)
        whole = bool(predicted_T.all())
        self.whole.append(whole)
        self.prompts |= not whole
        self.documents.extend((len(ids_T), size))

    def close(self) -> dict:
        """Completes the files and returns their entry for meta.json."""
        self.abandon()
        if not self.prompts:
            os.remove(os.path.join(self.folder, "predicted.bin"))
        else:
            self._save("whole", np.concatenate([[0], np.cumsum(self.whole, dtype=np.int64)]))
        documents = np.frombuffer(self.documents, np.int64).reshape(-1, 2)
        self._save("documents", documents)
        self._save("offsets", np.concatenate([[0], np.cumsum(documents[:, 0])]))
        tokens, size = documents.sum(axis=0).tolist()
        return {"documents": len(documents), "tokens": tokens, "bytes": size, "prompts": bool(self.prompts)}

    def _save(self, name, array):
        np.save(os.path.join(self.folder, f"{name}.npy"), array)

    def abandon(self):
        self.tokens.close()
        self.predicted.close()
