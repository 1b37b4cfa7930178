"""Annotations become checked fields, and a value that does not fit gives an error that says why."""

import dataclasses
from typing import Annotated, Literal

import pytest

from deepseek_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from deepseek_jax.config.names import OTHERS
from deepseek_jax.config.schema import (
    BELOW_ONE,
    BETWEEN,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Checked,
    ConfigError,
    build,
    did_you_mean,
    fields_of,
)


@dataclasses.dataclass(frozen=True)
class Inner(Checked, section="inner"):
    width: Annotated[int, POSITIVE, "of a layer"] = 4


@dataclasses.dataclass(frozen=True)
class Section(Checked, section="part"):
    count: Annotated[int, POSITIVE, "how many"] = 1
    rate: Annotated[float, FRACTION, "share"] = 0.5
    bound: Annotated[int | None, NOT_NEGATIVE, "None: no bound"] = None
    order: Annotated[Literal["sorted", "random"], "of the documents"] = "random"
    name: Annotated[str, "any word"] = "x"
    on: Annotated[bool, "whether"] = False
    weights: Annotated[tuple[tuple[float, int], ...], "pairs"] = ((0.5, 1),)
    from_: Annotated[str | None, "a path"] = None
    inner: Inner = Inner()
    plain: float = 1.0


def test_a_field_is_read_off_its_annotation():
    fields = {field.name: field for field in fields_of(Section)}
    assert list(fields) == [f.name for f in dataclasses.fields(Section)]
    count, bound, order, from_ = (fields[name] for name in ("count", "bound", "order", "from_"))
    assert (count.kind, count.optional, count.range, count.doc, count.default) == (int, False, POSITIVE, "how many", 1)
    assert (bound.kind, bound.optional, bound.range) == (int, True, NOT_NEGATIVE)
    assert (order.kind, order.choices) == (str, ("sorted", "random"))
    assert (from_.key, from_.optional) == ("from", True)
    assert (fields["plain"].kind, fields["plain"].range, fields["plain"].doc) == (float, None, "")


def test_whole_numbers_become_floats_and_lists_tuples():
    made = build(Section, {"rate": 1, "weights": [[1, 2], (0, 3)], "inner": {"width": 8}, "from": "here"})
    assert made == Section(rate=1.0, weights=((1.0, 2), (0.0, 3)), inner=Inner(8), from_="here")
    assert isinstance(made.rate, float) and isinstance(made.weights[0][0], float)


@pytest.mark.parametrize(("values", "message"), [
    (dict(count=0), "part.count=0 must be positive."),
    (dict(bound=-1), "part.bound=-1 cannot be negative; 0 leaves it out, or None."),
    (dict(rate=1.5), "part.rate=1.5 must lie in [0, 1]."),
    (dict(count=None), "part.count cannot be None."),
    (dict(count=1.0), "part.count=1.0 should be int, not float."),
    (dict(count=True), "part.count=True should be int, not bool."),
    (dict(rate=True), "part.rate=True should be float, not bool."),
    (dict(on=1), "part.on=1 should be bool, not int."),
    (dict(name=3), "part.name=3 should be str, not int."),
    (dict(plain=float("nan")), "part.plain=nan should be a finite number."),
    (dict(plain=10**400), "part.plain has 401 digits, too many for a float."),
    (dict(order="up"), "part.order='up' is unknown; take one of 'sorted', 'random'."),
    (dict(weights=3), "part.weights=3 should be a tuple of pairs, such as ((0.5, 1),)."),
    (dict(weights=((1, 2, 3),)), "part.weights=((1, 2, 3),) should be a tuple of pairs, such as ((0.5, 1),)."),
    (dict(weights=((1, 2.5),)), "part.weights[0][1]=2.5 should be int, not float."),
    (dict(from_=7), "part.from=7 should be str, not int."),
    (dict(inner=dict(width=0)), "inner.width=0 must be positive."),
    (dict(inner=3), "part.inner=3 should be a section with keys, not a single value."),
    (dict(inner=dict(widht=1)), "unknown config key part.inner.widht; did you mean width?"),
])
def test_a_value_that_does_not_fit_is_named_with_what_would(values, message):
    with pytest.raises(ConfigError) as error:
        Section(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(("bounds", "inside", "outside"), [
    (POSITIVE, (1, 1e-9), (0, -1)),
    (NOT_NEGATIVE, (0, 1), (-1e-9,)),
    (FRACTION, (0, 0.5, 1), (-0.1, 1.1)),
    (BELOW_ONE, (0, 0.999), (1, -0.1)),
    (BETWEEN, (0.1,), (0, 1)),
], ids=["positive", "not negative", "fraction", "below one", "between"])
def test_the_ends_of_a_range(bounds, inside, outside):
    assert all(map(bounds.fits, inside)) and not any(map(bounds.fits, outside))


def test_a_section_without_a_default_has_to_be_given():
    Outer = dataclasses.make_dataclass("Outer", [("inner", Inner)], bases=(Checked,), frozen=True)
    with pytest.raises(ConfigError, match="the config has no section inner; start from default_config"):
        build(Outer, {})
    assert build(Outer, {"inner": {}}).inner == Inner()


def test_a_message_is_one_line():
    assert str(ConfigError("first\nsecond")) == "first second"


def test_a_message_holds_nothing_that_a_terminal_obeys_or_cannot_print():
    assert str(ConfigError("a\x1b[2J\tcaf\udce9 é 模型")) == r"a\x1b[2J\tcaf\udce9 é 模型"


def test_a_message_never_quotes_a_page():
    with pytest.raises(ConfigError) as caught:
        ModelConfig(d_model=["x"] * 10**5)
    assert len(str(caught.value)) < 300


def test_the_nearest_word_or_all_of_them():
    assert did_you_mean("steps", ["step", "batch"]) == "did you mean step?"
    assert did_you_mean("zzz", ["b", "a"]) == "known are: a, b."


@pytest.mark.parametrize(("section", "word", "ours"), [
    (ModelConfig, "top_k", "experts_per_token"), (ModelConfig, "n_routed_experts", "num_experts"),
    (ModelConfig, "n_group", "num_groups"), (ModelConfig, "topk_group", "groups_kept"),
    (ModelConfig, "moe_intermediate_size", "expert_ffn_dim"), (ModelConfig, "hidden_size", "d_model"),
    (OptimizerConfig, "lr", "learning_rate"), (TrainConfig, "gradient_accumulation_steps", "accumulation_steps")])
def test_names_of_other_projects_lead_to_ours(section, word, ours):
    assert did_you_mean(word, [field.key for field in fields_of(section)]) == f"did you mean {ours}?"


def test_every_name_of_others_is_one_of_a_key():
    keys = {field.key for section in (ModelConfig, OptimizerConfig, TrainConfig) for field in fields_of(section)}
    assert set(OTHERS.values()) <= keys and not keys & OTHERS.keys() - {key for key in OTHERS if OTHERS[key] == key}
