"""Records of ArrayRecord are rows like those of .jsonl, whichever program wrote them; large files are split into parts.
"""

import json
import sys

import numpy as np
import pyarrow.parquet
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.data import corpus, units
from deepseek_jax.data.ahead import prepare_ahead
from deepseek_jax.data.prepare import prepare
from tests.data.conftest import make_text

array_record = pytest.importorskip("array_record.python.array_record_module")

# The bytes of tf.train.Example, from feature.proto and the encoding of protocol buffers.
TEXT = b"\n\x0f\n\r\n\x04text\x12\x05\n\x03\n\x01a"  # features {"text": bytes ["a"]}
IDS = b"\n\x16\n\x14\n\x06tokens\x12\n\x1a\x08\n\x06\x05\xac\x02\x07\x08\t"  # {"tokens": int64 [5, 300, 7, 8, 9]}


def write(path, records, options="group_size:1"):
    writer = array_record.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def test_each_kind_of_record_is_a_document(tmp_path):
    conversation = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    rows = ["plain text", {"text": "row"}, {"prompt": "1 +", "answer": " 1"}, {"messages": conversation}, {"other": 1},
            {"tokens": [3, 4]}]
    records = [row.encode() if isinstance(row, str) else json.dumps(row).encode() for row in rows]
    path = write(tmp_path / "c4-train.array_record-00000-of-00001",
                 [*records, TEXT, IDS, "\nnaïve".encode(), b"{ code }", b"\xff\xfe", b""])
    counts, said = corpus.Counts(), []
    found = list(corpus.read_documents(corpus.list_files(str(tmp_path)), counts, said.append))
    name = "c4-train.array_record-00000-of-00001"
    assert [d.name for d in found] == [f"{name}#{i}" for i in (0, 1, 2, 3, 5, 6, 7, 8, 9)]
    assert [d.parts for d in found[:3]] == [(("plain text", True),), (("row", True),), (("1 +", False), (" 1", True))]
    assert found[3].messages == tuple(conversation)
    assert [found[i].ids.tolist() for i in (4, 6)] == [[3, 4], [5, 300, 7, 8, 9]]
    assert [found[i].parts[0][0] for i in (5, 7, 8)] == ["a", "\nnaïve", "{ code }"]
    assert (counts.documents, counts.skipped, counts.empty) == (9, 2, 1)
    assert said[0].startswith(f"skipped {name}#4: has neither") and said[1] == f"skipped {name}#10: not UTF-8 (byte 0)"
    assert corpus.list_files(path)[0].named


def test_parts_of_a_large_file_have_its_documents_and_its_tokens(make_config, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    path = write(tmp_path / "texts" / "a.array_record", [make_text(i).encode() for i in range(100)])
    monkeypatch.setattr(units, "SMALLEST", 20_000)
    made = units.units(corpus.list_files(path))
    assert len(made) > 3
    apart = [d for unit in made for d in corpus.read_documents(unit, alone=True)]
    assert apart == list(corpus.read_documents(corpus.list_files(path))) and len(apart) == 100
    config = make_config(path, cache_dir=str(tmp_path / "ahead"))
    result, = prepare_ahead(config, str(tmp_path / "a"))
    assert result.parts == len(made) and not result.missing
    ahead = prepare(config, str(tmp_path / "a"))
    alone = prepare(make_config(path, cache_dir=str(tmp_path / "alone")), str(tmp_path / "b"))
    for split in ("train", "validation"):
        (a,), (b,) = getattr(ahead, split), getattr(alone, split)
        assert np.array_equal(a.tokens[:], b.tokens[:]) and np.array_equal(a.bytes_N, b.bytes_N)


def test_a_damaged_stretch_costs_its_own_records_whoever_reads_it(make_config, tmp_path, monkeypatch):
    path = tmp_path / "a.array_record"
    write(path, [f"{i}\n{make_text(i, lines=2)}".encode() for i in range(3000)], "group_size:64,uncompressed")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle:middle + 40] = bytes(b ^ 255 for b in data[middle:middle + 40])
    path.write_bytes(data)
    files, counts, said = corpus.list_files(str(path)), corpus.Counts(), []
    found = list(corpus.read_documents(files, counts, said.append))
    assert len(found) == counts.documents == 3000 - 64 and counts.skipped == 64 == len(said)
    numbers = [int(d.parts[0][0].split("\n")[0]) for d in found]
    assert [d.name for d in found] == [f"a.array_record#{i}" for i in numbers]
    lost = sorted(set(range(3000)) - set(numbers))
    assert lost == list(range(lost[0], lost[0] + 64)) and lost[0] % 64 == 0
    assert said[0].startswith(f"skipped a.array_record#{lost[0]}: is damaged: ")
    monkeypatch.setattr(units, "SMALLEST", 20_000)
    made = units.units(files)
    apart = corpus.Counts()
    assert len(made) > 3
    assert [d for unit in made for d in corpus.read_documents(unit, apart, alone=True)] == found
    assert apart == counts


def test_a_large_file_without_a_record_is_counted_whoever_reads_it(tmp_path, monkeypatch):
    write(tmp_path / "a.array_record", [])
    write(tmp_path / "b.array_record", [make_text(1).encode()])
    schema = pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.ParquetWriter(tmp_path / "c.parquet", schema).close()
    monkeypatch.setattr(units, "SMALLEST", 100)
    files, apart, alone = corpus.list_files(str(tmp_path)), corpus.Counts(), corpus.Counts()
    assert min(map(units._size, files)) > 100
    found = [d for unit in units.units(files) for d in corpus.read_documents(unit, apart, alone=False)]
    assert found == list(corpus.read_documents(files, alone)) and apart == alone and apart.files == 3


@pytest.mark.parametrize("beside, kind", [(b"\xff\xfe", "bytes_list"), (0.5, "float_list"), (b"3 4", "bytes_list")])
def test_features_beside_the_text_do_not_matter_and_a_text_of_another_kind_is_named(tmp_path, beside, kind):
    from deepseek_jax.data import array_record as reader

    def example(**features):
        made = reader._example()()
        for name, (form, value) in features.items():
            getattr(made.features.feature[name], form).value.append(value)
        return made.SerializeToString()

    text = ("bytes_list", b"a text")
    records = [example(text=text, image=(kind, beside)), example(text=text, tokens=(kind, beside)),
               example(text=("float_list", 0.5)), example(text=("bytes_list", b"\xff")), example(title=text)]
    path, said = write(tmp_path / "a.array_record", records), []
    found = list(corpus.read_documents(corpus.list_files(path), warn=said.append))
    assert [d.parts for d in found] == [(("a text", True),)] * 2
    assert [line.split(" nor ")[0] for line in said] == [
        f'skipped a.array_record#{i}: has neither "text"' for i in (2, 3, 4)]


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"junk", lambda data: b""],
                         ids=["cut", "junk", "empty"])
def test_a_damaged_file_is_named_and_skipped(tmp_path, damage):
    path = write(tmp_path / "a.array_record", [make_text(i).encode() for i in range(50)])
    (tmp_path / "b.array_record").write_bytes(damage((tmp_path / "a.array_record").read_bytes()))
    counts, said = corpus.Counts(), []
    found = list(corpus.read_documents(corpus.list_files(str(tmp_path)), counts, said.append))
    assert len(found) == 50 and counts.skipped == 1
    assert len(said) == 1 and said[0].startswith("skipped b.array_record: is no ArrayRecord file, or was cut off")
    assert path.endswith("a.array_record")


def test_without_the_package_it_is_one_line_that_names_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.array_record", [b"text"])
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    with pytest.raises(ConfigError, match="needs a reader of ArrayRecord: pip install array_record"):
        list(corpus.read_documents(corpus.list_files(path)))


def test_in_a_bucket_it_is_one_line():
    from deepseek_jax.data import array_record as reader
    with pytest.raises(ConfigError, match="s3://b/a.array_record: ArrayRecord files are read from a disk"):
        list(reader.read_records("s3://b/a.array_record"))
