"""The newest state of a run on the machines' own disks or in their memory, for a restart there within seconds.

    train.checkpoint_local/RUN/process_3/STEP/...     as in the work directory, of what the devices of process 3 hold

Each process writes all that its devices hold, waits for no other, and reads what it wrote. A step counts if every
process has it, complete. With another mesh, or a machine that is new, there is none, and the checkpoint in the work
directory counts. So does it where the run was continued from that one since: RUN then is another name
(`checkpoints/local.json`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import pathlib
import uuid
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax import io, storage
from deepseek_jax.checkpoint import agreement, chunks, manifest
from deepseek_jax.checkpoint.format import write_meta
from deepseek_jax.config import ConfigError


class LocalCheckpoints:
    """The two newest states that this process has written.

    Args:
      folder: on this machine.
      directory: of the run's checkpoints, shared by all processes.
    Raises ConfigError where nothing can be written.
    """

    def __init__(self, folder: str, directory: pathlib.Path):
        self.folder, self.directory = pathlib.Path(folder), directory
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "local checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._open(agreement.from_first(self._run))

    def _run(self) -> str | None:
        """The name under which the states of this run are kept; None: there are none."""
        try:
            return io.read_json(self.directory / "local.json")["run"]
        except FileNotFoundError:
            return None

    def _open(self, run: str | None):
        self.own = self.folder / str(run) / f"process_{jax.process_index()}"
        if run is None:
            return
        try:
            self.own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"train.checkpoint_local={self.folder} cannot be written to: {error.strerror}; take "
                              "another folder on this machine.") from error
        manifest.clean_up(self.own)

    def restore(self, read: Callable[[pathlib.Path], Any], newest: int) -> Any | None:
        """read(checkpoint) of the newest step, `newest` or later, that every process has; None: there is none, and what
        is here is removed."""
        for step in self._common(newest):
            value, why = None, None
            try:
                value = read(self.own / str(step))
            except manifest.DamagedError as error:
                why = error.why
            if not agreement.said_by_any(why):
                return value
        storage.remove(self.own)
        with contextlib.suppress(OSError):  # others of this machine may have theirs there
            self.own.parent.rmdir()
        self._open(agreement.from_first(self._renew))
        return None

    def _common(self, newest: int) -> list[int]:
        own = [step for step in manifest.steps(self.own) if manifest.incomplete(self.own / str(step)) is None]
        found = [set(json.loads(steps)) for steps in agreement.said_by_any(json.dumps(own))]
        return sorted((step for step in set.intersection(*found) if step >= newest), reverse=True)

    def _renew(self) -> str:
        run = uuid.uuid4().hex[:12]
        io.write_json(self.directory / "local.json", {"run": run}, sync=True)
        return run

    def save(self, step: int, arrays: dict[str, Any], leaves: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing and returns; waits for the one before it. Raises what `wait` does."""
        self.wait()
        for old in manifest.steps(self.own)[:-1]:
            manifest.discard(self.own / str(old))
        name = chunks.new_state()
        save = chunks.Save(self.own / f"{step}.partial", name, arrays, alone=True)
        self._pending = self._thread.submit(self._write, step, save, meta, chunks.describe(name, leaves, arrays))

    def _write(self, step, save, meta, leaves):
        try:
            save.folder.mkdir()
            write_meta(save.folder, step, meta, leaves)
            manifest.commit(save.folder, self.own / str(step), save.write(""))
        except OSError as error:
            storage.remove(save.folder)
            full = "; it holds two states of what the devices of this machine have, and needs room for them"
            raise OSError(f"step {step} was not written to train.checkpoint_local={self.folder}: "
                          f"{error.strerror or error}{full if error.errno == errno.ENOSPC else ''}.") from error

    def wait(self) -> None:
        """Returns once the last state is written. Raises OSError, in one line, if it was not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last one. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
