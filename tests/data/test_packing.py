"""Sequences of complete documents: none is cut, lost, or seen twice in an epoch."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.config import ConfigError
from deepseek_jax.config.training import InitConfig
from deepseek_jax.data.packing import WholeDocuments, pack
from deepseek_jax.data.prepare import find_tokenizer, prepare
from deepseek_jax.data.token_shards import Shard
from deepseek_jax.data.tokenizer import train_tokenizer

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
            "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")


def shard_of(lengths):
    offsets_N = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)]).astype(np.uint16)
    predicted = np.arange(len(tokens)) % 2 == 0
    return Shard(tokens, offsets_N, np.array(lengths, np.int64), predicted)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 40))
def test_each_document_that_fits_is_in_one_row_and_no_row_is_too_full(lengths, room):
    rows = pack(np.array(lengths, np.int64), room)
    assert sorted(i for row in rows for i in row) == [i for i, n in enumerate(lengths) if n <= room]
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < total <= room for total in sums)
    # Two rows that are both at most half full would have been joined.
    assert sum(2 * total <= room for total in sums) <= 1


def test_the_fullest_row_that_has_room_is_taken():
    assert sorted(map(sorted, pack(np.array([6, 5, 4, 3, 2]), 10))) == [[0, 2], [1, 3, 4]]


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    source = WholeDocuments(shard_of([5, 9, 3, 7, 2, 8, 6, 4] * 4), seed=3, source=0, length=9)
    epochs = [[source.sequence(e * len(source.rows) + j).tokens_T.tobytes() for j in range(len(source.rows))]
              for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(source.row(r).tokens_T.tobytes()
                                                            for r in range(len(source.rows)))
    assert epochs[0] != epochs[1]


def test_a_row_is_its_documents_then_filling_without_loss_or_segment():
    source = WholeDocuments(shard_of([3, 2]), seed=0, source=0, length=7)
    row = source.row(0)
    np.testing.assert_array_equal(row.tokens_T, [1, 1, 1, 2, 2, 1, 1, 1])
    np.testing.assert_array_equal(row.segments_T, [1, 1, 1, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(row.predicted_T, [1, 0, 1, 0, 1, 0, 0, 0])


def chats(path, count=30, answer=lambda i: f"it is {i}"):
    rows = [{"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": answer(i)}]}
            for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chat_loader(make_loader, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "chat_template.jinja").write_text(TEMPLATE)
    options = dict(packing="whole", mask_documents=True, fim_rate=0.0, split_punctuation_rate=0.0)
    return lambda *paths, **more: make_loader(*paths, **options | more)


def test_the_loss_of_chats_is_on_answers_and_their_ends_alone(chat_loader, tmp_path):
    loader = chat_loader(chats(tmp_path / "rows.jsonl"))
    batch = loader.batch(0)
    tokens_T, weights_T = batch["tokens"][0, 0], batch["weights"][0, 0] > 0
    texts = loader.tokenizer.decode(tokens_T[weights_T].tolist(), specials=True).split("<|eos|>")
    assert all(text.strip().startswith("it is ") for text in texts[:-1]) and texts[-1] == ""
    for segment in set(batch["segment_ids"][0, 0]) - {0}:
        whole = loader.tokenizer.decode(tokens_T[batch["segment_ids"][0, 0] == segment].tolist(), specials=True)
        assert whole.startswith("<|bos|>user: what is ") and whole.endswith("<|eos|>\n")


def test_held_out_chats_are_scored_once_and_whole(chat_loader, tmp_path):
    loader = chat_loader(chats(tmp_path / "rows.jsonl"), batch_size=2)
    scored, size = [], 0
    for batch in loader.validation_batches(2):
        same_BT = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
        hits_BT = (batch["weights"][:, 1:] > 0) & same_BT
        size += int(loader.tokenizer.byte_lengths_W[batch["tokens"][:, 1:][hits_BT]].sum())
        scored += [loader.tokenizer.decode(t[1:][h].tolist(), specials=True)
                   for t, h in zip(batch["tokens"], hits_BT)]
    answers = [a for a in "".join(scored).split("<|eos|>") if a]
    held_out = [f"it is {i}" for i in range(30)]
    assert answers and len(set(answers)) == len(answers) and {a.strip() for a in answers} <= set(held_out)
    assert size == loader.validation_bytes(2)


def test_of_two_sources_each_is_scored_apart(chat_loader, tmp_path):
    loader = chat_loader((str(chats(tmp_path / "a.jsonl")), 1.0), (str(chats(tmp_path / "b.jsonl", 20)), 1.0),
                         batch_size=2)
    total = 0.0
    for i, batch in zip(loader.validation.batch_numbers(2), loader.validation_batches(2)):
        parts = loader.weights_by_source(i, 2, batch["weights"])
        np.testing.assert_array_equal(sum(parts.values()), batch["weights"])
        total += batch["weights"].sum()
    assert total > 0 and loader.sources == ["a.jsonl", "b.jsonl"]


def test_what_no_template_can_take_is_named_skipped_and_counted(chat_loader, tmp_path, caplog):
    path = chats(tmp_path / "rows.jsonl")
    bad = [{"messages": []}, {"messages": [{"role": "user", "content": "alone"}]}, {"messages": "text"},
           {"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]},
           {"messages": [{"role": "assistant", "content": "first"}]}]
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in bad))
    chat_loader(path)
    said = "\n".join(caplog.messages)
    for line in ("rows.jsonl#30: messages must be a list", "rows.jsonl#31: messages have no answer",
                 "rows.jsonl#32: messages must be a list", "rows.jsonl#33: messages[0] needs a role",
                 "rows.jsonl#34: messages[0] answers nothing"):
        assert line in said


def test_chats_without_a_template_are_an_error_that_says_where_it_belongs(make_loader, tmp_path):
    with pytest.raises(ConfigError, match="put a chat_template.jinja next to the tokenizer.json"):
        make_loader(chats(tmp_path / "rows.jsonl"))


def test_documents_longer_than_a_sequence_are_an_error_if_there_are_no_others(chat_loader, tmp_path):
    path = chats(tmp_path / "rows.jsonl", answer=lambda i: "very long " * 200)
    with pytest.raises(ConfigError, match="no held-out document has at most train.sequence_length=64 tokens"):
        chat_loader(path)
    mixed = chats(tmp_path / "mixed.jsonl")
    with pytest.raises(ConfigError, match="rows.jsonl has no training document of at most train.sequence_length=64"):
        chat_loader(mixed, path)


def test_texts_are_read_without_a_look_at_the_chat_template(make_loader, tmp_path, folder):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "chat_template.jinja").write_text("{% damaged")
    assert make_loader(folder).batch(0)["tokens"].any()
    with pytest.raises(ConfigError, match="is damaged"):
        make_loader(chats(tmp_path / "rows.jsonl"))


def test_a_template_that_was_missing_is_taken_when_it_is_there(make_config, trained, tmp_path):
    base, work = tmp_path / "base", tmp_path / "work"
    trained.save(str(base / "tokenizer.json"))
    config = dataclasses.replace(make_config(chats(tmp_path / "rows.jsonl")), init=InitConfig(str(base)))
    with pytest.raises(ConfigError, match="put a chat_template.jinja next to"):
        prepare(config, str(work))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    assert prepare(config, str(work)).train[0].predicted is not None


def test_a_run_that_has_begun_keeps_its_tokenizer(make_config, trained, tmp_path):
    base, work = tmp_path / "base", tmp_path / "work"
    trained.save(str(base / "tokenizer.json"))
    config = dataclasses.replace(make_config(chats(tmp_path / "rows.jsonl")), init=InitConfig(str(base)))
    first = find_tokenizer(config, str(work), [])
    train_tokenizer(["other text"] * 3, 300).save(str(base / "tokenizer.json"))
    assert find_tokenizer(config, str(work), []).digest != first.digest  # nothing was learned with the first
    (work / "checkpoints" / "5").mkdir(parents=True)
    kept = find_tokenizer(config, str(work), []).digest
    trained.save(str(base / "tokenizer.json"))
    assert find_tokenizer(config, str(work), []).digest == kept != first.digest


def test_a_row_with_a_text_is_that_text_whatever_else_it_has(make_loader, tmp_path):
    rows = [{"text": f"text {i} " * 40, "messages": [{"role": "user", "tool_calls": i}]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = make_loader(tmp_path / "rows.jsonl", fim_rate=0.0)
    assert "text" in loader.tokenizer.decode(loader.batch(0)["tokens"][0, 0].tolist())
