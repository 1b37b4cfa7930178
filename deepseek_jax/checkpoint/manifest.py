"""Directories that are committed atomically (no jax here).

A checkpoint is written as `STEP.ATTEMPT.partial`. `commit` adds the length and CRC32 of each file, flushes
everything to disk, and then renames it to `STEP`; a removal renames it to `STEP.trash` first. So a name
without a suffix is a committed checkpoint, and `damage` finds a flipped bit, a missing file or a short one.

Buckets rename nothing. There the manifest is the last object of a checkpoint to be written and the first to be removed,
and what has none is no checkpoint. It also has the store's own checksum of each object, so that one listing shows
whether all of them are what was written, and nothing is read for it.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import zlib

from deepseek_jax import io, storage
from deepseek_jax.config import ConfigError


def directory_of(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a run's checkpoints, whatever the current folder becomes. `..` behind a link stays what it is."""
    path = storage.as_path(workdir)
    return (path if storage.is_remote(workdir) else path.absolute()) / "checkpoints"


def check_name(workdir: str | os.PathLike[str]) -> None:
    """Raises ConfigError for a work directory that TensorStore cannot open."""
    try:
        storage.absolute(workdir).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the name of the work directory {storage.absolute(workdir)} is not UTF-8, which checkpoints "
                          "need; rename it.") from None


def steps(directory: pathlib.Path) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    if storage.is_remote(directory):
        found = [name for name in storage.names(directory) if name.isdecimal()]
        return sorted(int(name) for name in found if _has_manifest(directory / name))
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal() and p.is_dir())


def newest(directory: pathlib.Path) -> tuple[pathlib.Path | None, list[tuple[pathlib.Path, str]]]:
    """-> (newest undamaged checkpoint or None, [(newer but damaged, why)]). Raises ConfigError if all are damaged."""
    damaged = []
    for step in reversed(steps(directory)):
        path = directory / str(step)
        why = damage(path)
        if why is None:
            return path, damaged
        if _is_there(path):  # otherwise a training run has just removed it
            damaged.append((path, why))
    if damaged:
        names = ", ".join(f"{p.name} ({why})" for p, why in damaged)
        raise ConfigError(f"every checkpoint in {directory} is damaged: {names}; "
                          "restore that directory from a backup, or remove it to start again from step 0.")
    return None, []


def of_step(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The checkpoint of a step. Raises ConfigError if it is not there, or damaged."""
    path = directory / str(step)
    if step not in (known := steps(directory)):
        there = ", ".join(map(str, known)) or "none"
        raise ConfigError(f"{directory} holds no checkpoint of step {step}; there are: {there}.")
    if why := damage(path):
        raise ConfigError(f"the checkpoint {path} is damaged: {why}; take another step.")
    return path


def damage(path: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every byte is as it was written."""
    try:
        files = io.read_json(path / "manifest.json")["files"]
        expected = [(name, size, crc, *tag) for name, (size, crc, *tag) in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is unreadable"
    if storage.is_remote(path):
        return _damage_of_objects(path, expected)
    for name, size, crc, *_ in expected:
        try:
            found = _fingerprint(path / name)
        except OSError:
            return f"{name} is missing"
        if found[0] != size:
            return f"{name} has {found[0]} of {size} bytes"
        if found[1] != crc:
            return f"{name} fails its checksum"
    return None


def _damage_of_objects(path, expected):
    found = storage.entries(path)
    for name, size, crc, *tag in expected:
        if name not in found:
            return f"{name} is missing"
        if found[name].size != size:
            return f"{name} has {found[name].size} of {size} bytes"
        # In a copy the store's checksum may be another one, and says nothing.
        if tag and found[name].tag != tag[0] and zlib.crc32(storage.read_bytes(path / name)) != crc:
            return f"{name} fails its checksum"
    return None


def begin(directory: pathlib.Path, step: int, attempt: int = 1) -> pathlib.Path:
    """Where a checkpoint is to be written."""
    return directory / (str(step) if storage.is_remote(directory) else f"{step}.{attempt}.partial")


def commit(partial: pathlib.Path, final: pathlib.Path, known: dict[str, list[int]] | None = None) -> None:
    """Makes the folder `partial` the checkpoint `final`, in one rename; an older `final` is replaced. In a bucket both
    are the same address, and the manifest makes it one.

    Args:
      known: {file: [length, CRC32]} of files that are on the disk already; of objects, of all but meta.json.
    """
    if storage.is_remote(final):
        _commit_objects(final, known or {})
        return
    files = {str(p.relative_to(partial)): p for p in sorted(partial.rglob("*")) if p.is_file()}
    prints = {name: (known or {}).get(name) or _fingerprint(p, sync=True) for name, p in files.items()}
    io.write_json(partial / "manifest.json", {"files": prints}, indent=None, sync=True)
    for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
        io.sync_file(folder)
    discard(final)
    partial.rename(final)
    io.sync_file(final.parent)


def _commit_objects(address, known):
    data = storage.read_bytes(address / "meta.json")
    files = known | {"meta.json": [len(data), zlib.crc32(data)]}
    if why := _damage_of_objects(address, [(name, size, crc) for name, (size, crc) in files.items()]):
        raise OSError(f"of what was written, {why}.")
    found = storage.entries(address)
    files = {name: [*files[name], found[name].tag] for name in sorted(files)}
    io.write_json(address / "manifest.json", {"files": files}, indent=None)


def _has_manifest(path):
    return storage.is_file(path / "manifest.json")


def _is_there(path):
    return _has_manifest(path) if storage.is_remote(path) else path.exists()


def _fingerprint(path, sync=False):
    """-> [length, CRC32] of a file, which is flushed to the disk first if `sync`."""
    size = crc = 0
    with open(path, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        while chunk := f.read(1 << 22):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def discard(path: pathlib.Path) -> None:
    """Removes a checkpoint. Renamed first, so that a partly removed one does not look damaged."""
    if storage.is_remote(path):
        storage.remove(path / "manifest.json")
        storage.remove(path)
        return
    if path.exists():
        trash = path.with_suffix(".trash")
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def clean_up(directory: pathlib.Path) -> None:
    """Removes what a killed run left behind. A partial that lacks only its last rename is committed instead."""
    if storage.is_remote(directory):
        for name in storage.names(directory):
            if name.isdecimal() and not _has_manifest(directory / name):
                storage.remove(directory / name)
        return
    for path in directory.glob("*.partial"):
        final = directory / path.name.split(".")[0]
        if not final.exists() and damage(path) is None:
            path.rename(final)
    for path in [*directory.glob("*.partial"), *directory.glob("*.trash")]:
        shutil.rmtree(path, ignore_errors=True)
