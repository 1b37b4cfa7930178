"""Tokens made by `prepare` are those that a run would make, whichever process makes which part."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from deepseek_jax import storage
from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.data import ahead, corpus, prepare, token_shards, units
from deepseek_jax.data.ahead import Share, prepare_ahead
from deepseek_jax.data.loader import Loader
from tests.data.conftest import make_text


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A corpus with every kind of file, some of them faulty; large ones are split into pieces of 3,000 bytes."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(units, "SMALLEST", 3000)
    root = tmp_path / "texts"
    root.mkdir()
    row = lambda i: {"text": make_text(i, lines=3 + i % 7)}
    lines = [json.dumps(row(i)) for i in range(60)]
    lines[7], lines[20], lines[33] = "", "no json", json.dumps({"prompt": "1 + 1 =", "answer": " 2"})
    lines[40] = json.dumps({"text": make_text(99, lines=200)})  # longer than a piece
    (root / "a.jsonl").write_text("\ufeff" + "\n".join(lines))
    (root / "b.txt").write_text(make_text(3))
    (root / "b2.txt").write_bytes(b"\xff")
    with gzip.open(root / "c.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(row(i)) + "\n" for i in range(30))
    table = pyarrow.table({"text": [row(i)["text"] for i in range(80)]})
    pyarrow.parquet.write_table(table, root / "d.parquet", row_group_size=9)
    (root / "empty.jsonl").write_text("")
    return str(root)


def contents(folder):
    """{path: bytes} of all files in the caches of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(one, other):
    for split in token_shards.SPLITS:
        a, b = one[split], other[split]
        assert np.array_equal(a.tokens[:], b.tokens[:])
        assert np.array_equal(a.offsets_N, b.offsets_N) and np.array_equal(a.bytes_N, b.bytes_N)
        assert np.array_equal(a.is_predicted(0, len(a.tokens)), b.is_predicted(0, len(b.tokens)))
        assert np.array_equal(a.whole_N, b.whole_N)
    return True


def test_units_read_one_by_one_give_the_documents_in_order(mixed):
    files = corpus.list_files(mixed)
    made = units.units(files)
    numbered = units.number_rows(made, [[units.count_lines(file) for file in unit] for unit in made])
    counts, pieces = corpus.Counts(), corpus.Counts()
    wanted = list(corpus.read_documents(files, counts))
    found = [document for unit in numbered for document in corpus.read_documents(unit, pieces, alone=False)]
    assert found == wanted and pieces == counts
    stretched = [file.name for unit in made for file in unit if file.stretch]
    assert stretched.count("a.jsonl") > 4 < stretched.count("d.parquet")


def test_tokens_and_tokenizer_are_those_that_a_run_makes(make_config, mixed, tmp_path):
    config = make_config(mixed, cache_dir=None)
    made, = prepare_ahead(config, str(tmp_path / "ahead"))
    alone = prepare.prepare(config, str(tmp_path / "alone"))
    found = prepare.prepare(config, str(tmp_path / "ahead"))
    assert made.parts > 10 and made.missing == []
    assert made.tokens == len(alone.train[0].tokens) + len(alone.validation[0].tokens)
    assert found.tokenizer.digest == alone.tokenizer.digest
    assert same(dict(train=found.train[0], validation=found.validation[0]),
                dict(train=alone.train[0], validation=alone.validation[0]))
    parts = found.sources[0].pop("parts")
    assert len(parts) == made.parts and found.sources == alone.sources
    a, b = (Loader(config, prepared).batch(3) for prepared in (found, alone))
    assert all(np.array_equal(a[key], b[key]) for key in a)


def test_workers_and_shards_change_no_byte(make_config, mixed, tmp_path):
    """Shards in any order; the last one finishes."""
    made = {}
    for name, shares, workers in (("one", [Share()], 1), ("two", [Share()], 2),
                                  ("three", [Share(2, 3), Share(0, 3), Share(1, 3)], 1)):
        config = make_config(mixed, cache_dir=str(tmp_path / name))
        for share in shares:
            source, = prepare_ahead(config, None, share, workers)
            assert bool(source.missing) == (share != shares[-1])
        made[name] = contents(tmp_path / name)
    assert made["one"] == made["two"] == made["three"]


def test_a_finished_part_is_not_made_again_and_a_run_reads_no_text(make_config, mixed, tmp_path, monkeypatch):
    config = make_config(mixed, cache_dir=str(tmp_path / "cache"))
    prepare_ahead(config, None, Share(0, 2))
    before = contents(tmp_path / "cache")
    shutil.copytree(tmp_path / "cache", tmp_path / "again")
    made = []
    monkeypatch.setattr(ahead, "_tokenize", lambda folder, *rest, real=ahead._tokenize: (made.append(folder),
                                                                                        real(folder, *rest)))
    source, = prepare_ahead(config, None)
    assert len(made) == source.parts // 2
    assert before.items() <= contents(tmp_path / "cache").items()
    monkeypatch.setattr(corpus, "read_documents", None)
    assert prepare.prepare(config, str(tmp_path / "run")).sources[0]["files"] == 6


def test_a_complete_cache_may_be_one_that_can_only_be_read(make_config, mixed, tmp_path, monkeypatch):
    def refuse(folder):
        raise storage.StorageError(f"{folder} cannot be written")

    config = make_config(mixed, cache_dir=str(tmp_path / "cache"))
    made = prepare_ahead(config, None)
    before = contents(tmp_path / "cache")
    monkeypatch.setattr(storage, "check_writable", refuse)
    assert prepare_ahead(config, None) == made and contents(tmp_path / "cache") == before
    for names in "**/meta.json", "*-*/*.json*":
        for path in (tmp_path / "cache").glob(names):
            path.unlink()
        for path in (tmp_path / "cache").glob("tokenizer-*"):
            path.unlink()
        with pytest.raises(storage.StorageError, match="cache cannot be written"):
            prepare_ahead(config, None)


def test_of_a_killed_process_what_is_finished_counts_and_nothing_else(tmp_path, monkeypatch):
    """SIGKILL to the parent ends its workers too; the next start makes the same bytes as an undisturbed one."""
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(12):
        (root / f"{i:02}.txt").write_text(make_text(i, lines=3000))
    keys = ["--config.model.vocab_size=400", f"--config.data.sources=(({str(root)!r}, 1.0),)"]
    (tmp_path / "small.py").write_text(
        "from deepseek_jax.data import units; units.SMALLEST = 1000\n"
        "if __name__ == '__main__': from deepseek_jax.prepare import main; main()")
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(tmp_path / "small.py"), "--config", "tiny", *keys, "--workers=2",
                                f"--out={out}"])
    while not list(out.glob("parts-*/*/meta.json")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not list(out.glob("shards-*"))
    monkeypatch.setattr(units, "SMALLEST", 1000)
    for name in ("killed", "let_be"):
        source, = prepare_ahead(load_config("tiny", [*keys, f"--config.data.cache_dir={tmp_path / name}"]), None)
        assert source.parts == 12 and not source.missing
    found = {path: data for path, data in contents(out).items() if ".partial" not in path}
    assert found == contents(tmp_path / "let_be")


def test_the_cut_is_found_in_the_first_documents(folder):
    read = []
    places = (read.append(p) or p for p in [1, 2**63, 3, 4])
    assert corpus.find_cut(places, 0.25, folder) == 2**62 and len(read) == 2


def test_joined_arrays_are_one():
    parts = [np.arange(3), np.arange(0), np.arange(5) + 10, np.arange(0)]
    joined, whole = token_shards.Joined([3, 0, 5, 0], parts.__getitem__), np.concatenate(parts)
    assert len(joined) == 8
    for start in range(9):
        for stop in range(start, 9):
            assert joined[start:stop].tolist() == whole[start:stop].tolist()


def test_prepare_imports_no_jax():
    code = "import sys, deepseek_jax.prepare; print([m for m in ('jax', 'flax', 'orbax', 'grain') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(ConfigError, match="a worker was killed.*fewer --workers"), ahead.Workers(2) as workers:
        workers.run([(os.abort,), (os.abort,)], "dying")


def test_a_tokenizer_that_another_one_replaced_makes_no_parts(make_config, mixed, tmp_path, monkeypatch):
    """Otherwise parts under its name would permanently hold the ids of the other one."""
    find = prepare.find_tokenizer

    def replaced(config, workdir, sources):
        found = find(config, workdir, sources)
        prepare.train_tokenizer(["another text"], 300).save(os.path.join(workdir, "tokenizer.json"))
        return found

    monkeypatch.setattr(prepare, "find_tokenizer", replaced)
    with pytest.raises(ConfigError, match="has changed since this began"):
        prepare_ahead(make_config(mixed, cache_dir=None), str(tmp_path / "run"))
