"""Counts computed only from the config: against published figures, and against the model's own arrays."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig, model_config
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.parallel.capacity import parameter_bytes
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.scale import costs


@pytest.mark.parametrize(
    ("name", "convention", "billions"),
    [("v3_671b", "main model", 671.026), ("v3_671b", "main model and MTP", 682.636),
     ("v3_671b", "checkpoint, MTP with copies of embedding and head", 684.490),
     ("v3_671b", "active per token", 37.552), ("v3_671b", "active, without the input embedding", 36.626),
     ("v3_671b", "active, without embedding and head", 35.699),
     ("v2_lite_16b", "main model", 15.706), ("v2_lite_16b", "active, without the input embedding", 2.451),
     ("v2_236b", "main model", 235.741), ("v2_236b", "active per token", 21.376)])
def test_every_way_of_counting_gives_the_published_number(name, convention, billions):
    assert round(costs.conventions(model_config(name))[convention] / 1e9, 3) == billions


def test_the_main_model_of_v3_is_counted_to_the_unit():
    assert costs.conventions(model_config("v3_671b"))["main model"] == 671_026_419_200


@pytest.mark.parametrize("name", ["tiny", "v2_lite_16b", "v2_236b", "v3_671b", "v3_2_671b"])
def test_groups_of_parameters_are_those_of_the_arrays(name):
    c = model_config(name)
    shapes = jax.eval_shape(lambda: DeepSeekV3(c).init(jax.random.key(0), np.zeros((1, 8), np.int32)))["params"]
    table = parameter_bytes(shapes, abstract_mesh(MeshConfig()))

    counted = {group: n for group, n in costs.parameters(c).items() if n}
    assert counted == {group: row["compute"] // 4 for group, row in table.items()}


@pytest.mark.parametrize(("part", "count"), [
    (costs.attention_parameters, 187_107_328),
    (lambda c: costs.ffn_parameters(c, c.dense_ffn_dim), 396_361_728),
    (lambda c: costs.ffn_parameters(c, c.expert_ffn_dim), 44_040_192),
    (lambda c: costs.active_product_parameters(c)["head"], 926_679_040),
])
def test_parts_of_v3_have_the_published_size(part, count):
    assert part(model_config("v3_671b")) == count


@pytest.mark.parametrize("name", ["tiny", "small", "v2_lite_16b", "v3_671b"])
def test_products_are_counted_from_the_arrays_that_the_model_really_has(name):
    c = model_config(name)
    shapes = jax.eval_shape(lambda: DeepSeekV3(c).init(jax.random.key(0), np.zeros((1, 8), np.int32)))["params"]
    used = dict.fromkeys(("attention", "dense_ffn", "moe", "head", "mtp"), 0)
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        names = [p.key for p in path]
        if names[-1] in ("scale", "embedding"):
            continue
        routed = names[-2:-1] == ["ffn"] and "dense_layers" not in names
        size = int(np.prod(x.shape)) * c.experts_per_token // c.num_experts if routed else int(np.prod(x.shape))
        group = ("mtp" if "mtp" in names[0] else "head" if names[0] == "head" else
                 "attention" if "attention" in names else "dense_ffn" if "dense_layers" in names else "moe")
        used[group] += size
    used["mtp"] += c.mtp_depth * used["head"]  # shared, and used once more per depth

    assert costs.active_product_parameters(c) == used


def test_v3_costs_250_gflop_a_token_at_4096():
    c = model_config("v3_671b", mtp_depth=0)

    assert costs.training_flops_per_token(c, 4096) == pytest.approx(250e9, rel=0.05)


def test_attention_counts_half_of_the_sequence_when_it_is_causal():
    c = model_config("tiny")
    least = costs.training_flops_per_token(c, 0)

    assert costs.training_flops_per_token(c, 512, causal=False) - least == 2 * (
        costs.training_flops_per_token(c, 512) - least)
    # 2 products forward and twice as many backward, with 2 operations per element, over 512 keys
    per_key = 3 * 2 * c.num_heads * (c.qk_head_dim + c.v_head_dim) * (c.num_layers + c.mtp_depth)
    assert costs.training_flops_per_token(c, 512, causal=False) - least == 512 * per_key


@pytest.mark.parametrize("remat", ["none", "report", "full"])
def test_the_passes_of_the_layers_add_up_to_the_flops_of_training(remat):
    c = model_config("v3_671b", remat=remat, mtp_depth=0)
    table = costs.layer_flops(c, 4096)
    once = lambda parts: sum(table[part][what] for part in parts for what in ("forward", "input", "weight"))
    layers = (c.num_moe_layers * once(("attention", "scores", "shared", "experts"))
              + c.num_dense_layers * once(("attention", "scores", "dense")))

    assert layers + 6 * c.d_model * c.vocab_size == pytest.approx(costs.training_flops_per_token(c, 4096))


def test_full_remat_computes_the_forward_pass_again_and_none_only_the_scores():
    full, none = (costs.layer_flops(model_config("v3_671b", remat=remat), 4096) for remat in ("full", "none"))

    assert all(full[part]["again"] == full[part]["forward"] for part in ("attention", "shared", "experts", "dense"))
    assert [part for part in none if none[part]["again"]] == ["scores"]


@pytest.mark.parametrize(("remat", "again"), [("none", 8), ("report", 7), ("attention", 15), ("full", 15)])
def test_each_of_the_parts_of_a_sequence_makes_the_keys_of_all(remat, again):
    """Once per pass, and again for the gradients; with recomputation some exist already, or are made once more."""
    c = model_config("v3_671b", remat=remat)
    one, eight = (costs.layer_flops(c, 131072, parts) for parts in (1, 8))
    keys = 2 * c.kv_rank * c.num_heads * (c.nope_head_dim + c.v_head_dim)
    more = {what: (eight["attention"][what] - one["attention"][what]) / keys for what in one["attention"]}

    assert more == {"forward": 7, "input": 7, "weight": 7, "again": again}
    assert all(one[part] == eight[part] for part in one if part != "attention")
    forward = one["attention"]["forward"] + one["scores"]["forward"]
    assert more["forward"] * keys / forward == pytest.approx(0.04, abs=0.005)
