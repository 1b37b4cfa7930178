"""The reference page of all config keys, made from the fields' own annotations."""

from __future__ import annotations

import dataclasses
import typing

from deepseek_jax.config.load import Config
from deepseek_jax.config.model import FP8Config, ModelConfig, Yarn
from deepseek_jax.config.schema import Checked, Field, fields_of

HEAD = """# Config keys

Every key can be set in a config file (`config.train.steps = 50`) and on the command line (`--config.train.steps=50`).
This page is written by `python -m deepseek_jax.config > docs/config.md`.
"""


def page() -> str:
    """The page in Markdown: a table for each section."""
    sections: list[tuple[str, type[Checked]]] = [("model", ModelConfig), ("model.yarn", Yarn), ("fp8", FP8Config)]
    sections += [(field.key, field.kind) for field in fields_of(Config) if field.key != "model"]
    return HEAD + "".join(_section(name, cls) for name, cls in sections)


def _section(name: str, cls: type[Checked]) -> str:
    lines = ["", f"## {name}", "", (cls.__doc__ or "").split("\n\n")[0], ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    lines += [_row(name, field) for field in fields_of(cls) if field.kind is not FP8Config]
    return "\n".join(lines) + "\n"


def _row(section: str, field: Field) -> str:
    kind = " or ".join(f"`{choice}`" for choice in field.choices) or _name(field.kind)
    kind += f" {field.range.shown}" if field.range else ""
    kind += ", or None" if field.optional else ""
    default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
    return f"| `{section}.{field.key}` | {kind} | {default} | {field.doc} |"


def _name(kind: typing.Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "pairs of " + " and ".join(part.__name__ for part in typing.get_args(typing.get_args(kind)[0]))
    return kind.__name__
