"""Compressors read the held-out documents, with memory for only one of them at a time."""

import gzip
import json
import lzma

from deepseek_jax.data import baselines, corpus, prepare
from deepseek_jax.data.baselines import compressed_bits_per_byte
from tests.data.conftest import make_text


def test_a_stream_of_documents_compresses_as_all_of_them_at_once(make_config, folder):
    config = make_config(folder)
    source = prepare.Source(folder, config.data.validation_fraction)
    texts = [d.parts[0][0].encode() for d in corpus.read_documents(source.files)
             if corpus.hash_position(d.name) <= source.survey[1]]
    size = sum(map(len, texts))
    found = compressed_bits_per_byte(config.data)
    assert found == {"gzip_each_bits_per_byte": 8 * sum(len(gzip.compress(t, 9, mtime=0)) for t in texts) / size,
                     "xz_each_bits_per_byte": 8 * sum(len(lzma.compress(t, preset=9)) for t in texts) / size,
                     "xz_concatenated_bits_per_byte": 8 * len(lzma.compress(b"".join(texts), preset=9)) / size}


def test_of_much_text_each_source_gives_its_share(make_config, folder, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    for i in range(20):
        (tmp_path / "other" / f"{i}.txt").write_text(make_text(i, lines=40))
    monkeypatch.setattr(baselines, "SAMPLE_BYTES", 4000)
    read, real = [], corpus.read_documents
    monkeypatch.setattr(corpus, "read_documents", lambda *a, **k: (read.append(d.name) or d for d in real(*a, **k)))
    assert compressed_bits_per_byte(make_config(folder, tmp_path / "other").data)["gzip_each_bits_per_byte"] < 8
    assert len(read) < 60  # not both sources completely, twice


def test_token_ids_are_not_compressed(make_config, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"tokens": [1, 2, i]}) + "\n" for i in range(50)))
    assert compressed_bits_per_byte(make_config(tmp_path).data) == {}


def test_compressors_take_held_out_text_of_its_own(own):
    assert compressed_bits_per_byte(own.data) == compressed_bits_per_byte(own.data, own.data.validation)


def test_of_a_budget_the_noted_cut_is_taken_and_not_all_text_is_read(make_config, tmp_path, monkeypatch):
    rows = "".join(json.dumps({"text": make_text(i, lines=4)}) + "\n" for i in range(500))
    (tmp_path / "rows.jsonl").write_text(rows)
    config, workdir = make_config(tmp_path / "rows.jsonl", validation_tokens=600), str(tmp_path / "work")
    monkeypatch.setattr(baselines, "SAMPLE_BYTES", 400)
    wanted = compressed_bits_per_byte(config.data)
    prepare.claim_corpus(prepare.prepare(config, workdir), workdir)
    read, real = [], corpus.read_documents
    monkeypatch.setattr(corpus, "read_documents", lambda *a, **k: (read.append(d.name) or d for d in real(*a, **k)))
    assert compressed_bits_per_byte(config.data, workdir=workdir) == wanted
    assert len(read) < 400
