"""A run's folder: its lock, its config, and its model.

    config.json  tokenizer.json  corpus.json  metrics.jsonl  expert_load/  tensorboard/  checkpoints/  cache/  logs/
    goodput.json  tracker.json  *.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock

from deepseek_jax import io, stop, storage, working_files
from deepseek_jax.config import (
    Config,
    ConfigError,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    as_dict,
    freeze,
)
from deepseek_jax.history import check_changes

if TYPE_CHECKING:
    from deepseek_jax.data.tokenizer import Tokenizer


@contextlib.contextmanager
def alone_in(workdir: str) -> Iterator[None]:
    """A context in which no other process trains in this work directory. Raises ConfigError if one already does.

    The kernel, or the server of a shared disk, releases the lock when its holder ends, however it ends. In a bucket it
    is an object: `_Lease`.
    """
    if storage.is_remote(workdir):
        with _Lease(workdir):
            yield
        return
    os.makedirs(workdir, exist_ok=True)
    holder = storage.as_path(workdir) / ".holder"
    try:
        lock = filelock.FileLock(os.path.join(workdir, ".lock"), timeout=0).acquire()
    except filelock.Timeout:
        raise _taken(workdir, _object(str(holder))) from None
    except NotImplementedError:  # a file system without locks
        lock = contextlib.nullcontext()
    with lock:
        io.write_json(holder, _about_this_process())
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def _about_this_process():
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _taken(workdir, said) -> ConfigError:
    """said: the lock holder's description of itself, if it has been written."""
    known = {"host", "pid", "since"} <= said.keys()
    holder = f" (process {said['pid']} of {said['host']}, since {said['since']})" if known else ""
    return ConfigError(f"{workdir} is being trained by another process{holder}; wait for it, stop it, or take another "
                       "--workdir.")


class _Lease:
    """The object .holder of a work directory in a bucket, which its holder rewrites every BEAT seconds.

    No store releases it when the holder dies. So the lock counts as free if its process on this machine is gone, or,
    for another machine, if it has not been rewritten for EXPIRY seconds, which the next run waits for. A holder that
    was cut off from the store for that long, and then finds another's lock or none, ends at once and writes nothing
    more.

    No store can remove an object on the condition that it is still the one that was read, either. So runs that take an
    expired lock read it again after SETTLE seconds, and the last writer has it.
    """

    BEAT, EXPIRY, SETTLE = 20, 90, 3

    def __init__(self, workdir: str):
        self.workdir, self.address = workdir, os.path.join(workdir, ".holder")
        self.said: dict[str, Any] = _about_this_process() | {
            "id": uuid.uuid4().hex, "machine": working_files.machine(), "started": _started(os.getpid())}
        self.beats, self.released = 0, threading.Event()
        self.thread = threading.Thread(target=self._hold, daemon=True)

    def __enter__(self):
        taken_over = self._await()
        storage.create(self.address, self._words())
        self._check_own()  # more reliable than the response: a request whose response was lost is sent twice
        if taken_over:
            time.sleep(self.SETTLE)
            self._check_own()
        self.thread.start()

    def __exit__(self, *error):
        self.released.set()
        self.thread.join()
        with contextlib.suppress(storage.StorageError, OSError):  # then it expires
            if (self._found() or {}).get("id") == self.said["id"]:
                storage.remove(self.address)

    def _words(self):
        return json.dumps(self.said | {"beats": self.beats}).encode()

    def _found(self) -> dict[str, Any] | None:
        """The content of the object; None: there is none. Content that no run wrote counts as another machine's, and
        expired."""
        try:
            data = storage.read_bytes(self.address)
        except FileNotFoundError:
            return None
        try:
            found = io.parse_json(data)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {"content": data}

    def _check_own(self):
        found = self._found() or {}
        if found.get("id") != self.said["id"]:
            raise _taken(self.workdir, found)

    def _await(self) -> bool:
        """Waits until the lock is free; returns whether it was taken over from a holder. Raises ConfigError as soon as
        its holder is seen to be alive."""
        said = self._found()
        if said is None:
            return False
        # Windows cannot tell whether a process is alive.
        if os.name == "posix" and said.get("machine") == self.said["machine"] and isinstance(said.get("pid"), int):
            if working_files.is_running(said["pid"]) and said.get("started") == _started(said["pid"]):
                raise _taken(self.workdir, said)
            self._take_from(said)
            return True
        end = time.monotonic() + self.EXPIRY
        while time.monotonic() <= end:
            time.sleep(min(1, self.EXPIRY / 10))
            now = self._found()
            if now is None:
                return False
            if now != said:
                raise _taken(self.workdir, now)
        holder = f"process {said['pid']} of {said['host']}" if {"pid", "host"} <= said.keys() else "whoever"
        self._take_from(said)
        print(f"{self.workdir} is free: {holder}, which held it, has been silent for {self.EXPIRY} seconds.",
              flush=True)
        return True

    def _take_from(self, said):
        now = self._found()  # others may do the same at the same time
        if now not in (said, None):
            raise _taken(self.workdir, now)
        storage.remove(self.address)

    def _hold(self):
        while not self.released.wait(self.BEAT):
            with contextlib.suppress(storage.StorageError, OSError):  # the store may answer again at the next beat
                try:
                    self._check_own()
                except ConfigError as error:
                    print(f"error: {error} This one was cut off from the store.", file=sys.stderr)
                    stop.leave(stop.MISTAKE)
                self.beats += 1
                storage.put(self.address, self._words())


def _started(pid: int) -> str | None:
    """The start time of a process, in ticks since boot, since process numbers are reused. None: unknown."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
            return f.read().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def claim_workdir(config: Config, workdir: str) -> None:
    """Writes the config into a work directory that has none, or whose run has saved nothing yet."""
    path = os.path.join(workdir, "config.json")
    if not storage.exists(path) or not _has_begun(workdir):
        storage.make_folder(workdir)
        io.write_json(path, as_dict(config))


def _check_name(workdir):
    from deepseek_jax.checkpoint.manifest import check_name

    check_name(workdir)


def _has_begun(workdir):
    from deepseek_jax.checkpoint.manifest import has_begun

    return has_begun(workdir)


def check_workdir(config: Config, workdir: str) -> None:
    """Raises ConfigError for a name that cannot hold checkpoints, for a run with a config that this one may not
    continue (`history`), and for local states of a run in a bucket; StorageError for a disk or a bucket that cannot be
    written to."""
    _check_name(workdir)
    # Each local state needs all earlier metrics, which are uploaded as complete files.
    if config.train.checkpoint_local is not None and storage.is_remote(workdir):
        raise ConfigError(f"train.checkpoint_local is for a --workdir on a disk, and {workdir} is in a bucket; "
                          "take train.checkpoint_local=None, or a disk.")
    storage.check_writable(workdir)
    if not storage.lexists(os.path.join(workdir, "config.json")) or not _has_begun(workdir):
        return
    check_changes(load_workdir_config(workdir), config, workdir, f"take that config or another --workdir, where "
                  f"--config.init.from={workdir} starts with this run's weights.")


def load_workdir_config(workdir: str) -> Config:
    """The config of a run. Raises ConfigError if the directory has none."""
    path = os.path.join(workdir, "config.json")
    if storage.is_folder(path):
        raise ConfigError(f"{path} is a folder, not the config of a run; take another --workdir.")
    if not storage.is_file(path):
        raise ConfigError(f"{workdir} holds no config.json; give the --workdir of a run.")
    _check_name(workdir)
    try:
        saved = io.read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it, or take another --workdir.") from error
    if isinstance(saved, dict) and "model_type" in saved:
        raise ConfigError(f"{workdir} is a Hugging Face checkpoint; take --hf {workdir}, or make a work directory of "
                          f"it with python -m deepseek_jax.convert from-hf {workdir} RUN.")
    return freeze(saved)


def check_speaks(config: Config, folder: str) -> None:
    """Raises ConfigError for the config of a reward model, whose weights can no longer generate text."""
    if config.preference.objective == "reward":
        raise ConfigError(f"{folder} is a reward model, which scores answers and writes none: "
                          f"--config.rollout.reward=model:{folder} is what it is for; take the run that it began "
                          f"from, {config.init.from_}.")


class LoadedRun(NamedTuple):
    """A checkpoint of a run. variables: collections params and router."""

    config: Config
    variables: dict[str, Any]
    step: int


def load_run(workdir: str, ema: bool = False, step: int | None = None) -> LoadedRun:
    """A run's config (on one device here) and variables; with `ema` the moving average of its weights. Adapters are
    merged into their base.

    Args:
      step: of the checkpoint; None: the newest undamaged one.
    Raises:
      ConfigError: there is no run or no such checkpoint, it has no moving average, or it is a reward model.
    """
    from deepseek_jax.checkpoint.adapters import restore_weights  # imports jax and Orbax: only to read arrays

    config = on_one_device(load_workdir_config(workdir))
    check_speaks(config, workdir)
    variables, step = restore_weights(workdir, ema=ema, step=step)
    if not variables["params"]:
        raise ConfigError(f"the run in {workdir} keeps no moving average; train with --config.train.ema_decay=0.999.")
    return LoadedRun(dataclasses.replace(config, lora=LoraConfig()), variables, step)


def on_one_device(config: Config) -> Config:
    """The config of the same run without its mesh; the micro-batches of a pipeline become accumulation steps."""
    train, mesh = config.train, config.mesh
    rounds = train.accumulation_steps * (config.pipeline.microbatches if mesh.pipe > 1 else 1)
    return dataclasses.replace(config, mesh=MeshConfig(), train=dataclasses.replace(train, accumulation_steps=rounds))


class LoadedModel(NamedTuple):
    """A model for generation. variables: collections params and router."""

    cfg: ModelConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer


def load(folder: str, ema: bool = False, step: int | None = None, hf: bool | None = None,
         on_host: bool = False) -> LoadedModel:
    """The model of a run's folder, or of a Hugging Face checkpoint's. ema, step: of a run, as in `load_run`.

    Args:
      hf: whether it is a Hugging Face checkpoint; None: determined from its config.json.
      on_host: leave the variables in the host's memory, as NumPy arrays, for an engine that moves one layer at a time.
    Raises:
      ConfigError: there is nothing usable, or the tokenizer does not fit.
    """
    from deepseek_jax.data.tokenizer import Tokenizer

    folder = os.path.expanduser(folder)
    vocabulary = os.path.join(folder, "tokenizer.json")
    hf = is_hf_checkpoint(folder) if hf is None else hf
    if hf:
        if ema or step is not None:
            raise ConfigError(f"{folder} is a Hugging Face checkpoint, which holds no moving average and no steps; "
                              "ask for neither.")
        Tokenizer.load(vocabulary)  # before gigabytes are read
    from deepseek_jax.checkpoint.arrays import as_numpy

    read = as_numpy(_read) if on_host else _read
    cfg, variables = read(folder, hf, ema, step)
    return LoadedModel(cfg, variables, Tokenizer.load(vocabulary, cfg.vocab_size))


def _read(folder, hf, ema, step):
    if hf:
        from deepseek_jax.interop import load_hf

        return load_hf(folder)
    run = load_run(folder, ema, step)
    return run.config.model, run.variables


def is_hf_checkpoint(folder: str) -> bool:
    """Whether the config.json there is one of Hugging Face's: it names its architecture."""
    return bool({"model_type", "architectures"} & _object(os.path.join(folder, "config.json")).keys())


def most_positions(folder: str) -> int | None:
    """The context length, of prompt and answer together, of the model in a folder; None: unknown.

    That is max_position_embeddings of a Hugging Face checkpoint, or of the one that a work directory was converted
    from; of any other run what its YaRN extends the context to.
    """
    from deepseek_jax.interop.convert import LAYOUT

    own = _object(os.path.join(folder, "config.json"))
    source = _object(os.path.join(folder, LAYOUT)).get("config", own)
    within = source.get("text_config")  # of a model that also has a vision model
    stated = (within if isinstance(within, dict) else source).get("max_position_embeddings")
    if type(stated) is int and stated > 0:
        return stated
    yarn = freeze(own).model.yarn if "model" in own else None
    return None if yarn is None else int(yarn.factor * yarn.original_length)


def _object(path: str) -> dict[str, Any]:
    """A file's JSON object; {} if there is no file."""
    try:
        found = io.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
