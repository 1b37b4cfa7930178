"""Shards hold exactly the tokens of their documents, and only complete ones are ever read."""

import dataclasses
import os

import numpy as np
import pytest

from deepseek_jax import io
from deepseek_jax.config import ConfigError, InitConfig
from deepseek_jax.data import token_shards
from deepseek_jax.data.blocks import BlockStream
from deepseek_jax.data.corpus import Document, hash_position, read_documents
from deepseek_jax.data.examples import Stream
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.prepare import (
    OLD_ORDER,
    ORDER,
    Source,
    claim_corpus,
    prepare,
    prepare_evaluation,
    sample,
)


def documents(texts):
    return [Document(f"doc{i}", ((text, True),)) for i, text in enumerate(texts)]


def written(tmp_path, made, tokenizer, **options):
    folder = str(tmp_path / "cache" / "shards-x")
    token_shards.write(folder, made, tokenizer, token_shards.Options(**{"cut": 2**63, **options}), {"source": "here"})
    return token_shards.read(folder)


def test_every_document_is_stored_between_bos_and_eos(tmp_path, trained, texts):
    made = documents(texts)
    found, meta = written(tmp_path, made, trained)
    for split, wanted in (("train", [d for d in made if hash_position(d.name) > 2**63]),
                          ("validation", [d for d in made if hash_position(d.name) <= 2**63])):
        shard = found[split]
        assert len(wanted) == len(shard.bytes_N) == meta[split]["documents"] > 0
        for i, document in enumerate(wanted):
            ids = shard.tokens[shard.offsets_N[i]:shard.offsets_N[i + 1]].tolist()
            assert ids == [trained.bos, *trained.encode(document.parts[0][0]), trained.eos]
            assert shard.bytes_N[i] == document.bytes == trained.byte_lengths_W[ids].sum()
        assert meta[split]["tokens"] == len(shard.tokens)
        assert shard.predicted is None and shard.whole_N.all()
    assert meta["source"] == "here" and meta["dtype"] == "uint16"


def test_batches_of_tokenization_leave_no_seam(tmp_path, trained, texts, monkeypatch):
    whole, _ = written(tmp_path / "a", documents(texts), trained)
    monkeypatch.setattr(token_shards, "_BATCH_BYTES", 3000)
    batched, _ = written(tmp_path / "b", documents(texts), trained)
    assert (whole["train"].tokens == batched["train"].tokens).all()


def test_prompts_are_marked_with_bos_and_answers_with_eos(tmp_path, trained):
    made = [Document("a", (("1 + 1 =", False), (" 2", True))), Document("b", (("text", True),))]
    found, _ = written(tmp_path, made, trained, cut=None)
    shard = found["validation"]
    prompt, answer = len(trained.encode("1 + 1 =")), len(trained.encode(" 2"))
    first = [False] * (1 + prompt) + [True] * (answer + 1)
    assert shard.predicted[:len(first)].tolist() == first
    assert shard.predicted[len(first):].all()
    assert shard.whole_N.tolist() == [False, True]


def test_only_training_documents_are_split_and_each_by_its_name_and_seed(tmp_path, trained, texts):
    made = documents(texts)
    plain, _ = written(tmp_path / "plain", made, trained)
    half, _ = written(tmp_path / "half", made, trained, split_rate=0.5)
    fewer, _ = written(tmp_path / "fewer", made[5:], trained, split_rate=0.5)
    other, _ = written(tmp_path / "other", made, trained, split_rate=0.5, seed=1)
    assert (half["validation"].tokens == plain["validation"].tokens).all()
    assert len(half["train"].tokens) > len(plain["train"].tokens)
    tail = len(fewer["train"].tokens)
    assert (half["train"].tokens[-tail:] == fewer["train"].tokens).all()
    assert not np.array_equal(half["train"].tokens, other["train"].tokens)
    spell = lambda shard: trained.decode(shard.tokens, specials=True)
    assert spell(half["train"]) == spell(plain["train"]) == spell(other["train"])


def test_documents_of_the_same_text_are_split_in_different_places(tmp_path, trained, texts):
    found, _ = written(tmp_path, documents([texts[0]] * 9), trained, split_rate=0.5, cut=0)
    shard = found["train"]
    assert len({tuple(d) for d in np.split(shard.tokens, shard.offsets_N[1:-1])}) == 9


def test_splitting_a_prompt_leaves_the_answer_predicted(tmp_path, trained, texts):
    made = [Document("a", ((texts[0], False), (texts[1], True)))]
    found, _ = written(tmp_path, made, trained, split_rate=0.5, cut=0)
    shard = found["train"]
    assert trained.decode(shard.tokens[shard.predicted]) == texts[1]
    assert trained.decode(shard.tokens[~shard.predicted]) == texts[0]


def test_interrupted_writing_leaves_nothing_behind(tmp_path, trained, texts):
    def interrupted():
        yield from documents(texts)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, interrupted(), trained)
    assert os.listdir(tmp_path / "cache") == []


def test_a_folder_that_was_cut_off_is_not_read_and_does_not_disturb(tmp_path, trained, texts, monkeypatch):
    # A killed process cannot clean up.
    monkeypatch.setattr(io.shutil, "rmtree", lambda *a, **k: None)
    monkeypatch.setattr(io.os, "rename", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, documents(texts), trained)
    monkeypatch.undo()
    assert len(os.listdir(tmp_path / "cache")) == 1
    assert not os.path.exists(tmp_path / "cache" / "shards-x")
    found, _ = written(tmp_path, documents(texts), trained)
    assert len(found["train"].tokens) > 0


def test_the_slower_of_two_writers_gives_way(tmp_path, trained, texts):
    written(tmp_path, documents(texts), trained)
    written(tmp_path, documents(texts), trained)
    assert os.listdir(tmp_path / "cache") == ["shards-x"]


def test_what_is_there_is_not_made_again(make_config, folder, tmp_path, monkeypatch):
    config = make_config(folder)
    first = prepare(config, str(tmp_path / "work"))
    monkeypatch.setattr(token_shards, "write", None)
    again = prepare(config, str(tmp_path / "work"))
    assert again.sources == first.sources
    assert again.tokenizer.digest == first.tokenizer.digest
    assert first.sources[0]["files"] == 40


def test_the_seed_makes_new_shards_only_where_tokens_are_split(make_config, folder, tmp_path):
    def made(rate):
        cache = tmp_path / f"cache{rate}"
        for seed in (0, 1):
            prepare(make_config(folder, split_punctuation_rate=rate, seed=seed, cache_dir=str(cache)),
                    str(tmp_path / "work"))
        return len(list(cache.glob("shards-*")))
    assert (made(0.0), made(0.5)) == (1, 2)


def test_the_tokenizer_reads_training_documents_only(folder):
    source = Source(folder, 0.2)
    read = set(source.training_texts())
    wanted = {d.parts[0][0] for d in read_documents(source.files) if hash_position(d.name) > source.survey[1]}
    assert read == wanted and 20 < len(read) < 40


def test_a_changed_corpus_tokenizer_or_option_makes_new_shards(trained):
    key = lambda digest="a", tokenizer=trained, **options: token_shards.key(digest, tokenizer, **{"seed": 0, **options})
    other = type("Other", (), {"digest": "x"})
    assert key() == key()
    assert len({key(), key(digest="b"), key(tokenizer=other), key(seed=1)}) == 4


def test_a_changed_file_is_read_anew(make_config, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"document {i}\n" * 20)
    config = make_config(tmp_path)
    before = prepare(config, str(tmp_path / "work"))
    (tmp_path / "0.txt").write_text("changed\n" * 50)
    after = prepare(config, str(tmp_path / "work"))
    assert after.tokenizer.digest == before.tokenizer.digest  # that of the work directory stays
    assert after.sources[0]["bytes"] == before.sources[0]["bytes"] + 400 - len("document 0\n") * 20


def test_a_run_from_others_weights_takes_their_tokenizer(make_config, folder, tmp_path, trained):
    trained.save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "base" / "config.json").write_text("{}")
    config = dataclasses.replace(make_config(folder), init=InitConfig(str(tmp_path / "base")))
    assert prepare(config, str(tmp_path / "work")).tokenizer.digest == trained.digest
    assert (tmp_path / "work" / "tokenizer.json").exists()
    assert (tmp_path / "work" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "work" / "config.json").exists()


@pytest.mark.parametrize("text", ['{"a"', "[1]", "null"])
def test_a_broken_note_of_the_corpus_is_named(make_config, folder, tmp_path, text):
    (tmp_path / "corpus.json").write_text(text)
    with pytest.raises(ConfigError, match=r"corpus.json (is not JSON|holds no JSON object).*; restore it"):
        claim_corpus(prepare(make_config(folder), str(tmp_path)), str(tmp_path))


def test_an_evaluation_corpus_is_all_validation(make_config, folder, tmp_path):
    config = make_config(folder)
    prepare(config, str(tmp_path / "work"))
    made = prepare_evaluation(config, str(tmp_path / "work"), folder)
    assert made.train == ()
    assert len(made.validation[0].bytes_N) == made.sources[0]["documents"] == 40


def test_a_sample_is_about_its_share_and_the_same_again():
    texts = [f"{i} " * 4096 for i in range(200)]
    size = lambda share: sum(map(len, sample(texts, share)))
    assert size(1.0) == size(3.0) == sum(map(len, texts))
    assert 0.2 < size(0.25) / size(1.0) < 0.3
    assert list(sample(texts, 0.25)) == list(sample(texts, 0.25))


def test_a_run_does_not_go_on_in_another_corpus(make_config, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"text {i}, as it was when the run began\n" * 50)
    config, workdir = make_config(tmp_path), str(tmp_path)
    for _ in range(2):
        claim_corpus(prepare(config, workdir), workdir)
    (tmp_path / "2.txt").write_text("another text than before\n")

    with pytest.raises(ConfigError, match="have changed since the run"):
        claim_corpus(prepare(config, workdir), workdir)


def test_a_run_keeps_the_order_that_it_began_with(make_config, folder, tmp_path):
    """The record of an older version has no order; a run with a checkpoint and no record is even older."""
    config, new, old = make_config(folder), str(tmp_path / "new"), str(tmp_path / "old")
    made = prepare(config, new)
    claim_corpus(made, new)
    assert made.order == prepare(config, new, resumes=True).order == ORDER
    assert isinstance(Loader(config, made).streams[0], BlockStream)
    prepare(config, old)
    io.write_json(tmp_path / "old" / "corpus.json", {folder: made.sources[0]["digest"]})
    resumed = prepare(config, old, resumes=True)
    claim_corpus(resumed, old)
    assert resumed.order == prepare(config, old).order == OLD_ORDER
    assert isinstance(Loader(config, resumed).streams[0], Stream)
    (tmp_path / "older" / "checkpoints" / "2").mkdir(parents=True)
    assert prepare(config, str(tmp_path / "older")).order == OLD_ORDER


def test_a_branch_has_the_order_of_its_run_and_its_files(make_config, tmp_path):
    corpus, run, branch = tmp_path / "corpus", tmp_path / "run", str(tmp_path / "branch")
    corpus.mkdir()
    for i in range(4):
        (corpus / f"{i}.txt").write_text(f"text {i}, as it was when the run began\n" * 50)
    config = make_config(corpus)
    digest = prepare(config, str(run)).sources[0]["digest"]
    io.write_json(run / "corpus.json", {str(corpus): digest})  # of an older version
    (run / "checkpoints" / "2").mkdir(parents=True)
    branching = dataclasses.replace(config, init=InitConfig(f"{run}@2"))

    made = prepare(branching, branch, resumes=True)
    claim_corpus(made, branch)
    assert made.order == OLD_ORDER and isinstance(Loader(branching, made).streams[0], Stream)
    (tmp_path / "branch" / "checkpoints" / "4").mkdir(parents=True)
    assert prepare(branching, branch, resumes=True).order == OLD_ORDER
    assert prepare(config, str(tmp_path / "other")).order == ORDER

    (corpus / "2.txt").write_text("another text than before\n")
    with pytest.raises(ConfigError, match=r"corpus have changed since the run in \S+run began; restore them, or take "
                                          r"--config\.init\.from=\S+run for its weights alone"):
        prepare(branching, str(tmp_path / "second"), resumes=True)


def test_shards_of_an_older_version_have_their_index_made_when_they_are_read(tmp_path, trained):
    made = [Document("a", (("1 + 1 =", False), (" 2", True))), Document("b", (("text", True),))]
    found, _ = written(tmp_path, made, trained, cut=None)
    for name in ("offsets", "whole"):
        (tmp_path / "cache" / "shards-x" / "validation" / f"{name}.npy").unlink()
    old = token_shards.read(str(tmp_path / "cache" / "shards-x"))[0]["validation"]
    new = found["validation"]
    assert old.offsets_N.tolist() == new.offsets_N.tolist()
    assert old.whole_before_N.tolist() == new.whole_before_N.tolist() == [0, 0, 1]


def test_an_array_of_many_parts_keeps_few_of_them_open():
    asked = []
    joined = token_shards.Joined([3] * 200, lambda i: asked.append(i) or np.full(3, i))
    assert [joined[3 * i:3 * i + 1].tolist() for i in range(200)] == [[i] for i in range(200)]
    joined[599:600], joined[0:1]
    assert len(asked) == 201 and token_shards.OPENED < 200  # the last is still there, the first was deleted
