"""Generation: each token is the most likely one of a complete forward pass, whatever else is in the batch or the cache.
"""

import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.serving import generate
from tests.model import naive

CFG = naive.tiny(num_layers=2)
PROMPTS = [[5, 9, 3, 60, 2, 2, 41], [7], [11, 12, 13, 14], list(range(40))]


@pytest.fixture(scope="module")
def variables():
    return naive.variables_of(CFG)


@pytest.fixture(scope="module")
def greedy(variables):
    return generate(CFG, variables, PROMPTS, 12).tokens


def test_greedy_is_the_argmax_of_whole_forward_passes(variables, greedy):
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        whole = prompt + found
        row = np.zeros((1, 64), np.int32)  # one length, so one compilation; causality hides the padding
        row[0, :len(whole)] = whole
        best = naive.forward(CFG)(variables, row).logits_BTW[0].argmax(-1)
        assert found == best[len(prompt) - 1:len(whole) - 1].tolist()
    assert len({tuple(f) for f in greedy}) == len(PROMPTS)  # the prompt matters


def test_a_prompt_is_continued_as_it_would_be_alone(variables, greedy):
    assert [generate(CFG, variables, [p], 12).tokens[0] for p in PROMPTS] == greedy


def test_speculative_decoding_says_the_same_and_counts_its_drafts(variables, greedy):
    made = generate(CFG, variables, PROMPTS, 12, speculative=True)

    assert made.tokens == greedy
    assert 0 <= made.accepted <= made.drafted <= 12 * len(PROMPTS) and made.drafted > 0


def test_the_end_token_stops_its_own_prompt_only_and_is_left_out(variables, greedy):
    end = greedy[0][2]
    stopped = generate(CFG, variables, PROMPTS, 12, eos_id=end).tokens

    cut = lambda tokens: tokens[:tokens.index(end)] if end in tokens else tokens
    assert stopped == [cut(tokens) for tokens in greedy] and len(stopped[0]) <= 2


def test_a_sample_is_a_function_of_the_seed_and_differs_between_prompts(variables):
    draw = lambda seed: generate(CFG, variables, [[7], [7], [7]], 12, temperature=1.0, seed=seed).tokens

    assert draw(3) == draw(3) != draw(4)
    assert len({tuple(tokens) for tokens in draw(3)}) == 3


def test_a_temperature_near_zero_is_greedy(variables, greedy):
    assert generate(CFG, variables, PROMPTS, 12, temperature=1e-6).tokens == greedy


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "at least one token id"),
        ([[1], []], {}, "at least one token id"),
        ([[1, CFG.vocab_size]], {}, r"each in \[0, 64\)"),
        ([[-1]], {}, r"each in \[0, 64\)"),
        ([[1]], dict(temperature=-1.0), "neither can be negative"),
        ([[1]], dict(temperature=float("nan")), "neither can be negative"),
        ([[1]], dict(max_new_tokens=-1), "neither can be negative"),
    ],
)
def test_what_cannot_be_continued_says_why(prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(CFG, {}, prompts, **{"max_new_tokens": 2, **options})


def test_drafts_need_an_mtp_module():
    with pytest.raises(ConfigError, match="no MTP module"):
        generate(naive.tiny(mtp_depth=0), {}, [[1]], 3, speculative=True)


def test_nothing_to_do_is_no_error(variables):
    assert generate(CFG, {}, [], 5).tokens == []
    assert generate(CFG, variables, [[1], [2]], 0).tokens == [[], []]
