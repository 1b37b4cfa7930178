"""Checks by their contents whether the files of a corpus are still those that were tokenized (no jax here)."""

from __future__ import annotations

import os
from collections.abc import Iterator

from deepseek_jax import io, storage
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data import corpus, token_shards
from deepseek_jax.data.ahead import Workers
from deepseek_jax.data.prepare import Source, cache_of, noted, settle
from deepseek_jax.data.units import units

_SHOWN = 10


def verify(config: Config, workdir: str | None, workers: int = 1) -> Iterator[str]:
    """A line for each source whose contents are the same. If only modification times differ, this is recorded, and
    existing runs and tokens stay valid.

    workdir: None checks the tokens in data.cache_dir.

    Raises ConfigError: files that have changed, are new or are gone; or no tokens to compare with.
    """
    cache = cache_of(config, workdir or "")
    with Workers(workers) as pool:
        for path in (*(path for path, _ in config.data.sources), *filter(None, [config.data.validation])):
            source = Source(path, None, workdir, cache)
            folder, began = _made_of(source, cache, noted(workdir).get(path) if workdir else None)
            pieces = units(source.files)
            found = pool.run([(corpus.content_hashes, unit) for unit in pieces], f"reading {path}")
            differ = _differences(token_shards.read_hashes(folder), [line for unit in found for line in unit])
            if differ:
                more = f" and {len(differ) - _SHOWN:,} more" if len(differ) > _SHOWN else ""
                raise ConfigError(f"{path} is not what its tokens were made of: {', '.join(differ[:_SHOWN])}{more}; "
                                  "restore the files, or make tokens of them for a new run.")
            if began != source.digest:
                settle(cache, source.digest, began)
                yield f"{path}: {len(source.files):,} files are the same, but for times; their tokens stay valid"
            else:
                yield f"{path}: {len(source.files):,} files are the same"


def _made_of(source: Source, cache: str, began: str | None) -> tuple[str, str]:
    """The shards of a source, and its digest when they were made: at the start of the run, now, or otherwise the
    newest."""
    made = {}
    there = [os.path.join(cache, name, "meta.json") for name in storage.names(cache) if name.startswith("shards-")]
    for path in sorted(filter(storage.is_file, there), key=storage.changed):
        meta = io.read_json(path)
        if meta.get("source") == source.path and token_shards.read_hashes(os.path.dirname(path)):
            made[meta["digest"]] = os.path.dirname(path)
    if not made:
        raise ConfigError(f"{cache} has no tokens of {source.path} with hashes of its files; nothing to compare with.")
    digest: str = next(digest for digest in (str(began), source.digest, list(made)[-1]) if digest in made)
    return made[digest], digest


def _differences(before, now) -> list[str]:
    """A description of the change of each file that differs."""
    old, new = _by_name(before), _by_name(now)
    return [f"{name} {'is new' if name not in old else 'is gone' if name not in new else 'has changed'}"
            for name in sorted(old | new) if old.get(name) != new.get(name)]


def _by_name(hashes):
    """{name: [(start, hash), ...]}."""
    found = {}
    for name, start, value in hashes:
        found.setdefault(name, []).append((start, value))
    return found
