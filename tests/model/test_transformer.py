"""The complete model: against `naive.model` in float64, its options, and its exact parameter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Yarn, model_config
from deepseek_jax.model import DeepSeekV3
from tests.model import naive
from tests.precision import float64

TOKENS = np.random.default_rng(1).integers(0, 64, (2, 8)).astype(np.int32)
SEGMENTS = np.array([[0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([np.arange(8), [0, 1, 2, 0, 1, 2, 3, 4]], np.int32)
CAPTURE = ("scores", "chosen")

MODELS = {
    "v3": dict(mtp_depth=2),
    "v2": dict(naive.V2, q_rank=None, mtp_depth=1, num_dense_layers=2),
    "yarn_multiplicative": dict(yarn=Yarn(original_length=32, mscale=0.707, mscale_all_dim=0.707), rope_theta=100.0,
                                rope_head_dim=8, router_bias="multiplicative", mtp_depth=0, num_shared_experts=0),
    "norms_with_two_eps": dict(norm_eps=0.3, latent_norm_eps=0.05, mtp_depth=1),
    "all_dense": dict(num_dense_layers=3),
    "all_dense_without_mtp": dict(num_dense_layers=3, mtp_depth=0),
    "all_moe_one_group": dict(num_dense_layers=0, num_groups=1, groups_kept=1, mtp_depth=0, remat="report"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_scanned_model_is_its_blocks_one_by_one_in_naive_float64(name):
    cfg = naive.tiny(dtype="float64", **MODELS[name])
    with float64():
        variables = naive.variables_of(cfg)

        output = naive.forward(cfg)(variables, TOKENS, POSITIONS, SEGMENTS)

        expected = naive.model(cfg, variables, TOKENS, POSITIONS, SEGMENTS)
        np.testing.assert_allclose(output.logits_BTW, expected["logits"], atol=1e-10)
        np.testing.assert_allclose(output.hidden_BTD, expected["hidden"], atol=1e-10)
        for k in range(cfg.mtp_depth):
            np.testing.assert_allclose(output.mtp_hidden[k], expected["mtp_hidden"][k], atol=1e-10, err_msg=f"{k=}")
            np.testing.assert_allclose(output.mtp_logits[k], expected["mtp_logits"][k], atol=1e-10, err_msg=f"{k=}")
        np.testing.assert_allclose(output.sequence_loss, expected["sequence_loss"], atol=1e-12)
        np.testing.assert_allclose(output.auxiliary_loss, expected["auxiliary_loss"], atol=1e-12)
        assert output.counts.keys() == expected["counts"].keys()
        for key, counts in expected["counts"].items():
            assert np.array_equal(output.counts[key], counts), key
        floats = [x.dtype for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert set(floats) == {jnp.dtype("float64")}


def test_a_float64_model_computes_nothing_in_less():
    cfg = naive.tiny(dtype="float64")
    with float64():
        shapes = jax.eval_shape(lambda: DeepSeekV3(cfg).init(jax.random.key(0), TOKENS))
        program = jax.jit(DeepSeekV3(cfg).apply).lower(shapes, TOKENS).as_text()

    assert "f64" in program
    assert not [kind for kind in ("f32", "bf16", "f16") if f"x{kind}>" in program or f"<{kind}>" in program]


def test_capture_shows_the_scores_and_choices_that_were_counted():
    cfg = naive.tiny()
    variables = naive.variables_of(cfg)

    output = naive.forward(cfg, CAPTURE)(variables, TOKENS, POSITIONS, SEGMENTS)

    scores_LBTE, chosen_LBTK = output.captured["scores"], output.captured["chosen"]
    assert scores_LBTE.shape == (2, 2, 8, 8) and chosen_LBTK.shape == (2, 2, 8, 3)
    for layer in range(2):
        assert np.array_equal(output.counts["bias"][layer], np.bincount(np.ravel(chosen_LBTK[layer]), minlength=8))
        by_score = [naive.route(cfg, s_E, variables["router"]["bias"][layer])[0] for s_E in
                    np.asarray(scores_LBTE[layer]).reshape(-1, 8)]
        assert np.array_equal(np.reshape(chosen_LBTK[layer], (-1, 3)), by_score)
    assert {int(counts.sum()) for counts in (*output.counts["bias"], *output.counts["mtp_bias"])} == {2 * 8 * 3}


@pytest.mark.parametrize("capture", [(), ("scores",), ("chosen",)])
def test_only_what_is_asked_for_is_captured(capture):
    cfg = naive.tiny()
    shapes = jax.eval_shape(naive.forward(cfg, capture), naive.variables_of(cfg), TOKENS)

    assert tuple(shapes.captured) == capture


def test_logits_can_be_left_out():
    cfg = naive.tiny()

    output = jax.eval_shape(lambda v: DeepSeekV3(cfg).apply(v, TOKENS, logits=False), naive.variables_of(cfg))

    assert output.logits_BTW is None and output.mtp_logits == ()
    assert output.hidden_BTD.shape == (2, 8, 32) and len(output.mtp_hidden) == 1


@pytest.mark.parametrize(
    ("overrides", "collections"),
    [
        (dict(), {"params": None, "router": {"bias": (2, 8), "mtp_bias": (1, 8)}}),
        (dict(mtp_depth=0), {"params": None, "router": {"bias": (2, 8)}}),
        (dict(num_dense_layers=3), {"params": None, "router": {"mtp_bias": (1, 8)}}),
        (naive.V2, {"params": None}),
    ],
)
def test_the_biases_lie_in_the_router_collection_and_softmax_models_have_none(overrides, collections):
    variables = naive.variables_of(naive.tiny(**overrides))

    assert variables.keys() == collections.keys()
    assert {k: v.shape for k, v in variables.get("router", {}).items()} == collections.get("router", {})
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"]) if "bias" in str(path)]


def test_documents_packed_into_a_row_are_the_documents_alone():
    cfg = naive.tiny()
    variables, run = naive.variables_of(cfg), naive.forward(cfg, CAPTURE)
    packed = run(variables, TOKENS, POSITIONS, SEGMENTS).logits_BTW[1, 3:]

    alone = np.concatenate([TOKENS[1, 3:], TOKENS[1, :3]])[None].repeat(2, 0)  # the second document, then any tokens
    expected = run(variables, alone, np.arange(8)[None].repeat(2, 0).astype(np.int32), 0 * SEGMENTS).logits_BTW[0, :5]

    np.testing.assert_allclose(packed, expected, atol=1e-4)
    unmasked = run(variables, TOKENS, POSITIONS, 0 * SEGMENTS).logits_BTW[1, 3:]
    assert np.abs(packed - unmasked).max() > 0.01


def test_only_distances_between_positions_matter():
    cfg = naive.tiny()
    variables, run = naive.variables_of(cfg), naive.forward(cfg, CAPTURE)
    base, moved, stretched = (run(variables, TOKENS, p.astype(np.int32), 0 * SEGMENTS).logits_BTW
                              for p in (0 * POSITIONS + np.arange(8), 0 * POSITIONS + np.arange(8) + 100,
                                        0 * POSITIONS + np.arange(8) * 3))

    np.testing.assert_allclose(base, moved, atol=1e-3)
    assert np.abs(base - stretched).max() > 0.02


def test_a_bfloat16_model_has_float32_masters_and_float32_logits():
    cfg = naive.tiny(dtype="bfloat16")
    shapes = jax.eval_shape(lambda: DeepSeekV3(cfg).init(jax.random.key(0), TOKENS))

    output = jax.eval_shape(DeepSeekV3(cfg).apply, shapes, TOKENS)

    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert output.hidden_BTD.dtype == jnp.bfloat16
    assert {x.dtype for x in (output.logits_BTW, *output.mtp_logits, output.sequence_loss)} == {jnp.dtype("float32")}


def sizes(name, **overrides):
    """{path: elements of the array, per layer where it is stacked} of a preset; nothing is allocated."""
    shapes = jax.eval_shape(
        lambda: DeepSeekV3(model_config(name, **overrides)).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    return {"/".join(p.key for p in path): int(np.prod(x.shape)) for path, x in
            jax.tree_util.tree_leaves_with_path(shapes)}


EMBEDDING = 926_679_040


@pytest.fixture(scope="module")
def v3():
    return sizes("v3_671b")


@pytest.mark.parametrize(
    ("part", "of", "elements"),
    [
        ("params/layers/attention/", 58, 187_107_328),
        ("params/dense_layers/attention/", 3, 187_107_328),
        ("params/dense_layers/ffn/", 3, 396_361_728),
        ("params/layers/ffn/shared/", 58, 44_040_192),
        ("params/embedding", 1, EMBEDDING),
        ("params/head", 1, EMBEDDING),
        ("router/bias", 58, 256),
    ],
)
def test_parts_of_v3_have_the_published_number_of_parameters(v3, part, of, elements):
    assert sum(n for path, n in v3.items() if path.startswith(part)) == of * elements


def test_a_moe_layer_of_v3_has_the_published_number_of_parameters_and_a_routed_expert_too(v3):
    layer = sum(n for path, n in v3.items() if path.startswith(("params/layers/ffn/", "router/bias")))
    routed = sum(v3[f"params/layers/ffn/{name}"] for name in ("gate", "up", "down"))

    assert layer == 58 * 11_320_164_608
    assert routed == 58 * 256 * 44_040_192


@pytest.mark.parametrize(
    ("name", "main", "mtp"),
    [("v3_671b", 671_026_419_200, 11_610_068_224), ("v3_2_671b", 671_877_944_064, 11_624_027_648),
     ("v2_lite_16b", 15_706_484_224, 0), ("v2_236b", 235_741_434_880, 0),
     ("moonlight_16b", 15_960_110_208, 0), ("kimi_k2_1t", 1_026_408_232_448, 0),
     ("glm_4_7_flash", 29_943_393_920, 643_706_176), ("gigachat3_10b", 10_672_535_616, 413_212_736)])
def test_presets_have_the_published_number_of_parameters(name, main, mtp):
    found = sizes(name)

    assert sum(n for path, n in found.items() if "mtp" not in path) == main
    assert sum(n for path, n in found.items() if "mtp" in path) == mtp


def test_the_released_checkpoint_of_v3_is_the_model_and_copies_of_embedding_and_head(v3):
    assert sum(v3.values()) + 2 * EMBEDDING == 684_489_845_504


def test_gigachat3_has_the_parameters_that_its_published_files_have():
    D, F, experts, layers, vocabulary = 1536, 1280, 64, 26, 128_256
    attention = D * 32 * 192 + D * 576 + 512 + 512 * 32 * (128 + 192) + 32 * 192 * D  # no query latent
    moe = (experts + 1) * 3 * D * F + experts * D
    layer = attention + 2 * D
    main = 2 * vocabulary * D + D + layers * layer + 3 * D * 8960 + (layers - 1) * moe
    module = layer + moe + 2 * D * D + 3 * D

    found = sizes("gigachat3_10b")
    biases = sum(n for path, n in found.items() if path.startswith("router/"))
    assert biases == layers * experts
    assert sum(found.values()) - biases == main + module
    assert main == 10_672_534_016  # the count of a published copy without the MTP module, biases not counted
    # Layer 26 of the published files, in bfloat16, including the module's copies of embedding and head.
    assert 2 * (module + experts + 2 * vocabulary * D) == 1_614_430_336
