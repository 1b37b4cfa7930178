"""The network over the cache gives the results of the complete forward pass, however the tokens are split into steps.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.interop import load_hf, save_hf
from deepseek_jax.model import experts
from deepseek_jax.model.layers import head_logits
from deepseek_jax.model.rope import rope_table
from deepseek_jax.serving import decode_attention, generate, latent_cache
from deepseek_jax.serving.decode_attention import CacheGeometry, TokenSlots
from deepseek_jax.serving.decode_model import forward, predict_ahead
from deepseek_jax.serving.decode_moe import all_at_once, choices_in_turn, moe, tiles_in_turn
from deepseek_jax.serving.weights import prepare
from kernels_pallas import api
from tests.model import naive

CASES = {
    "V3": naive.tiny(norm_eps=0.3, latent_norm_eps=0.05),
    "V2, without a query latent": naive.tiny(**naive.V2, q_rank=None, num_groups=1, groups_kept=1),
}
SPARSE = dict(index_topk=5, index_heads=3, index_head_dim=7, num_layers=2, num_dense_layers=2, mtp_depth=0)
MODELS = CASES | {"V3.2": naive.tiny(**SPARSE), "V3.2 in float64": naive.tiny(dtype="float64", **SPARSE)}
LENGTH, SIZE = 24, 4
TOKENS_BT = np.random.default_rng(0).integers(0, 64, (2, LENGTH)).astype(np.int32)


@functools.cache
def program(name, kind, deterministic=False):
    cfg, geometry = MODELS[name], CacheGeometry(kind, SIZE, (2, 4, 6), deterministic)

    @jax.jit
    def run(weights, cache, slots):
        hidden_BTD, cache, routed = forward(cfg, geometry, weights, cache, slots)
        return hidden_BTD, head_logits(hidden_BTD, weights.head), cache, routed.counts

    return run


def by_steps(name, pieces, kind="float32", delay=0, deterministic=False):
    """Hidden states, logits and counts; at most 8 tokens per step, shuffled pages; row 1 starts `delay` steps late."""
    cfg = MODELS[name]
    weights = prepare(cfg, naive.variables_of(cfg), cfg.mtp_depth)
    cache = latent_cache.make(cfg, kind, 2 * LENGTH // SIZE + 1, SIZE, cfg.mtp_depth)
    table_BP = 1 + np.random.default_rng(1).permutation(2 * LENGTH // SIZE).reshape(2, -1)
    hidden, logits = np.zeros((2, LENGTH, cfg.d_model)), np.zeros((2, LENGTH, cfg.vocab_size))
    counts, at = 0, np.zeros(2, int)
    for n in range(len(pieces) + delay):
        taken = np.array([pieces[n] if n < len(pieces) else 0, pieces[n - delay] if n >= delay else 0])
        width = 1 if taken.max() == 1 else 8
        tokens_BT = np.zeros((2, width), np.int32)
        for b in range(2):
            tokens_BT[b, :taken[b]] = TOKENS_BT[b, at[b]:at[b] + taken[b]]
        slots = TokenSlots(tokens_BT, at[:, None] + np.arange(width), np.arange(width) < taken[:, None], table_BP)
        h, w, cache, counts_LE = program(name, kind, deterministic)(weights, cache, jax.tree.map(jnp.asarray, slots))
        for b in range(2):
            hidden[b, at[b]:at[b] + taken[b]], logits[b, at[b]:at[b] + taken[b]] = h[b, :taken[b]], w[b, :taken[b]]
        counts, at = counts + np.asarray(counts_LE), at + taken
    return hidden, logits, counts, weights, cache, table_BP


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("pieces", "delay"), [([8, 8, 8], 0), ([1] * LENGTH, 0), ([5, 1, 7, 3, 8], 0), ([3, 8, 1, 1, 8, 3], 2)],
    ids=["in whole chunks", "token by token", "in uneven chunks", "one joins later"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "in tiles"])
def test_cached_logits_are_those_of_the_whole_forward_pass(name, pieces, delay, deterministic):
    whole = naive.forward(CASES[name])(naive.variables_of(CASES[name]), TOKENS_BT)

    _, logits, counts, *_ = by_steps(name, pieces, delay=delay, deterministic=deterministic)

    assert np.abs(whole.logits_BTW).max() > 1
    np.testing.assert_allclose(logits, whole.logits_BTW, atol=1e-4)
    np.testing.assert_array_equal(counts, whole.counts["bias"])
    assert counts.sum() == 2 * LENGTH * CASES[name].experts_per_token * CASES[name].num_moe_layers


@pytest.mark.parametrize(("kind", "near"), [("bfloat16", 0.02), ("fp8", 0.25)])
def test_narrow_caches_are_near_and_not_equal(kind, near):
    exact = by_steps("V3", [8, 8, 8])[1]
    error = np.abs(by_steps("V3", [8, 8, 8], kind)[1] - exact)

    assert 1e-4 < np.median(error) < near


def test_the_mtp_module_over_its_cache_predicts_as_in_training():
    cfg = CASES["V3"]
    whole = naive.forward(cfg)(naive.variables_of(cfg), TOKENS_BT)
    hidden, _, _, weights, cache, table_BP = by_steps("V3", [8, 8, 8])
    run = jax.jit(functools.partial(predict_ahead, cfg, CacheGeometry("float32", SIZE, (6,)), weights, 1))

    for start in range(0, LENGTH - 8, 8):  # position i has the hidden state of i and token i + 1 as inputs
        slots = TokenSlots(jnp.asarray(TOKENS_BT[:, start + 1:start + 9]),
                           jnp.arange(start, start + 8)[None].repeat(2, 0), jnp.ones((2, 8), bool),
                           jnp.asarray(table_BP))
        h, cache = run(cache, jnp.asarray(hidden[:, start:start + 8], jnp.float32), slots)
        np.testing.assert_allclose(h, whole.mtp_hidden[0][:, start:start + 8], atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("way", [choices_in_turn, tiles_in_turn, all_at_once])
def test_experts_for_few_tokens_are_the_routed_experts(way, tokens):
    rng = np.random.default_rng(tokens)
    x, gates = rng.standard_normal((tokens, 6)).astype(np.float32), rng.random((tokens, 3)).astype(np.float32)
    chosen = np.stack([rng.permutation(9)[:3] for _ in range(tokens)]).astype(np.int32)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((9, 6, 5), (9, 6, 5), (9, 5, 6))]

    expected = experts.routed_experts(jnp.asarray(x), chosen, gates, experts.ExpertWeights(*weights), "reference")

    np.testing.assert_allclose(jax.jit(way)(x, chosen, gates, *weights), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [tiles_in_turn, all_at_once])
def test_choices_of_nobody_add_nothing_and_change_nobody_elses_sum(way):
    rng = np.random.default_rng(0)
    x, gates = rng.standard_normal((12, 6)).astype(np.float32), np.ones((12, 2), np.float32)
    chosen = np.stack([rng.permutation(4)[:2] for _ in range(12)]).astype(np.int32)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((4, 6, 5), (4, 6, 5), (4, 5, 6))]
    whole = jax.jit(way)(x, chosen, gates, *weights)

    chosen[7:] = 4
    found = jax.jit(way)(x, chosen, gates, *weights)

    np.testing.assert_allclose(found[:7], whole[:7], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[7:], 0)


@pytest.mark.parametrize("tokens", [2, 16, 40])
def test_a_bfloat16_layer_is_the_float32_layer_rounded(tokens):
    cfg = naive.tiny(num_layers=2, dtype="bfloat16")
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), naive.variables_of(cfg))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, tokens, cfg.d_model)), jnp.bfloat16)
    exact = dataclasses.replace(cfg, dtype="float32")
    none = jnp.zeros((1, tokens), jnp.int32)
    slots = TokenSlots(none, none, jnp.arange(tokens)[None] < tokens - 1, none)

    found, (counts, _) = moe(cfg, prepare(cfg, variables).layers[1], x, slots)
    expected, (same, _) = moe(exact, prepare(exact, variables).layers[1], x.astype(jnp.float32), slots)

    assert (counts == same).all() and counts.sum() == (tokens - 1) * cfg.experts_per_token
    error = np.asarray(found, np.float32) - expected
    assert np.abs(error[:, :-1]).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(("page_size", "taken"), [(8, True), (128, True), (12, False), (96, False)])
def test_a_kernel_is_asked_for_pages_that_it_reads(monkeypatch, page_size, taken):
    cfg = naive.tiny(num_layers=2, kv_rank=512, rope_head_dim=64, dtype="bfloat16")
    monkeypatch.setattr(decode_attention.api, "chosen_here", lambda operation: "hopper")

    assert decode_attention._has_kernel(cfg, CacheGeometry("bfloat16", page_size, (1,)), 1) == taken
    xla = dataclasses.replace(cfg, implementation="xla")
    assert not decode_attention._has_kernel(xla, CacheGeometry("bfloat16", page_size, (1,)), 1)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_where_there_is_a_kernel_it_is_handed_what_it_takes(monkeypatch, kind):
    cfg = naive.tiny(num_layers=2, kv_rank=512, rope_head_dim=64, dtype="bfloat16")
    weights = prepare(cfg, naive.variables_of(cfg))
    geometry = CacheGeometry(kind, 8, (2, 4))
    cache = latent_cache.make(cfg, kind, 9, 8)
    rng, calls = np.random.default_rng(0), []
    table = jnp.asarray([[3, 1, 5, 0], [2, 8, 4, 7]], jnp.int32)
    prompt = TokenSlots(jnp.asarray(rng.integers(0, 64, (2, 20))), jnp.arange(20)[None].repeat(2, 0),
                        jnp.arange(20)[None] < jnp.array([[11], [20]]), table)
    _, cache, _ = jax.jit(functools.partial(forward, cfg, geometry))(weights, cache, prompt)
    last = TokenSlots(jnp.zeros((2, 1), jnp.int32), jnp.array([[11], [20]]), jnp.ones((2, 1), bool), table)
    x = jnp.asarray(rng.standard_normal((2, 1, cfg.d_model)), jnp.bfloat16)
    rope = rope_table(cfg, last.position_BT, jnp.float32)
    step = lambda: jax.jit(functools.partial(decode_attention.attention, cfg, geometry))(
        weights.layers[0].attention, x, rope, cache[0], last)[0].astype(jnp.float32)
    expected = step()

    def twin(*args, **options):
        calls.append(args)
        return api.mla_decode(*args, **options, implementation="reference")

    monkeypatch.setattr(decode_attention, "api", types.SimpleNamespace(chosen_here=lambda _: "hopper", mla_decode=twin))
    found = step()

    assert len(calls) == 1
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-7 * np.abs(expected).max())


def test_weights_kept_in_fp8_are_laid_out_as_if_they_had_been_dequantized_before(tmp_path):
    cfg, folder = naive.tiny(num_layers=2), str(tmp_path / "hf")
    save_hf(folder, cfg, naive.variables_of(cfg), fp8=True)
    cfg, kept = load_hf(folder, keep_fp8=True)
    assert kept["params"]["layers"]["ffn"]["gate"]["values"].dtype == jnp.float8_e4m3fn
    _, dequantized = load_hf(folder, dtype=np.float32)

    jax.tree.map(np.testing.assert_array_equal, prepare(cfg, kept, 1), prepare(cfg, dequantized, 1))

    assert generate(cfg, kept, [[5, 9, 3]], 4).tokens == generate(cfg, dequantized, [[5, 9, 3]], 4).tokens
