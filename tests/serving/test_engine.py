"""The engine: the order of sequences, how they end, and that every page is returned."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.serving import latent_cache
from deepseek_jax.serving.decode import decode, prefill
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.latent_cache import bytes_per_token
from deepseek_jax.serving.sequence import Request
from tests.model import naive

CFG = naive.tiny(num_layers=2)
VARIABLES = naive.variables_of(CFG)
rng = np.random.default_rng(0)
LONG = tuple(rng.integers(0, 64, 40).tolist())


@pytest.fixture(scope="module")
def warm():
    """One engine for all tests here: each must leave it empty."""
    engine = Engine(CFG, VARIABLES, EngineConfig(
        max_sequences=2, max_length=64, depth=1, page_size=4, chunk=8, most_steps=4))
    engine.warm_up()
    return engine


@pytest.fixture
def engine(warm):
    yield warm
    warm.run()
    warm.pool.clear()
    assert warm.pool.owned == 0 and warm.pool.reserved == 0
    assert warm.pool.available == warm.pool.total and sorted(warm._slots) == [0, 1]


def ids(sequence):
    return [token.id for token in sequence.made]


def test_nothing_is_compiled_after_the_warm_up_whatever_the_mix(engine):
    before = decode._cache_size(), prefill._cache_size()
    for i in range(12):
        engine.submit(Request(LONG[:1 + 3 * i], 1 + i, temperature=0.5 * (i % 3), top_k=i % 2, top_p=1 - 0.3 * (i % 2),
                              seed=i, logprobs=i % 4 == 0))
    engine.run()

    assert (decode._cache_size(), prefill._cache_size()) == before


def test_a_sequence_that_joins_later_changes_nothing_for_the_others(engine):
    alone = []
    for prompt in (LONG[:9], LONG[20:33]):
        alone.append(engine.submit(Request(prompt, 16)))
        engine.run()

    first = engine.submit(Request(LONG[:9], 16))
    while len(first.made) < 5:
        engine.step()
    second = engine.submit(Request(LONG[20:33], 16))
    engine.run()

    assert [ids(first), ids(second)] == [ids(s) for s in alone]


def test_first_come_first_served(engine):
    order, made = [], []
    for i in range(5):
        made.append(engine.submit(Request((i,), 6), lambda s, new: order.append(s) if s.steps <= 4 else None))
    engine.run()
    assert [made.index(s) for s in dict.fromkeys(order)] == [0, 1, 2, 3, 4]


def test_a_long_prompt_delays_a_running_stream_by_one_chunk_at_a_time(engine):
    running = engine.submit(Request((1,), 40))
    engine.step()
    reading = engine.submit(Request(LONG, 2))
    while not reading.made and reading.finish is None:
        before = len(running.made)
        engine.step()
        assert len(running.made) > before or running.finish


@pytest.mark.parametrize("when", ["reading", "running"])
def test_a_cancelled_sequence_ends_at_the_next_step_and_gives_its_pages_back(engine, when):
    sequence = engine.submit(Request(LONG, 20))
    for _ in range({"reading": 1, "running": 6}[when]):
        engine.step()
    assert sequence in getattr(engine, when)

    engine.cancel(sequence)
    engine.step()

    assert sequence.finish == "cancelled" and sequence.pages == []
    assert engine.pool.owned == 0


def test_a_cancelled_sequence_that_waits_frees_its_place_before_any_step(engine):
    heard, sequence = [], None
    for i in range(2):
        engine.submit(Request((i,), 30))
    engine.step()
    sequence = engine.submit(Request(LONG, 20), lambda s, new: heard.append((s, new)))

    engine.cancel(sequence)

    assert sequence.finish == "cancelled" and heard == [(sequence, [])] and not engine.waiting


def test_a_sequence_cancelled_while_it_is_being_admitted_takes_nothing(engine, monkeypatch):
    sequence = engine.submit(Request(LONG, 20))
    find = engine.pool.find
    monkeypatch.setattr(engine.pool, "find", lambda prompt: engine.cancel(sequence) or find(prompt))

    engine.step()

    assert sequence.finish == "cancelled" and sequence.slot == -1 and not engine.busy


def test_a_common_prefix_is_read_once_and_the_continuation_is_the_same(engine):
    prompt = LONG[:30]
    first = engine.submit(Request(prompt, 8))
    engine.run()
    read = engine.totals["prompt_tokens"]

    second = engine.submit(Request(prompt, 8))
    third = engine.submit(Request((*prompt[:20], 3, 3, 3), 8))
    engine.run()

    assert (first.reused, second.reused, third.reused) == (0, 28, 20)
    assert engine.totals["prompt_tokens"] == read + 1 + 2
    assert ids(second) == ids(first)
    engine.pool.clear()
    again = engine.submit(Request((*prompt[:20], 3, 3, 3), 8))
    engine.run()
    assert ids(again) == ids(third)


def test_a_listener_hears_every_token_once_and_can_end_the_sequence(engine):
    heard = []

    def listen(sequence, new):
        heard.append([token.id for token in new])
        before = sum(map(len, heard[:-1]))
        return 7 - before if before + len(new) >= 7 else None

    before = engine.totals["tokens"]
    sequence = engine.submit(Request((5, 6), 40), listen)
    engine.run()

    assert [i for new in heard for i in new][:7] == ids(sequence) and heard[-1] == [] and [] not in heard[:-1]
    assert sequence.finish == "stop" and len(ids(sequence)) == engine.totals["tokens"] - before == 7


def test_what_is_made_after_a_listener_stops_counts_nowhere():
    engine = Engine(CFG, VARIABLES, EngineConfig(max_sequences=2, max_length=64, depth=1, page_size=4, chunk=8))
    sequence = engine.submit(Request((5, 6), 40), lambda sequence, new: 1 if new else None)
    engine.run()

    assert len(sequence.made) == engine.totals["tokens"] == 1 and sequence.steps == 1
    assert sequence.drafted == engine.totals["drafted"] == 0  # the first step has no drafts


@pytest.mark.parametrize("where", ["running", "reading"])
def test_logits_that_are_no_numbers_end_a_sequence_with_an_error(where):
    broken = jax.tree.map(np.array, VARIABLES)
    broken["params"]["embedding"][9] = np.nan
    engine = Engine(CFG, broken, EngineConfig(max_sequences=2, max_length=64, page_size=4, chunk=8, pages=16))
    bad = engine.submit(Request((5, 9) if where == "running" else (9, 5, 6), 4))
    good = engine.submit(Request((5, 6), 4))
    engine.run()

    assert (bad.finish, bad.made, good.finish, len(good.made)) == ("error", [], "length", 4)
    assert engine.totals["errors"] == 1 and engine.pool.owned == 0
    after = [engine.submit(Request((7, 5, 6, 1, 2, 3)[i:], 9)) for i in range(4)]  # on pages that were NaN
    engine.run()
    whole = Engine(CFG, VARIABLES, EngineConfig(max_sequences=2, max_length=64, page_size=4, chunk=8))
    expected = [whole.submit(sequence.request) for sequence in after]
    whole.run()
    assert [ids(sequence) for sequence in after] == [ids(sequence) for sequence in expected]


@pytest.mark.parametrize("length", [2, 9, 40])
def test_logprobs_of_a_prompt_are_the_models_own_whatever_the_cache_holds(engine, length):
    prompt = tuple(int(i) for i in np.random.default_rng(length).integers(1, CFG.vocab_size, length))
    for max_new_tokens in (0, 3):
        engine.submit(Request(prompt, 1))
        sequence = engine.submit(Request(prompt, max_new_tokens, prompt_logprobs=True))
        others = [engine.submit(Request(prompt[1:] or (1,), 2)) for _ in range(2)]
        engine.run()

        row = np.zeros((1, 48), np.int32)
        row[0, :length] = prompt
        logits = np.asarray(naive.forward(CFG)(VARIABLES, row).logits_BTW[0, :length - 1], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert [t.id for t in sequence.scored] == list(prompt[1:]) and len(sequence.made) == max_new_tokens
        np.testing.assert_allclose([t.logprob for t in sequence.scored],
                                   logprobs[range(length - 1), list(prompt[1:])], atol=1e-4)
        assert [t.best[0][0] for t in sequence.scored] == logits.argmax(-1).tolist()
        assert not any(other.scored for other in others)


def test_logprobs_are_the_models_own(engine):
    sequence = engine.submit(Request((5, 6, 7), 4, temperature=2.0, seed=1, logprobs=True))
    engine.run()

    row = np.zeros((1, 16), np.int32)
    row[0, :7] = sequence.tokens
    logits = np.asarray(naive.forward(CFG)(VARIABLES, row).logits_BTW[0, 2:6], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose([t.logprob for t in sequence.made], logprobs[range(4), ids(sequence)], atol=1e-4)
    assert [t.best[0][0] for t in sequence.made] == logits.argmax(-1).tolist()


def test_the_cache_grows_by_its_bytes_per_token_a_page_at_a_time(engine):
    sequence = engine.submit(Request(LONG, 2))
    sizes = []
    while engine.busy:
        engine.step()
        sizes.append((sequence.filled, engine.live_bytes()))

    token = bytes_per_token(CFG, "float32", mtp=1)
    assert sizes[0] == (8, 8 * token) and sizes[2] == (24, 24 * token) and sizes[-1][1] == 0


def test_the_bytes_of_the_cache_are_those_that_the_process_grows_by():
    held = lambda: sum(x.nbytes for x in jax.live_arrays())
    before, made = held(), []
    for pages in (8, 40):
        made.append(latent_cache.make(CFG, "bfloat16", pages, 4))
    grown = held() - before
    assert grown == 48 * 4 * bytes_per_token(CFG, "bfloat16") and len(made) == 2


def test_more_work_than_pages_waits_and_finishes():
    small = Engine(CFG, VARIABLES, EngineConfig(max_sequences=2, max_length=64, depth=1, pages=12, page_size=4, chunk=8,
                   most_steps=4))
    made = [small.submit(Request(LONG[:20 + i], 16)) for i in range(6)]
    while small.busy:
        small.step()
        assert small.pool.owned + small.pool.reserved <= 12
    assert [len(s.made) for s in made] == [16] * 6 and small.pool.available == 12


@pytest.mark.parametrize(
    ("request_", "message"),
    [(Request((1,) * 60, 9), "more than the 64"), (Request((1,), 3, top_p=0.0), "top_p=0.0"),
     (Request((1,), 3, top_k=-1), "top_k=-1"), (Request((1,), 3, seed=-1), "seed=-1")])
def test_what_cannot_be_served_says_why(engine, request_, message):
    with pytest.raises(ConfigError, match=message):
        engine.submit(request_)


def test_random_traffic_leaks_no_page(engine):
    rng, live = np.random.default_rng(1), []
    for _ in range(150):
        if rng.random() < 0.4:
            length = int(rng.integers(1, 40))
            new, temperature = int(rng.integers(1, 20)), float(rng.random())
            live.append(engine.submit(Request(LONG[:length], new, temperature=temperature)))
        if live and rng.random() < 0.15:
            engine.cancel(live[rng.integers(len(live))])
        engine.step()
        assert engine.pool.owned + len(engine.pool._free) + len(engine.pool._kept) == engine.pool.total


def test_short_prompts_are_read_together():
    engine = Engine(CFG, VARIABLES, EngineConfig(
        max_sequences=2, max_length=64, depth=1, page_size=4, chunk=32, most_steps=4))
    alone = []
    for prompt in (LONG[:14], LONG[20:29]):
        alone.append(engine.submit(Request(prompt, 6)))
        engine.run()
    engine.pool.clear()

    together = [engine.submit(Request(prompt, 6)) for prompt in (LONG[:14], LONG[20:29])]
    engine.step()

    assert all(s.made for s in together)
    engine.run()
    assert [ids(s) for s in together] == [ids(s) for s in alone]


def test_the_token_that_ends_a_sequence_is_kept_apart(engine):
    first = engine.submit(Request((5, 6, 7), 1))
    engine.run()
    (token,) = ids(first)
    ended = engine.submit(Request((5, 6, 7), 4, stop_tokens=frozenset([token]), logprobs=True))
    engine.run()
    assert (ended.made, ended.finish, ended.end.id) == ([], "stop", token) and ended.end.logprob < 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_routes_are_those_of_every_token_that_was_fed(deterministic):
    engine = Engine(CFG, VARIABLES, EngineConfig(max_sequences=1, max_length=64, depth=1, page_size=4, chunk=16,
                                                 most_steps=4, deterministic=deterministic, routes=True))
    first, again = (engine.submit(Request(LONG[:13], 8)) for _ in range(2))  # the second reuses pages of the first
    engine.run()
    routes = np.stack(first.routes[:20])
    assert routes.shape == (20, CFG.num_moe_layers, CFG.experts_per_token)
    np.testing.assert_array_equal(routes, np.stack(again.routes[:20]))
    own = naive.forward(CFG, ("chosen",))(VARIABLES, np.array([[*LONG[:13], *ids(first)]])).captured["chosen"]
    np.testing.assert_array_equal(np.sort(routes), np.sort(np.moveaxis(np.asarray(own[:, 0, :20]), 0, 1)))
