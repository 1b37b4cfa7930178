"""Documents from folders, files and globs, and their division into training and validation.

A corpus is a sorted list of files under relative names; reading it yields `Document`s in that order. A text file is one
document, and so is a row of jsonl or parquet. Unreadable input is named, skipped and counted, never guessed at. A hash
of its name decides whether a document belongs to validation, so adding or removing other files does not change that.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from deepseek_jax import io, storage
from deepseek_jax.chat.messages import BadMessages, check_messages, check_tools
from deepseek_jax.config import ConfigError
from deepseek_jax.data import array_record, megatron, zst
from deepseek_jax.data.files import File, Stretch, below, find

log = logging.getLogger(__name__)

STDLIB = "stdlib"
HUB = "hf:"  # a folder as Hugging Face's hub lays out data sets
# Tests are missing from many installations, so corpora with them would differ between machines; the others are
# generated tables, from which a model learns nothing (and which would lower its bits per byte misleadingly).
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_STDLIB_GENERATED = "_sysconfigdata"  # build settings: machine paths, in one dict
_LONE_PIECE = 16384  # characters; a corpus of one text file is cut at line ends into documents of about this size
_WARNINGS_SHOWN = 10
CONTENTS_UP_TO = 256 << 20  # bytes that each process reads at each start, in a quarter of a second
BY_TIMES = "times-"  # prefix of such a digest


@dataclasses.dataclass(frozen=True)
class Document:
    """A text in parts; a part that is not predicted (a prompt) is read by the model without a loss.

    messages: of a conversation; its parts are their texts, and a chat template makes its tokens.
    tools: the tools that the conversation may call.
    ids: int64, of a document that is already tokenized; it has no parts.
    """

    name: str
    parts: tuple[tuple[str, bool], ...]
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    ids: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text, _ in self.parts)

    @property
    def is_learned(self) -> bool:
        """Whether any of it is predicted."""
        return any(predicted for _, predicted in self.parts) if self.ids is None else len(self.ids) > 0


@dataclasses.dataclass
class Counts:
    """Counts from one pass over a corpus. `skipped`: unreadable files and rows; `empty`: those without any text."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    skipped: int = 0
    empty: int = 0


def list_files(path: str) -> list[File]:
    """The readable files of a folder, file, glob or the word "stdlib", sorted by name. Raises ConfigError.

    Files are chosen by their extensions. A file that is named is always read, and so are those of a glob that finds no
    known extension. "~" is the home folder. In hf:FOLDER only the tables are read, and only those of the split train if
    names say so. NAME means NAME.idx if only that and NAME.bin exist.
    """
    files = [f for f in _found(path) if f.named or _reader(f.name)]
    if storage.is_remote(path.removeprefix(HUB)) and any(f.name.endswith(".idx") for f in files):
        raise ConfigError(f"data.sources: {path} has files of Megatron-LM, which are mapped; copy them to a "
                          "disk.")
    if not files:
        raise ConfigError(f"data.sources: {path} has no file that can be read; known are {' '.join(_READERS)}, and a "
                          f"glob such as {os.path.join(path, '*')!r} reads others as text.")
    return files


def ignored_files(path: str) -> list[str]:
    """The names of the files there that `list_files` leaves out because of their extensions."""
    if path == STDLIB or path.startswith(HUB):
        return []
    found = _found(path)
    ids = {megatron.ids_file(f.name) for f in found if f.name.endswith(".idx")}
    return [f.name for f in found if not (f.named or _reader(f.name) or f.name in ids)]


def _found(path):
    if path.startswith(HUB):
        return _of_hub(os.path.expanduser(path.removeprefix(HUB)))
    if path != STDLIB:
        path = os.path.expanduser(path)
        index = None if storage.is_remote(path) else megatron.index_of(path)
        return find(index or path, lambda name: _reader(name) is not None)
    found = below(sysconfig.get_path("stdlib"), _STDLIB_SKIPPED)
    return sorted(f for f in found
                  if f.name.endswith(".py") and not os.path.basename(f.name).startswith(_STDLIB_GENERATED))


def _of_hub(folder):
    """The tables in a folder with the hub's layout, such as data/train-00000-of-00010.parquet; README.md is not one."""
    if not storage.is_folder(folder):
        raise ConfigError(f"data.sources: hf:{folder} is no folder; download the data set first: hf download "
                          f"--repo-type dataset {folder} --local-dir FOLDER.")
    files = [f for f in find(folder, lambda name: _reader(name) is not None) if f.name.endswith(_TABLES)]
    if not files:
        raise ConfigError(f"data.sources: hf:{folder} has no {', '.join(_TABLES)}, as data sets of the hub have.")
    train = [f for f in files if any(part.startswith("train") for part in f.name.split(os.sep))]
    return train or files


def digest(files: Sequence[File], by_contents: bool | None = None) -> str:
    """One hash of a corpus: two with the same digest give the same documents.

    Args:
      by_contents: hash names and contents, rather than names, sizes and times of change (in nanoseconds), which every
        process of a large run can afford; None: if there are at most CONTENTS_UP_TO bytes, whose copies then are the
        same corpus.
    """
    stats = [_stat(file) for file in files]
    total = hashlib.sha256()
    if by_contents or (by_contents is None and sum(size for size, _ in stats) <= CONTENTS_UP_TO):
        for file in files:
            total.update(_bytes(f"{file.name}\0{content_hash(file)}\n"))
        return total.hexdigest()
    for file, (size, changed) in zip(files, stats):
        total.update(_bytes(f"{file.name}\0{size}\0{changed}\n"))
    return BY_TIMES + total.hexdigest()


def paths_of(file: File) -> list[str]:
    """The files behind a source file: for an index also its file of ids."""
    return [file.path, megatron.ids_file(file.path)] if file.name.endswith(".idx") else [file.path]


def _stat(file) -> tuple[int, int | str]:
    """Bytes, and nanoseconds at the last change or, of an object, the store's checksum."""
    try:
        if storage.is_remote(file.path):
            return storage.size(file.path), storage.version(file.path)
        found = [os.stat(path) for path in paths_of(file)]
    except OSError:
        return 0, 0
    return sum(f.st_size for f in found), sum(f.st_mtime_ns for f in found)


def content_hash(file: File) -> str:
    """SHA-256 of a file, or of its stretch of lines; for other kinds of stretches, the first one has that of the
    file."""
    lines = file.stretch is not None and file.name.endswith(".jsonl")
    if file.stretch and file.stretch.start and not lines:
        return ""
    try:
        if file.stretch is None or not lines:
            return "".join(map(_file_hash, paths_of(file)))
        with io.open_regular(file.path) as f:
            f.seek(file.stretch.start)
            left, found = file.stretch.stop - file.stretch.start, hashlib.sha256()
            while left and (data := f.read(min(left, 1 << 20))):
                found.update(data)
                left -= len(data)
            return found.hexdigest()
    except OSError:
        return "unreadable"  # it is skipped and named when it is read


def _file_hash(path):
    with io.open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def content_hashes(files: Iterable[File]) -> list[tuple[str, int, str]]:
    """(name, start, `content_hash`) of each file or stretch."""
    return [(file.name, file.stretch.start if file.stretch else 0, content_hash(file)) for file in files]


def read_documents(files: list[File], counts: Counts | None = None, warn: Callable[[str], None] | None = None,
                   alone: bool | None = None) -> Iterator[Document]:
    """Every non-empty document of `files`, in order.

    Args:
      counts: filled while reading.
      warn: called with one line for each file or row that is skipped; None says nothing.
      alone: whether the corpus is one file; None: whether `files` is.
    """
    counts = Counts() if counts is None else counts
    alone = len(files) == 1 if alone is None else alone
    tell: Callable[[str], Any] = warn or (lambda line: None)
    for file in files:
        counts.files += file.stretch is None or file.stretch.start == 0
        if file.fault:
            counts.skipped += 1
            tell(f"skipped {file.name}: {file.fault}")
            continue
        try:
            for row, parts in (_reader(file.name) or _read_text)(file.path, alone, file.stretch):
                name = file.name if row is None else f"{file.name}#{row}"
                if isinstance(parts, str):
                    counts.skipped += 1
                    tell(f"skipped {name}: {parts}")
                    continue
                document = _document(name, parts)
                if not document.is_learned:
                    counts.empty += 1
                    continue
                counts.documents += 1
                counts.bytes += document.bytes
                yield document
        except (ConfigError, storage.StorageError):
            raise
        except Exception as error:  # a damaged file can make its reader raise anything
            counts.skipped += 1
            tell(f"skipped {file.name}: {_first_line(error)}")


def _document(name, parts):
    if isinstance(parts, np.ndarray):
        return Document(name, (), ids=parts)
    chat = (parts.messages, parts.tools) if isinstance(parts, _Conversation) else (None, ())
    return Document(name, tuple(part for part in parts if part[0]), *chat)


def _first_line(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


class Warnings:
    """Logs the first few lines, then only counts: ten thousand bad rows are usually a single fault."""

    def __init__(self):
        self.lines = 0

    def __call__(self, line: str):
        self.lines += 1
        if self.lines <= _WARNINGS_SHOWN:
            log.warning(line)

    def close(self) -> None:
        if self.lines > _WARNINGS_SHOWN:
            log.warning("... and %d more", self.lines - _WARNINGS_SHOWN)


# Readers: (path, alone, stretch) -> (row or None, parts) pairs, with a sentence instead of the parts of a row that is
# not a document. `alone`: the file is the entire corpus.


def _read_text(path, alone, stretch):
    del stretch  # of rows
    with io.open_regular(path) as f:
        text = f.read().decode("utf-8-sig")  # not in text mode: line ends are unchanged, so bytes can be counted
    if not alone:
        yield None, ((text, True),)
        return
    # One document could not be divided into training and validation.
    piece, size, row = [], 0, 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _LONE_PIECE:
            yield row, (("".join(piece), True),)
            piece, size, row = [], 0, row + 1
    yield row, (("".join(piece), True),)


def _read_jsonl(path, alone, stretch):
    del alone
    with open_lines(path) as lines:
        for row, line in enumerate(lines) if stretch is None else _lines(lines, stretch):
            if line.strip():
                try:
                    yield row, _parts(json.loads(line.decode("utf-8" if row else "utf-8-sig")))
                except (ValueError, RecursionError) as error:
                    yield row, _first_line(error)


def _lines(file, stretch: Stretch):
    """(row, line) of the lines that start inside a stretch."""
    place, row = stretch.start, stretch.row
    if place:
        file.seek(place - 1)
        place += len(file.readline()) - 1  # the rest of a line that starts earlier
    while place < stretch.stop and (line := file.readline()):
        yield row, line
        place, row = place + len(line), row + 1


def open_lines(path: str) -> Any:
    """The file in binary, decompressed according to its extension."""
    io.check_regular(path)
    if path.endswith(".gz"):
        return gzip.open(storage.open_file(path) if storage.is_remote(path) else path, "rb")
    return zst.decompressed(storage.open_file(path)) if path.endswith(".zst") else storage.open_file(path)


def open_parquet(path: str) -> Any:
    """A pyarrow.parquet.ParquetFile, to be closed. Raises ConfigError without pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path} needs a reader of parquet: pip install pyarrow") from None
    return pyarrow.parquet.ParquetFile(storage.open_file(path) if storage.is_remote(path) else path)


def _read_parquet(path, alone, stretch):
    del alone
    with open_parquet(path) as file:
        columns = [c for c in (*_KEYS, *_IDS) if c in file.schema_arrow.names]
        start, groups = (0, range(file.num_row_groups)) if stretch is None else (
            stretch.row, range(stretch.start, stretch.stop))
        for group in groups:
            row = start
            start += file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=1024, columns=columns, row_groups=[group]):
                    for record in batch.to_pylist():
                        yield row, _parts(_without_none(record))
                        row += 1
            except (ConfigError, storage.StorageError):
                raise
            except Exception as error:  # damage can make the reader raise anything; the other groups can be read
                yield row, f"damaged, and so are those up to {start - 1}: {_first_line(error)}"


def _parts(record):
    """The parts of a row, or a sentence that says why it is not a document."""
    if not isinstance(record, dict):
        return "not an object with keys"
    if record.get("messages") is not None and all(record.get(key) is None for key in ("text", "answer")):
        return _conversation(record["messages"], record.get("tools") or [])
    keys = ("prompt", "answer") if record.get("text") is None else ("text",)
    ids = next((record[key] for key in _IDS if record.get(key) is not None), None)
    if ids is not None and all(record.get(key) is None for key in _KEYS):
        return _token_ids(ids)
    if not all(isinstance(record.get(key), str) for key in keys):
        return 'has neither "text" nor "prompt" and "answer" as strings, nor "messages", nor "tokens" as a list of ids'
    try:
        for key in keys:
            record[key].encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which is no text"  # JSON can spell it, UTF-8 cannot
    return tuple((record[key], key != "prompt") for key in keys)


def _token_ids(ids):
    if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)):
        return "tokens must be a list of ids, whole numbers of 0 and more"
    return np.array(ids, np.int64)


class _Conversation(tuple):
    """Parts that are turns of a chat."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]


def _conversation(messages, tools):
    if not isinstance(messages, list):
        return "messages must be a list of one or more messages"
    given = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]
    try:
        checked, described = check_messages(given, calls=True), check_tools(tools)
    except BadMessages as error:
        return str(error)
    if not any(m["role"] == "assistant" for m in checked):
        return "messages have no answer (of the role assistant)"
    parts = _Conversation([*((json.dumps(tool, ensure_ascii=False), False) for tool in described),
                           *((text, m["role"] == "assistant") for m in checked for text in _said(m))])
    parts.messages, parts.tools = tuple(checked), tuple(described)
    return parts


def _said(message):
    """The text of a message, and that of its calls."""
    calls = message.get("tool_calls", ())
    return message["content"], *(json.dumps(call["function"], ensure_ascii=False) for call in calls)


def _without_none(value):
    """A row of parquet without null keys, since all its objects have the same keys. A map becomes an object."""
    if isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in value):
        value = dict(value)
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _read_megatron(path, alone, stretch):
    del alone
    yield from megatron.read_ids(path) if stretch is None else megatron.read_ids(path, stretch.start, stretch.stop)


def _read_array_record(path, alone, stretch):
    del alone
    for row, record in array_record.read_records(path, *([] if stretch is None else [stretch.start, stretch.stop])):
        if isinstance(record, str):
            yield row, ((record, True),)
        else:
            yield row, _first_line(record) if isinstance(record, ValueError) else _parts(record)


_KEYS, _IDS = array_record.KEYS, array_record.IDS
_TABLES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_READERS = {".txt": _read_text, ".md": _read_text, ".py": _read_text, ".jsonl": _read_jsonl,
            ".jsonl.gz": _read_jsonl, ".jsonl.zst": _read_jsonl, ".parquet": _read_parquet, ".idx": _read_megatron,
            ".array_record": _read_array_record}


def _reader(name: str) -> Any:
    name = array_record.ENDING.sub(".array_record", name)
    return next((reader for ending, reader in _READERS.items() if name.endswith(ending)), None)


# Training and validation.


def hash_position(name: str) -> int:
    """A document's position in [0, 2^64): the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(_bytes(name)).digest()[:8], "big")


def _bytes(name):
    """The name in UTF-8; a file name that is not valid UTF-8 keeps its raw bytes."""
    return name.encode(errors="surrogateescape")


def find_cut(places: Iterable[int], validation_fraction: float | None, path: str) -> int | None:
    """The position in [0, 2^64) up to which documents are validation; None (all) if `validation_fraction` is None; -1
    (none) if it is 0.

    It is that fraction of the range, moved only if a small corpus would leave one side without a document; so positions
    are read only until both sides have a document. Raises ConfigError when there are too few documents.
    """
    if validation_fraction and not 0 < validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction={validation_fraction:g} must lie between 0 and 1.")
    lowest, highest, cut = 2**64, -1, int((validation_fraction or 0) * 2**64)
    for p in places:
        lowest, highest = min(lowest, p), max(highest, p)
        if not validation_fraction or lowest <= cut < highest:
            break
    if highest < 0:
        raise ConfigError(f"data.sources: {path} holds no text; give files with some.")
    if not validation_fraction:
        return None if validation_fraction is None else -1
    if lowest == highest:
        raise ConfigError(f"data.sources: {path} holds one document, too few for training and validation; add files.")
    return min(max(cut, lowest), highest - 1)
