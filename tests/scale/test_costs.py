"""Counts from the config alone: against the published figures, and against the model's own arrays."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import model_config
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.scale import costs


def active(c, embeddings):
    """Parameters that take part in one token: products, norms and biases, and `embeddings` of the two big tables."""
    products = costs.active_product_parameters(c)
    latent_norms = c.kv_rank + (c.q_rank or 0)
    norms = c.num_layers * (2 * c.d_model + latent_norms) + c.d_model
    biases = c.num_moe_layers * c.num_experts * c.has_router_bias
    blocks = products["attention"] + products["dense_ffn"] + products["moe"]
    return blocks + norms + biases + embeddings * c.vocab_size * c.d_model


@pytest.mark.parametrize(
    ("name", "embeddings", "billions"),
    [("v3_671b", 2, 37.552), ("v3_671b", 1, 36.626), ("v3_671b", 0, 35.699),
     ("v2_lite_16b", 1, 2.451), ("v2_236b", 2, 21.376)])
def test_a_token_meets_the_published_number_of_parameters(name, embeddings, billions):
    assert round(active(model_config(name), embeddings) / 1e9, 3) == billions


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
    used["mtp"] += c.mtp_depth * used["head"]  # shared, and used once more a depth

    assert costs.active_product_parameters(c) == used


def test_v3_costs_250_gflop_a_token_at_4096():
    c = model_config("v3_671b", mtp_depth=0)

    assert costs.training_flops_per_token(c, 4096) == pytest.approx(250e9, rel=0.05)


def test_attention_counts_half_of_the_sequence_when_it_is_causal():
    c = model_config("tiny")
    least = costs.training_flops_per_token(c, 0)

    assert costs.training_flops_per_token(c, 512, causal=False) - least == 2 * (
        costs.training_flops_per_token(c, 512) - least)
    # 2 products forward and twice that backward, of 2 operations per element, over 512 keys
    per_key = 3 * 2 * c.num_heads * (c.qk_head_dim + c.v_head_dim) * (c.num_layers + c.mtp_depth)
    assert costs.training_flops_per_token(c, 512, causal=False) - least == 512 * per_key
