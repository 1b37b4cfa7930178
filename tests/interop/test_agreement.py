"""A flipped expert is distinguished from an error: KL of logits with a model's own routes and with the reference's."""

import numpy as np
import pytest

from deepseek_jax.interop import load_hf
from deepseek_jax.interop.agreement import agreement, divergence
from tests.interop.checkpoints import CASES, golden
from tests.interop.parity_table import in_bfloat16, of_transformers, tokens_pinned


def test_the_divergence_is_that_of_the_definition():
    reference, other = np.random.default_rng(0).normal(size=(2, 1, 2, 5))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (reference, other))

    np.testing.assert_allclose(divergence(reference + 7, other - 3), (p * np.log(p / q)).sum(-1), atol=1e-12)


def test_pinning_the_routes_takes_flipped_experts_out_of_the_divergence():
    found = in_bfloat16("gigachat3")

    assert 0 < found.flipped < 0.1
    assert found.pinned < 1e-3 < found.free


def test_fp8_weights_computed_in_bfloat16_agree_with_transformers_in_float32():
    found = in_bfloat16("v3_1")

    assert found.pinned < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "v3_2"])  # its indexer chooses tokens, too
def test_in_bfloat16_the_arithmetic_is_at_least_as_close_as_that_of_transformers(case):
    assert in_bfloat16(case).pinned < of_transformers()[case]["pinned"]


@pytest.mark.slow
def test_with_experts_and_tokens_pinned_sparse_attention_in_bfloat16_is_arithmetic_alone():
    free = in_bfloat16("v3_2")

    assert tokens_pinned() < 1e-3 < free.pinned


def test_pinned_routes_do_not_hide_an_error():
    cfg, variables = load_hf(golden("mtp"))
    expected = np.load(f"{golden('mtp')}/expected.npz")
    variables["params"]["head"] = variables["params"]["head"] * 1.2

    found = agreement(cfg, variables, *(
        expected[name] for name in ("tokens_BT", "logits_BTW", "chosen_LBTK")))
    assert found.flipped == 0
    assert found.pinned == pytest.approx(found.free, rel=1e-3) and found.pinned > 1e-2
