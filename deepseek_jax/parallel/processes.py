"""A run of several processes, one command each: starting JAX across them, and agreement between them.

They connect before JAX starts (`parallel.meeting`), and each is told at once when another ends (`parallel.watch`).
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax import stop
from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.coordinator import store, wait_for_all
from deepseek_jax.parallel.meeting import STARTUP_TIMEOUT, Group, check
from deepseek_jax.parallel.watch import Watch

WORD_OF_A_LOSS = 3  # seconds for it to arrive


@contextlib.contextmanager
def joined(group: Group | None, timeout: float = STARTUP_TIMEOUT) -> Iterator[None]:
    """A context in which JAX spans all processes of the group; does nothing without a group. timeout: seconds to wait
    for them.

    Raises:
      ConfigError: the group is impossible, or the processes got different flags.
      PeerLostError: the others cannot be reached.
    """
    if group is None:
        yield
        return
    check(group)
    watch = Watch(group, timeout)
    stop.before_exit.append(watch.leave)
    try:
        if hasattr(jax.config, "jax_enable_preemption_service"):  # the run has its own handler of SIGTERM
            jax.config.update("jax_enable_preemption_service", False)
        # The scheduler's variables were already read (`parallel.cluster`): jax would take one device per process from
        # them.
        jax.distributed.initialize(group.coordinator, group.processes, group.process, group.devices,
                                   cluster_detection_method="deactivate", initialization_timeout=max(1, int(timeout)))
        yield
    except BaseException as error:
        code = stop.exit_code(error)
        if code == 1:  # perhaps a collective failed because another process has ended, which the watch reports better
            time.sleep(WORD_OF_A_LOSS)
        # JAX would wait for the others before this process can end, and they wait for this one.
        atexit.register(stop.leave, code)
        raise
    watch.part()
    stop.before_exit.remove(watch.leave)


def is_first() -> bool:
    """Whether this process writes metrics and pictures and prints."""
    return jax.process_index() == 0


def first_then_others(make: Callable[[], Any], name: str) -> Any:
    """Runs make() in process 0 first, so that the others find its files."""
    made = make() if is_first() else None
    wait_for_all(name)
    return made if is_first() else make()


def check_same(config: str) -> None:
    """Raises ConfigError, in all processes, if their configs differ: they would wait for each other forever."""
    if jax.process_count() > 1 and len(set(multihost_utils.process_allgather(
            np.uint32(zlib.crc32(config.encode()))).tolist())) > 1:
        raise ConfigError("the processes of this run were given different configs; start all of them with the same "
                          "command, but for --process.")


class StopAgreement:
    """The step after which all processes stop, once one of them was asked to.

    That process writes to the key-value store of JAX's coordination service, which a thread in each process polls, so
    that no step waits for the store. Once process 0 knows, it publishes the step after next as the last, and starts no
    further step before all processes have read it. So none can be past it: a process reaches the end of step n + 2 with
    the metrics of step n + 1, which all devices compute together.
    """

    def __init__(self):
        self.prefix = f"deepseek_jax/stop/{next(_agreements)}/"  # the next run in this process has its own
        self.last: tuple[int, str] | None = None
        self.said, self.heard = False, None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def stopped_by(self, step: int, asked: str | None) -> str | None:
        """The signal that ends the run with this step or an earlier one, the same in all processes; None: there is
        none.

        Args:
          step: just dispatched; the metrics of the previous one have been fetched.
          asked: the signal that this process got, if it did.
        """
        if jax.process_count() == 1:
            return asked
        self._begin_to_listen()
        if self.last is None:
            self._decide(step, asked or self.heard) if is_first() else self._ask(asked)
        return self.last[1] if self.last is not None and step >= self.last[0] else None

    def close(self) -> None:
        """This process takes no more steps; process 0 must not wait for it."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._acknowledge()

    def listen(self) -> None:
        """Polls the store once: process 0 for a stop request, the others for the last step."""
        if is_first():
            self.heard = next((name for _, name in store().key_value_dir_get(f"{self.prefix}asked")), None)
            return
        for _, words in store().key_value_dir_get(f"{self.prefix}last"):
            step, name = words.split()
            self.last = int(step), name
            self._acknowledge()

    def _begin_to_listen(self):
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()

    def _listen(self):
        # At most a thousand polls per second by all processes together.
        while self.last is None and not self._over.wait(max(0.05, 1e-3 * jax.process_count())):
            try:
                self.listen()
            except Exception:  # the service is gone, and with it a process: the watch reports it and ends this one
                return

    def _acknowledge(self):
        store().key_value_set(f"{self.prefix}heard/{jax.process_index()}", "yes", allow_overwrite=True)

    def _decide(self, step, asked):
        if asked is not None:
            self.last = step + 2, asked
            store().key_value_set(f"{self.prefix}last/step", f"{step + 2} {asked}")
            while len(store().key_value_dir_get(f"{self.prefix}heard")) < jax.process_count() - 1:
                time.sleep(0.01)

    def _ask(self, asked):
        if asked is not None and not self.said:
            store().key_value_set(f"{self.prefix}asked/{jax.process_index()}", asked)
            self.said = True


class SaveTimer:
    """The steps that are saved because `minutes` have passed since the last save, the same in all processes.

    Process 0 reads the clock, and publishes the step as `StopAgreement` does: the step after next, so that none can be
    past it. A save for another reason before that step takes its place, even if a process learns of the step only
    afterwards. minutes: None: no such saves.
    """

    def __init__(self, minutes: float | None):
        self.prefix = f"deepseek_jax/save/{next(_agreements)}/"
        self.minutes, self.last_save = minutes, time.monotonic()
        self.count, self.last_step = 0, -1
        self.next: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether to save after this step, or as soon as possible in a run that can save only between some steps.

        step: just dispatched; the metrics of the previous one have been fetched.
        """
        if self.minutes is not None and self.next is None:
            self._decide(step) if is_first() else self._hear()
        return self.next is not None and step >= self.next

    def saved(self, step: int) -> None:
        """Records that the run is saved after this step, for any reason."""
        self.last_save, self.last_step = time.monotonic(), step
        self._void()

    def _void(self):
        if self.next is not None and self.last_step >= self.next - self._ahead():
            self.count, self.next = self.count + 1, None

    def _ahead(self):
        return 2 if jax.process_count() > 1 else 0

    def _decide(self, step):
        if self.minutes is not None and time.monotonic() - self.last_save >= 60 * self.minutes:
            self.next = step + self._ahead()
            if jax.process_count() > 1:
                store().key_value_set(f"{self.prefix}{self.count}/step", str(self.next))

    def _hear(self):
        while self.next is None and (found := store().key_value_dir_get(f"{self.prefix}{self.count}")):
            self.next = int(found[0][1])
            self._void()


_agreements = itertools.count()
