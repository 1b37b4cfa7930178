"""Preference pairs: the tokens of a row, the rows that are refused, and the pairs of each step."""

import json

import numpy as np
import pytest

from deepseek_jax.chat.messages import PLAIN, Conventions, chat_ids
from deepseek_jax.chat.template import read
from deepseek_jax.config import ConfigError
from deepseek_jax.config.training import DataConfig
from deepseek_jax.data.position import beginning
from deepseek_jax.data.prepare import Source
from deepseek_jax.posttraining.pairs import PairLoader, hold, read_pairs
from tests.chat.test_template import published
from tests.posttraining import policies

ASK, TWO, THREE = ({"role": role, "content": text} for role, text in
                   (("user", "1 + 1?"), ("assistant", "2"), ("assistant", "3, no?")))
TEXT = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
LENGTH = 24


def written(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return Source(str(path), 0.5)


def many(path, count=12):
    return written(path, *({"prompt": f"say {i} ", "chosen": "a" * (1 + i % 3), "rejected": f"{i}"}
                           for i in range(count)))


def loader_of(source, host=0, hosts=1, **train):
    config = policies.config_of(**train)
    object.__setattr__(config, "data", DataConfig(sources=((source.path, 1.0),)))
    return PairLoader(config, [hold(source, policies.tokenizer(), lambda: PLAIN, LENGTH)], policies.tokenizer(), host,
                      hosts)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}, ASK, THREE]])
def test_an_answer_begins_where_the_prompt_that_serving_makes_ends(tmp_path, system):
    tokenizer = published()
    row = {"prompt": [*system, ASK], "chosen": [TWO], "rejected": [THREE]}
    (pair,) = read_pairs(written(tmp_path / "a.jsonl", row), tokenizer, lambda: PLAIN)
    prompt = chat_ids(row["prompt"], tokenizer, None)
    for turn, answer in ((pair.chosen, TWO), (pair.rejected, THREE)):
        assert turn.ids[:turn.start] == prompt
        assert tokenizer.decode(turn.ids[turn.start:turn.stop], specials=True) == answer["content"] + "<|eos|>"


def test_strings_are_plain_text_that_begins_as_the_checkpoint_says(tmp_path):
    tokenizer, source = policies.tokenizer(), written(tmp_path / "a.jsonl", TEXT)
    for begins in (True, False):
        (pair,) = read_pairs(source, tokenizer, lambda begins=begins: Conventions(begins=begins))
        prompt = [tokenizer.bos] * begins + tokenizer.encode("1 + 1 =")
        assert pair.rejected == ([*prompt, *tokenizer.encode(" 3"), tokenizer.eos], len(prompt),
                                 len(pair.rejected.ids))


@pytest.mark.parametrize(("row", "said"), [
    ("{", "Expecting property name"), ([], "neither|prompt and chosen are not two lists"),
    (TEXT | {"rejected": None}, "prompt and rejected are not two lists of messages, nor two strings"),
    (TEXT | {"prompt": [ASK]}, "prompt and chosen are not two lists"),
    ({"prompt": [ASK], "chosen": [TWO, ASK], "rejected": [TWO]}, "chosen is not one message of the role assistant"),
    ({"prompt": [ASK], "chosen": [TWO], "rejected": [ASK]}, "rejected is not one message of the role assistant"),
    ({"prompt": [{"role": "king"}], "chosen": [TWO], "rejected": [TWO]}, r"messages\[0\] needs a role"),
    (TEXT | {"chosen": "\ud800"}, "half a character"),
])
def test_a_row_that_is_no_pair_is_one_line_with_file_and_line(tmp_path, row, said):
    source = written(tmp_path / "a.jsonl", TEXT, "\n", row)
    with pytest.raises(ConfigError, match=rf"a\.jsonl, line 3: .*({said}).*a pair is an object with prompt"):
        list(read_pairs(source, published(), lambda: PLAIN))


def test_what_is_no_file_of_pairs_is_refused_and_so_are_messages_without_a_template(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"a\.txt is no file of pairs; give \.jsonl files"):
        list(read_pairs(Source(str(tmp_path / "a.txt"), 0.5), policies.tokenizer(), lambda: PLAIN))
    source = written(tmp_path / "a.jsonl", {"prompt": [ASK], "chosen": [TWO], "rejected": [THREE]})
    with pytest.raises(ConfigError, match="conversations need a chat template"):
        list(read_pairs(source, policies.tokenizer(), lambda: PLAIN))


def test_a_batch_has_each_pair_in_two_rows_and_counts_the_answers_alone(tmp_path):
    loader = loader_of(many(tmp_path / "a.jsonl"), batch_size=8, accumulation_steps=2)
    batch = loader.batch(0)
    assert batch["tokens"].shape == batch["weights"].shape == (2, 4, LENGTH + 1) and batch["active"] == 2
    pairs = [loader.pair(g) for g in range(4)]
    for row, pair in enumerate(pairs):
        for side, turn in enumerate((pair.chosen, pair.rejected)):
            tokens, weights = (batch[name][row // 2, row % 2 * 2 + side] for name in ("tokens", "weights"))
            np.testing.assert_array_equal(tokens[:len(turn.ids)], turn.ids)
            np.testing.assert_array_equal(np.flatnonzero(weights), np.arange(turn.start, len(turn.ids)))


def test_every_epoch_has_each_pair_once_in_another_order_and_no_held_out_one(tmp_path):
    loader = loader_of(many(tmp_path / "a.jsonl"))
    held = loader.sources[0]
    count = len(held.train)
    epochs = [[loader.pair(e * count + i).name for i in range(count)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(pair.name for pair in held.train)
    assert epochs[0] != epochs[1] and count + len(held.validation) == 12
    assert not set(epochs[0]) & {pair.name for pair in held.validation}


def test_two_hosts_share_what_one_reads(tmp_path):
    source = many(tmp_path / "a.jsonl")
    whole, parts = loader_of(source), [loader_of(source, host, 2) for host in range(2)]
    for step in (0, 3):
        both = np.concatenate([part.batch(step)["tokens"] for part in parts], axis=1)
        np.testing.assert_array_equal(both, whole.batch(step)["tokens"])
    joined = [np.concatenate(x) for x in zip(*([b["tokens"] for b in part.validation_batches()] for part in parts))]
    np.testing.assert_array_equal(joined, [b["tokens"] for b in whole.validation_batches()])
    with pytest.raises(ConfigError, match="make it a multiple of 4"):
        loader_of(source, 0, 2, batch_size=4, accumulation_steps=2)


def test_held_out_pairs_come_once_and_the_last_batch_is_filled_with_nothing(tmp_path):
    loader = loader_of(many(tmp_path / "a.jsonl", 13), batch_size=8, accumulation_steps=1)
    batches = list(loader.validation_batches())
    count = len(loader.sources[0].validation)
    assert sum((batch["weights"].sum(axis=1) > 0).sum() for batch in batches) == 2 * count
    assert len(batches) == -(-count // 4) and len(list(loader.validation_batches(1))) == 1


def test_a_pair_that_is_too_long_on_either_side_is_left_out_and_counted(tmp_path):
    long = {"prompt": "say", "chosen": "a", "rejected": "0 1 2 3 4 5 6 7 8 9" * 3}
    held = hold(written(tmp_path / "a.jsonl", *[TEXT | {"prompt": f"{i}"} for i in range(4)], long),
                policies.tokenizer(), lambda: PLAIN, LENGTH)
    assert held.left_out == 1 and len(held.train) + len(held.validation) == 4
    with pytest.raises(ConfigError, match=r"has no pair of at most 24 tokens; raise train\.sequence_length"):
        hold(written(tmp_path / "b.jsonl", long), policies.tokenizer(), lambda: PLAIN, LENGTH)


def test_answers_that_the_template_opens_unlike_are_refused(tmp_path):
    template = ("{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' and thinking %}<think>"
                "{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}"
                "{% if m['role'] == 'assistant' %}<|eos|>{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}[assistant]{% if thinking %}<think>{% endif %}"
                "{% endif %}")
    (tmp_path / "chat_template.jinja").write_text(template)
    text = Conventions(read(str(tmp_path), "<|bos|>", "<|eos|>"))
    thought = TWO | {"reasoning_content": "1 and 1"}
    row = {"prompt": [ASK], "chosen": [thought], "rejected": [THREE | {"reasoning_content": "no"}]}
    (pair,) = read_pairs(written(tmp_path / "a.jsonl", row), published(), lambda: text)
    assert pair.chosen.ids[:pair.chosen.start] == pair.rejected.ids[:pair.rejected.start]
    with pytest.raises(ConfigError, match=r"line 1: .* only one has reasoning_content; give it to both, or to"):
        list(read_pairs(written(tmp_path / "b.jsonl", row | {"rejected": [THREE]}), published(), lambda: text))


def test_a_run_with_a_ramp_that_is_made_longer_gives_the_pairs_that_follow(tmp_path):
    source = many(tmp_path / "a.jsonl", 60)
    ramp = dict(batch_size=8, accumulation_steps=2, ramp_from=4, ramp_until=0.5)
    before, after = (loader_of(source, steps=steps, **ramp) for steps in (4, 12))
    assert after.batch(4)["active"] == 1 and before.batch(3)["active"] == 2
    after.continue_at(beginning(before.config).after(before.config, after.config, 4))
    given = []
    for loader, steps in ((before, range(4)), (after, range(4, 7))):
        for batch in map(loader.batch, steps):
            given += [row.tobytes() for micro in batch["tokens"][:batch["active"]] for row in micro[::2]]
    pairs = [before.pair(g) for g in range(len(given))]
    filled = [np.resize(np.asarray(pair.chosen.ids, np.int32), LENGTH + 1).tobytes() for pair in pairs]
    assert given == filled and len(given) == 2 + 2 + 4 + 4 + 2 + 2 + 4
