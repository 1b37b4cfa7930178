"""Changed files are found and named; in large corpora by names, sizes and times, or by reading every file."""

import os

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.data import corpus, prepare, token_shards, units
from deepseek_jax.data.ahead import prepare_ahead
from deepseek_jax.data.verify import verify
from tests.data.conftest import make_text


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A corpus whose files are compared by their times, in units of one file."""
    monkeypatch.setattr(corpus, "CONTENTS_UP_TO", 100)
    monkeypatch.setattr(units, "SMALLEST", 1)
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(6):
        (root / f"{i}.txt").write_text(make_text(i, lines=60))
        os.utime(root / f"{i}.txt", ns=(10**18, 10**18 + i))
    return root


def digest(root, **how):
    return corpus.digest(corpus.list_files(str(root)), **how)


def test_a_large_corpus_is_hashed_by_names_sizes_and_nanoseconds(large, monkeypatch):
    seen = {digest(large)}
    os.utime(large / "1.txt", ns=(10**18, 10**18 + 2))
    seen.add(digest(large))
    (large / "2.txt").rename(large / "9.txt")
    seen.add(digest(large))
    with open(large / "3.txt", "a") as f:
        f.write("x")
    os.utime(large / "3.txt", ns=(10**18, 10**18 + 3))
    seen.add(digest(large))
    assert len(seen) == 4 and all(found.startswith(corpus.BY_TIMES) for found in seen)
    monkeypatch.setattr(corpus.io, "open_regular", None)
    assert digest(large) in seen  # nothing is read


def test_a_small_corpus_is_hashed_by_contents_so_that_its_copy_is_the_same(large, monkeypatch):
    monkeypatch.setattr(corpus, "CONTENTS_UP_TO", 10**6)
    before = digest(large)
    os.utime(large / "1.txt")
    assert digest(large) == before == digest(large, by_contents=True)


@pytest.mark.parametrize("ahead", [False, True])
def test_verify_names_what_changed_though_size_and_time_are_the_same(make_config, large, tmp_path, ahead):
    config, workdir = make_config(large, cache_dir=None), str(tmp_path / "run")
    prepare_ahead(config, workdir) if ahead else prepare.prepare(config, workdir)
    assert list(verify(config, workdir)) == [f"{large}: 6 files are the same"]
    text = (large / "4.txt").read_text()
    (large / "4.txt").write_text("?" + text[1:])
    os.utime(large / "4.txt", ns=(10**18, 10**18 + 4))
    with pytest.raises(ConfigError, match=r"made of: 4\.txt has changed; restore"):
        list(verify(config, workdir, 2))
    (large / "4.txt").rename(large / "7.txt")
    with pytest.raises(ConfigError, match=r"made of: 4\.txt is gone, 7\.txt is new; restore"):
        list(verify(config, workdir))


def test_a_copy_with_other_times_is_settled_by_its_contents(make_config, large, tmp_path, monkeypatch):
    config, workdir = make_config(large, cache_dir=None), str(tmp_path / "run")
    made = prepare.prepare(config, workdir)
    prepare.claim_corpus(made, workdir)
    os.utime(large / "0.txt")
    monkeypatch.setattr(token_shards, "write", None)
    with pytest.raises(ConfigError, match="have changed since the run .*prepare --verify"):
        prepare.prepare(config, workdir, resumes=True)
    assert "the same, but for times" in "".join(verify(config, workdir))
    again = prepare.prepare(config, workdir, resumes=True)
    prepare.claim_corpus(again, workdir)
    assert again.sources == made.sources


def test_a_run_that_began_by_contents_stays_with_them(make_config, large, tmp_path, monkeypatch):
    config, workdir = make_config(large, cache_dir=None), str(tmp_path / "run")
    with monkeypatch.context() as before:
        before.setattr(corpus, "CONTENTS_UP_TO", 10**9)
        prepare.claim_corpus(prepare.prepare(config, workdir), workdir)
    monkeypatch.setattr(token_shards, "write", None)
    os.utime(large / "0.txt")
    prepare.claim_corpus(prepare.prepare(config, workdir, resumes=True), workdir)
    assert not prepare.noted(workdir)[str(large)].startswith(corpus.BY_TIMES)


def test_without_tokens_there_is_nothing_to_verify(make_config, large, tmp_path):
    with pytest.raises(ConfigError, match="no tokens of .*nothing to compare"):
        list(verify(make_config(large, cache_dir=str(tmp_path / "none")), None))


def test_tokens_made_anew_in_between_do_not_hide_what_a_run_began_with(make_config, large, tmp_path):
    config, workdir = make_config(large, cache_dir=None), str(tmp_path / "run")
    prepare.claim_corpus(prepare.prepare(config, workdir), workdir)
    os.utime(large / "0.txt")
    prepare.prepare(config, workdir)  # as an evaluation does
    assert "the same, but for times" in "".join(verify(config, workdir))
    prepare.prepare(config, workdir, resumes=True)
