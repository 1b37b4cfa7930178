"""Every format is read, unreadable files are skipped with a message, and the split depends only on names."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from deepseek_jax.config import ConfigError
from deepseek_jax.data import corpus, units


def read(path):
    counts, warnings = corpus.Counts(), []
    documents = list(corpus.read_documents(corpus.list_files(str(path)), counts, warnings.append))
    return documents, counts, warnings


def texts(path):
    return ["".join(text for text, _ in d.parts) for d in read(path)[0]]


ROWS = "\n".join(json.dumps({"text": t}) for t in ("one é", "two")).encode()


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one é", "two"], "unused": [1, 2]}), path)


@pytest.mark.parametrize("name, write", [
    ("a.jsonl", lambda p: p.write_bytes(ROWS)),
    ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(ROWS, mtime=0))),
    ("a.jsonl.zst", lambda p: p.write_bytes(zstandard.compress(ROWS[:9]) + zstandard.compress(ROWS[9:]))),
    ("a.parquet", write_parquet),
])
def test_rows_of_every_format_are_documents(tmp_path, name, write):
    write(tmp_path / name)
    documents, counts, warnings = read(tmp_path / name)
    assert [d.name for d in documents] == [f"{name}#0", f"{name}#1"]
    assert [d.parts for d in documents] == [(("one é", True),), (("two", True),)]
    assert (counts.files, counts.documents, counts.bytes, counts.skipped) == (1, 2, 9, 0)
    assert not warnings


@pytest.mark.parametrize("ending", ["txt", "md", "py"])
def test_text_files_keep_every_byte(tmp_path, ending):
    raw = "\r\n\tcafé\n".encode()
    for name in "ab":
        (tmp_path / f"{name}.{ending}").write_bytes(raw)
    assert [t.encode() for t in texts(tmp_path)] == [raw, raw]


def test_folder_file_and_glob_find_the_same_text(tmp_path):
    for name in ("deep", ".tool"):
        (tmp_path / name).mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/ignored.bin", ".hidden.txt", ".tool/d.txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.txt", "deep/c.txt"]
    assert texts(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "deep/c.txt"]
    assert texts(tmp_path / "b.txt") == ["b.txt"]
    assert [f.name for f in corpus.list_files(str(tmp_path / "deep/*"))] == ["c.txt"]


def test_files_of_other_endings_are_text_if_they_are_named(tmp_path, monkeypatch):
    for name in ("ls.1", "open.2", "enwik", "notes.txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "enwik") == ["enwik"]
    assert texts(tmp_path / "*.[12]") == ["ls.1", "open.2"]
    assert texts(tmp_path / "*") == ["notes.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [f.name for f in corpus.list_files("~/enwik")] == ["enwik"]


def test_a_prompt_is_not_predicted_and_its_answer_is(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "no answer", "answer": ""}\n')
    documents, counts, _ = read(tmp_path)
    assert [d.parts for d in documents] == [(("1+1=", False), ("2", True))]
    assert counts.empty == 1


def test_a_file_that_is_not_utf8_is_named_skipped_and_counted(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("fine")
    documents, counts, warnings = read(tmp_path)
    assert [d.name for d in documents] == ["good.txt"]
    assert (counts.files, counts.skipped) == (2, 1)
    assert warnings == ["skipped bad.txt: not UTF-8 (byte 3)"]


@pytest.mark.parametrize("line", [b"{not json", b'{"text": 3}', b'["text"]', b'{"answer": "x"}', b'{"text": "\xe9"}',
                                  b'{"text": "\\ud800"}'])
def test_a_malformed_row_is_named_skipped_and_counted(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n\n{"text": "two"}')
    documents, counts, warnings = read(tmp_path)
    assert [d.name for d in documents] == ["a.jsonl#0", "a.jsonl#3"]
    assert counts.skipped == 1
    assert len(warnings) == 1 and warnings[0].startswith("skipped a.jsonl#1: ") and "\n" not in warnings[0]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_file_is_named_skipped_and_counted(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is something else")
    (tmp_path / "good.txt").write_text("fine")
    documents, counts, warnings = read(tmp_path)
    assert [d.name for d in documents] == ["good.txt"]
    assert counts.skipped == 1
    assert len(warnings) == 1 and name in warnings[0]


def test_many_bad_rows_give_few_lines(caplog):
    warnings = corpus.Warnings()
    for i in range(100):
        warnings(f"line {i}")
    warnings.close()
    assert len(caplog.messages) == 11
    assert caplog.messages[-1] == "... and 90 more"


@pytest.mark.parametrize("package, name", [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_told_with_its_install_line(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"x")
    for module in [m for m in sys.modules if m.split(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        read(tmp_path)


@pytest.mark.parametrize("make, message", [
    (lambda p: p / "absent", "there is no"),
    (lambda p: p, "no file that can be read"),
    (lambda p: p / "*.txt", "no file that can be read"),
])
def test_a_corpus_without_files_is_a_config_error(tmp_path, make, message):
    with pytest.raises(ConfigError, match=message):
        corpus.list_files(str(make(tmp_path)))


def test_stdlib_is_the_running_library_without_its_tests():
    names = {f.name for f in corpus.list_files("stdlib")}
    assert {"dataclasses.py", "json/decoder.py"} <= names
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]


def cut_of(names, fraction):
    return corpus.find_cut((corpus.hash_position(n) for n in names), fraction, "here")


def test_validation_takes_its_fraction_of_many_documents():
    names = [f"file{i}" for i in range(4000)]
    cut = cut_of(names, 0.1)
    assert 330 < sum(corpus.hash_position(n) <= cut for n in names) < 470


def test_other_files_do_not_move_a_document():
    names = [f"file{i}" for i in range(400)]
    assert cut_of(names, 0.1) == cut_of(names[:100], 0.1)


def test_the_split_is_the_same_in_another_process():
    code = "from deepseek_jax.data.corpus import hash_position; print(hash_position('json/decoder.py'))"
    out = [subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                          capture_output=True, text=True).stdout for seed in "12"]
    assert [int(o) for o in out] == [corpus.hash_position("json/decoder.py")] * 2
    assert corpus.hash_position("json/decoder.py") == 0x3b2e3cb3d29d57a5


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_two_documents_are_enough_for_both_sides(fraction):
    cut = cut_of("ab", fraction)
    assert sorted(corpus.hash_position(n) <= cut for n in "ab") == [False, True]


@pytest.mark.parametrize("names, fraction, message", [
    ("", 0.1, "holds no text"), ("a", 0.1, "one document"), ("ab", 1.0, "between 0 and 1"), ("", None, "no text")])
def test_a_corpus_too_small_to_split_is_a_config_error(names, fraction, message):
    with pytest.raises(ConfigError, match=message):
        cut_of(names, fraction)


def test_a_lone_text_file_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i}\n" for i in range(10000))
    (tmp_path / "a.txt").write_text(text)
    documents, _, _ = read(tmp_path)
    assert "".join(d.parts[0][0] for d in documents) == text
    assert len({d.name for d in documents}) == len(documents) > 4
    assert all(d.parts[0][0].endswith("\n") for d in documents)


def test_the_digest_sees_names_and_contents(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    digest = lambda: corpus.digest(corpus.list_files(str(tmp_path)))
    first = digest()
    assert digest() == first
    (tmp_path / "a.txt").write_text("two")
    second = digest()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, digest()}) == 3


MARKED = b'\xef\xbb\xbf{"text": "text"}\n'


@pytest.mark.parametrize("name, raw", [
    ("a.txt", b"\xef\xbb\xbftext"), ("a.unknown", b"\xef\xbb\xbftext"), ("a.jsonl", MARKED),
    ("a.jsonl.gz", gzip.compress(MARKED, mtime=0)), ("a.jsonl.zst", zstandard.compress(MARKED))])
def test_a_byte_order_mark_is_no_text(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    documents, counts, warnings = read(tmp_path / name)
    assert [d.parts for d in documents] == [(("text", True),)]
    assert counts.bytes == 4 and not warnings


def compressed(text, window_log):
    how = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=True)
    made = zstandard.ZstdCompressor(compression_params=how).compressobj()
    return made.compress(text) + made.flush()


def test_the_windows_of_zstd_long_are_read(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(compressed(ROWS, 30))
    assert texts(tmp_path / "a.jsonl.zst") == ["one é", "two"]


def test_a_larger_window_is_named_skipped_and_counted(tmp_path):
    raw = bytearray(compressed(ROWS, 30))
    raw[5] = 22 << 3  # the window's exponent, less 10
    (tmp_path / "a.jsonl.zst").write_bytes(raw)
    _, counts, warnings = read(tmp_path / "a.jsonl.zst")
    assert counts.skipped == 1 and "window is larger than 2 GiB" in warnings[0]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_that_was_cut_off_is_named_and_counted(tmp_path, ending):
    rows = b"".join(json.dumps({"text": f"{i}" * 50}).encode() + b"\n" for i in range(9999))
    raw = gzip.compress(rows, mtime=0) if ending == "gz" else zstandard.compress(rows)
    (tmp_path / f"a.jsonl.{ending}").write_bytes(raw[:len(raw) // 2])
    documents, counts, warnings = read(tmp_path / f"a.jsonl.{ending}")
    assert len(documents) < 9999 and counts.skipped == 1
    assert len(warnings) == 1 and ("ended before the end" if ending == "gz" else "was cut off") in warnings[0]


def test_frames_behind_one_another_are_one_file(tmp_path):
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    frames = [zstandard.compress(ROWS[i:i + 7]) for i in range(0, len(ROWS), 7)]
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + b"".join(frames) + skippable)
    assert texts(tmp_path / "a.jsonl.zst") == ["one é", "two"]


@pytest.mark.parametrize("columns", [
    {"text": [None, "two"]}, {"text": [None, None], "prompt": [None, "tw"], "answer": ["x", "o"]},
    {"text": [None, "two"], "prompt": [None, None], "answer": ["x", None]}])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_null_text_is_skipped_and_counted(tmp_path, form, columns):
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        path.write_text("\n".join(json.dumps(dict(zip(columns, row))) for row in zip(*columns.values())))
    documents, counts, warnings = read(path)
    assert ["".join(text for text, _ in d.parts) for d in documents] == ["two"]
    assert (counts.skipped, counts.documents) == (1, 1) and warnings[0].startswith(f"skipped a.{form}#0: ")


@pytest.mark.parametrize("table", [{"text": pyarrow.nulls(2)}, {"other": [1, 2]}])
def test_a_table_without_any_text_is_counted_row_by_row(tmp_path, table):
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    documents, counts, _ = read(tmp_path / "a.parquet")
    assert not documents and counts.skipped == 2


def test_a_row_nested_too_deeply_does_not_end_its_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"[" * 10**5 + b'\n{"text": "two"}\n')
    documents, counts, _ = read(tmp_path / "a.jsonl")
    assert [d.name for d in documents] == ["a.jsonl#1"] and counts.skipped == 1


ADD = {"name": "add", "description": None, "strict": True}
CALLING = {"tools": [{"type": "function", "function": ADD}], "messages": [
    {"role": "user", "content": "1 + 1", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": null}'}}]},
    {"role": "tool", "content": "2", "tool_calls": None}, {"role": "assistant", "content": "two", "tool_calls": None}]}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_conversation_may_call_tools(tmp_path, form):
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CALLING]), path)
    else:
        path.write_text(json.dumps(CALLING))
    (document,), _, warnings = read(path)
    assert not warnings and [m["role"] for m in document.messages] == ["user", "assistant", "tool", "assistant"]
    call, = document.messages[1]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": null}'} and document.messages[1]["content"] == ""
    tool, = document.tools  # in JSON null is a value, in parquet it is a missing one
    assert tool["function"] == (ADD if form == "jsonl" else {"name": "add", "strict": True})
    assert [predicted for _, predicted in document.parts] == [False, False, True, False, True]


def test_tools_that_are_none_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(CALLING | {"tools": tools}) for tools in ("add", None, [1])))
    documents, _, warnings = read(tmp_path / "a.jsonl")
    assert len(documents) == 1 and [w.split(": ", 1)[1] for w in warnings] == [
        "tools must be a list of functions with a name each."] * 2


def test_a_damaged_row_group_of_parquet_costs_its_own_rows_whoever_reads_it(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    texts = [f"{i} of the texts" * 20 for i in range(90)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=30, use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    begin = column.data_page_offset
    data[begin:begin + 40] = b"\xff" * 40
    path.write_bytes(data)
    documents, counts, warnings = read(path)
    assert [d.parts[0][0] for d in documents] == texts[:30] + texts[60:]
    assert [d.name for d in documents][-1] == "a.parquet#89" and counts.skipped == 1
    assert warnings[0].startswith("skipped a.parquet#30: damaged, and so are those up to 59: ")
    monkeypatch.setattr(units, "SMALLEST", 400)
    made = units.units(corpus.list_files(str(path)))
    assert len(made) == 3
    assert [d for unit in made for d in corpus.read_documents(unit, alone=True)] == documents


def test_a_map_of_parquet_is_an_object(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    call = pyarrow.struct([("function", pyarrow.struct([("name", pyarrow.string()), ("arguments", kind)]))])
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()),
                              ("tool_calls", pyarrow.list_(call))])
    rows = [[{"role": "user", "content": "x"},
             {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [("<|eos|>", "1")]}}]}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array(rows, pyarrow.list_(message))}),
                                tmp_path / "a.parquet")
    (document,), _, warnings = read(tmp_path / "a.parquet")
    assert not warnings
    assert document.messages[1]["tool_calls"][0]["function"]["arguments"] == {"<|eos|>": "1"}


def test_a_row_that_no_json_can_say_is_skipped_alone(tmp_path):
    rows = [CALLING, CALLING | {"tools": [{"function": {"name": "f", "at": 1}}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows).replace('"at": 1', '"at": NaN'))
    documents, counts, warnings = read(tmp_path / "a.jsonl")
    assert len(documents) == 1 and counts.skipped == 1 and "tools holds what is no JSON" in warnings[0]
