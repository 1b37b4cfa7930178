"""Checkpoints that survive kill -9, full disks and flipped bits.

`chunks` writes the arrays of `WORKDIR/checkpoints/STEP` in the background, and `manifest` commits that folder
atomically. Only the parts that are read are verified, as they are read; if that fails, all processes take the
checkpoint before it. The state may be any pytree. It is stored flat, leaf by leaf under its path
("params/embed/table"), so that other commands can read the parameters without knowing the optimizer.
"""

from __future__ import annotations

import concurrent.futures
import errno
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from deepseek_jax import storage
from deepseek_jax.checkpoint import agreement, arrays, chunks, manifest
from deepseek_jax.checkpoint.format import read_meta, write_meta
from deepseek_jax.checkpoint.local import LocalCheckpoints
from deepseek_jax.checkpoint.manifest import CheckpointError
from deepseek_jax.config import ConfigError

T = TypeVar("T")


class Checkpoints:
    """The newest `keep` checkpoints of one work directory, and those at multiples of `keep_period`; only the processes
    that train there may have this object.

    local: a folder on each machine, for the states of `save_local`.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 3, keep_period: int | None = None,
                 local: str | None = None):
        self.directory = manifest.directory_of(workdir)
        self.keep, self.keep_period = keep, keep_period
        self._damaged = set()  # steps seen damaged by restore; the next commit removes them
        self._attempts = 0
        self._pending = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        if jax.process_index() == 0:
            storage.make_folder(self.directory)
            manifest.clean_up(self.directory)
            if local is None and not storage.is_remote(self.directory):
                storage.remove(self.directory / "local.json")  # this run continues past the states on the machines
        self.local = None if local is None else LocalCheckpoints(local, self.directory)

    def save_local(self, step: int, state: Any, meta: dict) -> None:
        """`save` to this machine only, if there is a folder for it.

        Raises:
          CheckpointError: the previous one could not be written.
        """
        assert self.local is not None
        self.local.save(step, *_flatten(state), meta)

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts writing `state` and returns; its buffers may be donated at once.

        Waits for the previous save, so at most one is in progress.

        Args:
          step: names the checkpoint; an older one of the same step is replaced.
          state: any pytree of arrays, typed PRNG keys and numbers. Numbers come back as arrays.
          meta: small JSON data: the data position, the config.

        Raises:
          CheckpointError: this save could not start, or the previous one failed.
        """
        self.wait()
        arrays, leaves = _flatten(state)
        self._attempts += 1
        # A new name each time: late writes of a failed attempt must not get into the next one.
        partial = manifest.begin(self.directory, step, self._attempts)
        name = agreement.from_first(lambda: self._begin(step, partial, meta, leaves, arrays))
        save = chunks.Save(partial, name, arrays)
        written = f"checkpoint {step}, {self._attempts}"
        self._pending = self._thread.submit(self._commit, step, partial, lambda: save.write(written))

    def _begin(self, step, partial, meta, leaves, arrays) -> str:
        """Makes the folder and its meta.json. Returns the name of the folder of the arrays."""
        name = chunks.new_state()
        leaves = chunks.describe(name, leaves, arrays)
        try:
            if storage.is_remote(partial):
                manifest.discard(partial)  # including remains of a failed attempt
            else:
                manifest.clean_up(self.directory)
                partial.mkdir()
            write_meta(partial, step, meta, leaves)
        except (OSError, storage.StorageError) as error:
            raise self._failed(step, partial, error) from error
        return name

    def wait(self) -> None:
        """Returns once the last save is committed. Raises CheckpointError, once, if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest undamaged checkpoint as (state, meta), or None if there is none yet: a state on these machines,
        unless the work directory has a newer one.

        Args:
          abstract_state: the state's pytree, of jax.ShapeDtypeStruct (or arrays). A leaf with a sharding is read
            straight into it; one without becomes an uncommitted array.

        Raises:
          ConfigError: the state differs in a leaf from the saved one, or every checkpoint is damaged.
        """
        self.wait()
        read, local = lambda path: restore_state(path, abstract_state), None
        if self.local is not None:
            newest = agreement.from_first(lambda: max(self.steps(), default=0))
            local = self.local.restore(read, newest)
            if local is not None:
                return local

        def newest_of_both(path):  # a damaged one must not make the run go back further than the states on the machines
            nonlocal local
            local = self.local and self.local.restore(read, int(path.name))
            return local or read(path)

        found = read_newest(self.directory, newest_of_both)
        if self.local is not None and local is None:
            self.local.begin_anew()
        self._damaged = set(found.damaged)
        if found.step is None:
            return None
        if found.damaged and jax.process_index() == 0:
            names = ", ".join(f"{step} ({why})" for step, why in found.damaged.items())
            instead = found.step if local is None else "the state on this machine"
            print(f"Damaged checkpoint in {self.directory}: {names}; resuming from {instead} instead.", flush=True)
        return found.value

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return manifest.steps(self.directory)

    def close(self) -> None:
        """Waits for the last save. Raises the same errors as `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self.local is not None:
                self.local.close()

    def _commit(self, step, partial, write):
        try:
            prints = write()
            if jax.process_index() == 0:
                manifest.commit(partial, self.directory / str(step), prints)
        except Exception as error:
            raise self._failed(step, partial, error) from error
        self._damaged.discard(step)
        if jax.process_index() == 0:
            self._retire(step)

    def _retire(self, newest):
        """Removes the checkpoints that are no longer needed after the commit of `newest`."""
        whole = [step for step in self.steps() if step <= newest and step not in self._damaged]
        old = [step for step in whole[:-self.keep] if self.keep_period is None or step % self.keep_period]
        for step in self._damaged.union(old):
            manifest.discard(self.directory / str(step))
        self._damaged.clear()

    def _failed(self, step, partial, error) -> CheckpointError:
        why = str(error).strip().split("\n")[0] or type(error).__name__
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(error).lower():
            why = "no space left on the disk; free some, or keep fewer with train.checkpoints_kept"
        if storage.is_remote(partial):  # the store may no longer answer; the next start removes the remains
            return CheckpointError(f"checkpoint {step} was not written to {self.directory}: {why.rstrip('.')}. Those "
                                   "before it are untouched.")
        storage.remove(partial)
        last = self.steps()
        kept = f"The checkpoint of step {last[-1]} is untouched." if last else "There is no older one."
        return CheckpointError(f"checkpoint {step} was not written to {self.directory}: {why}. {kept}")


class Found(NamedTuple):
    """The value read from the newest intact checkpoint. step: None: there is none. damaged: {newer step: why}."""

    step: int | None
    value: Any
    damaged: dict[int, str]


def read_newest(directory: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> Found:
    """read(checkpoint) of the newest checkpoint that is intact, as far as the processes read it; all take the same one.

    Raises ConfigError if every checkpoint is damaged.
    """
    known: dict[int, str] = {}
    while True:
        step, damaged = agreement.from_first(lambda: manifest.newest(directory, known))
        damaged = {int(newer): why for newer, why in damaged.items()}  # JSON has turned them into strings
        if step is None:
            return Found(None, None, damaged)
        path, value, why = directory / str(step), None, None
        try:
            value = read(path)
        except manifest.DamagedError as error:
            if error.path != os.fspath(path):  # another checkpoint, which this one is based on
                raise
            why = error.why
        said = agreement.said_by_any(why)
        if not said:
            return Found(step, value, damaged)
        known[step] = said[0]


def find_checkpoint(workdir: str | os.PathLike[str], step: int | None = None) -> pathlib.Path:
    """The folder of a step's checkpoint, or for None of the newest complete one; the same in all processes.

    Raises ConfigError if there is none.
    """
    directory = manifest.directory_of(workdir)
    if step is not None:
        return manifest.of_step(directory, step)
    found = agreement.from_first(lambda: manifest.newest(directory)[0])
    return directory / str(_there(workdir, found))


def read_checkpoint(workdir: str | os.PathLike[str], read: Callable[[pathlib.Path], T],
                    step: int | None = None) -> tuple[T, int]:
    """read(checkpoint) of a step's checkpoint, or of the newest intact one, and its step. Raises ConfigError."""
    directory = manifest.directory_of(workdir)
    if step is not None:
        return read(manifest.of_step(directory, step)), step
    found = read_newest(directory, read)
    return found.value, _there(workdir, found.step)


def _there(workdir, step: int | None) -> int:
    if step is None:
        raise ConfigError(f"{workdir} holds no checkpoint; give the --workdir of a run that has saved one.")
    return step


def restore_items(workdir: str | os.PathLike[str], names: Sequence[str] = ("params", "router"),
                  abstract: dict[str, Any] | None = None,
                  step: int | None = None) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Reads some entries of a state in a work directory, where another process may be training. Nothing else is read or
    verified.

    Args:
      names: entries of the state's top level. A missing entry is returned as {}.
      abstract: {name: pytree of jax.ShapeDtypeStruct} to check against and to take shardings from; None reads
        everything into nested dicts.
      step: of the checkpoint; None: the newest undamaged one.

    Returns:
      ({name: pytree}, step, meta).

    Raises:
      ConfigError: there is no such or no undamaged checkpoint, or `abstract` differs in a leaf.
    """
    return read_checkpoint(workdir, lambda path: read_items(path, names, abstract), step)[0]


def read_items(path: pathlib.Path, names: Sequence[str], abstract: dict[str, Any] | None = None,
               cast: bool = False) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """`restore_items` of the checkpoint in a folder. cast: leaves are cast to the dtypes of `abstract`."""
    saved = read_meta(path)
    leaves = {name: leaf for name, leaf in saved["leaves"].items() if name.split("/")[0] in names}
    items = {name: {} for name in names}
    if abstract is not None:
        items |= _read(path, leaves, {name: abstract[name] for name in names if name in abstract}, cast)
    else:
        for name, value in _read(path, leaves, {name: _saved_shape(leaf) for name, leaf in leaves.items()}).items():
            *parents, key = name.split("/")
            node = items
            for parent in parents:
                node = node.setdefault(parent, {})
            node[key] = value
    return items, saved["step"], saved["meta"]


def restore_state(path: pathlib.Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """The state of the checkpoint in a folder, and its meta. Arguments and errors as in `Checkpoints.restore`."""
    saved = read_meta(path)
    return _read(path, saved["leaves"], abstract_state), saved["meta"]


# Leaves: a state as {path: array}, and back.


def _named(tree):
    named, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}
    if len(leaves) != len(named):
        raise ValueError("two leaves of the state have the same path; dict keys must not contain '/'.")
    return leaves, treedef


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _flatten(state):
    """-> ({path: array} to write, {path: description} for meta.json)."""
    arrays, leaves = {}, {}
    for name, leaf in _named(state)[0].items():
        # A copy of NumPy leaves: the caller may change them while the background thread still reads.
        leaf = leaf if isinstance(leaf, jax.Array) else np.array(leaf) if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        leaves[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if _is_key(leaf):
            leaves[name]["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if leaf.size:  # an array without elements is fully described by its shape
            arrays[name] = leaf
    return arrays, leaves


def _saved_shape(leaf):
    dtype = jax.eval_shape(lambda: jax.random.key(0, impl=leaf["key"])).dtype if "key" in leaf else leaf["dtype"]
    return jax.ShapeDtypeStruct(tuple(leaf["shape"]), dtype)


def _read(path, leaves, abstract, cast=False):
    """Restores `abstract` from the checkpoint at `path`, whose leaves are `leaves`. Converted leaves are cast to fit;
    with `cast` all of them are."""
    wanted, treedef = _named(abstract)
    wanted = {name: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf) for name, leaf in wanted.items()}
    converted = lambda leaf: "zarr" in leaf and "exact" not in leaf
    leaves = {name: leaf | {"dtype": str(wanted[name].dtype)} if (cast or converted(leaf)) and name in wanted else leaf
              for name, leaf in leaves.items()}
    check_fit(path, {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in leaves.items()},
              {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in wanted.items()})
    filled = [name for name, leaf in wanted.items() if math.prod(leaf.shape)]
    of_orbax = {name: wanted[name] for name in filled if "orbax" in leaves[name]}
    read = _read_orbax(path, of_orbax, cast) if of_orbax else {}
    files, chunked = manifest.files_of(path), [name for name in filled if name not in of_orbax]
    read |= dict(zip(chunked, storage.in_parallel(
        lambda name: _read_chunks(path, leaves[name], files, name, wanted[name]), chunked)))
    return treedef.unflatten([_finish(leaf, leaves[name], read.get(name)) for name, leaf in wanted.items()])


def _read_orbax(path, wanted, cast):
    """Arrays that Orbax wrote, as this program did before format 2. Its files have no checksums of their content, so
    all of them are first read and compared with ours, each by one of the processes. An error in one process is raised
    in all: none may wait in Orbax for the others."""
    arrays.check_on_disk(path)
    found = next(manifest.damages(path, (jax.process_index(), jax.process_count())), None)
    for why in agreement.said_by_any(found):
        raise manifest.DamagedError(path, why)
    shapes, how = {}, {}
    for name, leaf in wanted.items():
        sharding = getattr(leaf, "sharding", None)
        shapes[name] = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        # Uncommitted arrays can be used with any mesh; Orbax by itself would require the devices of the run that saved.
        dtype = leaf.dtype if cast else None
        how[name] = (ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, dtype=dtype) if sharding
                     else ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path / "state", args=ocp.args.PyTreeRestore(shapes, restore_args=how,
                                                                          partial_restore=True))


def _read_chunks(path, leaf, files, name, wanted):
    """A leaf that is stored in zarr chunks; a NumPy array if its device is open, which this thread cannot decide."""
    held = jax.eval_shape(jax.random.key_data, wanted) if _is_key(wanted) else wanted
    if "exact" in leaf:
        leaf = leaf | {"shape": held.shape, "dtype": str(held.dtype)}
    found, sharding = arrays.Stored(path, leaf, files, name), getattr(wanted, "sharding", None)
    if sharding is None:
        return found[(slice(None),) * len(held.shape)].astype(held.dtype, copy=False)
    return arrays.restore(found, jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=sharding))


def _finish(wanted, saved, value):
    if value is None:
        value = jnp.zeros(wanted.shape, "uint32" if _is_key(wanted) else wanted.dtype)
    if isinstance(value, np.ndarray) and jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype:
        value = jnp.array(value)  # 64 bits stay NumPy unless jax_enable_x64
    return jax.random.wrap_key_data(jnp.asarray(value), impl=saved["key"]) if "key" in saved else value


def check_fit(path: pathlib.Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ConfigError for the first leaf of the config's state that differs from the saved one at `path`.

    saved, ours: {path of a leaf: the property that must be equal}, such as its shape.
    """
    for name in dict.fromkeys([*ours, *saved]):
        there, here = saved.get(name, "absent"), ours.get(name, "absent")
        if there != here:
            raise ConfigError(f"checkpoint {path} does not fit this config: {name} is {there} there and {here} here; "
                              "use the config it was saved with, or another --workdir.")
