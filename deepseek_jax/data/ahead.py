"""The results of `prepare`, made in advance by many processes on one or more machines (no jax here).

    survey-<key>/00000.json       contents of a unit of a source: counts, lines of its stretches, hashes of its files
    samples-<key>/00000.jsonl     texts of a unit that the tokenizer is trained on
    tokenizer-<key>.json
    parts-<key>/00000/            the tokens of a unit
    shards-<key>/                 the index of all parts, by the process that finds the last of them

Each is committed by a rename and never changed, so files that a killed process had finished are valid, and nothing else
is kept. Processes never wait for each other. Process i of n makes the parts i, i + n, ... It also makes surveys and
samples, which the parts need and which are a small share of the work: its own first, and then those that are still
missing.
"""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from deepseek_jax import io, storage
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data import corpus, prepare, token_shards
from deepseek_jax.data.files import File
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.units import count_lines, number_rows, units


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Share(NamedTuple):
    """The units of one process: those whose number is `index` modulo `count`."""

    index: int = 0
    count: int = 1

    def mine(self, total: int) -> range:
        """The numbers of its units, out of `total`."""
        return range(self.index, total, self.count)

    def mine_first(self, total: int) -> list[int]:
        """All numbers, starting with its own."""
        return sorted(range(total), key=lambda i: (i % self.count - self.index) % self.count)


ALL = Share()


class Made(NamedTuple):
    """The parts of a source, and those that other processes have yet to make."""

    path: str
    parts: int
    missing: list[int]
    tokens: int = 0


def prepare_ahead(config: Config, workdir: str | None, share: Share = ALL, workers: int = 1) -> list[Made]:
    """Makes the tokenizer and the parts of every source in the work directory, or, with None, only in data.cache_dir.

    Raises:
      ConfigError: an unusable corpus or tokenizer.
    """
    if workdir is None:
        with tempfile.TemporaryDirectory() as nothing:
            return prepare_ahead(config, nothing, share, workers)
    folder, data = prepare.cache_of(config, workdir), config.data
    with Workers(workers) as pool:
        divided = lambda path, fraction, most: Divided(path, fraction, most, workdir, folder, share, pool)
        began = prepare.began_in(config, workdir)
        sources = [divided(path, prepare.held_fraction(data), prepare.held_tokens(data, path, began))
                   for path, _ in data.sources]
        own = [] if data.validation is None else [divided(data.validation, None, data.validation_tokens)]
        tokenizer = prepare.find_tokenizer(config, workdir, sources)
        rate = data.split_punctuation_rate
        return [*(_parts(source, tokenizer, config, workdir, rate) for source in sources),
                *(_parts(source, tokenizer, config, workdir, None) for source in own)]


class Divided(prepare.Source):
    """A source whose units are read by many processes."""

    def __init__(self, path: str, validation_fraction: float | None, most: int | None, workdir: str, folder: str,
                 share: Share, workers: Workers):
        super().__init__(path, validation_fraction, workdir, folder, most)
        self.folder, self.share, self.workers, self.units = folder, share, workers, units(self.files)
        self.alone = len(self.files) == 1

    @functools.cached_property
    def surveys(self) -> list[dict[str, Any]]:
        """For each unit: counts, the lines of its stretches, the hashes of its files."""
        return [io.read_json(path) for path in self._of_all("survey", ".json", _survey, self.units, ())]

    @functools.cached_property
    def numbered(self) -> list[list[File]]:
        """The units with their row numbers."""
        return number_rows(self.units, [unit["lines"] for unit in self.surveys])

    @functools.cached_property
    def survey(self) -> tuple[corpus.Counts, int | None]:
        counts = [unit["counts"] for unit in self.surveys]
        total = corpus.Counts(**{key: sum(unit[key] for unit in counts) for key in counts[0]})
        return total, self.cut(total)

    def sampled(self, bytes: float) -> Iterator[str]:
        counts, cut = self.survey
        for path in self._of_all("samples", ".jsonl", _sample, self.numbered, (cut, bytes / max(1, counts.bytes))):
            with storage.open_file(path) as lines:
                yield from map(json.loads, lines)

    def check_writable(self) -> None:
        """Called only before something is made: a complete cache may be read-only."""
        storage.check_writable(self.folder)
        storage.make_folder(self.folder)

    def _of_all(self, name, ending, make, made, arguments) -> list[str]:
        """The files that make(path, unit, alone, *arguments) writes for each unit of `made`."""
        key = token_shards.hash_of(token_shards.FORMAT, self.digest, *map(str, arguments))
        folder = os.path.join(self.folder, f"{name}-{key}")
        paths = [os.path.join(folder, f"{i:05}{ending}") for i in range(len(made))]
        if missing := [i for i in self.share.mine_first(len(paths)) if not storage.is_file(paths[i])]:
            self.check_writable()
            storage.make_folder(folder)
        self.workers.run([(make, paths[i], made[i], self.alone, *arguments) for i in missing], f"{name} of {self.path}")
        return paths


def _survey(path, unit, alone):
    if storage.is_file(path):  # made by another process since this one began
        return
    counts = corpus.Counts()
    for _ in corpus.read_documents(unit, counts, alone=alone):
        pass
    lines = [count_lines(file) for file in unit]
    io.write_json(path, {"counts": dataclasses.asdict(counts), "lines": lines,
                         "hashes": corpus.content_hashes(unit)}, indent=None)


def _sample(path, unit, alone, cut, share):
    if storage.is_file(path):
        return
    texts = prepare.sample(prepare.texts_to_learn(corpus.read_documents(unit, alone=alone), cut), share)
    with io.replacing(path) as partial, open(partial, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(text) + "\n" for text in texts)


def _parts(source: Divided, tokenizer, config, workdir, rate) -> Made:
    folder = prepare.shards_folder(source, tokenizer, config, workdir, rate)
    parts = [token_shards.part_folder(folder, i) for i in range(len(source.units))]
    there = lambda i: storage.is_file(os.path.join(parts[i], "meta.json"))
    if not storage.is_file(os.path.join(folder, "meta.json")):
        source.check_writable()
        mine = [i for i in source.share.mine(len(parts)) if not there(i)]
        cut = source.survey[1] if mine else None
        source.workers.run([(_tokenize, parts[i], source.numbered[i], source.alone, cut, source.surveys[i]["counts"],
                             config, workdir, rate, tokenizer.digest) for i in mine], f"tokenizing {source.path}")
        if missing := [i for i in range(len(parts)) if not there(i)]:
            return Made(source.path, len(parts), missing)
        hashes = (line for unit in source.surveys for line in unit["hashes"])
        token_shards.join(folder, len(parts), {"source": source.path, "digest": source.digest, "cut": source.survey[1]},
                          hashes)
    meta = token_shards.read(folder)[1]
    return Made(source.path, len(parts), [], sum(meta[split]["tokens"] for split in token_shards.SPLITS))


# Nine parameters: everything that another process needs. digest: of the tokenizer.
def _tokenize(folder, unit, alone, cut, counts, config, workdir, rate, digest):
    warnings = corpus.Warnings()
    tokenizer = _tokenizer(path := os.path.join(workdir, "tokenizer.json"), digest)
    if tokenizer.digest != digest:
        raise ConfigError(f"{path} has changed since this began; let one `prepare` at a time use a work directory.")
    options = dataclasses.replace(prepare.shard_options(cut, tokenizer, config, workdir, rate), one_thread=True)
    token_shards.write(folder, corpus.read_documents(unit, None, warnings, alone), tokenizer, options, counts)
    warnings.close()


@functools.lru_cache(maxsize=1)
def _tokenizer(path, digest) -> Tokenizer:
    """Read by a worker once."""
    return Tokenizer.load(path)


_THREADS = "TOKENIZERS_PARALLELISM"  # the library's threads, which would compete with the workers


class Workers:
    """A context with worker processes for `calls`, which end with it; with one worker, this process does the work."""

    def __init__(self, count: int):
        self.count = count
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    @functools.cached_property
    def _pool(self) -> concurrent.futures.ProcessPoolExecutor:
        spawned = multiprocessing.get_context("spawn")
        return self._held.enter_context(concurrent.futures.ProcessPoolExecutor(self.count, spawned, _begin))

    def run(self, calls: Sequence[tuple[Any, ...]], name: str) -> list[Any]:
        """The results of the calls, each (function, *arguments), which are made in any order. Raises what a call
        raises."""
        with tqdm(total=len(calls), desc=name, leave=False, disable=None) as line:
            return (self._run if self.count > 1 and len(calls) > 1 else self._run_here)(calls, line)

    def _run_here(self, calls, line) -> list[Any]:
        results, before = [], os.environ.get(_THREADS)
        os.environ[_THREADS] = "false"
        try:
            for function, *arguments in calls:
                results.append(function(*arguments))
                line.update()
            return results
        finally:
            if before is None:
                del os.environ[_THREADS]
            else:
                os.environ[_THREADS] = before

    def _run(self, calls, line) -> list[Any]:
        try:
            futures = [self._pool.submit(*call) for call in calls]
            for done in concurrent.futures.as_completed(futures):
                done.result()
                line.update()
            return [future.result() for future in futures]
        except BaseException as error:
            self._pool.shutdown(cancel_futures=True)
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise ConfigError("a worker was killed, perhaps because memory ran out; take fewer --workers. What is "
                                  "finished is kept.") from None
            raise


def _begin() -> None:
    """Sets up a worker: one thread, and an exit when its parent is killed, which it would otherwise not notice."""
    os.environ[_THREADS] = "false"
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
