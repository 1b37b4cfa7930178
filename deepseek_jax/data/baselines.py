"""What compressors make of the held-out files: the bits per byte that a model has to beat."""

from __future__ import annotations

import gzip
import lzma

from deepseek_jax.config import DataConfig
from deepseek_jax.data import corpus
from deepseek_jax.data.prepare import Source


def compressed_bits_per_byte(data: DataConfig, path: str | None = None) -> dict[str, float]:
    """Compresses every held-out document of a run's sources, or all documents of `path`.

    Returns:
      Bits per byte of gzip -9 and xz -9 applied to the documents one by one, and of xz -9 to their concatenation.
    """
    sources = [Source(p, data.validation_fraction) for p, _ in data.sources] if path is None else [Source(path, None)]
    texts = [text for source in sources for text in _held_out(source)]
    size = sum(map(len, texts))
    packed = {"gzip_each": sum(len(gzip.compress(t, 9, mtime=0)) for t in texts),
              "xz_each": sum(len(lzma.compress(t, preset=9)) for t in texts),
              "xz_concatenated": len(lzma.compress(b"".join(texts), preset=9))}
    return {f"{name}_bits_per_byte": 8 * n / size for name, n in packed.items()}


def _held_out(source: Source):
    # Silent: whoever prepared the run has named what cannot be read.
    places = (corpus.hash_position(document.name) for document in corpus.read_documents(source.files))
    cut = corpus.find_cut(places, source.validation_fraction, source.path)
    for document in corpus.read_documents(source.files):
        if cut is None or corpus.hash_position(document.name) <= cut:
            yield "".join(text for text, _ in document.parts).encode()
