"""JAX's coordination service for agreement between processes: its key-value store, and a barrier."""

from __future__ import annotations

from typing import Any

import orbax.checkpoint as ocp

LONGEST_WAIT = 24 * 3600  # seconds to wait for the slowest process, for example while one tokenizes a large corpus


def wait_for_all(name: str) -> None:
    """A barrier: returns once every process has called this with the name.

    It does not use an exchange between devices: before the first one, gloo waits for the others for only 30 seconds.
    """
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_WAIT * 1000)


def store() -> Any:
    """The client of the key-value store. Private to jax, which has no public access to it; Orbax uses the same."""
    from jax._src import distributed

    return distributed.global_state.client
