"""Frozen dataclasses that check themselves (no jax here): types from the annotations, ranges from one table a class.

    class DataConfig(Checked, section="data", fraction="fim_rate", choices={"order": ("sorted", "random")}): ...

A field that no range names may hold any finite number. Ints become floats and lists tuples where the annotation says
so; everything else that does not fit raises ConfigError, in one line that says what would.
"""

from __future__ import annotations

import dataclasses
import difflib
import math


class ConfigError(ValueError):
    """A mistake of the person who wrote the config or the command line: one line, with what would work."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


RANGES = {  # name of a range -> (what it takes, what to say of what it does not)
    "positive": (lambda x: x > 0, "must be positive"),
    "not_negative": (lambda x: x >= 0, "cannot be negative; 0 leaves it out"),
    "fraction": (lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
    "below_one": (lambda x: 0 <= x < 1, "must lie in [0, 1)"),
    "between": (lambda x: 0 < x < 1, "must lie between 0 and 1"),
}
_SCALARS = {"int": int, "float": float, "str": str, "bool": bool}


@dataclasses.dataclass(frozen=True)
class Checked:
    """Base of every section. A subclass that overrides __post_init__ for what spans fields calls super() first."""

    def __init_subclass__(cls, section: str = "", choices: dict[str, tuple[str, ...]] | None = None, **ranges: str):
        cls._section, cls._choices = section, choices or {}
        cls._ranges = {name: RANGES[r] for r, names in ranges.items() for name in names.split()}

    def __post_init__(self):
        for field in dataclasses.fields(self):
            path = ".".join(filter(None, [self._section, key(field)]))
            value = _typed(field.type, getattr(self, field.name), path, field.default)
            if value is not None and field.name in self._ranges:
                fits, complaint = self._ranges[field.name]
                if not fits(value):
                    none = ", or None" if "None" in field.type else ""
                    raise ConfigError(f"{path}={value!r} {complaint}{none}.")
            if value not in self._choices.get(field.name, (value,)):
                options = ", ".join(map(repr, self._choices[field.name]))
                raise ConfigError(f"{path}={value!r} is unknown; take one of {options}.")
            object.__setattr__(self, field.name, value)


def key(field) -> str:
    """How a field is spelled in config files: `from_`, a keyword of Python, is `from` there."""
    return field.name.rstrip("_")


def did_you_mean(word, options) -> str:
    """The end of a sentence: the nearest of the options, or all of them."""
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(word), options, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are: {', '.join(options)}."


def build(cls, values, path: str = ""):
    """An instance of a Checked class from a mapping, whose unknown keys raise."""
    if not hasattr(values, "items"):
        raise ConfigError(f"{path or 'a config'}={values!r} should be a section with keys, not a single value.")
    fields = {key(f): f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"unknown config key {'.'.join(filter(None, [path, str(name)]))}; "
                              f"{did_you_mean(name, fields)}")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and key(field) not in values:
            raise ConfigError(f"the config has no section {key(field)}; start from default_config(preset).")
    return cls(**{fields[name]: value for name, value in values.items()})


def _sections(cls=Checked) -> dict[str, type]:
    return {c.__name__: c for direct in cls.__subclasses__() for c in [direct, *_sections(direct).values()]}


def _typed(annotation: str, value, path: str, example):
    """`value` as the annotation has it."""
    kind, _, optional = annotation.partition(" | ")
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{path} cannot be None.")
    if kind in _sections():
        cls = _sections()[kind]
        return value if isinstance(value, cls) else build(cls, value, path)
    if kind.startswith("tuple["):
        return _pairs(kind, value, path, example)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{path} has {len(str(value))} digits, too many for a float.") from None
    if not isinstance(value, _SCALARS[kind]) or (kind == "int" and isinstance(value, bool)):
        raise ConfigError(f"{path}={value!r} should be {kind}, not {type(value).__name__}.")
    if kind == "float" and not math.isfinite(value):
        raise ConfigError(f"{path}={value!r} should be a finite number.")
    return value


def _pairs(kind, value, path, example):
    kinds = kind.removeprefix("tuple[tuple[").partition("]")[0].split(", ")
    is_pair = lambda x: isinstance(x, (tuple, list)) and len(x) == 2
    if not isinstance(value, (tuple, list)) or not all(map(is_pair, value)):
        raise ConfigError(f"{path}={value!r} should be a tuple of pairs, such as {example!r}.")
    return tuple(tuple(_typed(k, part, f"{path}[{i}][{j}]", None) for j, (k, part) in enumerate(zip(kinds, pair)))
                 for i, pair in enumerate(value))
