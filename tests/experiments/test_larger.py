"""The study of the larger model: arms differ in what they are named after, and the picture compares like with like."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.config import PRESETS, as_dict
from deepseek_jax.model import DeepSeekV3
from experiments.studies.larger.attention import CACHE
from experiments.studies.larger.study import COMPARED, STUDY


def model_of(arm):
    cfg = STUDY.measure.config(STUDY, arm).model
    return dataclasses.replace(cfg, **{key.removeprefix("model."): part
                                       for key, part in STUDY.measure.network(arm).items()})


def shapes(arm):
    return jax.eval_shape(lambda: DeepSeekV3(model_of(arm)).init(jax.random.key(0), jnp.zeros((1, 8), int)))["params"]


def weights(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def changed(arm):
    recipe, other = (as_dict(STUDY.measure.config(STUDY, name)) for name in ("recipe", arm))
    return {f"{section}.{key}" for section in recipe for key in recipe[section]
            if recipe[section][key] != other[section][key]}


def test_the_recipe_is_small_without_groups_and_drafts():
    cfg = STUDY.measure.config(STUDY, "recipe").model
    apart = {key for key, value in PRESETS["small"].items() if getattr(cfg, key) != value}
    assert apart == {"num_groups", "groups_kept"} and cfg.mtp_depth == 0


@pytest.mark.parametrize(("arm", "keys"), [
    ("aux 1e-3", {"balance.bias_speed", "balance.aux_loss_weight"}), ("MTP", {"model.mtp_depth"}), ("MHA", set()),
    ("few large", {f"model.{key}" for key in ("num_experts", "experts_per_token", "expert_ffn_dim",
                                              "num_shared_experts")})])
def test_an_arm_differs_in_what_it_is_named_after(arm, keys):
    assert changed(arm) == keys
    assert (model_of(arm).attention != model_of("recipe").attention) == (arm == "MHA")


def test_large_experts_have_as_many_active_units_and_within_two_per_cent_as_many_in_total():
    fine, large = model_of("recipe"), model_of("few large")
    active, total = ([(getattr(cfg, key) + cfg.num_shared_experts) * cfg.expert_ffn_dim for cfg in (fine, large)]
                     for key in ("experts_per_token", "num_experts"))
    assert active[0] == active[1] == 640
    assert total[1] == pytest.approx(total[0], rel=0.02)


def test_both_attentions_have_as_many_weights_within_two_per_cent_and_the_caches_that_are_said():
    mla, mha = (weights(shapes(arm)["dense_layers"]["attention"]) for arm in ("recipe", "MHA"))
    cfg, full = model_of("recipe"), shapes("MHA")["dense_layers"]["attention"]
    assert mla < mha < 1.02 * mla
    assert CACHE == {"recipe": cfg.kv_rank + cfg.rope_head_dim, "MHA": 2 * math.prod(full["k"].shape[2:])}


@pytest.mark.parametrize("label", [row[0] for row in COMPARED])
def test_each_comparison_is_a_claim_about_the_loss_in_both_studies(label):
    _, here, study, there = next(row for row in COMPARED if row[0] == label)
    other = importlib.import_module(f"experiments.studies.{study}.study").STUDY
    for made, arms in ((STUDY, here), (other, there)):
        assert any((claim.metric, claim.arm, claim.against, claim.expected) == ("loss", *arms, "lower")
                   for claim in made.claims)
