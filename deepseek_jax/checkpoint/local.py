"""The newest state of a run on the machines' own disks or in their memory, for a restart there within seconds.

    train.checkpoint_local/RUN/process_3/STEP/...     as in the work directory, with the data of process 3
                                         copy_of_1/STEP/...     the same for process 1, which is on another machine
                               run.json               the run of these states: the address of its checkpoints
    WORKDIR/checkpoints/local.json                    RUN, written with the first of these states

Each process writes the data on its devices, and a copy of a neighbour's. The neighbour is the process that is half of
all processes away, or the next one on another machine, so that a machine, or the first or the second half of all racks
or slices, may be lost. A step is usable if some machine has each process's part; a process that lacks its part receives
it (`exchange`). Processes may be renumbered. Local states are not used with another mesh, nor if the run has since been
continued from its work directory, was continued without local states, or was copied: RUN is then a different name, or
missing. The checkpoint in the work directory is used instead.
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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax import io, storage
from deepseek_jax.checkpoint import agreement, chunks, manifest
from deepseek_jax.checkpoint.exchange import Incoming, Pairs
from deepseek_jax.checkpoint.format import write_meta
from deepseek_jax.checkpoint.manifest import CheckpointError
from deepseek_jax.config import ConfigError

_RUN = re.compile("[0-9a-f]{12}")
_OTHER_MESH = "it was saved on another mesh"

State = tuple[int, str]  # (step, name of the start that saved it): parts of different starts cannot be combined


class LocalCheckpoints:
    """The two newest states of this process, and the copies of its neighbour's.

    Args:
      folder: on this machine.
      directory: of the run's checkpoints, shared by all processes, on a disk.
    Raises ConfigError if nothing can be written.
    """

    def __init__(self, folder: str, directory: pathlib.Path):
        self.folder, self.directory = pathlib.Path(folder), directory
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "local checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._me, self._count = jax.process_index(), jax.process_count()
        self._open(agreement.from_first(self._known))
        if self._count > 1 and not self._copies and self._me == 0:
            print(f"note: processes share {self.folder}, so there are no copies in it, and with a machine all states "
                  "there are lost; the run then continues from the work directory.", flush=True)

    def _known(self) -> dict[str, Any]:
        """The name in local.json, or a new one, which is written there with the first state."""
        address = os.path.realpath(self.directory)
        try:
            found = io.read_json(self.directory / "local.json")
        except (FileNotFoundError, ValueError):
            found = None
        run = found.get("run") if isinstance(found, dict) and found.get("address") == address else None
        known = isinstance(run, str) and _RUN.fullmatch(run)
        return {"run": run if known else uuid.uuid4().hex[:12], "address": address, "noted": bool(known),
                "start": uuid.uuid4().hex[:12]}

    def _anew(self) -> dict[str, Any]:
        storage.remove(self.directory / "local.json")
        return self._known()

    def _open(self, known: dict[str, Any]):
        self._noted, self._about = known["noted"], {k: known[k] for k in ("run", "address")}
        self._start, self.run = known["start"], self.folder / known["run"]
        self._spent, self._why = set(), None
        self.own = self.run / f"process_{self._me}"
        try:
            self.own.mkdir(parents=True, exist_ok=True)
            io.write_json(self.run / "run.json", self._about)
            for other in self.folder.iterdir():
                if other.name != known["run"] and _RUN.fullmatch(other.name) and _address(other) == known["address"]:
                    storage.remove(other)  # states of this run from before it was continued from another state
            self.own.with_suffix(".start").write_text(self._start)
        except OSError as error:
            raise ConfigError(f"train.checkpoint_local={self.folder} cannot be written to: {error.strerror}; take "
                              "another folder on this machine.") from error
        for folder in [self.own, *self.own.glob("copy_of_*")]:
            manifest.clean_up(folder)
        agreement.said_by_any(None)
        self._here = [i for i in range(self._count) if self._is_here(self.run / f"process_{i}.start")]
        home = dict(map(json.loads, agreement.said_by_any(json.dumps([self._me, min(self._here)]))))
        away = _away([home[i] for i in range(self._count)])
        self._copies, shift = away is not None, away or 0
        self._pairs: Pairs = tuple((i, (i + shift) % self._count) for i in range(self._count))
        self._giver = (self._me - shift) % self._count

    def _is_here(self, mark):
        try:
            return mark.read_text() == self._start
        except FileNotFoundError:
            return False

    def restore(self, read: Callable[[pathlib.Path], Any], newest: int) -> Any | None:
        """read(checkpoint) of the newest step, at least `newest`, for which each process has its part or can receive
        it. None: there is none. Local data of later steps is removed: the run will reach them again, and not in all
        processes at once."""
        while (state := self._newest(found := self._found(), newest)) is not None:
            gifts = _rounds(found[state], self._count)
            value, why = self._read_own(read, state, gifts)
            if said := agreement.said_by_any(why):
                if _OTHER_MESH in said:
                    self._give_up(state, _OTHER_MESH)
                continue  # without damaged parts
            for pairs in gifts:
                try:
                    self._give(state, pairs)
                except OSError as error:
                    raise self._failed(state[0], error, "was not passed from machine to machine; in") from error
            if any(taker == self._me for pairs in gifts for _, taker in pairs):
                value, why = self._read(read, state)
            if said := agreement.said_by_any(why):
                self._give_up(state, said[0])
                continue
            if gifts and self._me == 0:
                words = ", ".join(f"{taker} from process {giver}" for pairs in gifts for giver, taker in pairs)
                print(f"Parts of step {state[0]} that machines have lost: process {words}.", flush=True)
            if self._why is not None and self._me == 0:
                print(f"Not taken: {self._why}. Step {state[0]} counts.", flush=True)
            self._tidy(state[0])
            return value
        return None

    def _folders(self) -> Iterator[tuple[int, pathlib.Path]]:
        """(process, folder of its states on this machine), this process first; includes processes that run elsewhere
        now."""
        for pattern in ("process_*", "process_*/copy_of_*"):
            for folder in sorted(self.run.glob(pattern)):
                number = folder.name.rsplit("_", 1)[-1]
                if number.isdecimal():
                    yield int(number), folder

    def _parts(self) -> dict[State, dict[int, pathlib.Path]]:
        """{state: {process: its part}} for the parts that are complete on this machine."""
        found: dict[State, dict[int, pathlib.Path]] = {}
        for process, folder in self._folders():
            for step in manifest.steps(folder):
                path = folder / str(step)
                if manifest.incomplete(path) is None:
                    start = next((p.name for p in path.glob("state-*")), "")
                    found.setdefault((step, start), {}).setdefault(process, path)
        return found

    def _found(self) -> dict[State, dict[int, list[int]]]:
        """{state: {process: processes whose machine has its part}}, the same in all processes."""
        found: dict[State, dict[int, list[int]]] = {}
        self._at = self._parts()
        own = [[*state, list(parts)] for state, parts in self._at.items()]
        for words in agreement.said_by_any(json.dumps([self._me, own])):
            holder, states = json.loads(words)
            for step, start, processes in states:
                for process in processes:
                    found.setdefault((step, start), {}).setdefault(process, []).append(holder)
        return {state: parts for state, parts in found.items() if state not in self._spent}

    def _newest(self, found, newest) -> State | None:
        known = sorted(state for state in found if state[0] >= newest)
        whole = [state for state in known if not self._lost(found[state])]
        if known and (not whole or known[-1][0] > whole[-1][0]):
            lost = ", ".join(map(str, self._lost(found[known[-1]])))
            self._why = f"step {known[-1][0]} on the machines, where no part of process {lost} is left"
        if not found and not self._spent and self._noted:
            self._why = "a state on the machines, where none is left"
        return whole[-1] if whole else None

    def _give_up(self, state, why):
        self._spent.add(state)
        self._why = f"step {state[0]} on the machines: {why}"

    def _lost(self, parts):
        return [i for i in range(self._count) if i not in parts]

    def _read_own(self, read, state, gifts):
        """-> (value, reason for a failure). Reads the parts to send completely, and this process's own part if it is
        here."""
        parts = self._at.get(state, {})
        for process in (taker for pairs in gifts for giver, taker in pairs if giver == self._me):
            if why := next(manifest.damages(parts[process]), None):
                manifest.discard(parts[process])
                return None, why
        if self._me not in parts:
            assert any(taker == self._me for pairs in gifts for _, taker in pairs)
            return None, None
        if parts[self._me] != self.own / str(state[0]):  # from a process that was numbered differently, or a copy
            manifest.discard(self.own / str(state[0]))
            parts[self._me].rename(self.own / str(state[0]))
        return self._read(read, state)

    def _read(self, read, state):
        path = self.own / str(state[0])
        try:
            return read(path), None
        except manifest.DamagedError as error:
            if error.why.endswith("is not in its manifest"):
                return None, _OTHER_MESH
            manifest.discard(path)
            return None, error.why

    def _give(self, state: State, pairs: Pairs):
        """In each pair the first process sends the second one its part, file by file."""
        taker, size, outgoing = dict(pairs).get(self._me), None, ()
        if taker is not None:
            path = self._at[state][taker]
            files, about = manifest.files_of(path), (path / "manifest.json").read_bytes()
            size = 8 + len(about) + sum(length for length, _ in files.values())
            outgoing = _in_order(path, about, files)
        most = max(map(int, agreement.said_by_any(None if size is None else str(size))))
        incoming = Incoming(pairs, most, outgoing)
        if any(taker == self._me for _, taker in pairs):
            self._receive(incoming, self.own / f"{state[0]}.partial")
        incoming.finish()

    def _receive(self, incoming: Incoming, partial: pathlib.Path):
        storage.remove(partial)
        about = incoming.take(int.from_bytes(incoming.take(8).tobytes(), "little"))
        files = io.parse_json(about.tobytes())["files"]
        for name, (length, _) in sorted(files.items()):
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as f:
                f.write(incoming.take(length))
                f.flush()
                os.fsync(f.fileno())
        manifest.commit(partial, partial.with_suffix(""), files)

    def _tidy(self, newest: int):
        """Removes states newer than a step, and states of processes that are no longer on this machine."""
        for folder in [self.own, *self.own.glob("copy_of_*")]:
            for later in manifest.steps(folder):
                if later > newest:
                    manifest.discard(folder / str(later))
            if folder != self.own and (folder.name != f"copy_of_{self._giver}" or not self._copies):
                storage.remove(folder)
        if self._me != min(self._here):  # one process per machine, so that no other reads them
            return
        for process, folder in self._folders():
            if process not in self._here and folder.parent == self.run:
                storage.remove(folder)

    def begin_anew(self) -> None:
        """Removes the local states: the run continues from another state."""
        if self._why is not None and self._me == 0:
            print(f"Not taken: {self._why}. The work directory counts.", flush=True)
        if self._noted:  # otherwise there are none yet
            storage.remove(self.own)
            self._open(agreement.from_first(self._anew))

    def save(self, step: int, arrays: dict[str, Any], leaves: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing, and returns once all processes have written the previous state and each has received its
        neighbour's copy. Raises as `wait` does."""
        self.wait()
        agreement.said_by_any(None)  # a process with a slow disk still needs the others' previous state
        folders = [self.own, self.own / f"copy_of_{self._giver}"][:1 + self._copies]
        try:
            for folder in folders:
                for old in manifest.steps(folder)[:-1]:
                    manifest.discard(folder / str(old))
            if not self._noted and self._me == 0:
                io.write_json(self.directory / "local.json", self._about, sync=True)
        except OSError as error:
            raise self._failed(step, error) from error
        self._noted = True
        name = f"state-{self._start}"
        saves = [chunks.Save(self.own / f"{step}.partial", name, arrays, alone=True)]
        if self._copies:
            saves.append(saves[0].of_neighbour(folders[1] / f"{step}.partial", arrays, self._pairs))
        self._pending = self._thread.submit(self._write, step, saves, meta, chunks.describe(name, leaves, arrays))

    def _write(self, step, saves, meta, leaves):
        for save in saves:
            try:
                save.folder.mkdir(parents=True)
                write_meta(save.folder, step, meta, leaves)
                manifest.commit(save.folder, save.folder.with_suffix(""), save.write(""))
            except OSError as error:
                storage.remove(save.folder)
                raise self._failed(step, error) from error

    def _failed(self, step, error, verb="was not written to") -> CheckpointError:
        what = "what the devices of this machine have" + (", and two of another machine" if self._copies else "")
        full = f"; it holds two states of {what}, and needs room for them"
        full = full if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return CheckpointError(f"step {step} {verb} train.checkpoint_local={self.folder}: "
                               f"{error.strerror or error}{full}.")

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
    """The address of the checkpoints that the states in a folder belong to."""
    with contextlib.suppress(OSError, ValueError):
        found = io.read_json(folder / "run.json")
        return found.get("address") if isinstance(found, dict) else None
    return None


def _away(home: list[int]) -> int | None:
    """The distance in process numbers to the one that keeps a copy: half of all, or the first larger distance at which
    no process shares a machine with the one it copies; None: there is no such distance. home: the first process on the
    machine of each process."""
    count = len(home)
    return next((shift for shift in range(count // 2, count)
                 if all(home[i] != home[(i + shift) % count] for i in range(count))), None)


def _rounds(holders: dict[int, list[int]], count: int) -> list[Pairs]:
    """(sender, receiver) pairs for simultaneous exchanges. holders: {process: processes whose machine has its part};
    numbers from `count` on are processes of an earlier start."""
    todo, rounds = [i for i in range(count) if i not in holders[i]], []
    while todo:
        pairs: dict[int, int] = {}
        for taker in todo:
            giver = next((holder for holder in holders[taker] if holder not in pairs), None)
            if giver is not None:
                pairs[giver] = taker
        rounds.append(tuple(pairs.items()))
        todo = [taker for taker in todo if taker not in pairs.values()]
    return rounds


def _in_order(path: pathlib.Path, about: bytes, files: dict[str, list[int]]) -> Iterator[np.ndarray]:
    """The bytes sent for a checkpoint: the length of its manifest, the manifest, and its files by name."""
    yield np.frombuffer(len(about).to_bytes(8, "little") + about, np.uint8)
    for name in sorted(files):
        yield np.frombuffer((path / name).read_bytes(), np.uint8)
