"""Generation: the likeliest token of a whole forward pass each time, whatever stands beside or behind a prompt."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.serving import decode, generate
from tests.model import naive

CFG = naive.tiny(num_layers=2)
PROMPTS = [[5, 9, 3, 60, 2, 2, 41], [7], [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def variables():
    return naive.variables_of(CFG)


@pytest.fixture(scope="module")
def greedy(variables):
    return generate(CFG, variables, PROMPTS, 6).tokens


def test_greedy_is_the_argmax_of_repeated_whole_forward_passes(variables, greedy):
    rng = np.random.default_rng(0)
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            # One length for one compilation; what stands behind the last token is anything but padding.
            row = np.array([tokens + rng.integers(0, CFG.vocab_size, 16 - len(tokens)).tolist()], np.int32)
            tokens.append(int(naive.forward(CFG)(variables, row).logits_BTW[0, len(tokens) - 1].argmax()))
        assert found == tokens[len(prompt):]
    assert len({tuple(f) for f in greedy}) == len(PROMPTS)  # the prompt matters


def test_a_prompt_is_continued_as_it_would_be_alone(variables, greedy):
    assert [generate(CFG, variables, [p], 6).tokens[0] for p in PROMPTS] == greedy


def test_the_end_token_stops_its_own_prompt_only_and_is_left_out(variables, greedy):
    end = greedy[0][2]
    stopped = generate(CFG, variables, PROMPTS, 6, eos_id=end).tokens

    cut = lambda tokens: tokens[:tokens.index(end)] if end in tokens else tokens
    assert stopped == [cut(tokens) for tokens in greedy] and len(stopped[0]) <= 2


# What follows is about choosing, not about the model: next-token logits come from a table.


@pytest.fixture
def table_WW(monkeypatch):
    """Logits of the next token by the last one."""
    table_WW = np.random.default_rng(1).standard_normal((CFG.vocab_size, CFG.vocab_size)).astype(np.float32)

    def next_logits(cfg, variables, tokens_BT, last_B):
        calls.append(tokens_BT.shape)
        return jnp.asarray(table_WW)[jnp.take_along_axis(tokens_BT, last_B[:, None], axis=1)[:, 0]]

    calls = []
    monkeypatch.setattr(decode, "_next_logits", next_logits)
    next_logits.calls = calls
    return table_WW


def test_lengths_are_rounded_up_so_that_few_programs_are_compiled(table_WW):
    generate(CFG, {}, [[1] * 60, [1]], 8)

    assert decode._next_logits.calls == [(2, 64)] * 5 + [(2, 128)] * 3


def test_nothing_is_run_once_all_prompts_have_ended(table_WW):
    table_WW[:, 3] = 100.0
    made = generate(CFG, {}, [[1], [2]], 8, eos_id=3)

    assert made.tokens == [[], []] and len(decode._next_logits.calls) == 1
    assert generate(CFG, {}, [[1]], 3, eos_id=None).tokens == [[3, 3, 3]]


def test_a_sample_is_a_function_of_the_seed(table_WW):
    draw = lambda seed: generate(CFG, {}, PROMPTS, 12, temperature=1.0, seed=seed).tokens

    assert draw(3) == draw(3) != draw(4)
    assert draw(3)[0][:4] != draw(3)[1][:4] != draw(3)[2][:4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_their_temperature(table_WW, temperature):
    n = 4000
    drawn = np.ravel(generate(CFG, {}, [[7]] * n, 1, temperature=temperature).tokens)

    expected_W = np.exp(table_WW[7] / temperature)
    expected_W *= n / expected_W.sum()
    counts_W = np.bincount(drawn, minlength=CFG.vocab_size)
    assert ((counts_W - expected_W) ** 2 / expected_W).sum() < 110  # chi squared, 63 degrees: one in 5000


def test_a_temperature_near_zero_is_greedy(table_WW):
    cold, greedy = (generate(CFG, {}, PROMPTS, 8, temperature=t).tokens for t in (1e-4, 0.0))
    assert cold == greedy


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "at least one token id"),
        ([[1], []], {}, "at least one token id"),
        ([[1, CFG.vocab_size]], {}, r"each in \[0, 64\)"),
        ([[-1]], {}, r"each in \[0, 64\)"),
        ([[1]], dict(speculative=True), "leave --speculative away"),
        ([[1]], dict(temperature=-1.0), "neither can be negative"),
        ([[1]], dict(temperature=float("nan")), "neither can be negative"),
        ([[1]], dict(max_new_tokens=-1), "neither can be negative"),
    ],
)
def test_what_cannot_be_continued_says_why(prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(CFG, {}, prompts, **{"max_new_tokens": 2, **options})


def test_nothing_to_do_is_no_error(table_WW):
    assert generate(CFG, {}, [], 5).tokens == []
    assert generate(CFG, {}, [[1], [2]], 0).tokens == [[], []]
