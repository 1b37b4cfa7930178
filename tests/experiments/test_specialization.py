"""What the study of specialization measures: information, entropy, biases, and whether seeds have the same experts."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, ModelConfig
from experiments.studies.specialization import measure, overlap
from experiments.studies.specialization.study import STUDY


def model_of(study) -> ModelConfig:
    return study.measure.config(study, "5e-3").model


def test_an_expert_of_its_own_kind_says_all_and_one_of_every_kind_nothing():
    kind_N = np.repeat(np.arange(4), 50)
    own_NK = np.stack([kind_N, kind_N + 4], axis=1)
    mixed_NK = np.tile(np.arange(8)[:2], (200, 1))

    assert measure.information(own_NK, kind_N, 8) == pytest.approx(2.0)
    assert measure.information(mixed_NK, kind_N, 8) == pytest.approx(0.0, abs=1e-12)
    half = np.where(np.arange(200)[:, None] % 2, own_NK, mixed_NK)
    assert 0.1 < measure.information(half, kind_N, 8) < 1.9


def test_the_entropy_of_equal_scores_is_one_and_that_of_a_single_one_zero():
    assert measure.entropy(np.full((2, 3, 16), 0.3)) == pytest.approx(1.0)
    assert measure.entropy(np.eye(16)[None]) == pytest.approx(0.0, abs=1e-9)
    assert measure.entropy(np.repeat(np.eye(8), 2, axis=1)[None]) == pytest.approx(0.25)  # two of sixteen


@pytest.mark.parametrize(("text", "kind"), [(" def", "word"), ("_self", "word"), (" 12", "number"), ("\n    ", "space"),
                                            ("", "space"), ("):", "punctuation"), ("x2", "mixed"), ("(a", "mixed")])
def test_tokens_have_kinds_by_their_characters(text, kind):
    assert measure.kind_of(text) == kind


def test_a_fast_start_moves_biases_by_more_and_then_as_the_report_does():
    bias, counts = jnp.zeros((1, 2)), jnp.array([[5, 1]])
    state, moved = measure.FAST_START.init(bias), []
    for _ in range(measure.FAST_STEPS + 2):
        new, state = measure.FAST_START.update(bias, counts, 0.001, state)
        moved.append(float(new[0, 1] - bias[0, 1]))
        bias = new

    np.testing.assert_allclose(moved[:measure.FAST_STEPS], 0.001 * measure.FAST, rtol=1e-4)
    np.testing.assert_allclose(moved[measure.FAST_STEPS:], 0.001, rtol=1e-3)
    assert bias[0, 0] == -bias[0, 1]


def measured(bias_LE, monkeypatch):
    """What is measured of a model that chooses experts 0 and 1 for every token."""
    kinds = [np.zeros((6, 5), int), np.ones((6, 5), int)]
    chosen = np.broadcast_to(np.arange(2), (2, 6, 5, 2))
    monkeypatch.setattr(measure, "rows_by_kind", lambda loader: kinds)
    monkeypatch.setattr(measure, "_routed", lambda cfg: lambda *_: (np.full((2, 6, 5, 16), 0.5), chosen))
    monkeypatch.setattr(measure, "token_kinds", lambda tokenizer: np.array([0, 1]))
    config = types.SimpleNamespace(model=types.SimpleNamespace(num_experts=16))
    loader = types.SimpleNamespace(tokenizer=None)
    return measure.experts(config, {}, {"bias": bias_LE}, loader, True)  # pyright: ignore[reportArgumentType]


def test_what_all_biases_share_is_told_from_how_far_they_are_apart(monkeypatch):
    bias_LE = np.random.default_rng(0).standard_normal((2, 16))
    found, shifted = (measured(bias_LE + shift, monkeypatch) for shift in (0, 5))

    assert shifted["bias_offset"] == pytest.approx(found["bias_offset"] + 5)
    assert shifted["bias_spread"] == pytest.approx(found["bias_spread"]) == pytest.approx(
        np.ptp(bias_LE, axis=1).mean())
    assert shifted["bias_largest"] > 4 > found["bias_largest"]


def test_the_choices_of_the_first_rows_of_each_kind_are_kept(monkeypatch):
    digits = measured(np.zeros((2, 16)), monkeypatch)["chosen"]
    assert digits == "01" * (2 * 2 * measure.COMPARED * 5)
    assert overlap.choices(model_of(STUDY), digits).shape == (2, 2 * measure.COMPARED * 5, 16)


def runs_of(*models):
    """Finished runs of an arm with these choices, int [L, N, K] each."""
    return [{"arm": "one", "arrays": {"chosen": "".join(f"{e:x}" for e in model.ravel())}} for model in models]


def test_the_same_experts_in_another_order_agree_in_full_and_others_as_chance_does():
    rng = np.random.default_rng(0)
    model, other = (np.stack([[rng.choice(16, 2, replace=False) for _ in range(300)] for _ in range(2)])
                    for _ in range(2))
    renamed = np.stack([rng.permutation(16)[layer] for layer in model])

    same, apart = (overlap.overlap(model_of(STUDY), runs_of(model, third))["one"] for third in (renamed, other))

    assert same["mean"] == same["least"] == same["largest"] == 1 and same["pairs"] == 1
    assert apart["mean"] == pytest.approx(apart["chance"], abs=0.03) and apart["mean"] < 0.25


def test_the_short_form_has_as_many_layers_as_its_model():
    cfg = model_of(STUDY.shortened())
    assert (cfg.num_layers, cfg.num_dense_layers) == (2, 1)
    assert overlap.choices(cfg, "01" * 5).shape == (1, 5, 16)


def test_experts_of_a_study_that_is_not_finished_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "finished", lambda *_: runs_of(np.zeros((2, 3, 2), int)))
    monkeypatch.setattr(overlap, "OUT", tmp_path / "overlap.json")
    monkeypatch.setattr("sys.argv", ["overlap", "--workdir", str(tmp_path)])

    with pytest.raises(ConfigError, match="47 runs are not finished; start python -m experiments.studies.special"):
        overlap.main()
    assert not overlap.OUT.exists()
