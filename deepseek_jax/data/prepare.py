"""Preparation before the first step, done once: the tokenizer and the token shards of every source.

    config.data.sources -> files -> (training documents) tokenizer.json -> shards of training and validation

A tokenizer.json in the work directory is kept, so a resumed run reads the tokens it began with; a run that starts from
another's weights takes that run's tokenizer. The rest is cached under names that contain a hash of its inputs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tokenizers

from deepseek_jax import io, storage
from deepseek_jax.chat.template import keep_built_in, of_folder
from deepseek_jax.checkpoint.manifest import has_begun
from deepseek_jax.config import Config, ConfigError, DataConfig
from deepseek_jax.data import corpus, token_shards
from deepseek_jax.data.tokenizer import COMPANIONS, PATTERN, SPECIALS, Tokenizer, train_tokenizer
from deepseek_jax.data.units import units

log = logging.getLogger(__name__)

TOKENIZER_SAMPLE_BYTES = 20_000_000  # more text hardly changes the merges, and takes longer
OLD_ORDER, ORDER = 1, 2  # examples.Stream, blocks.BlockStream
BYTES_A_TOKEN = 4  # an upper estimate for text in many languages, so that held-out documents have the requested tokens
_PIECE = 4096  # characters; a larger corpus is sampled in pieces of this size


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Tokenizer and shards, from which batches are made."""

    tokenizer: Tokenizer
    train: tuple[token_shards.Shard, ...]  # one a source
    validation: tuple[token_shards.Shard, ...]  # one per source, or only that of data.validation
    sources: tuple[dict, ...]  # one per source: counts of files, documents, tokens (JSON); then data.validation's
    order: int = ORDER  # order of documents and sequences; a run keeps the one that it began with


class Source:
    """The files behind one entry of data.sources."""

    def __init__(self, path: str, validation_fraction: float | None, workdir: str | None = None,
                 cache: str | None = None, most: int | None = None):
        """workdir, cache: how files are hashed depends on what a run there began with, or on `settle`. most: maximum of
        held-out tokens; None: no bound."""
        self.path, self.validation_fraction, self.most = path, validation_fraction, most
        self.files = corpus.list_files(path)
        began = noted(workdir).get(path, "") if workdir else ""
        old = bool(began) and not began.startswith(corpus.BY_TIMES)  # before large corpora were hashed by times
        self.digest = corpus.digest(self.files, True if old else None)
        if cache and storage.is_file(same := _same(cache, self.digest)):
            self.digest = _read_object(same)["digest"]

    @functools.cached_property
    def survey(self) -> tuple[corpus.Counts, int | None]:
        """Reads the source once: counts, and the cut between validation and training. Logs what it skips."""
        counts, warnings = corpus.Counts(), corpus.Warnings()
        documents = corpus.read_documents(self.files, counts, warnings)
        try:
            cut = None if self.most else self._find_cut(documents)
            collections.deque(documents, maxlen=0)  # `counts` is of all of them
        finally:
            warnings.close()
        return counts, self.cut(counts) if self.most else cut

    def cut(self, counts: corpus.Counts | None = None) -> int | None:
        """The cut between validation and training. counts: of the source, if they are known."""
        if self.most and counts is None:
            collections.deque(corpus.read_documents(self.files, counts := corpus.Counts()), maxlen=0)
        return self._find_cut(corpus.read_documents(self.files), counts)

    def _find_cut(self, documents, counts: corpus.Counts | None = None) -> int | None:
        places, fraction = (corpus.hash_position(d.name) for d in documents), self.validation_fraction
        if not self.most or counts is None or not counts.bytes:
            return corpus.find_cut(places, fraction, self.path)
        share = self.most * BYTES_A_TOKEN / counts.bytes
        if fraction is not None or share >= 1:
            return corpus.find_cut(places, fraction and min(fraction, share), self.path)
        lowest, cut = 2**64, int(share * 2**64)  # separate held-out text, which need not leave a document for training
        for place in places:
            if (lowest := min(lowest, place)) <= cut:
                break
        return max(cut, lowest)

    def training_texts(self) -> Iterator[str]:
        return texts_to_learn(corpus.read_documents(self.files), self.survey[1])

    def sampled(self, bytes: float) -> Iterator[str]:
        """About that many bytes of the training documents, to train a tokenizer on."""
        return sample(self.training_texts(), bytes / max(1, self.survey[0].bytes))


def texts_to_learn(documents: Iterable[corpus.Document], cut: int | None) -> Iterator[str]:
    """The texts of the training documents. Raises ConfigError for documents of token ids."""
    for document in documents:
        if document.ids is not None:
            raise ConfigError(f"{document.name} holds token ids, which no tokenizer can be trained on; give the one "
                              "that made them as data.tokenizer=PATH.")
        if cut is not None and corpus.hash_position(document.name) > cut:
            yield from (text for text, _ in document.parts)


def prepare(config: Config, workdir: str, resumes: bool = False) -> Prepared:
    """Creates what is missing and reads the rest.

    Args:
      resumes: refuse, before tokenizing, files that differ from those that the run in the work directory began with.
    Raises:
      ConfigError: an unusable corpus or tokenizer.
    """
    data = config.data
    began = began_in(config, workdir)
    places = began, cache_of(config, workdir)
    sources = [Source(path, held_fraction(data), *places, held_tokens(data, path, began)) for path, _ in data.sources]
    own = [] if data.validation is None else [Source(data.validation, None, *places, data.validation_tokens)]
    if resumes:
        check_sources(began, {source.path: source.digest for source in (*sources, *own)}, branches=began != workdir)
    tokenizer = find_tokenizer(config, workdir, sources)
    pairs = [_shards(source, tokenizer, config, workdir, data.split_punctuation_rate) for source in sources]
    held = [_shards(source, tokenizer, config, workdir, None) for source in own] or pairs
    validation = [shards["validation"] for shards, _ in held]
    if data.validation_tokens is not None:
        validation = [token_shards.bounded(s, data.validation_tokens // len(held) or 1) for s in validation]
    report = tuple(meta | {"digest": source.digest} | _bound_of(data, source, meta)
                   for source, (_, meta) in zip((*sources, *own), (*pairs, *held)))
    return Prepared(tokenizer, tuple(s["train"] for s, _ in pairs), tuple(validation), report,
                    _order(began))


def began_in(config: Config, workdir: str) -> str:
    """The folder whose corpus.json records what the run in a work directory began with; for a branch that has not saved
    yet, the folder of the run that it branches off."""
    if config.init.step is None or has_begun(workdir):
        return workdir
    return str(config.init.folder)


def held_fraction(data: DataConfig) -> float:
    """The paths of the training sources."""
    return data.validation_fraction if data.validation is None else 0.0


def held_tokens(data: DataConfig, path: str | None = None, workdir: str | None = None) -> int | None:
    """The maximum of held-out tokens per training source; None: no bound. path, workdir: a source in the run there
    keeps the bound that it was first read with: with another one, held-out text would be trained on."""
    if data.validation_tokens is None or data.validation is not None:
        return None
    note, most = _note(workdir) if workdir else {}, data.validation_tokens // len(data.sources) or 1
    if not _has_order(note) or path not in note["sources"]:
        return most
    if "held" not in note:  # of an older version
        return data.validation_tokens // len(note["sources"]) or 1
    kept = note["held"].get(path, {})
    return kept["most"] if kept.get("of") == data.validation_tokens else most


def _bound_of(data, source, meta) -> dict[str, Any]:
    """The record of a source's held-out tokens: the maximum for all sources, for this one, and the resulting cut."""
    if source.most is None:
        return {}
    cut = {"cut": meta["cut"]} if "cut" in meta else {}  # not in shards of an older version
    return {"held": {"of": data.validation_tokens, "most": source.most, **cut}}


def known_cuts(workdir: str) -> dict[str, int | None]:
    """The recorded cuts between validation and training, for the sources of a run with data.validation_tokens."""
    note = _note(workdir)
    return {path: held["cut"] for path, held in note.get("held", {}).items() if "cut" in held} if _has_order(
        note) else {}


def claim_corpus(prepared: Prepared, workdir: str) -> None:
    """Records the corpus in a new work directory, or checks that an old one's files are unchanged.

    Raises:
      ConfigError: they have changed, so a resumed run would continue on different text.
    """
    digests = {meta["source"]: meta["digest"] for meta in prepared.sources}
    before = noted(workdir)
    check_sources(workdir, digests)
    note = _note(workdir)
    held = (note.get("held", {}) if _has_order(note) else {}) | {
        meta["source"]: meta["held"] for meta in prepared.sources if "held" in meta}
    # All sources, or those that a later mixture adds; for a branch the order of its run.
    now = {"order": prepared.order, "sources": digests | before, **({"held": held} if held else {})}
    if digests.keys() - before.keys() or prepared.order != _order(workdir) or (held and note != now):
        io.write_json(os.path.join(workdir, "corpus.json"), now, indent=1)


def check_sources(workdir: str, digests: dict[str, str], branches: bool = False) -> None:
    """Raises ConfigError if the files differ from those that the run in a work directory began with. digests: by
    source. branches: it is the run that this one branches off."""
    before = noted(workdir)
    changed = [name for name, digest in before.items() if name in digests and digest not in digests.values()]
    if changed:
        times = any(before[name].startswith(corpus.BY_TIMES) for name in changed)
        hint = (" (or only their times: then `python -m deepseek_jax.prepare --verify` with this --config and "
                "--workdir settles it)") if times and not branches else ""
        advice = f"--config.init.from={workdir} for its weights alone" if branches else "another --workdir"
        raise ConfigError(f"the files of {', '.join(changed)} have changed since the run in {workdir} began{hint}; "
                          f"restore them, or take {advice}.")


def noted(workdir: str) -> dict[str, str]:
    """{source: digest} of the corpus that the run in a work directory began with; {} if there is no run."""
    found = _note(workdir)
    return found["sources"] if _has_order(found) else found


def _order(workdir) -> int:
    """The order that the run in a work directory began with; old runs have no record of it."""
    found = _note(workdir)
    if found or has_begun(workdir):
        return found["order"] if _has_order(found) else OLD_ORDER
    return ORDER


def _has_order(note):
    return isinstance(note.get("sources"), dict)  # otherwise its keys are sources


def _note(workdir) -> dict[str, Any]:
    path = os.path.join(workdir, "corpus.json")
    return _read_object(path) if storage.is_file(path) else {}


def _same(cache, digest) -> str:
    """The file that records an earlier digest of files with the same contents."""
    return os.path.join(cache, f"same-{token_shards.hash_of(digest)}.json")


def settle(cache: str, digest: str, before: str) -> None:
    """Records that the files of `digest` have the same contents as those of `before`, so they are the same corpus."""
    io.write_json(_same(cache, digest), {"digest": before})


def _read_object(path: str) -> dict[str, Any]:
    """Reads a JSON object. Raises ConfigError if the file has none."""
    try:
        found = io.read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it, or take another --workdir.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object; restore it, or take another --workdir.")
    return found


def prepare_evaluation(config: Config, workdir: str, path: str) -> Prepared:
    """All of another corpus as validation documents, tokenized as in an existing run."""
    tokenizer = Tokenizer.load(os.path.join(workdir, "tokenizer.json"), config.model.vocab_size)
    made, meta = _shards(Source(path, None), tokenizer, config, workdir, 0.0)
    return Prepared(tokenizer, (), (made["validation"],), (meta,))


def cache_of(config: Config, workdir: str) -> str:
    """The folder of token shards and of trained tokenizers."""
    return os.path.expanduser(config.data.cache_dir or "") or os.path.join(workdir, "cache")


def find_tokenizer(config: Config, workdir: str, sources: Sequence[Source]) -> Tokenizer:
    """Before the first checkpoint, the tokenizer of the run in init.from or distill.from, or of data.tokenizer, with
    its companion files; otherwise the work directory's; if there is neither, one is trained here."""
    own, begun = os.path.join(workdir, "tokenizer.json"), has_begun(workdir)
    source = config.init.folder or config.distill.from_ or config.data.tokenizer
    if storage.is_file(own) and (begun or source is None):
        return Tokenizer.load(own, config.model.vocab_size)
    if source is not None and storage.is_file(source):
        tokenizer = Tokenizer.load(source, config.model.vocab_size)
    elif source is not None:
        tokenizer = Tokenizer.load(os.path.join(source, "tokenizer.json"), config.model.vocab_size)
        storage.make_folder(workdir)
        for name in COMPANIONS:
            if storage.is_file(theirs := os.path.join(source, name)):
                io.write_bytes(os.path.join(workdir, name), storage.read_bytes(theirs))
        keep_built_in(source, workdir)
    else:
        tokenizer = _trained(config, workdir, sources)
    tokenizer.save(own)
    return tokenizer


def _trained(config, workdir, sources) -> Tokenizer:
    weights = _tokenizer_weights(config.data)
    depends_on = [PATTERN, list(SPECIALS.values()), tokenizers.__version__, TOKENIZER_SAMPLE_BYTES, _PIECE,
                  config.model.vocab_size, held_fraction(config.data),
                  [(s.digest, weight) for s, weight in zip(sources, weights)], *_bound(held_tokens(config.data))]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    path = os.path.join(cache_of(config, workdir), f"tokenizer-{key}.json")
    if not storage.is_file(path):
        texts = (text for source, weight in zip(sources, weights)
                 for text in source.sampled(TOKENIZER_SAMPLE_BYTES * weight / sum(weights)))
        log.info("training a tokenizer of %d tokens", config.model.vocab_size)
        train_tokenizer(texts, config.model.vocab_size).save(path)
    return Tokenizer.load(path, config.model.vocab_size)


def _bound(most) -> list[int]:
    """Its contribution to a hash: empty if there is none, as in older versions."""
    return [] if most is None else [most]


def _tokenizer_weights(data) -> list[float]:
    """The share of each source; with stages the mean of its shares in the mixtures, which includes every source and
    does not depend on the length of the run."""
    if not data.stages:
        return [weight for _, weight in data.sources]
    mixtures = [data.weights_at(step) for step in (0, *(step for step, _ in data.stages))]
    return [sum(shares) / len(mixtures) for shares in zip(*([w / sum(m) for w in m] for m in mixtures))]


def sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the texts, in pieces chosen by their hash: the same on every machine. All, if 1 or more."""
    for text in texts:
        if share >= 1:
            yield text
            continue
        for start in range(0, len(text), _PIECE):
            piece = text[start:start + _PIECE]
            if corpus.hash_position(piece) < share * 2**64:
                yield piece


def _about_chats(workdir) -> dict[str, str]:
    """A hash of the work directory's chat settings; empty if there are none."""
    files = [path for name in COMPANIONS if storage.is_file(path := os.path.join(workdir, name))]
    if not files:
        return {}
    total = hashlib.sha256()
    for path in files:
        with io.open_regular(path) as f:
            total.update(f.read())
    return {"chats": total.hexdigest()}


def shards_folder(source: Source, tokenizer: Tokenizer, config: Config, workdir: str,
                  split_rate: float | None) -> str:
    """The folder of a source's shards; its name contains a hash of everything that they depend on. split_rate: as in
    `shard_options`."""
    split_rate, bound = split_rate or 0.0, _bound(source.most)
    key = token_shards.key(source.digest, tokenizer, validation_fraction=source.validation_fraction,
                           split_rate=split_rate, seed=_seed(config, split_rate), **_about_chats(workdir),
                           **({"validation_tokens": bound} if bound else {}))
    return os.path.join(cache_of(config, workdir), f"shards-{key}")


def _seed(config, split_rate):
    return config.train.seed if split_rate > 0 else 0  # without splitting, every seed has the same tokens


def shard_options(cut: int | None, tokenizer: Tokenizer, config: Config, workdir: str,
                  split_rate: float | None) -> token_shards.Options:
    """How documents become tokens. split_rate: None for a source of held-out text, whose documents after `cut` are left
    out."""
    text = functools.cache(lambda: of_folder(workdir, tokenizer, chats=False))
    rate = split_rate or 0.0
    return token_shards.Options(cut, rate, _seed(config, rate), text, trained=split_rate is not None)


def _shards(source, tokenizer, config, workdir, split_rate) -> tuple[dict[str, token_shards.Shard], dict]:
    folder = shards_folder(source, tokenizer, config, workdir, split_rate)
    if not storage.is_file(os.path.join(folder, "meta.json")):
        counts, cut = source.survey
        meta = {"source": source.path, "digest": source.digest, "cut": cut, **dataclasses.asdict(counts)}
        token_shards.write(folder, corpus.read_documents(source.files), tokenizer,
                           shard_options(cut, tokenizer, config, workdir, split_rate), meta,
                           progress=(f"tokenizing {source.path}", counts.bytes),
                           hashes=[line for unit in units(source.files) for line in corpus.content_hashes(unit)])
    shards, meta = token_shards.read(folder)
    return shards, meta | {"source": source.path}  # it may differ on the machine where these were made
