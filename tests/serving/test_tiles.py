"""Deterministic decoding: to the last bit, a sequence does not depend on the rest of its batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.serving.decode_attention import TokenSlots
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.sequence import Request
from deepseek_jax.serving.tiles import TILE, in_tiles
from tests.model import naive

CFG = naive.tiny(num_layers=2, dtype="bfloat16")
VARIABLES = naive.variables_of(CFG)
OPTIONS = EngineConfig(max_sequences=4, max_length=160, page_size=4, chunk=32, most_steps=4, deterministic=True)


def requests_of(count, new_tokens=12):
    """Prompts of many lengths; every fifth begins like the one before it, and every second is sampled."""
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        prompt = tuple(rng.integers(0, CFG.vocab_size, rng.integers(1, 100)).tolist())
        prompt = made[-1].prompt + prompt[:5] if i % 5 == 4 else prompt
        made.append(Request(prompt, new_tokens, temperature=float(i % 2), seed=i, logprobs=True))
    return made


def answers(options, requests, together=None):
    """Tokens and logprobs of each request; `together`: how many are submitted at once."""
    engine, made = Engine(CFG, VARIABLES, options), []
    together = together or len(requests)
    for i in range(0, len(requests), together):
        sequences = [engine.submit(request) for request in requests[i:i + together]]
        engine.run()
        made += [[(token.id, token.logprob) for token in s.made] for s in sequences]
    return made


COMPANY = {"more at once than a tile holds": dict(max_sequences=TILE + 4), "shorter chunks": dict(chunk=16),
           "an FP8 cache": dict(cache="fp8")}


def test_company_changes_no_bit_of_a_bfloat16_continuation():
    requests = requests_of(TILE + 4, 6)

    assert answers(dataclasses.replace(OPTIONS, max_sequences=TILE + 4), requests) == answers(OPTIONS, requests, 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", COMPANY)
def test_company_changes_none_of_200_bfloat16_continuations(how):
    options, requests = dataclasses.replace(OPTIONS, **COMPANY[how]), requests_of(200, 40)
    alone = dataclasses.replace(OPTIONS, cache=options.cache)

    assert answers(options, requests) == answers(alone, requests, 1)


@pytest.mark.slow
def test_drafts_change_no_bit_of_a_greedy_continuation():
    requests = [dataclasses.replace(r, temperature=0.0) for r in requests_of(8, 10)]

    assert answers(dataclasses.replace(OPTIONS, depth=1), requests) == answers(OPTIONS, requests, 1)


@pytest.mark.slow
def test_in_float32_the_tokens_are_those_of_the_default_way():
    cfg = dataclasses.replace(CFG, dtype="float32")
    requests = [Request(r.prompt, 10, logprobs=True) for r in requests_of(8)]
    made = []
    for deterministic in (True, False):
        engine = Engine(cfg, VARIABLES, dataclasses.replace(OPTIONS, depth=1, deterministic=deterministic))
        sequences = [engine.submit(request) for request in requests]
        engine.run()
        made.append(([[t.id for t in s.made] for s in sequences],
                     np.array([t.logprob for s in sequences for t in s.made]), engine.loads_LE.tolist()))
    assert made[0][0] == made[1][0] and made[0][2] == made[1][2]
    np.testing.assert_allclose(made[0][1], made[1][1], atol=1e-5)


@pytest.mark.parametrize("B, T", [(1, 1), (3, 7), (TILE, 1), (2, 40)])
def test_tiles_take_tokens_in_order_and_leave_out_what_holds_none(B, T):
    valid_BT = jnp.arange(T)[None] < jnp.arange(1, B + 1)[:, None] * (T // B + 1)
    slots = TokenSlots(jnp.arange(B * T).reshape(B, T), jnp.broadcast_to(jnp.arange(T), (B, T)), valid_BT,
                       jnp.arange(B * 2).reshape(B, 2))

    def run(seen, tile, hidden_M1D):
        assert tile.token_BT.shape == (TILE, 1) and tile.table_BP.shape == (TILE, 2)
        at = jnp.where(tile.valid_BT[:, 0], tile.token_BT[:, 0], B * T)
        seen = seen.at[at].set(seen.max() + 1 + jnp.arange(TILE))  # increases in the order of the tokens
        return hidden_M1D + tile.table_BP[:, None, :1], seen, (tile.valid_BT.sum(), 1)

    hidden_BTD = jnp.arange(B * T * 3.0).reshape(B, T, 3)
    out_BTD, seen, (tokens, turns) = jax.jit(lambda: in_tiles(run, jnp.zeros(B * T + 1, int), slots, hidden_BTD))()

    order = np.asarray(seen)[:-1][np.asarray(valid_BT).reshape(-1)]
    assert (np.diff(order) > 0).all() and tokens == valid_BT.sum()
    full = np.zeros(-(-B * T // TILE) * TILE, bool)
    full[:B * T] = np.asarray(valid_BT).reshape(-1)
    assert turns == full.reshape(-1, TILE).any(axis=1).sum()
    np.testing.assert_array_equal(np.asarray(out_BTD)[valid_BT], np.asarray(
        hidden_BTD + 2.0 * jnp.arange(B)[:, None, None])[valid_BT])
