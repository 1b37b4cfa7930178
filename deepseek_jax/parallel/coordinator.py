"""The service of JAX that the processes of a run agree by: its key-value store, and a wait for all of them."""

from __future__ import annotations

from typing import Any

import orbax.checkpoint as ocp

LONGEST_WAIT = 24 * 3600  # seconds, of a process for the slowest: for example while one tokenizes a large corpus


def wait_for_all(name: str) -> None:
    """Returns once every process has called this with the name.

    Not by an exchange between devices: before its first one, gloo waits for the others for 30 seconds only.
    """
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_WAIT * 1000)


def store() -> Any:
    """The client of the key-value store. Private to jax, which has no public way to it; Orbax takes the same."""
    from jax._src import distributed

    return distributed.global_state.client
