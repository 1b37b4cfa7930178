"""The place of a run in its sources when it changes on the way: nothing is read twice, and nothing is passed over."""

import collections
import dataclasses
import json

import pytest

from deepseek_jax.config import Config, DataConfig, TrainConfig
from deepseek_jax.data.position import beginning, position_of
from tests.model import naive


def config_of(*sources, batch=4, **train):
    return Config(model=naive.tiny(), data=DataConfig(sources=sources), train=TrainConfig(batch_size=batch, **train))


def read(position, config, first, last):
    """[(path, number of the sequence in it)] of the steps first ... last - 1."""
    mixture, paths = position.mixture(config), [path for path, _ in config.data.sources]
    located = [mixture.locate(g) for g in range(position.sequences_before(config, first),
                                                position.sequences_before(config, last))]
    return [(paths[source], j) for source, j in located]


BEFORE = config_of(("a", 3.0), ("b", 1.0), batch=7)
CHANGES = {"other_weights": config_of(("a", 1.0), ("b", 5.0), batch=7),
           "one_more": config_of(("a", 3.0), ("b", 1.0), ("c", 2.0), batch=7),
           "one_less": config_of(("b", 1.0), batch=7),
           "another_order": config_of(("b", 1.0), ("a", 3.0), batch=7),
           "a_larger_batch": config_of(("a", 3.0), ("b", 1.0), batch=12)}


@pytest.mark.parametrize("after", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("step", [5, 400])
def test_each_source_goes_on_where_it_was(after, step):
    start = beginning(BEFORE)
    changed = start.after(BEFORE, after, step)
    seen = read(start, BEFORE, 0, step) + read(changed, after, step, step + 700)

    assert len(seen) == 7 * step + after.train.batch_size * 700
    for path in {path for path, _ in seen}:
        numbers = sorted(j for p, j in seen if p == path)
        assert numbers[:200] == list(range(len(numbers)))[:200]
        assert len(set(numbers)) == len(numbers) and numbers[-1] < len(numbers) + 1024  # a block's pattern is shuffled


def test_a_new_mixture_has_its_shares_from_the_change_on():
    after = config_of(("a", 1.0), ("b", 3.0), batch=8)
    counts = collections.Counter(path for path, _ in read(beginning(BEFORE).after(BEFORE, after, 10), after, 10, 138))
    assert counts == {"a": 256, "b": 768}


def test_sources_keep_the_number_that_their_order_is_drawn_with():
    changed = beginning(BEFORE).after(BEFORE, CHANGES["one_less"], 5)
    again = changed.after(CHANGES["one_less"], config_of(("c", 1.0), ("a", 1.0), batch=7), 9)
    assert [again.number(path) for path in "abc"] == [0, 1, 2]
    assert again.used[1] == changed.used[1] + 4 * 7  # all of four steps


def test_what_does_not_touch_the_data_leaves_the_position_as_it_is():
    start = beginning(BEFORE)
    longer = dataclasses.replace(BEFORE, train=dataclasses.replace(BEFORE.train, steps=2000))
    assert start.after(BEFORE, longer, 5) is start


def test_a_ramp_of_another_length_goes_on_after_what_was_read():
    ramp = {"batch": 8, "accumulation_steps": 4, "ramp_from": 2, "ramp_until": 0.5}
    short, long = config_of(("a", 1.0), steps=20, **ramp), config_of(("a", 1.0), steps=200, **ramp)
    changed = beginning(short).after(short, long, 15)
    assert changed.sequence == short.sequences_before(15) != long.sequences_before(15)
    assert changed.sequences_before(long, 16) == changed.sequence + 2 * long.microbatches_at(15)


def test_the_position_comes_back_from_json():
    changed = beginning(BEFORE).after(BEFORE, CHANGES["one_more"], 5)
    meta = json.loads(json.dumps({"position": list(changed)}))
    assert position_of(meta, CHANGES["one_more"]) == changed
    assert position_of({}, BEFORE) == beginning(BEFORE)
