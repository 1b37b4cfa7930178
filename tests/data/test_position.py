"""The position of a run in its sources when its config changes: nothing is read twice, and nothing is skipped."""

import collections
import dataclasses
import json

import pytest

from deepseek_jax.config import Config, DataConfig, TrainConfig
from deepseek_jax.data.position import beginning, position_of
from tests.model import naive


def config_of(*sources, batch=4, stages=(), **train):
    return Config(model=naive.tiny(), data=DataConfig(sources=sources, stages=stages),
                  train=TrainConfig(batch_size=batch, **train))


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
           "a_larger_batch": config_of(("a", 3.0), ("b", 1.0), batch=12),
           "a_stage": config_of(("a", 3.0), ("b", 1.0), batch=7, stages=((401, (("b", 1.0),)), (500, (("a", 1.0),))))}


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


STAGED = config_of(("a", 3.0), ("b", 1.0), ("c", 0.0), batch=8,
                   stages=((128, (("b", 1.0), ("c", 3.0))), (256, (("a", 1.0),))))


def test_stages_have_the_sources_in_their_shares_and_each_goes_on_where_it_was():
    counts = [collections.Counter(path for path, _ in read(beginning(STAGED), STAGED, first, first + 128))
              for first in (0, 128, 256, 1000)]
    assert counts == [{"a": 768, "b": 256}, {"b": 256, "c": 768}, {"a": 1024}, {"a": 1024}]
    seen = read(beginning(STAGED), STAGED, 0, 400)
    for path, count in {"a": 768 + 8 * 144, "b": 512, "c": 768}.items():
        assert [j for p, j in seen if p == path] == list(range(count))


def test_a_stage_may_begin_anywhere_in_a_pattern_of_shares():
    config = config_of(("a", 1.0), ("b", 1.0), batch=7, stages=((5, (("b", 1.0),)), (9, (("a", 1.0), ("b", 3.0)))))
    seen = read(beginning(config), config, 0, 40)
    assert {path for path, _ in seen[35:63]} == {"b"}
    for path in "ab":
        assert [j for p, j in seen if p == path] == list(range(sum(p == path for p, _ in seen)))


@pytest.mark.parametrize("step", [100, 128, 200, 300])
def test_a_staged_run_that_changes_goes_on_where_its_sources_were(step):
    after = dataclasses.replace(STAGED, train=dataclasses.replace(STAGED.train, batch_size=4))
    changed = beginning(STAGED).after(STAGED, after, step)
    seen = read(beginning(STAGED), STAGED, 0, step) + read(changed, after, step, 400)
    assert changed.sequence == 8 * step and len(seen) == 8 * step + 4 * (400 - step)
    for path in "abc":
        assert [j for p, j in seen if p == path] == list(range(sum(p == path for p, _ in seen)))
    assert {path for path, _ in seen[-4 * 100:]} == {"a"}


def test_a_stage_that_was_added_on_the_way_is_the_one_that_was_there_from_the_start_where_patterns_begin():
    plain = config_of(("a", 3.0), ("b", 1.0), batch=8)
    staged = dataclasses.replace(plain, data=dataclasses.replace(plain.data, stages=((128, (("b", 1.0),)),)))
    added = beginning(plain).after(plain, staged, 128)
    assert read(added, staged, 128, 300) == read(beginning(staged), staged, 128, 300)
