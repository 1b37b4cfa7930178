"""Corpora tokenized by other programs: Megatron-LM's, tables of ids, and their tokenizer."""

import json
import struct

import numpy as np
import pytest

from deepseek_jax.config import ConfigError, InitConfig, load_config
from deepseek_jax.data import corpus, units
from deepseek_jax.data.ahead import prepare_ahead
from deepseek_jax.data.prepare import prepare
from tests.data.conftest import make_text

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_megatron(prefix, documents, dtype="uint16", modes=False):
    """The pair that Megatron-LM's IndexedDatasetBuilder writes. documents: lists of sequences of ids."""
    sequences = [np.array(s, dtype) for document in documents for s in document]
    lengths = np.array([len(s) for s in sequences], "<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths * np.dtype(dtype).itemsize)])[:-1].astype("<i8")
    ends = np.cumsum([0, *map(len, documents)]).astype("<i8")
    (prefix.parent / f"{prefix.name}.bin").write_bytes(b"".join(s.tobytes() for s in sequences))
    (prefix.parent / f"{prefix.name}.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
        + struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(ends))
        + lengths.tobytes() + pointers.tobytes() + ends.tobytes() + (bytes(len(sequences)) if modes else b""))


def ids_of(path):
    return [(d.name, d.ids.tolist()) for d in corpus.read_documents(corpus.list_files(str(path)))]


@pytest.mark.parametrize("dtype", CODES)
def test_documents_of_megatron_are_read_in_each_type_of_ids(tmp_path, dtype):
    write_megatron(tmp_path / "a_text_document", [[[1, 2, 3]], [[4], [5, 6]], [[]], [[7]]], dtype, modes=True)
    wanted = [("a_text_document.idx#0", [1, 2, 3]), ("a_text_document.idx#1", [4, 5, 6]),
              ("a_text_document.idx#3", [7])]
    for path in (tmp_path, tmp_path / "a_text_document", tmp_path / "a_text_document.bin",
                 tmp_path / "a_text_document.idx", tmp_path / "*.idx"):
        assert ids_of(path) == wanted
    assert corpus.ignored_files(str(tmp_path)) == []


def test_ids_come_between_bos_and_eos_that_are_not_there_already(make_config, tmp_path, trained):
    trained.save(str(tmp_path / "given" / "tokenizer.json"))
    texts = [make_text(i) for i in range(30)]
    ids = [trained.encode(text) for text in texts]
    root = tmp_path / "corpus"
    root.mkdir()
    write_megatron(root / "a", [[[*i, trained.eos]] for i in ids[:10]])
    (root / "b.jsonl").write_text("".join(json.dumps({"tokens": [trained.bos, *i]}) + "\n" for i in ids[10:]))
    made = prepare(make_config(root, tokenizer=str(tmp_path / "given")), str(tmp_path / "run"))
    found = []
    for shard in (*made.train, *made.validation):
        found += [tuple(shard.tokens[a:b].tolist()) for a, b in zip(shard.offsets_N, shard.offsets_N[1:])]
        assert shard.bytes_N.sum() == trained.byte_lengths_W[shard.tokens[:]].sum()
    assert sorted(found) == sorted((trained.bos, *i, trained.eos) for i in ids)
    assert made.sources[0]["bytes"] == sum(len(text.encode()) for text in texts)
    assert made.tokenizer.digest == trained.digest and (tmp_path / "run" / "tokenizer.json").is_file()


@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_tables_of_ids(tmp_path, column):
    import pyarrow
    import pyarrow.parquet

    rows = [[1, 2], [], [3]]
    pyarrow.parquet.write_table(pyarrow.table({column: pyarrow.array(rows, pyarrow.list_(pyarrow.uint16()))}),
                                tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    assert ids_of(tmp_path) == [(f"{name}#{row}", ids) for name in ("a.parquet", "b.jsonl")
                                for row, ids in ((0, [1, 2]), (2, [3]))]


@pytest.mark.parametrize("value", [5, [1.5], [-1], ["a"], [True], [2**40]])
def test_rows_without_proper_ids_are_skipped_and_named(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"tokens": value}) + "\n" + json.dumps({"tokens": [1]}))
    lines = []
    found = list(corpus.read_documents(corpus.list_files(str(tmp_path)), warn=lines.append))
    assert [d.ids.tolist() for d in found] == [[1]] and "tokens must be a list of ids" in lines[0]


def test_a_large_pair_is_cut_into_units_and_its_tokens_are_the_same(make_config, tmp_path, trained, monkeypatch):
    trained.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "corpus").mkdir()
    write_megatron(tmp_path / "corpus" / "a", [[trained.encode(make_text(i, lines=5))] for i in range(60)], "int32")
    config = make_config(tmp_path / "corpus", tokenizer=str(tmp_path / "tokenizer.json"), cache_dir=None)
    alone = prepare(config, str(tmp_path / "alone"))
    monkeypatch.setattr(units, "SMALLEST", 2000)
    made, = prepare_ahead(config, str(tmp_path / "ahead"))
    found = prepare(config, str(tmp_path / "ahead"))
    assert made.parts > 3 and (found.train[0].tokens[:] == alone.train[0].tokens).all()
    assert found.sources[0]["bytes"] == alone.sources[0]["bytes"] > 0


def test_a_changed_bin_is_another_corpus(tmp_path):
    write_megatron(tmp_path / "a", [[[1, 2]]])
    digests = {corpus.digest(corpus.list_files(str(tmp_path)), by_contents) for by_contents in (True, False)
               for ids in ([1, 2], [1, 3], [1, 2, 3]) for _ in [write_megatron(tmp_path / "a", [[ids]])]}
    assert len(digests) == 6


def cut(path, bytes):
    path.write_bytes(path.read_bytes()[:bytes])


@pytest.mark.parametrize("damage, complaint", [
    (lambda a: cut(a / "a.idx", 60), r"a\.idx is cut off: 60 bytes"),
    (lambda a: cut(a / "a.bin", 5), r"a\.bin is cut off: 5 bytes of the 8"),
    (lambda a: (a / "a.bin").unlink(), r"there is no .*a\.bin, which .*a\.idx is the index of"),
    (lambda a: (a / "a.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 7, 0, 1)), "dtype code 7"),
    (lambda a: (a / "a.idx").write_bytes(b"other"), "holds no text")])
def test_a_damaged_pair_is_one_line(make_config, tmp_path, trained, damage, complaint):
    trained.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "c").mkdir()
    write_megatron(tmp_path / "c" / "a", [[[1, 2]], [[3, 4]]])
    damage(tmp_path / "c")
    with pytest.raises(ConfigError, match=complaint):
        prepare(make_config(tmp_path / "c", tokenizer=str(tmp_path / "tokenizer.json")), str(tmp_path / "run"))


def test_ids_without_their_tokenizer_or_with_another_are_one_line(make_config, tmp_path, trained):
    (tmp_path / "c").mkdir()
    write_megatron(tmp_path / "c" / "a", [[[1, 2]], [[3, 60000]], [[5, 6]]])
    with pytest.raises(ConfigError, match=r"holds token ids.*data\.tokenizer=PATH"):
        prepare(make_config(tmp_path / "c"), str(tmp_path / "run"))
    trained.save(str(tmp_path / "tokenizer.json"))
    config = make_config(tmp_path / "c", tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"a\.idx#1 has the token id 60000, and the tokenizer's are 0 to 399"):
        prepare(config, str(tmp_path / "run2"))
    with pytest.raises(ConfigError, match="there is no .*absent/tokenizer.json"):
        prepare(make_config(tmp_path / "c", tokenizer=str(tmp_path / "absent")), str(tmp_path / "run3"))


def test_a_tokenizer_and_weights_that_know_theirs_do_not_go_together(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer=a: the weights of b know their own"):
        load_config("tiny", ["--config.data.tokenizer=a", "--config.init.from=b"])
    assert InitConfig().from_ is None


def test_of_a_folder_of_the_hub_the_tables_of_training_are_read(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "README.md").write_text("# A data set")
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (data / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    source = f"hf:{tmp_path}"
    names = [f.name for f in corpus.list_files(source)]
    assert names == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert corpus.ignored_files(source) == []
    for path in data.glob("train*"):
        path.unlink()
    assert [f.name for f in corpus.list_files(source)] == ["data/test-00000-of-00001.jsonl"]
    with pytest.raises(ConfigError, match="hf:org/name is no folder; download the data set first"):
        corpus.list_files("hf:org/name")
    with pytest.raises(ConfigError, match="has no .parquet"):
        next(data.glob("*")).unlink()
        corpus.list_files(source)
