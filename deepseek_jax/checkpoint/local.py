"""The newest state of a run on the machines' own disks or in their memory, for a restart there within seconds.

    train.checkpoint_local/RUN/process_3/STEP/...     as in the work directory, of what the devices of process 3 hold
                               run.json               whose states these are: the address of its checkpoints
    WORKDIR/checkpoints/local.json                    RUN, from the first of these states on

Each process writes all that its devices hold, and reads what it wrote. A step counts if every process has it, complete.
With another mesh, or a machine that is new, there is none, and the checkpoint in the work directory counts. So does it
where the run was continued from that one since, or without these, or was copied: RUN is another name then, or none.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import pathlib
import re
import uuid
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax import io, storage
from deepseek_jax.checkpoint import agreement, chunks, manifest
from deepseek_jax.checkpoint.format import write_meta
from deepseek_jax.checkpoint.manifest import CheckpointError
from deepseek_jax.config import ConfigError

_RUN = re.compile("[0-9a-f]{12}")


class LocalCheckpoints:
    """The two newest states that this process has written.

    Args:
      folder: on this machine.
      directory: of the run's checkpoints, shared by all processes, on a disk.
    Raises ConfigError where nothing can be written.
    """

    def __init__(self, folder: str, directory: pathlib.Path):
        self.folder, self.directory = pathlib.Path(folder), directory
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "local checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._open(agreement.from_first(self._known))

    def _known(self) -> dict[str, Any]:
        """What local.json says, or a new name, which it says with the first state."""
        address = os.path.realpath(self.directory)
        try:
            found = io.read_json(self.directory / "local.json")
        except (FileNotFoundError, ValueError):
            found = None
        run = found.get("run") if isinstance(found, dict) and found.get("address") == address else None
        known = isinstance(run, str) and _RUN.fullmatch(run)
        return {"run": run if known else uuid.uuid4().hex[:12], "address": address, "noted": bool(known)}

    def _anew(self) -> dict[str, Any]:
        storage.remove(self.directory / "local.json")
        return self._known()

    def _open(self, known: dict[str, Any]):
        self._noted, self._about, self._damaged = known["noted"], {k: known[k] for k in ("run", "address")}, set()
        self.own = self.folder / known["run"] / f"process_{jax.process_index()}"
        try:
            self.own.mkdir(parents=True, exist_ok=True)
            io.write_json(self.own.parent / "run.json", self._about)
            for other in self.folder.iterdir():
                if other.name != known["run"] and _RUN.fullmatch(other.name) and _address(other) == known["address"]:
                    storage.remove(other)  # of this run, before it was continued from another state
        except OSError as error:
            raise ConfigError(f"train.checkpoint_local={self.folder} cannot be written to: {error.strerror}; take "
                              "another folder on this machine.") from error
        manifest.clean_up(self.own)

    def restore(self, read: Callable[[pathlib.Path], Any], newest: int) -> Any | None:
        """read(checkpoint) of the newest step, `newest` or later, that every process has; None: there is none. What is
        here of later steps goes: the run gets there again, and not in all processes at once."""
        for step in self._common(newest):
            value, why = None, None
            try:
                value = read(self.own / str(step))
            except manifest.DamagedError as error:
                why = error.why
            if not agreement.said_by_any(why):
                for later in manifest.steps(self.own):
                    if later > step:
                        manifest.discard(self.own / str(later))
                return value
            self._damaged.add(step)
        return None

    def _common(self, newest: int) -> list[int]:
        own = [step for step in manifest.steps(self.own) if manifest.incomplete(self.own / str(step)) is None]
        found = [set(json.loads(steps)) for steps in agreement.said_by_any(json.dumps(own))]
        return sorted((step for step in set.intersection(*found) - self._damaged if step >= newest), reverse=True)

    def begin_anew(self) -> None:
        """Removes what is here: the run continues from another state."""
        if self._noted:  # otherwise there is nothing yet
            storage.remove(self.own)
            self._open(agreement.from_first(self._anew))

    def save(self, step: int, arrays: dict[str, Any], leaves: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing and returns, once all processes have written the one before it. Raises what `wait` does."""
        self.wait()
        agreement.said_by_any(None)  # a process whose disk is slow still needs that of the others before it
        try:
            for old in manifest.steps(self.own)[:-1]:
                manifest.discard(self.own / str(old))
            if not self._noted and jax.process_index() == 0:
                io.write_json(self.directory / "local.json", self._about, sync=True)
        except OSError as error:
            raise self._failed(step, error) from error
        self._noted = True
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
            raise self._failed(step, error) from error

    def _failed(self, step, error) -> CheckpointError:
        full = "; it holds two states of what the devices of this machine have, and needs room for them"
        return CheckpointError(f"step {step} was not written to train.checkpoint_local={self.folder}: "
                               f"{error.strerror or error}{full if error.errno == errno.ENOSPC else ''}.")

    def wait(self) -> None:
        """Returns once the last state is written. Raises CheckpointError if it was not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last one. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _address(folder: pathlib.Path) -> str | None:
    """Of the checkpoints that the states in a folder belong to."""
    with contextlib.suppress(OSError, ValueError):
        found = io.read_json(folder / "run.json")
        return found.get("address") if isinstance(found, dict) else None
    return None
