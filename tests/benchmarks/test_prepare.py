"""The corpus of the benchmark of `prepare`: the same text each time, and all of it is read."""

import json

from benchmarks import machine, prepare
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


def test_several_sizes_are_one_report_of_the_shape_that_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "documents", lambda: documents(size=40_000))
    monkeypatch.setattr(prepare, "prepared", lambda folder, keys, workers, size: {
        "workers": workers, "seconds": 2.0, "cpu_seconds": 1.0, "megabytes_a_cpu_second": size / 1e6,
        "peak_megabytes": 80.0})
    monkeypatch.setattr(prepare, "started", shown)
    report = str(tmp_path / "report.json")
    monkeypatch.setattr("sys.argv", ["prepare", "--gigabytes", "0.0001", "0.0002", "--workers", "1", "--json", report])
    prepare.main()
    made, kept = (json.loads(path.read_text()) for path in (
        tmp_path / "report.json", machine.ROOT / "benchmarks" / "results" / "prepare_cpu.json"))
    assert [round(size["bytes"], -5) for size in made["sizes"]] == [100_000, 200_000]
    assert shape(made) == shape(kept)


def shown(workdir, keys):
    """The same in a separate process."""
    return {"tokens_and_loader": 0.5, "first_batch": 0.1}


def shape(value):
    """The keys of objects, and the first of each list."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) else type(value)
