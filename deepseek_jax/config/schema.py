"""Frozen dataclasses that check themselves (no jax here). A field is its type, its range and one line of documentation:

    class DataConfig(Checked, section="data"):
        fim_rate: Annotated[float, FRACTION, "share of documents rearranged prefix-suffix-middle"] = 0.1
        order: Annotated[Literal["sorted", "random"], "of the documents"] = "random"

A field without a range accepts any finite number. Ints become floats and lists tuples if the annotation says so; every
other mismatch raises ConfigError, in one line that says what would work.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from deepseek_jax import storage
from deepseek_jax.config.names import OTHERS

T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake in the config or on the command line, in one line that says what would work.

    Control and unprintable characters are escaped with backslashes, since messages quote files from elsewhere.
    """

    def __init__(self, message: str):
        line = " ".join(message.splitlines())
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


def usable_path(name: str, path: str, on_disk: bool = False) -> str:
    """The path with ~ expanded, which a shell does not do in --hf=~/x; or the address of something in a bucket, with
    one slash between its parts and none at its end. name: of the option or key. on_disk: an address is refused.

    Raises ConfigError for an address without a bucket, of another scheme, or with a single slash, which as a path would
    be a local folder named `http:` or `gs:`.
    """
    if re.match(r"(gs|s3):/(?!/)", path):
        raise ConfigError(f"{name}={path} has one slash where an address has two; write {path.replace(':', ':/', 1)}.")
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        return os.path.expanduser(path)
    if on_disk or not storage.is_remote(path):
        which = "" if on_disk else ", and in buckets gs:// and s3://"
        raise ConfigError(f"{name}={path} is an address, and only paths of this machine{which} are read and written; "
                          "copy it here, or mount it as a file system.")
    scheme, rest = path.split("://", 1)
    parts = rest.split("/")
    if not parts[0]:
        raise ConfigError(f"{name}={path} names no bucket; write {scheme}://BUCKET/NAME.")
    return f"{scheme}://{'/'.join(filter(None, parts))}"


def shown(value: Any) -> str:
    """A value for an error message: its repr, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class Range(NamedTuple):
    """The allowed values of a number, its error message, and its notation on the reference page."""

    fits: Callable[[Any], bool]
    complaint: str
    shown: str


POSITIVE = Range(lambda x: x > 0, "must be positive", "> 0")
NOT_NEGATIVE = Range(lambda x: x >= 0, "cannot be negative; 0 leaves it out", ">= 0")
FRACTION = Range(lambda x: 0 <= x <= 1, "must lie in [0, 1]", "[0, 1]")
BELOW_ONE = Range(lambda x: 0 <= x < 1, "must lie in [0, 1)", "[0, 1)")
BETWEEN = Range(lambda x: 0 < x < 1, "must lie between 0 and 1", "(0, 1)")


class Field(NamedTuple):
    """One field of a section, read from its annotation. key: its name in config files."""

    name: str
    key: str
    kind: Any  # int, float, str, bool, a Checked class, or tuple[tuple[X, Y], ...]
    optional: bool
    range: Range | None
    choices: tuple[str, ...]
    doc: str
    default: Any


@dataclasses.dataclass(frozen=True)
class Checked:
    """Base of every section. A subclass that overrides __post_init__ to check several fields together calls super()
    first."""

    _section: typing.ClassVar[str] = ""

    def __init_subclass__(cls, section: str = ""):
        cls._section = section

    def __post_init__(self):
        for field in fields_of(type(self)):
            path = ".".join(filter(None, [self._section, field.key]))
            value = _typed(field.kind, field.optional, getattr(self, field.name), path, field.default)
            if value is not None and field.range and not field.range.fits(value):
                none = ", or None" if field.optional else ""
                raise ConfigError(f"{path}={shown(value)} {field.range.complaint}{none}.")
            if value is not None and field.choices and value not in field.choices:
                options = ", ".join(map(repr, field.choices))
                raise ConfigError(f"{path}={shown(value)} is unknown; take one of {options}.")
            object.__setattr__(self, field.name, value)


@functools.cache
def fields_of(cls: type[Checked]) -> tuple[Field, ...]:
    """The fields of a section, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(_field(field, hints[field.name]) for field in dataclasses.fields(cls))


def _field(field: dataclasses.Field[Any], hint: Any) -> Field:
    notes = getattr(hint, "__metadata__", ())
    kind = typing.get_args(hint)[0] if notes else hint
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    kind, choices = parts[0], ()
    if typing.get_origin(kind) is typing.Literal:
        kind, choices = str, typing.get_args(kind)
    return Field(field.name, key(field), kind, type(None) in parts,
                 next((note for note in notes if isinstance(note, Range)), None), choices,
                 next((note for note in notes if isinstance(note, str)), ""), field.default)


def key(field: Any) -> str:
    """The name of a field in config files: `from_` is `from` there, which is a keyword in Python."""
    return field.name.rstrip("_")


def did_you_mean(word: object, options: Iterable[object]) -> str:
    """The end of a message: the option known elsewhere by this word, the nearest one, or all of them."""
    words = sorted(map(str, options))
    if OTHERS.get(str(word)) in words:
        return f"did you mean {OTHERS[str(word)]}?"
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are: {', '.join(words)}."


def build(cls: type[T], values: Any, path: str = "") -> T:
    """An instance of a Checked class from a mapping, whose unknown keys raise ConfigError."""
    if not hasattr(values, "items"):
        raise ConfigError(f"{path or 'a config'}={shown(values)} should be a section with keys, not a single value.")
    fields = {field.key: field for field in fields_of(typing.cast(type[Checked], cls))}
    for name in values:
        if name not in fields:
            raise ConfigError(f"unknown config key {'.'.join(filter(None, [path, str(name)]))}; "
                              f"{did_you_mean(name, fields)}")
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.key not in values:
            raise ConfigError(f"the config has no section {field.key}; start from default_config(preset).")
    given: Mapping[str, Any] = {fields[name].name: value for name, value in values.items()}
    return cls(**given)


def _typed(kind: Any, optional: bool, value: Any, path: str, example: Any) -> Any:
    """`value` converted to the type of this field."""
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{path} cannot be None.")
    if typing.get_origin(kind) is tuple:
        return _pairs(kind, value, path, example)
    if issubclass(kind, Checked):
        return value if isinstance(value, kind) else build(kind, value, path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{path} has {len(str(value))} digits, too many for a float.") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}={shown(value)} should be {kind.__name__}, not {type(value).__name__}.")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path}={shown(value)} should be a finite number.")
    return value


def _pairs(kind, value, path, example):
    kinds = typing.get_args(typing.get_args(kind)[0])
    is_pair = lambda x: isinstance(x, (tuple, list)) and len(x) == 2
    if not isinstance(value, (tuple, list)) or not all(map(is_pair, value)):
        such = f", such as {example!r}" if example else ""
        raise ConfigError(f"{path}={shown(value)} should be a tuple of pairs{such}.")
    return tuple(tuple(_typed(k, False, part, f"{path}[{i}][{j}]", None)
                       for j, (k, part) in enumerate(zip(kinds, pair))) for i, pair in enumerate(value))
