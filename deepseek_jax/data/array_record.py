"""Records of ArrayRecord files, as grain and MaxText read them (no jax here).

A record is a row, like a line of .jsonl: a JSON object, a `tf.train.Example` with features of the same names (bytes or
int64, as TFDS writes them), or otherwise a text.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from deepseek_jax import storage
from deepseek_jax.config import ConfigError

ENDING = re.compile(r"\.array_?record(-\d+-of-\d+)?$")  # TFDS appends the file number to the extension
KEYS, IDS = ("text", "prompt", "answer", "messages", "tools"), ("tokens", "input_ids")  # keys of a row
_AT_ONCE = 1024  # records


class _Records:
    """The records of an open file."""

    def __init__(self, reader: Any):
        self._reader, self.num_records = reader, reader.num_records

    def read(self, start: int, stop: int) -> list[bytes | ValueError]:
        """The records, with a ValueError instead of each one in a damaged stretch, and only of those."""
        try:
            return self._reader.read(start, stop)
        except RuntimeError as error:
            if stop - start <= 1:
                return [ValueError(f"is damaged: {error}")]
        middle = (start + stop) // 2
        return self.read(start, middle) + self.read(middle, stop)


@contextlib.contextmanager
def _opened(path) -> Iterator[_Records]:
    """Raises ConfigError without the package, or for what is in a bucket; ValueError for a file
    that is damaged."""
    if storage.is_remote(path):
        raise ConfigError(f"data.sources: {path}: ArrayRecord files are read from a disk; copy them there.")
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise ConfigError(f"{path} needs a reader of ArrayRecord: pip install array_record") from None
    try:
        # Records are read a thousand at a time in one thread; more threads would take the workers' cores.
        reader = ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:1")
        try:
            yield _Records(reader)
        finally:
            reader.close()
    except RuntimeError as error:
        raise ValueError(f"is no ArrayRecord file, or was cut off {error}".strip()) from None


def count_records(path: str) -> int:
    """Raises as `read_records` does."""
    with _opened(path) as reader:
        return reader.num_records()


def read_records(path: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any]]:
    """(number, row) from `start` to `stop`. A row is an object, a text, or the ValueError of a record that is neither.

    Raises ConfigError without the package, or for what is in a bucket; ValueError for a file that is damaged.
    """
    with _opened(path) as reader:
        end: int = reader.num_records() if stop is None else stop
        for first in range(start, end, _AT_ONCE):
            for number, record in enumerate(reader.read(first, min(first + _AT_ONCE, end)), first):
                yield number, record if isinstance(record, ValueError) else _row(record)


def _row(record: bytes) -> Any:
    if record.startswith(b"\n") and (row := _features(record)):
        return row
    try:
        text = record.decode()
        return json.loads(text) if text.startswith("{") else text
    except UnicodeDecodeError as error:
        return error
    except (ValueError, RecursionError):
        return text  # code may begin with a brace


def _features(record) -> dict[str, Any] | None:
    """{name: text or ids} of a tf.train.Example, without its other features; None: it is not an Example."""
    from google.protobuf.message import DecodeError

    try:
        features = _example().FromString(record).features.feature
    except DecodeError:
        return None
    return {name: _value(feature) if name in (*KEYS, *IDS) else None for name, feature in features.items()}


def _value(feature) -> Any:
    """The text of bytes that are UTF-8; otherwise the feature's raw value, which callers reject as text or ids."""
    kind = feature.WhichOneof("kind")
    if kind is None:
        return None
    values = [*getattr(feature, kind).value]
    try:
        return b"".join(values).decode() if kind == "bytes_list" else values
    except UnicodeDecodeError:
        return values


@functools.cache
def _example() -> Any:
    """The class of tf.train.Example (tensorflow/core/example/feature.proto), without TensorFlow."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="deepseek_jax.proto", package="deepseek_jax", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(parent, name, *fields):
        made = parent.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            of_type = {"type_name": f".deepseek_jax.{kind}", "type": kinds.TYPE_MESSAGE} if isinstance(kind, str) else {
                "type": kind}
            made.field.add(name=field, number=number, label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
                           **of_type)
        return made

    message(file.message_type, "BytesList", ("value", kinds.TYPE_BYTES, True))
    message(file.message_type, "FloatList", ("value", kinds.TYPE_FLOAT, True))
    message(file.message_type, "Int64List", ("value", kinds.TYPE_INT64, True))
    feature = message(file.message_type, "Feature", ("bytes_list", "BytesList", False),
                      ("float_list", "FloatList", False), ("int64_list", "Int64List", False))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message(file.message_type, "Features", ("feature", "Features.FeatureEntry", True))
    entry = message(features.nested_type, "FeatureEntry", ("key", kinds.TYPE_STRING, False),
                    ("value", "Feature", False))
    entry.options.map_entry = True
    message(file.message_type, "Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("deepseek_jax.Example"))
