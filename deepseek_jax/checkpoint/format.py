"""meta.json of a checkpoint, in any format that this program has ever written.

    format 1   no number. A leaf without "zarr" is an Orbax array in `state`
    format 2   such a leaf is marked: "orbax"
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from deepseek_jax import io
from deepseek_jax.checkpoint.manifest import DamagedError
from deepseek_jax.config import ConfigError

FORMAT = 2


def _name_orbax(about: dict[str, Any]) -> dict[str, Any]:
    return about | {"leaves": {name: leaf if "zarr" in leaf else leaf | {"orbax": "state"}
                               for name, leaf in about["leaves"].items()}}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _name_orbax}  # to the next format


def write_meta(checkpoint: str | os.PathLike[str], step: int, meta: dict[str, Any], leaves: dict[str, Any]) -> None:
    """Writes meta.json. leaves: {path: shape, dtype, and location}. meta: the caller's data."""
    about = {"format": FORMAT, "step": step, "meta": meta, "leaves": leaves}
    io.write_json(os.path.join(checkpoint, "meta.json"), about, indent=None, sync=True)


def read_meta(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """{"step", "meta", "leaves"} of a checkpoint, in the newest format.

    Raises:
      ConfigError: it was written by a newer version of this program.
      DamagedError: meta.json cannot be read.
    """
    try:
        about = io.read_json(os.path.join(checkpoint, "meta.json"))
        known = about.get("format", 1)
    except (OSError, ValueError, AttributeError):
        raise DamagedError(checkpoint, "meta.json is unreadable") from None
    if known > FORMAT:
        raise ConfigError(f"the checkpoint {os.fspath(checkpoint)} has format {known}, and this deepseek-jax knows "
                          f"those up to {FORMAT}; update it.")
    for step in range(known, FORMAT):
        about = MIGRATIONS[step](about)
    return about
