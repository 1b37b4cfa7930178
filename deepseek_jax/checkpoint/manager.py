"""Checkpoints that survive kill -9, full disks and flipped bits.

Orbax writes the arrays of `WORKDIR/checkpoints/STEP` in the background; `manifest` commits that directory
atomically, and its manifest is checked before anything is restored. In a bucket, `objects` writes them. The state may
be any pytree. It is stored
flat, leaf by leaf under its path ("params/embed/table"), so that other commands can read the parameters without
knowing the optimizer.
"""

from __future__ import annotations

import concurrent.futures
import errno
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from deepseek_jax import io, storage
from deepseek_jax.checkpoint import arrays, manifest, objects
from deepseek_jax.config import ConfigError


class CheckpointError(OSError):
    """A checkpoint that could not be written: one line. Those written before it are untouched."""


class Checkpoints:
    """The newest `keep` checkpoints of one work directory; only the process that trains there may hold this."""

    def __init__(self, workdir, keep: int = 3):
        self.directory = manifest.directory_of(workdir)
        self.keep = keep
        self._damaged = set()  # steps seen damaged by restore; the next commit removes them
        self._attempts = 0
        self._pending = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        if jax.process_index() == 0:
            storage.make_folder(self.directory)
            manifest.clean_up(self.directory)

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts writing `state` and returns; its buffers may be donated at once.

        Waits for the save before this one, so at most one is under way.

        Args:
          step: names the checkpoint; an older one of the same step is replaced.
          state: any pytree of arrays, typed PRNG keys and numbers. Numbers come back as arrays.
          meta: small and JSON-able: the data position, the config.

        Raises:
          CheckpointError: this save could not start, or the one before it failed.
        """
        self.wait()
        arrays, leaves = _flatten(state)
        self._attempts += 1
        # A new name each time: what an attempt that failed still writes must not get into the next.
        partial = manifest.begin(self.directory, step, self._attempts)
        if storage.is_remote(partial):
            self._pending = self._save_objects(step, partial, arrays, leaves, meta)
            return
        # Asynchronous creation of directories, if it fails, leaves Orbax threads waiting that delay the exit.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)
        try:
            if jax.process_index() == 0:
                manifest.clean_up(self.directory)
                partial.mkdir()
                io.write_json(partial / "meta.json", {"step": step, "meta": meta, "leaves": leaves}, indent=None,
                              sync=True)
            writer.save(partial / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise self._failed(step, partial, error) from error
        # Closing waits for the bytes, and raises what went wrong with them.
        self._pending = self._thread.submit(self._commit, step, partial, writer.close)

    def _save_objects(self, step, address, arrays, leaves, meta):
        """The same into a bucket; only its copy to the host is made here."""
        save, name = objects.Save(address, arrays, leaves), f"checkpoint {step}, {self._attempts}"
        try:
            if jax.process_index() == 0:
                manifest.discard(address)  # what an attempt that failed has left there, too
                about = {"step": step, "meta": meta, "leaves": leaves, "state": save.state}
                io.write_json(address / "meta.json", about, indent=None)
        except Exception as error:
            raise self._failed(step, address, error) from error
        objects.wait_for_all(f"{name}, begun")
        return self._thread.submit(self._commit, step, address, lambda: save.write(f"{name}, written"))

    def wait(self) -> None:
        """Returns once the last save is committed. Raises CheckpointError, once, if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest undamaged checkpoint as (state, meta), or None if there is none yet.

        Args:
          abstract_state: the state's pytree, of jax.ShapeDtypeStruct (or arrays). A leaf with a sharding is read
            straight into it; one without becomes an uncommitted array.

        Raises:
          ConfigError: the state differs in a leaf from the saved one, or every checkpoint is damaged.
        """
        self.wait()
        path, damaged = manifest.newest(self.directory)
        self._damaged = {int(p.name) for p, _ in damaged}
        if path is None:
            return None
        if damaged:
            names = ", ".join(f"{p.name} ({why})" for p, why in damaged)
            print(f"Damaged checkpoint in {self.directory}: {names}; resuming from {path.name} instead.", flush=True)
        return restore_state(path, abstract_state)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return manifest.steps(self.directory)

    def close(self) -> None:
        """Waits for the last save. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

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
        """Removes the checkpoints that are superfluous after the commit of `newest`."""
        whole = [step for step in self.steps() if step <= newest and step not in self._damaged]
        for step in self._damaged.union(whole[:-self.keep]):
            manifest.discard(self.directory / str(step))
        self._damaged.clear()

    def _failed(self, step, partial, error) -> CheckpointError:
        why = str(error).strip().split("\n")[0] or type(error).__name__
        if getattr(error, "errno", None) == errno.ENOSPC or "no space left" in str(error).lower():
            why = "no space left on the disk; free some, or keep fewer with train.checkpoints_kept"
        if storage.is_remote(partial):  # which may not answer any more; the next start removes what is there
            return CheckpointError(f"checkpoint {step} was not written to {self.directory}: {why.rstrip('.')}. Those "
                                   "before it are untouched.")
        storage.remove(partial)
        last = self.steps()
        kept = f"The checkpoint of step {last[-1]} is untouched." if last else "There is no older one."
        return CheckpointError(f"checkpoint {step} was not written to {self.directory}: {why}. {kept}")


def find_checkpoint(workdir: str | os.PathLike[str], step: int | None = None) -> pathlib.Path:
    """The folder of a step's checkpoint; None: of the newest undamaged one. Raises ConfigError where there is none."""
    directory = manifest.directory_of(workdir)
    path = manifest.newest(directory)[0] if step is None else manifest.of_step(directory, step)
    if path is None:
        raise ConfigError(f"{workdir} holds no checkpoint; give the --workdir of a run that has saved one.")
    return path


def restore_state(path: pathlib.Path, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """The state of the checkpoint in a folder, and its meta. Arguments and errors as of `Checkpoints.restore`."""
    saved = io.read_json(path / "meta.json")
    return _read(path, saved["leaves"], abstract_state), saved["meta"]


def restore_items(workdir: str | os.PathLike[str], names: Sequence[str] = ("params", "router"),
                  abstract: dict[str, Any] | None = None,
                  step: int | None = None) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Reads some entries of a state of a work directory, which another process may be training.

    Args:
      names: entries of the state's top level. One that the state lacks comes back as {}.
      abstract: {name: pytree of jax.ShapeDtypeStruct} to check against and to take shardings from; None reads what
        is there into nested dicts.
      step: of the checkpoint; None: the newest undamaged one.

    Returns:
      ({name: pytree}, step, meta).

    Raises:
      ConfigError: no such checkpoint there, none undamaged, or `abstract` differs in a leaf.
    """
    return read_items(find_checkpoint(workdir, step), names, abstract)


def read_items(path: pathlib.Path, names: Sequence[str], abstract: dict[str, Any] | None = None,
               cast: bool = False) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """`restore_items` of the checkpoint in a folder. cast: leaves become what `abstract` says, whatever their dtype."""
    saved = io.read_json(path / "meta.json")
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
    """-> ({path: array} for Orbax, {path: description} for meta.json)."""
    arrays, leaves = {}, {}
    for name, leaf in _named(state)[0].items():
        # A copy of NumPy leaves: the caller may change them while the background thread still reads.
        leaf = leaf if isinstance(leaf, jax.Array) else np.array(leaf) if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        leaves[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if _is_key(leaf):
            leaves[name]["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if leaf.size:  # Orbax refuses arrays without elements; their shape says all there is to know
            arrays[name] = leaf
    return arrays, leaves


def _saved_shape(leaf):
    dtype = jax.eval_shape(lambda: jax.random.key(0, impl=leaf["key"])).dtype if "key" in leaf else leaf["dtype"]
    return jax.ShapeDtypeStruct(tuple(leaf["shape"]), dtype)


def _read(path, leaves, abstract, cast=False):
    """Restores `abstract` from the checkpoint at `path`, whose leaves are `leaves`. Converted ones are cast to fit, and
    with `cast` all of them."""
    wanted, treedef = _named(abstract)
    wanted = {name: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf) for name, leaf in wanted.items()}
    adapts = lambda leaf: cast or ("zarr" in leaf and "exact" not in leaf)
    leaves = {name: leaf | {"dtype": str(wanted[name].dtype)} if adapts(leaf) and name in wanted else leaf
              for name, leaf in leaves.items()}
    check_fit(path, {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in leaves.items()},
              {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in wanted.items()})
    chunked = [name for name in wanted if "zarr" in leaves[name]]
    if any(math.prod(leaf.shape) for name, leaf in wanted.items() if name not in chunked):
        arrays.check_on_disk(path)
    shapes, how, each = {}, {}, storage.in_parallel if storage.is_remote(path) else map
    read = dict(zip(chunked, each(lambda name: _read_chunks(path, leaves[name], wanted[name]), chunked)))
    for name, leaf in wanted.items():
        if name in read:
            continue
        if math.prod(leaf.shape):
            sharding = getattr(leaf, "sharding", None)
            shapes[name] = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
            # Uncommitted arrays go with any mesh; Orbax by itself would ask for the devices of the run that saved.
            dtype = leaf.dtype if cast else None
            how[name] = (ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, dtype=dtype) if sharding
                         else ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(shapes, restore_args=how, partial_restore=True)
        read |= reader.restore(path / "state", args=args) if shapes else {}
    return treedef.unflatten([_finish(leaf, leaves[name], read.get(name)) for name, leaf in wanted.items()])


def _read_chunks(path, leaf, wanted):
    """A leaf that is stored in zarr chunks."""
    if "exact" not in leaf:
        return arrays.restore(arrays.Stored(path, leaf), wanted)
    held = jax.eval_shape(jax.random.key_data, wanted) if _is_key(wanted) else wanted
    found = arrays.Stored(path, leaf | {"shape": held.shape, "dtype": str(held.dtype)})
    sharding = getattr(wanted, "sharding", None)
    if sharding is None:  # `_finish` knows which of NumPy's stay so
        return found[(slice(None),) * len(held.shape)].astype(held.dtype, copy=False)
    return arrays.restore(found, jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=sharding))


def _finish(wanted, saved, value):
    if value is None:
        value = jnp.zeros(wanted.shape, "uint32" if _is_key(wanted) else wanted.dtype)
    if isinstance(value, np.ndarray) and jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype:
        value = jnp.array(value)  # 64 bits stay NumPy unless jax_enable_x64
    return jax.random.wrap_key_data(jnp.asarray(value), impl=saved["key"]) if "key" in saved else value


def check_fit(path: pathlib.Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ConfigError for the first leaf of the config's state that differs from the one saved at `path`.

    saved, ours: {path of a leaf: what must be equal}, such as its shape.
    """
    for name in dict.fromkeys([*ours, *saved]):
        there, here = saved.get(name, "absent"), ours.get(name, "absent")
        if there != here:
            raise ConfigError(f"checkpoint {path} does not fit this config: {name} is {there} there and {here} here; "
                              "use the config it was saved with, or another --workdir.")
