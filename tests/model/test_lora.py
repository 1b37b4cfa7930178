"""Adapters: zero at the start, the product of two matrices afterwards, and the only parameters that are trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint.adapters import Merged, merge
from deepseek_jax.config import LoraConfig
from deepseek_jax.model import lora
from deepseek_jax.model.grouped_matmul import grouped_matmul
from deepseek_jax.model.layers import linear
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.posttraining.fp8_sampler import as_fp8
from tests.model import adapted, naive
from tests.precision import float64

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)


def answers(cfg, params, router):
    """Logits of the model and of its MTP modules."""
    output = naive.forward(cfg)({"params": params, "router": router}, TOKENS)
    return np.stack([output.logits_BTW, *output.mtp_logits])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_the_model_is_its_base_to_the_bit(dtype):
    cfg = naive.tiny(**adapted.SMALL, dtype=dtype)
    variables = adapted.variables(cfg)
    adapters = adapted.adapters_of(cfg, size=0)
    kept = jax.tree_util.tree_map_with_path(
        lambda keys, w: w.astype(lora.held(cfg, tuple(key.key for key in keys), w.dtype)), variables["params"])

    base = answers(cfg, variables["params"], variables["router"])
    assert np.array_equal(base, answers(cfg, lora.attach(adapted.LORA, kept, adapters), variables["router"]))


def test_the_model_is_the_naive_one_with_alpha_over_rank_times_a_b_added_to_its_weights():
    with float64():
        cfg = naive.tiny(num_layers=2, dtype="float64")
        variables, adapters = adapted.variables(cfg), adapted.adapters_of(cfg)
        found = answers(cfg, lora.attach(adapted.LORA, variables["params"], adapters), variables["router"])
        plain = {"params": adapted.merged(variables["params"], adapters, 2.0), "router": variables["router"]}
        expected = naive.model(cfg, plain, TOKENS)
        base = naive.model(cfg, variables, TOKENS)

    expected, base = (np.stack([x["logits"], x["mtp_logits"][0]]) for x in (expected, base))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert np.abs(expected - base).max() > 0.5


def test_merged_and_unmerged_agree_to_1e_6_of_logits_of_order_one():
    """In float32; each layer rounds in a different order in the two forms."""
    cfg = naive.tiny(**adapted.SMALL)
    variables, adapters = adapted.variables(cfg), adapted.adapters_of(cfg, size=0.1)
    params = variables["params"] | {"head": variables["params"]["head"] / 8}  # logits of order one

    unmerged = answers(cfg, lora.attach(adapted.LORA, params, adapters), variables["router"])
    made = answers(cfg, merge(params, adapters, adapted.LORA.scale), variables["router"])

    base = answers(cfg, params, variables["router"])
    assert 0.3 < np.abs(made).max() < 1.5 and np.abs(made - base).max() > 0.05
    np.testing.assert_allclose(unmerged, made, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", ["dense_layers/attention/o", "layers/attention/kv_b", "layers/ffn/down"])
def test_a_part_of_a_merged_weight_is_that_part(path):
    params, adapters = adapted.variables(adapted.CFG)["params"], adapted.adapters_of(adapted.CFG)
    node = lambda tree: functools.reduce(dict.__getitem__, path.split("/"), tree)
    w, pair = node(params), node(adapters)
    leaf = Merged(w, pair["a"], pair["b"], 2.0)
    index = tuple(slice(n // 2, n) for n in w.shape)

    expected = node(adapted.merged(params, adapters, 2.0))
    np.testing.assert_allclose(leaf[index], expected[index], atol=1e-6)
    np.testing.assert_allclose(node(merge(params, adapters, 2.0)), expected, atol=1e-6)


@pytest.mark.parametrize(("targets", "expected"), [
    ("attention", {"attention"}), ("experts", {"ffn", "shared"}), ("all", {"attention", "ffn", "shared"})])
def test_targets_say_which_weights_get_adapters_and_router_norms_embedding_and_head_never_do(targets, expected):
    params = adapted.variables(adapted.CFG)["params"]
    adapters = jax.eval_shape(lambda: lora.fresh(LoraConfig(rank=2, targets=targets), jax.random.key(0), params))
    leaves = {tuple(key.key for key in keys)[:-1] for keys, _ in jax.tree_util.tree_leaves_with_path(adapters)}

    assert {path[-2] for path in leaves} == expected
    assert {path[0] for path in leaves} == {"dense_layers", "layers", "mtp_1"}
    assert all(path[-1] in {"q_a", "q_b", "kv_a", "kv_b", "o", "gate", "up", "down"} for path in leaves)


def test_a_is_as_large_as_keeps_the_size_of_inputs_and_b_is_zero():
    big = {"layers": {"attention": {"o": jax.ShapeDtypeStruct((2, 8, 64, 16), jnp.float32)}}}
    pair = lora.fresh(LoraConfig(rank=32), jax.random.key(0), big)["layers"]["attention"]["o"]

    assert pair["a"].shape == (2, 8, 64, 32) and pair["b"].shape == (2, 32, 16)
    assert abs(float(pair["a"].std()) * np.sqrt(8 * 64) - 1) < 0.05 and not pair["b"].any()


def test_a_base_in_fp8_is_the_base_that_is_rounded_to_it_forward_and_backward():
    cfg = naive.tiny(**adapted.SMALL, d_model=160)  # blocks that are partial
    variables, adapters = adapted.variables(cfg), adapted.adapters_of(cfg, size=0.1)
    held = adapted.in_blocks(variables["params"])

    def loss(adapters, base):
        params = lora.attach(adapted.LORA, base, adapters)
        output = DeepSeekV3(cfg).apply({"params": params, "router": variables["router"]}, TOKENS)
        return jnp.square(output.logits_BTW).mean()

    run = jax.jit(jax.value_and_grad(loss), compiler_options=naive.QUICKLY)
    found, rounded, whole = (run(adapters, base) for base in (held, as_fp8(variables)["params"], variables["params"]))
    np.testing.assert_allclose(found[0], rounded[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found[1], rounded[1])
    assert abs(whole[0] - rounded[0]) > 1e-3 * rounded[0]


@pytest.mark.parametrize("experts", [False, True])
def test_the_backward_pass_keeps_a_base_in_fp8_alone(experts):
    """The dequantized weights, which would be two or four times as large, are not kept."""
    x = np.ones((256, 128), np.float32)
    w = adapted.in_blocks({"gate": np.random.default_rng(0).standard_normal((2, 128, 384)).astype(np.float32)})["gate"]
    if experts:
        product = lambda x: grouped_matmul(x, w, jnp.array([128, 128]), 128, "cpu")
    else:
        w = jax.tree.map(lambda a: a[0], w)
        product = lambda x: linear(x, w)
    kept = {a.dtype for a in jax.tree.leaves(jax.vjp(product, x)[1]) if a.shape[-2:] == (128, 384)}
    assert kept == {jnp.dtype(jnp.float8_e4m3fn)}
