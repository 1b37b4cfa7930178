"""A table of a run's data: files, size, tokens, share and epochs of each source."""

from __future__ import annotations

import os

from deepseek_jax.config import Config
from deepseek_jax.data.corpus import ignored_files
from deepseek_jax.data.packing import pack
from deepseek_jax.data.prepare import Prepared
from deepseek_jax.table import aligned

HEAD = ("source", "files", "MB", "skipped", "tokens", "held out", "share", "epochs")
MOST_ENDINGS = 4  # extensions that a note lists


def describe_sources(config: Config, prepared: Prepared) -> str:
    """The table, a line for each source.

    MB: of readable text, millions of bytes of UTF-8. skipped: files and rows that could not be read. tokens: of the
    training documents. held out: tokens for validation. share: of the run's sequences. epochs: how often the run reads
    those tokens. A note below the table counts files that are not read because of their extensions.
    """
    train, shares = config.train, _shares(config)
    sequences = config.sequences_before(train.steps)
    rows: list[tuple[str, ...]] = [HEAD]
    held_out = prepared.validation if config.data.validation is None else (None,) * len(shares)
    for share, meta, made, held in zip(shares, prepared.sources, prepared.train, held_out):
        tokens, of_text = len(made.tokens), train.sequence_length
        if config.data.packing == "whole":
            of_text = tokens / max(1, len(pack(made.lengths_N, train.sequence_length + 1)))
        epochs = share * sequences * of_text / tokens if tokens else 0.0
        shown = f"{epochs:.2f}" if epochs >= 0.1 else f"{epochs:.2g}"
        rows.append((meta["source"], f"{meta['files']:,}", f"{meta['bytes'] / 1e6:.1f}", f"{meta['skipped']:,}",
                     f"{tokens:,}", f"{len(held.tokens):,}" if held else "", f"{share:.1%}", shown))
    if config.data.validation is not None:
        meta = prepared.sources[-1]
        rows.append((meta["source"], f"{meta['files']:,}", f"{meta['bytes'] / 1e6:.1f}", f"{meta['skipped']:,}", "",
                     f"{len(prepared.validation[0].tokens):,}", "", ""))
    notes = [note for path, _ in config.data.sources if (note := _left_out(path))]
    if config.data.packing == "whole":
        parts: list = [*zip(prepared.sources, zip(prepared.train, held_out))]
        if config.data.validation is not None:
            parts.append((prepared.sources[-1], prepared.validation))
        notes += [note for meta, shards in parts if (note := _too_long(meta["source"], shards, train.sequence_length))]
    return "\n".join([aligned(rows), *notes])


def _shares(config) -> list[float]:
    """The share of each source in the run's sequences, over all stages."""
    data, steps = config.data, config.train.steps
    starts = [0, *(min(step, steps) for step, _ in data.stages)]
    before = [config.sequences_before(step) for step in (*starts, steps)]
    mixtures = [data.weights_at(step) for step in starts]
    return [sum((end - begin) * mixture[i] / sum(mixture) for begin, end, mixture in zip(before, before[1:], mixtures))
            / before[-1] for i in range(len(data.sources))]


def _too_long(source, shards, length):
    count = sum(int((shard.lengths_N > length + 1).sum()) for shard in shards if shard)
    return count and (f"note: {source}: {count:,} documents are longer than train.sequence_length={length} and are "
                      "left out; raise it to train on them.")


def _left_out(path):
    ignored = ignored_files(path)
    if not ignored:
        return ""
    endings = sorted({os.path.splitext(name)[1] or "none" for name in ignored})
    return (f"note: {path}: {len(ignored):,} more files have other endings ({', '.join(endings[:MOST_ENDINGS])}"
            f"{', ...' if len(endings) > MOST_ENDINGS else ''}) and are not read; a source of its own reads them, such "
            f"as a glob of that ending.")
