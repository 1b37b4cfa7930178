"""A run of several processes, one command each: how JAX comes to span them, and how they agree.

They meet before JAX starts (`parallel.meeting`), and each hears at once when another ends (`parallel.watch`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import stop
from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.meeting import STARTUP_TIMEOUT, Group, check
from deepseek_jax.parallel.watch import Watch

WORD_OF_A_LOSS = 3  # seconds for it to arrive
LONGEST_WORK = 24 * 3600  # seconds that others wait for one, for example while it tokenizes a large corpus


@contextlib.contextmanager
def joined(group: Group | None, timeout: float = STARTUP_TIMEOUT) -> Iterator[None]:
    """Inside, JAX spans all processes of the group. Nothing happens without one. timeout: seconds to wait for them.

    Raises:
      ConfigError: the group cannot be, or the processes were not told the same.
      PeerLostError: the others cannot be reached.
    """
    if group is None:
        yield
        return
    check(group)
    watch = Watch(group, timeout)
    stop.farewells.append(watch.leave)
    try:
        if hasattr(jax.config, "jax_enable_preemption_service"):  # the run has its own handler of SIGTERM
            jax.config.update("jax_enable_preemption_service", False)
        # What a scheduler says was read before (`parallel.cluster`): jax would take one device per process from it.
        jax.distributed.initialize(group.coordinator, group.processes, group.process, group.devices,
                                   cluster_detection_method="deactivate", initialization_timeout=max(1, int(timeout)))
        yield
    except BaseException as error:
        code = stop.exit_code(error)
        if code == 1:  # perhaps a collective broke because another process has ended, of which the watch says more
            time.sleep(WORD_OF_A_LOSS)
        # JAX would wait for the others before this process may end, and they wait for it.
        atexit.register(stop.leave, code)
        raise
    watch.part()
    stop.farewells.remove(watch.leave)


def is_first() -> bool:
    """Whether this process writes metrics and pictures and prints."""
    return jax.process_index() == 0


def first_then_others(make: Callable[[], Any], name: str) -> Any:
    """Runs make() in process 0 first, so that the others find its files."""
    made = make() if is_first() else None
    wait_for_all(name)
    return made if is_first() else make()


def wait_for_all(name: str) -> None:
    """Returns once every process has called this.

    Not by an exchange between devices: before its first one, gloo waits for the others for 30 seconds only.
    """
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_WORK * 1000)


def check_same(config: str) -> None:
    """Raises ConfigError, in all processes, where their configs differ: they would wait for each other for ever."""
    if jax.process_count() > 1 and len(set(multihost_utils.process_allgather(
            np.uint32(zlib.crc32(config.encode()))).tolist())) > 1:
        raise ConfigError("the processes of this run were given different configs; start all of them with the same "
                          "command, but for --process.")


def any_process(flag: bool) -> bool | jax.Array:
    """Whether it is set in any process; the same answer in all. An array, so that its reader decides when to wait."""
    if jax.process_count() == 1:
        return flag
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    flags = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")),
                                                   np.full(jax.local_device_count(), flag))
    return _any(flags, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnums=1)
def _any(flags, replicated):
    return jax.lax.with_sharding_constraint(flags.any(), replicated)
