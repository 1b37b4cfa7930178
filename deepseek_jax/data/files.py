"""The files of a source: those of a folder, of a glob, or a single one (no jax here).

Links are followed, and each real file is listed once: under its own name, if it is below the source's folder, otherwise
under the first of its names. So a folder and a glob of all of it are the same corpus, loops of links end, and no text
is both in training and in validation. An entry that is not a regular file is listed with its fault.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from deepseek_jax import io, storage
from deepseek_jax.config import ConfigError


class Stretch(NamedTuple):
    """Part of a file: its lines that start in bytes `start` to `stop`, or row groups of parquet, documents of an .idx
    or records of ArrayRecord by their numbers."""

    start: int
    stop: int
    row: int = 1  # the number of the first row, if it is known


class File(NamedTuple):
    """A file of a source, or a part of one."""

    name: str  # relative, with forward slashes: used for hashing and ordering
    path: str
    named: bool = False  # by the user: text, whatever its extension
    fault: str = ""  # why it cannot be read, if that is known from its folder
    stretch: Stretch | None = None  # None: all of it


def find(path: str, is_known: Callable[[str], bool]) -> list[File]:
    """The files of a folder, a glob or a file's path, sorted by name; hidden ones are left out unless they are named.

    Args:
      is_known: whether files of that name can be read. If a glob finds no such files, all its files are taken as named.
    Raises:
      ConfigError: a path that is not a glob does not exist or is not a regular file.
    """
    if storage.is_remote(path):
        return _in_bucket(path, is_known)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _once(_below(path), path, is_known)
    if os.path.lexists(path):
        if why := _fault(path):
            raise ConfigError(f"data.sources: {path} cannot be read: {why}.")
        return [File(os.path.basename(path), path, named=True)]
    if not glob.has_magic(path):
        raise ConfigError(f"data.sources: there is no {path}; give a folder, a file, a glob or 'stdlib'.")
    root = os.path.dirname(path[:min(path.find(c) for c in "*?[" if c in path)]) or "."
    return _once(_or_named([_named(p, root) for p in _matching(path)], is_known), root, is_known)


def _or_named(files, is_known):
    """The files of a glob; marked as named if none has a known extension."""
    unknown = not any(is_known(file.name) for file in files)
    return [file._replace(named=True) for file in files] if unknown else files


def _in_bucket(path, is_known) -> list[File]:
    """The same for an address: the objects below it, a glob of objects, or a single one."""
    path = path.rstrip("/")
    if storage.is_file(path):
        return [File(path.rsplit("/", 1)[1], path, named=True)]
    magic = [path.find(c) for c in "*?[" if c in path]
    root = path[:min(magic)].rsplit("/", 1)[0] if magic else path
    found = storage.glob(path) if magic else [f"{root}/{name}" for name in storage.entries(root)]
    files = [File(p.removeprefix(f"{root}/"), p) for p in found]
    shown = [f for f in files if not any(part.startswith(".") or part == "__pycache__" for part in f.name.split("/"))]
    if not files and not magic:
        raise ConfigError(f"data.sources: there is no {path}; give objects below a name, an object or a glob.")
    return sorted(_or_named(shown, is_known) if magic else shown)


def below(root: str, skipped: Collection[str]) -> list[File]:
    """The files below a folder, without following links to folders and without folders of these names."""
    folders = _folders([root], skipped, follow=False)
    return [_named(os.path.join(folder, n), root) for folder, names in folders for n in names if not n.startswith(".")]


def _named(path, root, fault=""):
    return File(os.path.relpath(path, root).replace(os.sep, "/"), path, fault=fault)


def _below(root):
    """Every file below a folder; a folder that cannot be listed appears as a file with a fault."""
    faults = []
    for folder, names in _folders([root], onerror=faults.append):
        yield from (_named(os.path.join(folder, name), root) for name in names if not name.startswith("."))
    yield from (_named(error.filename, root, error.strerror)._replace(named=True) for error in faults)


def _matching(pattern: str) -> Iterable[str]:
    """The paths that match, without folders. `**` is as in `glob`, but visits each real folder once."""
    first, *rest = re.split(r"(?:^|(?<=/))\*\*(?:/+|$)", pattern.replace(os.sep, "/"))
    found = glob.glob(first) if first else [os.curdir] if rest else []
    for i, tail in enumerate(rest):
        folders = list(_folders(p for p in found if os.path.isdir(p)))
        if tail:
            found = [p for folder, _ in folders for p in glob.glob(os.path.join(glob.escape(folder), tail))]
        elif i + 1 < len(rest):
            found = [folder for folder, _ in folders]
        else:
            found = [os.path.join(folder, n) for folder, names in folders for n in names if not n.startswith(".")]
    return (p for p in found if not os.path.isdir(p))


def _folders(roots: Iterable[str], skipped: Collection[str] = (), follow: bool = True,
             onerror: Callable[[OSError], object] | None = None) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for `roots` and all folders below: each real folder once, links last."""
    seen, queue = set(), sorted(roots)
    while queue:
        links = []
        for root in queue:
            for folder, folders, names in os.walk(root, onerror=onerror):
                real = os.path.realpath(folder)
                # Hidden folders hold tools' own files (.git, .venv), not a corpus.
                folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__" and f not in skipped]
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                links += [path for f in folders if os.path.islink(path := os.path.join(folder, f))]
                yield folder, names
        queue = sorted(links) if follow else []


def _once(files: Iterable[File], root: str, is_known: Callable[[str], bool]) -> list[File]:
    """One name for each real file, sorted, and the fault of each entry that is not a regular file."""
    base, kept = os.path.realpath(root), {}

    def rank(file):
        real = os.path.realpath(file.path)
        return not (file.named or is_known(file.name)), _named(real, base).name != file.name, file.name, real

    for *_, real, file in sorted((*rank(file), file) for file in files):
        kept.setdefault(real, file if file.fault else file._replace(fault=_fault(file.path)))
    return sorted(kept.values())


def _fault(path):
    try:
        io.check_regular(path)
    except OSError as error:
        return error.strerror
    return ""
