"""What the benchmark of `prepare` measures on: the same text each time, and all of it read."""

import json

from benchmarks.prepare import documents, write_corpus
from deepseek_jax.data import corpus


def test_the_text_is_the_same_each_time_ascii_and_as_large_as_asked_for(tmp_path):
    texts = documents(size=100_000)
    assert texts == documents(size=100_000) and all(map(str.isascii, texts))
    assert 100_000 <= sum(map(len, texts)) < 105_000
    size = write_corpus(str(tmp_path / "a.jsonl"), texts, 0.0005)
    counts = corpus.Counts()
    rows = [d.parts[0][0] for d in corpus.read_documents(corpus.list_files(str(tmp_path)), counts)]
    assert counts.bytes == size >= 500_000 and sorted(set(rows)) == sorted(set(texts)) and counts.skipped == 0
    assert [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows
    assert rows[:len(texts)] != rows[len(texts):2 * len(texts)]
