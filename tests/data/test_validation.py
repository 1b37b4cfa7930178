"""Validation scores every token once, and counts exactly the bytes of the scored text."""

import dataclasses
import json

import numpy as np
import pytest

from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.data.ahead import prepare_ahead
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.overview import describe_sources
from deepseek_jax.data.prepare import claim_corpus, prepare
from deepseek_jax.data.token_shards import Shard, bounded
from tests.data.conftest import make_text


def stack(loader, rows, limit=0):
    batches = list(loader.validation_batches(rows, limit))
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def natural(loader):
    return np.concatenate([s.tokens for s in loader.validation.shards])


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_validation_token_is_predicted_once(make_loader, folder, rows):
    loader = make_loader(folder)
    got = stack(loader, rows)
    scored = got["tokens"][got["weights"] > 0]
    np.testing.assert_array_equal(scored, natural(loader)[1:])
    assert len(got["tokens"]) % rows == 0


def test_each_target_follows_what_comes_before_it(make_loader, folder):
    loader = make_loader(folder)
    got, wanted = stack(loader, 4), natural(loader)
    inputs = got["tokens"][:, :-1][got["weights"][:, 1:] > 0]
    np.testing.assert_array_equal(inputs, wanted[:-1])


def test_validation_has_neither_fim_nor_splitting(make_loader, folder):
    loader = make_loader(folder, fim_rate=1.0, split_punctuation_rate=1.0)
    tokens = natural(loader)
    assert not np.isin(tokens, (3, 4, 5)).any()
    assert (loader.tokenizer.splits[0][tokens] > 0).any()
    assert not (loader.tokenizer.splits[0][loader.streams[0].shard.tokens] > 0).any()


def test_training_and_validation_share_no_document(make_loader, folder):
    loader = make_loader(folder)
    spell = lambda shard: set(loader.tokenizer.decode(shard.tokens, specials=True).split("<|bos|>")[1:])
    train, validation = spell(loader.streams[0].shard), spell(loader.validation.shards[0])
    assert len(train) + len(validation) == 40 and not train & validation and len(validation) > 2


def test_padding_has_no_segment_and_documents_count_from_one(make_loader, folder):
    loader = make_loader(folder)
    got = stack(loader, 7)
    real = np.arange(got["tokens"].size).reshape(got["tokens"].shape)
    real = (real // 65) * 64 + real % 65 < len(natural(loader))
    assert ((got["segment_ids"] > 0) == real).all() and not real.all()
    starts = (got["tokens"] == 0) & real
    starts[:, 0] = real[:, 0]
    np.testing.assert_array_equal(got["segment_ids"], np.cumsum(starts, axis=1) * real)


def test_the_bytes_are_those_of_the_documents(make_loader, folder):
    loader = make_loader(folder)
    assert loader.validation_bytes(4) == sum(int(s.bytes_N.sum()) for s in loader.validation.shards) > 1000


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_counts_the_bytes_of_what_it_scores(make_loader, folder, limit):
    loader = make_loader(folder)
    got = stack(loader, 2, limit)
    assert len(got["tokens"]) == 2 * limit
    spelled = loader.tokenizer.decode(got["tokens"][got["weights"] > 0])
    assert loader.validation_bytes(2, limit) == len(spelled.encode())


def test_only_answers_are_scored_and_only_their_bytes_count(make_loader, tmp_path):
    rows = [{"prompt": f"question {i}?", "answer": f" é{i}."} for i in range(99)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loader = make_loader(tmp_path / "rows.jsonl")
    got = stack(loader, 3)
    spelled = loader.tokenizer.decode(got["tokens"][got["weights"] > 0])
    assert "question" not in spelled and spelled.count("é") == len(loader.validation.shards[0].bytes_N)
    assert loader.validation_bytes(3) == len(spelled.encode())


def test_hosts_share_validation_and_agree_on_its_bytes(make_loader, folder):
    whole = make_loader(folder)
    parts = [make_loader(folder, host=h, hosts=2) for h in range(2)]
    batches = [list(p.validation_batches(2, limit=2)) for p in parts]
    for i, batch in enumerate(whole.validation_batches(4, limit=2)):
        np.testing.assert_array_equal(np.concatenate([b[i]["tokens"] for b in batches]), batch["tokens"])
    assert {p.validation_bytes(2, limit=2) for p in parts} == {whole.validation_bytes(4, limit=2)}


def test_several_sources_make_one_stream(make_loader, folder, tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.md").write_text(f"another source, document {i}\n" * 30)
    loader = make_loader(folder, tmp_path)
    assert len(loader.validation.shards) == 2
    got = stack(loader, 2)
    np.testing.assert_array_equal(got["tokens"][got["weights"] > 0], natural(loader)[1:])
    crossing = len(loader.validation.shards[0].tokens) // 64
    starts = (got["tokens"][crossing] == 0).cumsum() + (got["tokens"][crossing, 0] != 0)
    np.testing.assert_array_equal(got["segment_ids"][crossing], starts)


def test_the_targets_of_each_source_are_told_apart(make_loader, folder, tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.md").write_text(f"another source, document {i}\n" * 30)
    loader = make_loader(folder, tmp_path)
    scored = {source: [] for source in loader.sources}
    several = 0
    for number, batch in enumerate(loader.validation_batches(2)):
        parts = loader.weights_by_source(number, 2, batch["weights"])
        several += len(parts) > 1
        np.testing.assert_array_equal(sum(parts.values()), batch["weights"])
        for source, weights_BT in parts.items():
            scored[source] += batch["tokens"][weights_BT > 0].tolist()

    first, second = (shard.tokens.tolist() for shard in loader.validation.shards)
    assert scored == dict(zip(loader.sources, (first[1:], second))) and several == 1
    assert make_loader(folder).weights_by_source(0, 2, batch["weights"]) == {}


def test_a_limit_leaves_no_source_out(make_loader, folder, tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.md").write_text(f"another source, document {i}\n" * 30)
    validation = make_loader(folder, tmp_path).validation
    small, large = sorted(validation.shards, key=lambda shard: len(shard.tokens))
    assert len(small.tokens) < len(large.tokens) / 3
    for limit in (1, 2, 3):
        chosen = validation.batch_numbers(2, limit)
        assert {s for i in chosen for s in validation.sources_of(i, 2)} == {0, 1}
        assert limit <= len(chosen) <= limit + 1 and chosen == sorted(set(chosen))


def test_a_limit_spreads_what_it_scores_over_the_whole_set(make_loader, folder):
    loader = make_loader(folder)
    whole, some = list(loader.validation_batches(1)), list(loader.validation_batches(1, limit=3))
    n = len(whole)
    for got, expected in zip(some, (whole[0], whole[n // 3], whole[2 * n // 3])):
        np.testing.assert_array_equal(got["tokens"], expected["tokens"])


def test_held_out_text_of_its_own_leaves_all_of_the_sources_to_train_on(own, tmp_path):
    made = prepare(own, str(tmp_path / "work"))
    assert [len(shard.bytes_N) for shard in made.train] == [40, 3]
    assert [len(shard.bytes_N) for shard in made.validation] == [3]
    spelled = made.tokenizer.decode(made.validation[0].tokens)
    assert spelled.count("held\n") == 3 and "other\n" not in spelled
    loader = Loader(own, made)
    batch = next(loader.validation_batches(4))
    assert loader.weights_by_source(0, 4, batch["weights"]) == {}
    *_, last = describe_sources(own, made).splitlines()
    tokens = f"{len(made.validation[0].tokens):,}"
    assert last.split() == [own.data.validation, "3", "0.0", "0", tokens]
    claim_corpus(made, str(tmp_path / "work"))
    (tmp_path / "held" / "0.txt").write_text("changed")
    with pytest.raises(ConfigError, match="the files of .*held have changed since"):
        prepare(own, str(tmp_path / "work"), resumes=True)


def test_held_out_text_of_its_own_is_prepared_ahead(own, tmp_path):
    made = prepare_ahead(own, str(tmp_path / "ahead"))
    assert [m.path for m in made] == [*(path for path, _ in own.data.sources), own.data.validation]
    ahead, alone = (prepare(own, str(tmp_path / name)) for name in ("ahead", "alone"))
    assert ahead.tokenizer.digest == alone.tokenizer.digest
    assert (ahead.validation[0].tokens[:] == alone.validation[0].tokens[:]).all()


@pytest.mark.parametrize("keys, complaint", [
    (["data.sources=(('a', 1.0),)", "data.validation=a"], "is one of data.sources too"),
    (["data.validation=a", "preference.objective=dpo"], "pairs are held out by"),
    (["data.validation=ftp://a"], "is an address")])
def test_validation_that_is_none_is_one_line(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_config("tiny", [f"--config.{key}" for key in keys])


def documents(shards):
    return {bytes(s.tokens[a:b].astype("<i4").data) for s in shards for a, b in zip(s.offsets_N, s.offsets_N[1:])}


def write_rows(path, count=300):
    path.write_text("".join(json.dumps({"text": f"{i}\n" + make_text(i, lines=4)}) + "\n" for i in range(count)))
    return str(path)


def test_a_budget_of_tokens_holds_out_no_more_and_trains_on_the_rest(make_config, trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    own = {"split_punctuation_rate": 0.0, "tokenizer": str(tmp_path / "tokenizer.json")}
    rows = write_rows(tmp_path / "rows.jsonl")
    config, free = make_config(rows, validation_tokens=700, **own), make_config(rows, **own)
    made, all_held = (prepare(c, str(tmp_path / name)) for c, name in ((config, "a"), (free, "b")))
    assert len(made.validation[0].tokens) == 700 < len(all_held.validation[0].tokens)
    assert len(made.train[0].bytes_N) > len(all_held.train[0].bytes_N)
    assert documents(made.train) > documents(all_held.train)
    assert not documents(made.train) & documents(made.validation)
    assert len(documents(made.validation) & documents(all_held.validation)) >= len(made.validation[0].bytes_N) - 1
    scored = Loader(config, made).validation
    assert sum(row[1].sum() for row in map(scored.row, range(scored.rows))) == 699


def test_a_budget_is_shared_by_the_sources_and_made_alike_ahead(make_config, tmp_path):
    rows = [write_rows(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    config = make_config(*rows, validation_tokens=900)
    ahead = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(tmp_path / "ahead")))
    prepare_ahead(ahead, str(tmp_path / "b"), workers=1)
    made, made_ahead = prepare(config, str(tmp_path / "a")), prepare(ahead, str(tmp_path / "b"))
    assert [len(s.tokens) for s in made.validation] == [450, 450]
    assert documents(made.train) == documents(made_ahead.train)
    assert documents(made.validation) == documents(made_ahead.validation)
    assert made.tokenizer.digest == made_ahead.tokenizer.digest


def test_a_source_that_is_added_later_moves_no_held_out_document_into_training(make_config, trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    fields = {"validation_tokens": 2000, "cache_dir": str(tmp_path / "cache"), "split_punctuation_rate": 0.0,
              "tokenizer": str(tmp_path / "tokenizer.json")}
    rows = [write_rows(tmp_path / name, 2000) for name in ("a.jsonl", "b.jsonl")]
    alone, both = (make_config(*some, **fields) for some in (rows[:1], rows))
    made = prepare(alone, workdir := str(tmp_path / "work"))
    claim_corpus(made, workdir)
    prepare_ahead(both, workdir)
    later = prepare(both, workdir, resumes=True)
    assert documents(later.train[:1]) == documents(made.train)
    assert later.sources[0]["validation"]["documents"] == made.sources[0]["validation"]["documents"]
    assert sum(len(s.tokens) for s in later.validation) <= 2000
    claim_corpus(later, workdir)
    assert documents(prepare(both, workdir, resumes=True).train) == documents(later.train)
    other = prepare(both, str(tmp_path / "other"))
    assert documents(other.train[:1]) > documents(made.train)  # what a run of both sources holds out from its start
    note = json.loads((tmp_path / "work" / "corpus.json").read_text())
    (tmp_path / "work" / "corpus.json").write_text(json.dumps({k: note[k] for k in ("order", "sources")} | {
        "sources": {rows[0]: note["sources"][rows[0]]}}))  # of an older version
    assert documents(prepare(both, workdir, resumes=True).train[:1]) == documents(made.train)


def test_a_budget_bounds_held_out_text_of_its_own_and_tokenizes_no_more(own, tmp_path):
    for i in range(40):
        (tmp_path / "held" / f"more{i}.txt").write_text(f"held\n{i}\n" + "value\n" * 60)
    data = dataclasses.replace(own.data, validation_tokens=200, cache_dir=str(tmp_path / "cache"))
    config = dataclasses.replace(own, data=data)
    made = prepare(config, str(tmp_path / "work"))
    assert [len(s.tokens) for s in made.validation] == [200]
    assert made.sources[-1]["documents"] == 43 and made.sources[-1]["train"]["tokens"] == 0
    assert 200 <= made.sources[-1]["validation"]["tokens"] < 2000
    assert len(made.train[0].tokens) == len(prepare(own, str(tmp_path / "free")).train[0].tokens)


def test_one_document_of_held_out_text_is_scored_up_to_the_budget(own, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "value " * 500}) + "\n")
    data = dataclasses.replace(own.data, validation=str(tmp_path / "one.jsonl"), validation_tokens=30)
    made = prepare(dataclasses.replace(own, data=data), str(tmp_path / "work"))
    assert len(made.validation[0].tokens) == 30 and made.validation[0].tokens[:1] == [made.tokenizer.bos]


def test_what_is_drawn_of_a_shard_comes_from_all_of_it_and_is_read_when_it_is_asked_for():
    offsets_N = np.arange(0, 50_001, 50)
    tokens, predicted = np.arange(50_000, dtype=np.uint16), np.arange(50_000) % 3 > 0
    whole_N = np.arange(1001) // 2
    shard = Shard(tokens, offsets_N, np.full(1000, 200), predicted, whole_N)
    drawn = bounded(shard, 2020)
    starts = drawn.tokens[:][drawn.offsets_N[:-1]]
    assert len(drawn.tokens) == 2020 == drawn.offsets_N[-1] and len(starts) == 41 == len(drawn.bytes_N)
    assert not (starts % 50).any() and (np.diff(starts.astype(int)) > 0).all()
    assert starts[0] < 5000 < 45_000 < starts[-1]
    assert np.array_equal(drawn.is_predicted(0, 2020), predicted[drawn.tokens[:]])
    assert np.array_equal(np.diff(drawn.whole_before_N), np.diff(whole_N)[starts // 50])
    assert bounded(shard, 50_000) is shard
