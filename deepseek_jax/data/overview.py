"""What a run reads, in a table: files, size, tokens, share and epochs of each source."""

from __future__ import annotations

from deepseek_jax.config import Config
from deepseek_jax.data.prepare import Prepared
from deepseek_jax.table import aligned

HEAD = ("source", "files", "MB", "skipped", "tokens", "held out", "share", "epochs")


def describe_sources(config: Config, prepared: Prepared) -> str:
    """The table, a line for each source.

    MB: of readable text, millions of bytes of UTF-8. skipped: files and rows that could not be read. tokens: of the
    training documents. held out: tokens for validation. share: of the run's sequences. epochs: how often the run reads
    those tokens.
    """
    train, weights = config.train, [weight for _, weight in config.data.sources]
    sequences = train.sequences_before(train.steps)
    rows: list[tuple[str, ...]] = [HEAD]
    for weight, meta, made, held in zip(weights, prepared.sources, prepared.train, prepared.validation):
        share, tokens = weight / sum(weights), len(made.tokens)
        epochs = share * sequences * train.sequence_length / tokens if tokens else 0.0
        rows.append((meta["source"], f"{meta['files']:,}", f"{meta['bytes'] / 1e6:.1f}", f"{meta['skipped']:,}",
                     f"{tokens:,}", f"{len(held.tokens):,}", f"{share:.1%}", f"{epochs:.2f}"))
    return aligned(rows)
