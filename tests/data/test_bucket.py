"""A corpus in a bucket equals the corpus on a disk, and so do its tokens."""

import gzip
import json
import pathlib

import pytest

from deepseek_jax import storage, working_files
from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.data import corpus, prepare, token_shards, units
from deepseek_jax.data.ahead import Share, prepare_ahead
from deepseek_jax.data.verify import verify
from tests.buckets import SCHEMES, stores
from tests.data.conftest import make_text


@pytest.fixture(params=SCHEMES)
def address(request):
    return stores()[request.param].address()


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """Every kind of file, some of them faulty; large ones are split into pieces of 3,000 bytes."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(units, "SMALLEST", 3000)
    root = tmp_path / "texts"
    (root / "below/.hidden").mkdir(parents=True)
    row = lambda i: {"text": make_text(i, lines=3 + i % 7)}
    (root / "a.jsonl").write_text("\ufeff" + "\n".join([*(json.dumps(row(i)) for i in range(40)), "no json"]))
    (root / "below/b.txt").write_text(make_text(3))
    (root / "below/b2.txt").write_bytes(b"\xff")
    (root / "below/.hidden/c.txt").write_text("no part of it")
    (root / "other.bin").write_bytes(b"left out")
    with gzip.open(root / "c.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(row(i)) + "\n" for i in range(30))
    table = pyarrow.table({"text": [row(i)["text"] for i in range(80)]})
    pyarrow.parquet.write_table(table, root / "d.parquet", row_group_size=9)
    return root


def read(path):
    counts, warnings = corpus.Counts(), []
    files = corpus.list_files(str(path))
    return [*corpus.read_documents(files, counts, warnings.append)], counts, warnings, corpus.digest(files, True)


@pytest.mark.parametrize("pattern", ["", "/", "/*.jsonl*", "/**/*.txt", "/a.jsonl", "/c.jsonl.gz", "/d.parquet"])
def test_the_documents_and_their_digest_are_those_on_a_disk(mixed, address, pattern):
    storage.upload_folder(mixed, address)
    assert read(f"{address}{pattern}") == read(f"{mixed}{pattern}")


def test_what_is_not_there_or_cannot_be_read_there_is_named(address):
    with pytest.raises(ConfigError, match=f"there is no {address}; give objects below a name, an object or a glob"):
        corpus.list_files(address)
    storage.put(f"{address}/x.idx", b"")
    with pytest.raises(ConfigError, match="files of Megatron-LM, which are mapped; copy them to a disk"):
        corpus.list_files(address)


def test_a_store_that_does_not_answer_is_no_file_to_be_skipped(mixed, address, monkeypatch):
    storage.upload_folder(mixed, address)
    files = corpus.list_files(address)

    def refuse(*_, **__):
        raise OSError("Forbidden")

    monkeypatch.setattr(type(storage._client(address)[0]), "open", refuse)
    with pytest.raises(storage.StorageError, match="Forbidden"):
        list(corpus.read_documents(files))


def contents(cache):
    """{path: content} of the files of tokens in a cache."""
    here = working_files.on_disk(cache) if storage.is_remote(cache) else cache
    return {str(p.relative_to(here)): p.read_bytes() for p in pathlib.Path(here).rglob("*") if p.is_file()}


def test_tokens_made_by_shards_in_a_bucket_are_those_made_on_a_disk(mixed, address, tmp_path):
    storage.upload_folder(mixed, f"{address}/texts")
    at = lambda texts, cache: load_config("tiny", [
        "--config.model.vocab_size=300", f"--config.data.cache_dir={cache}", "--config.data.validation_fraction=0.3",
        f"--config.data.sources=(('{texts}', 1.0),)"])
    here, there = at(mixed, tmp_path / "cache"), at(f"{address}/texts", f"{address}/cache")
    prepare_ahead(here, None)
    for i in (1, 0, 1):
        made = prepare_ahead(there, None, Share(i, 2))
    assert made[0].parts > 3 and not made[0].missing
    found, expected = contents(f"{address}/cache"), contents(tmp_path / "cache")
    metas = [name for name in expected if name.startswith("shards-") and name.endswith("meta.json")]
    assert found.keys() == expected.keys() and {n for n in found if found[n] != expected[n]} == set(metas)
    ours, theirs = (prepare.prepare(config, str(tmp_path / name)) for name, config in (("a", here), ("b", there)))
    for one, other in zip((*ours.train, *ours.validation), (*theirs.train, *theirs.validation)):
        assert len(one.tokens) > 100 and (one.tokens[:] == other.tokens[:]).all()
    assert list(verify(there, None)) == [f"{address}/texts: 5 files are the same"]
    storage.put(f"{address}/texts/below/b.txt", b"other text")
    with pytest.raises(ConfigError, match="below/b.txt has changed"):
        list(verify(there, None))


def test_shards_count_when_their_last_object_is_there(address, tmp_path, monkeypatch):
    order, upload = [], storage.upload
    monkeypatch.setattr(storage, "upload", lambda file, to: (order.append(to), upload(file, to)))
    (tmp_path / "t.txt").write_text(make_text(1, lines=3000))
    config = load_config("tiny", ["--config.model.vocab_size=300", f"--config.data.cache_dir={address}",
                                  f"--config.data.sources=(('{tmp_path}/t.txt', 1.0),)"])
    prepare.prepare(config, str(tmp_path / "run"))
    assert order[-1].endswith("/meta.json") and sum(to.endswith("meta.json") for to in order) == 1
    assert token_shards.read(order[-1].removesuffix("/meta.json"))[1]["train"]["tokens"] > 100
