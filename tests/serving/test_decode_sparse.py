"""Sparse decoding equals the masked form of training: the same choices, from a cache of the indexer's keys."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import model_config
from deepseek_jax.serving import latent_cache
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.sequence import Request
from tests.model import naive
from tests.precision import float64
from tests.serving.test_decode_model import LENGTH, MODELS, SPARSE, TOKENS_BT, by_steps

UNEVEN, ONE_BY_ONE = [5, 1, 7, 3, 8], [1] * LENGTH


@pytest.mark.parametrize(("pieces", "deterministic"), [(UNEVEN, False), (ONE_BY_ONE, False), (UNEVEN, True)],
                         ids=["in uneven chunks", "token by token", "in tiles"])
def test_cached_logits_are_those_of_the_masked_forward_pass(pieces, deterministic):
    whole = naive.forward(MODELS["V3.2"])(naive.variables_of(MODELS["V3.2"]), TOKENS_BT)

    _, logits, *_ = by_steps("V3.2", pieces, deterministic=deterministic)

    np.testing.assert_allclose(logits, whole.logits_BTW, atol=1e-4)


def test_in_float64_they_are_so_to_rounding():
    with float64():
        whole = naive.forward(MODELS["V3.2 in float64"])(naive.variables_of(MODELS["V3.2 in float64"]), TOKENS_BT)
        _, logits, *_ = by_steps("V3.2 in float64", UNEVEN, kind="float64")

        np.testing.assert_allclose(logits, whole.logits_BTW, atol=1e-12)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_narrow_caches_are_near_and_not_equal(kind):
    exact = by_steps("V3.2", UNEVEN)[1]
    error = np.abs(by_steps("V3.2", UNEVEN, kind)[1] - exact)

    assert 1e-4 < np.median(error) < 1


@pytest.mark.parametrize(("kind", "of_a_key"), [("bfloat16", 256), ("float32", 512), ("fp8", 132)])
def test_a_token_costs_its_latent_and_its_key_in_the_indexer(kind, of_a_key):
    dense, sparse = (latent_cache.bytes_per_token(model_config(name), kind) for name in ("v3_671b", "v3_2_671b"))

    assert sparse - dense == 61 * of_a_key
    pages = latent_cache.make(MODELS["V3.2"], kind, pages=3, page_size=8)
    assert sum(p.nbytes for p in jax.tree.leaves(pages)) == 24 * latent_cache.bytes_per_token(MODELS["V3.2"], kind)


def test_keys_come_back_from_fp8_within_its_rounding():
    k_BTI = np.random.default_rng(0).standard_normal((2, 3, 7)).astype(np.float32)

    back = latent_cache.unpack_key(MODELS["V3.2"], "fp8", latent_cache.pack_key("fp8", jax.numpy.asarray(k_BTI)))

    np.testing.assert_allclose(back, k_BTI, rtol=0.07, atol=0.01)


def test_drafts_and_shared_prefixes_leave_the_greedy_tokens_as_they_are():
    cfg = naive.tiny(**SPARSE | dict(num_layers=1, num_dense_layers=1, mtp_depth=1))
    variables, prompt = naive.variables_of(cfg), tuple(range(3, 15))

    def greedy(tokens, count):
        for _ in range(count):
            row = np.zeros((2, LENGTH), np.int32)
            row[:, :len(tokens)] = tokens
            tokens = [*tokens, int(naive.forward(cfg)(variables, row).logits_BTW[0, len(tokens) - 1].argmax())]
        return tokens[-count:]

    engine = Engine(cfg, variables, EngineConfig(max_sequences=2, max_length=LENGTH, depth=1, page_size=4, chunk=16))
    made = []
    for asked in (prompt, (*prompt[:9], 40, 41)):
        made.append(engine.submit(Request(asked, 6)))
        engine.run()

    assert made[1].reused == 8 and made[0].drafted > 0
    assert [[token.id for token in sequence.made] for sequence in made] == [
        greedy(list(sequence.request.prompt), 6) for sequence in made]


def test_a_model_in_its_warm_up_is_served_dense():
    cfg = naive.tiny(**SPARSE, index_warmup=True)
    engine = Engine(cfg, naive.variables_of(cfg), EngineConfig(max_sequences=1, max_length=8))

    assert engine.cfg.index_topk is None
