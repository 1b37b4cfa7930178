"""Directories that are committed atomically (no jax here).

A checkpoint is written as `STEP.ATTEMPT.partial`. The writer of a file flushes it to the disk and records its length
and CRC32; `commit` joins the lists in a manifest, and then renames the folder to `STEP`; a removal renames it to
`STEP.trash` first. So a name without a suffix is a committed checkpoint.

    incomplete    the manifest, the length of each file, and meta.json: checked before a checkpoint is read
    arrays        each chunk is compared with its checksum as it is read
    damages       every byte of every file

A file is damaged if it is missing, too short or fails its checksum. A temporary error of a disk or a store (a stale
handle, too many open files) does not mean damage, and is raised unchanged.

Buckets cannot rename. There the manifest is the last object of a checkpoint to be written and the first to be removed,
and a folder without one is not a checkpoint.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator

from deepseek_jax import io, storage
from deepseek_jax.config import ConfigError

_MISSING = FileNotFoundError, NotADirectoryError, IsADirectoryError


class DamagedError(ConfigError):
    """A checkpoint that differs from what was written. path: of it. why: in a few words."""

    def __init__(self, path: str | os.PathLike[str], why: str):
        super().__init__(f"the checkpoint {os.fspath(path)} is damaged: {why}; take another step.")
        self.path, self.why = os.fspath(path), why

    def __reduce__(self):  # TensorStore pickles exceptions raised while reading
        return DamagedError, (self.path, self.why)


class CheckpointError(OSError):
    """A checkpoint that could not be written: one line. Those written before it are untouched."""


def directory_of(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a run's checkpoints, as an absolute path. `..` after a link is not resolved."""
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
    try:
        found = os.listdir(directory)
    except _MISSING:
        return []
    return sorted(int(name) for name in found if name.isdecimal() and (directory / name).is_dir())


def has_begun(workdir: str | os.PathLike[str]) -> bool:
    """Whether the run in a work directory has saved anything: there, or on the machines themselves (`local`)."""
    directory = directory_of(workdir)
    return bool(steps(directory)) or storage.is_file(directory / "local.json")


def newest(directory: pathlib.Path, known: dict[int, str] | None = None) -> tuple[int | None, dict[int, str]]:
    """-> (step of the newest complete checkpoint or None, {step of a newer one: why it is not complete}).

    known: {step: what is wrong with it}, found while reading it. Raises ConfigError if none is left.
    """
    known, damaged = known or {}, {}
    for step in reversed(steps(directory)):
        path = directory / str(step)
        why = known.get(step) or incomplete(path)
        if why is None:
            return step, damaged
        if is_there(path):  # otherwise a training run has just removed it
            damaged[step] = why
    if damaged:
        names = ", ".join(f"{step} ({why})" for step, why in damaged.items())
        raise ConfigError(f"every checkpoint in {directory} is damaged: {names}; "
                          "restore that directory from a backup, or remove it to start again from step 0.")
    return None, {}


def of_step(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The checkpoint of a step. Raises ConfigError if it is not there, or not complete."""
    path = directory / str(step)
    if step not in (known := steps(directory)):
        there = ", ".join(map(str, known)) or "none"
        raise ConfigError(f"{directory} holds no checkpoint of step {step}; there are: {there}.")
    if why := incomplete(path):
        raise DamagedError(path, why)
    return path


def files_of(path: str | os.PathLike[str]) -> dict[str, list[int]]:
    """{file: [length, CRC32]} of a checkpoint. Raises DamagedError, and OSError."""
    try:
        files = io.read_json(os.path.join(path, "manifest.json"))["files"]
        return {name: [size, crc] for name, (size, crc, *_) in files.items()}  # earlier versions have more entries
    except (*_MISSING, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(path, "manifest.json is unreadable") from None


def read_checked(path: str | os.PathLike[str], name: str, files: dict[str, list[int]]) -> bytes:
    """The content of a file of a checkpoint. Raises DamagedError if it differs from `files`, and OSError."""
    if name not in files:
        raise DamagedError(path, f"{name} is not in its manifest")
    try:
        data = storage.read_bytes(os.path.join(path, name))
    except _MISSING:
        raise DamagedError(path, f"{name} is missing") from None
    if why := _differs(name, [len(data), zlib.crc32(data)], files[name]):
        raise DamagedError(path, why)
    return data


def incomplete(path: pathlib.Path) -> str | None:
    """What is missing from a checkpoint, in a few words; None: its files are there with the right lengths, and
    meta.json is unchanged."""
    try:
        files = files_of(path)
        if why := _missing(path, files):
            return why
        read_checked(path, "meta.json", files)
    except DamagedError as error:
        return error.why
    return None


def _missing(path, files):
    """The first file that is missing or has the wrong length."""
    if storage.is_remote(path):
        found = {name: entry.size for name, entry in storage.entries(path).items()}
    else:
        found = {name: size for name, size in zip(files, storage.in_parallel(lambda n: _size(path / n), files))
                 if size is not None}
    for name, (size, _) in files.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} of {size} bytes"
    return None


def _size(path):
    try:
        return os.stat(path).st_size
    except _MISSING:
        return None


def damages(path: pathlib.Path, share: tuple[int, int] = (0, 1)) -> Iterator[str]:
    """A description of each damaged file of a checkpoint. Reads all files.

    share: (i, n): every n-th file, from the i-th on.
    """
    try:
        files = files_of(path)
    except DamagedError as error:
        yield error.why
        return
    names = sorted(files)[share[0]::share[1]]
    yield from filter(None, storage.in_parallel(lambda name: _damage(path, name, files[name]), names))


def size_of(path: pathlib.Path) -> str:
    """The size of an intact checkpoint, in words."""
    files = files_of(path)
    return f"whole, {len(files)} files of {sum(size for size, _ in files.values()) / 1e9:,.3f} GB"


def _damage(path, name, expected):
    try:
        return _differs(name, _fingerprint(path / name), expected)
    except _MISSING:
        return f"{name} is missing"


def _differs(name, found, expected):
    if found[0] != expected[0]:
        return f"{name} has {found[0]} of {expected[0]} bytes"
    if found[1] != expected[1]:
        return f"{name} fails its checksum"
    return None


def begin(directory: pathlib.Path, step: int, attempt: int = 1) -> pathlib.Path:
    """The address at which a checkpoint is written."""
    return directory / (str(step) if storage.is_remote(directory) else f"{step}.{attempt}.partial")


def commit(partial: pathlib.Path, final: pathlib.Path, known: dict[str, list[int]]) -> None:
    """Turns the folder `partial` into the checkpoint `final`, in one rename; an older `final` is replaced. In a bucket
    both are the same address, and writing the manifest commits it.

    Args:
      known: {file: [length, CRC32]} of all but meta.json. The files are on the disk already and are not read.
    """
    if storage.is_remote(final):
        _commit_objects(final, known)
        return
    files = known | {"meta.json": _fingerprint(partial / "meta.json")}
    io.write_json(partial / "manifest.json", {"files": dict(sorted(files.items()))}, indent=None, sync=True)
    folders = {os.path.dirname(name) for name in files}
    for folder in folders | {os.path.dirname(folder) for folder in folders}:
        io.sync_file(partial / folder)
    discard(final)
    partial.rename(final)
    io.sync_file(final.parent)


def _commit_objects(address, known):
    data = storage.read_bytes(address / "meta.json")
    files = known | {"meta.json": [len(data), zlib.crc32(data)]}
    if why := _missing(address, files):
        raise OSError(f"of what was written, {why}.")
    io.write_json(address / "manifest.json", {"files": dict(sorted(files.items()))}, indent=None)


def _has_manifest(path):
    return storage.is_file(path / "manifest.json")


def is_there(path: pathlib.Path) -> bool:
    """Whether a checkpoint still exists, intact or not; the run that owns it may have removed it."""
    return _has_manifest(path) if storage.is_remote(path) else path.exists()


def _fingerprint(path):
    """-> [length, CRC32] of a file or an object."""
    size = crc = 0
    with storage.open_file(path) as f:
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
    """Removes the remains of a killed run. A partial folder that lacks only its last rename is committed instead."""
    if storage.is_remote(directory):
        for name in storage.names(directory):
            if name.isdecimal() and not _has_manifest(directory / name):
                storage.remove(directory / name)
        return
    for path in directory.glob("*.partial"):
        final = directory / path.name.split(".")[0]
        if not final.exists() and incomplete(path) is None:
            path.rename(final)
    for path in [*directory.glob("*.partial"), *directory.glob("*.trash")]:
        shutil.rmtree(path, ignore_errors=True)
