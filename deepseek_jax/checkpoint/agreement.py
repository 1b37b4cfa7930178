"""Agreement between the processes of a run about its checkpoints.

They use the key-value store of JAX's coordination service, and not what each one finds on the disk: a file system may
show a file to one process before another. All processes call these functions in the same order.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.checkpoint.manifest import CheckpointError
from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.coordinator import LONGEST_WAIT, store, wait_for_all
from deepseek_jax.storage import StorageError

_PASSED_ON = CheckpointError, ConfigError, StorageError, OSError  # raised in one process, and then in all


def from_first(decide: Callable[[], Any]) -> Any:
    """The JSON value that decide() returns in process 0, the only one to call it. Its one-line errors (`_PASSED_ON`)
    are raised in all processes."""
    if jax.process_count() == 1:
        return decide()
    key = _new_key()
    if jax.process_index() == 0:
        try:
            said = {"value": decide()}
        except _PASSED_ON as error:
            kind = next(i for i, kind in enumerate(_PASSED_ON) if isinstance(error, kind))
            store().key_value_set(key, json.dumps({"error": str(error), "kind": kind}))
            raise
        store().key_value_set(key, json.dumps(said))
    else:
        said = json.loads(store().blocking_key_value_get(key, LONGEST_WAIT * 1000))
    if "error" in said:
        raise _PASSED_ON[said["kind"]](said["error"])
    return said["value"]


def said_by_any(words: str | None) -> list[str]:
    """The non-empty words of the processes, the same list in all of them, once each has called this."""
    if jax.process_count() == 1:
        return [] if words is None else [words]
    key = _new_key()
    if words is not None:
        store().key_value_set(f"{key}/{jax.process_index()}", words)
    wait_for_all(key)
    return [said for _, said in sorted(store().key_value_dir_get(key))]


_numbers = itertools.count()


def _new_key():
    return f"deepseek_jax/checkpoint/{next(_numbers)}"
