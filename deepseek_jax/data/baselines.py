"""Compression of the held-out files: the bits per byte that a model has to beat."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator

from deepseek_jax.config import DataConfig
from deepseek_jax.data import corpus
from deepseek_jax.data.prepare import Source, held_fraction, held_tokens, known_cuts

SAMPLE_BYTES = 20_000_000  # of held-out text: enough for three digits, without reading a terabyte


def compressed_bits_per_byte(data: DataConfig, path: str | None = None,
                             workdir: str | None = None) -> dict[str, float]:
    """Compresses the held-out documents of a run's sources, or the documents of `path`: the first SAMPLE_BYTES of text,
    in equal shares of the sources. No more than one document is in memory.

    workdir: of the run, which has recorded the held-out documents; without it, data.validation_tokens requires reading
    all text to find them.

    Returns:
      Bits per byte of gzip -9 and xz -9 applied to the documents one by one, and of xz -9 to their concatenation;
      nothing for documents of token ids.
    """
    most = data.validation_tokens if path is None else None
    cuts = known_cuts(workdir) if workdir and path is None else {}
    path = path or data.validation
    if path is not None:
        sources = [Source(path, None, most=most)]
    else:
        sources = [Source(p, held_fraction(data), most=held_tokens(data, p, workdir)) for p, _ in data.sources]
    size, by_gzip, by_xz, together, concatenated = 0, 0, 0, 0, lzma.LZMACompressor(preset=9)
    for text in (text for source in sources for text in _first(_held_out(source, cuts), SAMPLE_BYTES / len(sources))):
        size += len(text)
        by_gzip += len(gzip.compress(text, 9, mtime=0))
        by_xz += len(lzma.compress(text, preset=9))
        together += len(concatenated.compress(text))
    together += len(concatenated.flush())
    packed = {"gzip_each": by_gzip, "xz_each": by_xz, "xz_concatenated": together}
    return {f"{name}_bits_per_byte": 8 * n / size for name, n in packed.items()} if size else {}


def _first(texts: Iterator[bytes], most: float) -> Iterator[bytes]:
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size >= most:
            return


def _held_out(source: Source, cuts: dict[str, int | None]) -> Iterator[bytes]:
    # No warnings: `prepare` has already named the unreadable files.
    cut = cuts[source.path] if source.path in cuts else source.cut()
    for document in corpus.read_documents(source.files):
        if cut is None or corpus.hash_position(document.name) <= cut:
            yield "".join(text for text, _ in document.parts).encode()
