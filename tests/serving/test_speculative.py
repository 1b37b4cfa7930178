"""Drafts change the speed, but neither the tokens (greedy) nor their probabilities (sampled)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.serving import speculative
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.sampling import ACCEPT, DRAFT, TOKEN, Sampling, draw, keys, probabilities
from deepseek_jax.serving.sequence import Request
from deepseek_jax.serving.speculative import Drafts, verify
from tests.model import naive

W, D = 5, 2  # vocabulary, drafts
P = np.random.default_rng(0).dirichlet(np.ones(W), (W, W)).astype(np.float32)  # next token, given the last two
Q = np.random.default_rng(1).dirichlet(np.ones(W) * 0.5, (W, W)).astype(np.float32)
LOG_P = jnp.log(P)


def all_sampling(n, **how):
    full = dict(temperature=1.0, top_k=0, top_p=1.0, seed=0) | how
    kinds = dict(temperature=jnp.float32, top_k=jnp.int32, top_p=jnp.float32, seed=jnp.uint32)
    return Sampling(*(jnp.full(n, full[name], kind) for name, kind in kinds.items()), jnp.arange(n, dtype=jnp.uint32))


@functools.partial(jax.jit, static_argnums=1)
def draw_and_verify(sampling, n):
    """n sequences that end in tokens 1, 2: two drafts from Q, verified by P. Returns tokens [n, 3], and how many count.
    """
    before, last = jnp.full(n, 1), jnp.full(n, 2)
    drafts, q = [], []
    for d in range(D):
        q_BW = probabilities(sampling, jnp.log(jnp.asarray(Q))[before, last][:, None])[:, 0]
        token = draw(keys(sampling, jnp.full((n, 1), 10 + d), DRAFT), q_BW[:, None])[:, 0]
        drafts.append(token), q.append(q_BW)
        before, last = last, token
    context = jnp.stack([jnp.full(n, 1), jnp.full(n, 2), *drafts], 1)
    logits_BTW = LOG_P[context[:, :-1], context[:, 1:]]
    made, accepted = verify(sampling, logits_BTW, Drafts(jnp.stack(drafts, 1), jnp.full(n, D), jnp.stack(q, 1), ()),
                            jnp.full(n, 10))
    return made, accepted


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.6), dict(top_k=3), dict(top_p=0.7), dict(seed=9)], ids=str)
def test_what_is_kept_of_drafts_is_distributed_as_the_model_says(how):
    n = 10_000
    sampling = all_sampling(n, **how)
    made, accepted = (np.asarray(x) for x in draw_and_verify(sampling, n))
    exact = np.asarray(probabilities(all_sampling(W * W, **how), LOG_P.reshape(W * W, 1, W))).reshape(W, W, W)

    def chi_squared(counts, p):
        assert counts[p == 0].sum() == 0
        expected = counts.sum() * p[p > 0]
        return ((counts[p > 0] - expected) ** 2 / expected).sum()

    assert 0.2 < (accepted > 0).mean() < 0.95
    assert chi_squared(np.bincount(made[:, 0], minlength=W), exact[1, 2]) < 24  # 4 degrees: one in 10,000
    for first in np.unique(made[accepted > 0, 0]):  # the second token, where there is one, given the first
        second = made[(accepted > 0) & (made[:, 0] == first), 1]
        assert chi_squared(np.bincount(second, minlength=W), exact[2, first]) < 28


def test_verifying_takes_no_random_number_that_drafting_took(monkeypatch):
    uses = []
    monkeypatch.setattr(speculative, "keys", lambda *args: uses.append(args[-1]) or keys(*args))
    drafts = Drafts(jnp.ones((1, D), jnp.int32), jnp.full(1, D), jnp.full((1, D, W), 1 / W), ())

    verify(all_sampling(1), jnp.zeros((1, D + 1, W)), drafts, jnp.full(1, 10))

    assert sorted(uses) == sorted([ACCEPT, TOKEN])
    assert len({ACCEPT, TOKEN, DRAFT}) == 3


def test_greedy_keeps_drafts_up_to_the_first_that_differs():
    logits = jax.nn.one_hot(jnp.array([[3, 1, 2]] * 4), W)
    drafts = Drafts(jnp.array([[3, 1], [3, 0], [0, 1], [3, 1]]), jnp.array([2, 2, 2, 0]), jnp.zeros((4, D, W)), ())

    made, accepted = verify(all_sampling(4, temperature=0.0), logits, drafts, jnp.full(4, 7))

    assert accepted.tolist() == [2, 1, 0, 0]
    assert [row[:a + 1].tolist() for row, a in zip(made, accepted)] == [[3, 1, 2], [3, 1], [3], [3]]


def counting_model(**overrides):
    """A model whose MTP module drafts well: blocks that add nothing, a head that predicts the next number.

    The main model sees token t and predicts t + 1. Module k sees its hidden state h(t) and token t + k, and predicts
    t + k + 1.
    """
    cfg = naive.tiny(vocab_size=16, d_model=32, num_layers=2, **overrides)
    variables = jax.tree.map(np.zeros_like, naive.variables_of(cfg))
    p = variables["params"]
    p["embedding"][:] = np.eye(16, 32)
    p["head"][:] = np.eye(32, 16, k=1) + np.eye(32, 16, k=-15)
    p["norm"]["scale"][:] = 1
    for name in (n for n in p if n.startswith("mtp")):
        for norm in ("norm", "embedding_norm", "hidden_norm"):
            p[name][norm]["scale"][:] = 1
        p[name]["projection"][:32] = np.eye(32)
    return cfg, variables


def finish(engine, requests):
    made = [engine.submit(r) for r in requests]
    engine.run()
    return made


@pytest.mark.parametrize(("depth", "modules"), [(1, 1), (3, 1), (2, 2), (3, 2)])
def test_right_drafts_are_all_accepted_at_any_depth(depth, modules):
    cfg, variables = counting_model(mtp_depth=modules)
    engine = Engine(cfg, variables, EngineConfig(max_sequences=1, max_length=64, depth=depth, page_size=4, chunk=16))

    (made,) = finish(engine, [Request((1, 2, 3), 31)])

    assert [t.id for t in made.made] == [(4 + i) % 16 for i in range(31)]
    assert made.accepted == made.drafted and made.steps == 1 + -(-30 // (depth + 1))
    assert [t.draft for t in made.made][:2 + depth] == ["none"] + ["accepted"] * depth + ["none"]

    (after,) = finish(engine, [Request((9, 10, 11), 31)])  # in the same slot, which still has drafts of the first one
    assert [t.id for t in after.made] == [(12 + i) % 16 for i in range(31)]
    assert [t.draft for t in after.made] == [t.draft for t in made.made] and after.steps == made.steps


@pytest.mark.parametrize(("depth", "modules"), [
    (1, 1), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_greedy_is_the_same_token_for_token_over_many_prompts_and_page_boundaries(depth, modules):
    cfg = naive.tiny(mtp_depth=modules, num_layers=2, vocab_size=24)
    variables = naive.variables_of(cfg)
    variables["params"]["head"] *= 0.3
    rng = np.random.default_rng(0)
    requests = [Request(tuple(rng.integers(0, 24, rng.integers(1, 30)).tolist()), int(rng.integers(1, 25)))
                for _ in range(60)]
    make = lambda depth: Engine(cfg, variables, EngineConfig(4, 64, depth, page_size=4, chunk=16))
    plain, drafting = make(0), make(depth)

    expected, found = finish(plain, requests), finish(drafting, requests)

    assert [[t.id for t in s.made] for s in found] == [[t.id for t in s.made] for s in expected]
    assert 0 < sum(s.accepted for s in found) < sum(s.drafted for s in found)


def continuations(cfg, variables, requests, most, depth):
    engine = Engine(cfg, variables, EngineConfig(max_sequences=most, max_length=64, page_size=4, chunk=16, depth=depth))
    return [[t.id for t in s.made] for s in finish(engine, requests)]


@pytest.mark.slow
@pytest.mark.parametrize("most", range(1, 9))
def test_greedy_is_the_same_on_200_prompts_at_every_batch_size(most):
    cfg = naive.tiny(num_layers=2)
    variables = naive.variables_of(cfg)
    rng = np.random.default_rng(1)
    # Prompts end at, before and after page boundaries, and continuations cross several.
    requests = [Request(tuple(rng.integers(0, 64, 1 + i % 33).tolist()), 8 + i % 17) for i in range(200)]

    assert continuations(cfg, variables, requests, most, 1) == continuations(cfg, variables, requests, most, 0)


@pytest.mark.slow
def test_in_bfloat16_every_difference_is_a_near_tie():
    cfg = naive.tiny(num_layers=2, dtype="bfloat16")
    variables = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), naive.variables_of(cfg))
    rng = np.random.default_rng(1)
    requests = [Request(tuple(rng.integers(0, 64, 1 + i % 33).tolist()), 16) for i in range(200)]
    plain, drafting = (continuations(cfg, variables, requests, 4, depth) for depth in (0, 1))

    different = [i for i in range(200) if plain[i] != drafting[i]]
    print(f"{len(different)} of 200 continuations differ")  # shown with -s
    exact = dataclasses.replace(cfg, dtype="float32")
    for i in different:
        at = next(t for t, (a, b) in enumerate(zip(plain[i], drafting[i])) if a != b)
        row = np.zeros((1, 64), np.int32)
        whole = [*requests[i].prompt, *plain[i][:at]]
        row[0, :len(whole)] = whole
        logits, rounded = (np.asarray(naive.forward(c)(variables, row).logits_BTW[0, len(whole) - 1], np.float64)
                           for c in (exact, cfg))
        gap = abs(logits[plain[i][at]] - logits[drafting[i][at]])
        assert gap <= 2 * np.abs(rounded - logits).max()  # either could be first after rounding


def test_the_cache_of_the_modules_holds_the_true_tokens_whatever_was_drafted_before():
    cfg = naive.tiny(mtp_depth=2, num_layers=2, vocab_size=24)
    variables = naive.variables_of(cfg)
    prompt = tuple(np.random.default_rng(3).integers(0, 24, 9).tolist())
    make = lambda: Engine(cfg, variables, EngineConfig(1, 48, depth=2, page_size=4, chunk=16))
    spoken, read = make(), make()

    (made,) = finish(spoken, [Request(prompt, 20)])
    finish(read, [Request(tuple(made.tokens), 1)])

    final = (len(made.tokens) - 2) // 4  # pages that drafts no longer touch
    assert made.accepted < made.drafted
    pages = [e.pool.find(made.tokens)[:final] for e in (spoken, read)]
    assert len(pages[0]) == len(pages[1]) == final > 4
    for ours, theirs in zip(spoken._cache, read._cache):
        np.testing.assert_allclose(ours[np.array(pages[0])], theirs[np.array(pages[1])], atol=1e-4)


def test_sampled_drafts_are_reproducible_whoever_shares_the_batch():
    cfg = naive.tiny(num_layers=2, vocab_size=24)
    make = lambda: Engine(cfg, naive.variables_of(cfg), EngineConfig(4, 64, depth=1, page_size=4, chunk=16))
    mine = Request((1, 2, 3), 16, temperature=0.8, top_p=0.9, seed=11)
    others = [Request((4, 5), 9, temperature=1.2, seed=s) for s in range(2)] + [Request((6,), 5)]

    alone, among = finish(make(), [mine])[0], finish(make(), [*others, mine])[-1]

    assert [t.id for t in alone.made] == [t.id for t in among.made]
