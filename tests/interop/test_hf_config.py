"""config.json: both dialects are read, the written file suits both readers, and unsupported features are named."""

import json

import pytest

from deepseek_jax.config import ConfigError, Yarn, model_config
from deepseek_jax.interop import hf_config
from tests.interop.checkpoints import CASES, config, golden

YARN = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0}
RELEASED_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": hf_config.QUANTIZATION,
    "rms_norm_eps": 1e-06, "rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280}
RELEASED_V2_LITE = {
    "aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {**YARN, "type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "topk_group": 1, "topk_method": "greedy",
    "v_head_dim": 128, "vocab_size": 102400}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": None}
INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}}
SHARED = {**RELEASED_V3, "n_group": 1, "topk_group": 1, "rope_scaling": None, "quantization_config": None}
RELEASED_MOONLIGHT = SHARED | {
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "vocab_size": 163840}
RELEASED_KIMI_K2 = SHARED | {
    "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_routed_experts": 384, "num_attention_heads": 64,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_scaling": {**YARN, "beta_fast": 1.0,
    "factor": 32.0, "type": "yarn"}, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "vocab_size": 163840}
RELEASED_GLM = SHARED | {
    "model_type": "glm4_moe_lite", "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
    "mlp_layer_types": ["dense"] + ["sparse"] * 46, "first_k_dense_replace": None, "n_routed_experts": 64,
    "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192, "rms_norm_eps": 1e-5,
    "rope_theta": 1000000, "routed_scaling_factor": 1.8, "v_head_dim": 256, "vocab_size": 154880,
    "eos_token_id": [154820, 154827, 154829]}
RELEASED_JOYAI = SHARED | {
    "model_type": "joyai_llm_flash", "first_k_dense_replace": 1, "hidden_size": 2048, "moe_intermediate_size": 768,
    "num_hidden_layers": 40, "rope_theta": 32000000.0}
RELEASED_GIGACHAT = SHARED | {
    "first_k_dense_replace": 1, "hidden_size": 1536, "intermediate_size": 8960, "moe_intermediate_size": 1280,
    "n_routed_experts": 64, "num_attention_heads": 32, "num_experts_per_tok": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 32, "q_lora_rank": None, "rope_theta": 100000, "routed_scaling_factor": 1,
    "v_head_dim": 192, "vocab_size": 128256}
V32 = {"model_type": "deepseek_v32", "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}


@pytest.mark.parametrize(("raw", "preset", "depth"), [
    (RELEASED_V3 | V32, "v3_2_671b", 1),
    (RELEASED_V3, "v3_671b", 1), (RELEASED_V2_LITE, "v2_lite_16b", 0), (RELEASED_MOONLIGHT, "moonlight_16b", 0),
    (RELEASED_KIMI_K2, "kimi_k2_1t", 0), (RELEASED_GLM, "glm_4_7_flash", 1),
    (RELEASED_GIGACHAT, "gigachat3_10b", 1)])
def test_released_configs_are_the_presets(raw, preset, depth):
    assert hf_config.same_model(hf_config.read(raw, depth), model_config(preset))


def test_a_name_of_others_for_the_same_fields_is_the_same_model():
    plain = hf_config.read(RELEASED_JOYAI | {"model_type": "deepseek_v3"}, 1)

    assert hf_config.read(RELEASED_JOYAI, 1) == plain
    assert (plain.norm_eps, plain.latent_norm_eps) == (1e-6, 1e-6)


def test_a_model_with_a_vision_model_is_read_for_its_language_model():
    whole = {"model_type": "kimi_k25", "vision_config": {"hidden_size": 1152}, "eos_token_id": 163586,
             "tie_word_embeddings": True, "text_config": RELEASED_KIMI_K2 | {"eos_token_id": None}}

    assert hf_config.read(whole) == hf_config.read(RELEASED_KIMI_K2)
    text = hf_config.text_config(whole)
    assert (text["eos_token_id"], text["model_type"]) == (163586, "kimi_k2")
    assert hf_config.text_config(text) is text


def test_int4_of_compressed_tensors_is_read():
    assert hf_config.read(RELEASED_KIMI_K2 | {"quantization_config": INT4}) == hf_config.read(RELEASED_KIMI_K2)


@pytest.mark.parametrize(("kind", "eps", "dense"), [("deepseek_v3", 1e-6, 0), ("glm4_moe_lite", 1e-5, 1)])
def test_absent_keys_mean_what_the_class_of_transformers_says(kind, eps, dense):
    absent = {"rms_norm_eps": None, "first_k_dense_replace": None, "mlp_layer_types": None}
    cfg = hf_config.read(RELEASED_GLM | absent | {"model_type": kind}, 1)

    assert (cfg.norm_eps, cfg.latent_norm_eps, cfg.num_dense_layers) == (eps, 1e-6, dense)


def test_of_two_dialects_of_rope_the_released_one_counts_and_goes_out_alone():
    raw = RELEASED_V3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}

    assert hf_config.read(raw, 1) == hf_config.read(RELEASED_V3, 1)
    assert hf_config.again(raw) == RELEASED_V3


@pytest.mark.parametrize(("raw", "kind"), [(RELEASED_KIMI_K2, "deepseek_v3"), (RELEASED_JOYAI, "deepseek_v3"),
                                           (RELEASED_GLM, "glm4_moe_lite"), (RELEASED_V3, "deepseek_v3")])
def test_a_name_that_transformers_does_not_know_goes_out_as_deepseek_v3(raw, kind):
    again = hf_config.again(raw | {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}})

    assert again["model_type"] == kind
    assert ("auto_map" in again) == (raw["model_type"] == kind)


def test_an_export_names_its_architecture_and_has_floats_where_transformers_takes_nothing_else():
    bare = {k: v for k, v in RELEASED_GIGACHAT.items() if k != "architectures"}  # as the text part of a vision model

    again = hf_config.again(bare)
    assert again["architectures"] == ["DeepseekV3ForCausalLM"]
    assert type(again["routed_scaling_factor"]) is float and again["routed_scaling_factor"] == 1
    assert hf_config.read(again, 1) == hf_config.read(RELEASED_GIGACHAT, 1)


def test_both_dialects_say_the_same():
    new = {k: v for k, v in RELEASED_V3.items() if k not in ("rope_scaling", "rope_theta")}
    new |= {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0}, "rope_interleave": True}

    assert hf_config.read(new, 1) == hf_config.read(RELEASED_V3, 1)


@pytest.mark.parametrize("preset", ["tiny", "v2_lite_16b", "v2_236b", "v3_671b"])
def test_what_is_written_is_read_again_in_either_dialect(preset):
    cfg = model_config(preset)
    raw = json.loads(json.dumps(hf_config.write(cfg, "bfloat16", fp8=True)))
    new = {k: v for k, v in raw.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": raw["rope_theta"], **(raw["rope_scaling"] or {})}

    assert "rope_parameters" not in raw  # one dialect, which all readers know
    for dialect in (raw, new):
        assert hf_config.same_model(hf_config.read(dialect, cfg.mtp_depth), cfg)


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_wrote_survives_a_way_out_and_in(case):
    cfg = hf_config.read(config(golden(case)))

    assert hf_config.same_model(hf_config.read(hf_config.write(cfg, "float32")), cfg)


def test_greedy_routing_does_not_look_at_groups():
    cfg = hf_config.read(RELEASED_V2_LITE | {"n_group": 8, "topk_group": 3})

    assert (cfg.num_groups, cfg.groups_kept) == (1, 1)


def test_yarn_without_mscale_keeps_the_amplitude_and_leaves_the_softmax_alone():
    bare = {k: v for k, v in YARN.items() if not k.startswith("mscale")}
    cfg = hf_config.read(RELEASED_V3 | {"rope_scaling": {**bare, "type": "yarn"}})

    assert cfg.yarn == Yarn(mscale=1.0, mscale_all_dim=0.0)


@pytest.mark.parametrize(("fields", "named"), [
    ({"attention_bias": True}, "attention_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
    ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ({"topk_method": "greedy"}, "topk_method='greedy'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"rope_scaling": {**YARN, "type": "yarn", "attention_factor": 0.5}}, "rope attention_factor=0.5"),
    ({"rope_scaling": {**YARN, "type": "yarn", "truncate": False}}, "rope truncate=False"),
    ({"rope_scaling": {**YARN, "type": "yarn", "mscale": 0.7, "mscale_all_dim": 0}}, "only one of mscale"),
    ({"rope_scaling": {"type": "yarn", "factor": 40}}, "yarn without original_max_position_embeddings"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method='awq'"),
    ({"quantization_config": {"group_size": 64, "bits": 4}}, "quantization_config.quant_method=None"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "quantization={'group_size': 64"),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "quant_method='modelopt'"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "quant_method='mxfp4'"),
    ({"quantization_config": INT4 | {"format": "nvfp4-pack-quantized"}}, "format='nvfp4-pack-quantized'"),
    ({"quantization_config": INT4 | {"config_groups": {"group_0": {"weights": WEIGHTS | {"num_bits": 8}}}}},
     "config_groups.weights.num_bits=8 (only 4)"),
    ({"quantization_config": INT4 | {"config_groups": {"group_0": {"weights": WEIGHTS | {"group_size": 128}}}}},
     "group_size=128 (only 32)"),
    ({"quantization_config": INT4 | {"config_groups": None}}, "config_groups.weights=None"),
    ({"index_topk": 2048}, "index_topk=2048"),
    ({"zero_expert_num": 64}, "zero_expert_num=64"),
    ({"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types=['sparse', 'dense']"),
    ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 59}, "first_k_dense_replace=3 against 2 dense layers"),
    ({"quantization_config": hf_config.QUANTIZATION | {"weight_block_size": [64, 64]}}, "quantization_config"),
    ({"model_type": "deepseek_v32"}, "lacks index_topk, index_n_heads, index_head_dim"),
    (V32 | {"rope_interleave": False}, "rope_interleave=False (only True)"),
    (V32 | {"index_topk": "2048"}, "model.index_topk='2048'"),
    (V32 | {"index_head_dim": 64}, "model.index_head_dim=64; take more"),
    (V32 | {"q_lora_rank": None}, "set model.q_rank"),
    ({"model_type": "kimi_k3"}, "model_type='kimi_k3' is not supported; only deepseek_v3, deepseek_v2, deepseek_v32, "),
    ({"model_type": "kimi_k25", "text_config": ["x"]}, "text_config=['x'] of model_type=kimi_k25 is not an object"),
    *[({"model_type": kind}, f"model_type={kind!r} is not supported: it is ") for kind in hf_config.OTHERS],
    ({"hidden_size": None}, "lacks hidden_size"),
])
def test_what_is_not_supported_is_named_in_one_line(fields, named):
    with pytest.raises(ConfigError) as error:
        hf_config.read(RELEASED_V3 | fields)

    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("fields", "named"), [
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn' (not an object)"),
    ({"mlp_layer_types": "dense"}, "mlp_layer_types='dense' (not a list)"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' (not a number)"),
    ({"quantization_config": ["fp8"]}, "quantization_config=['fp8'] (not an object)"),
    ({"rope_theta": "10000"}, "rope_theta='10000' (not a number)"),
    ({"routed_scaling_factor": [2.5]}, "routed_scaling_factor=[2.5] (not a number)"),
    ({"rope_scaling": {**YARN, "type": "yarn", "factor": float("nan")}}, "rope_scaling.factor=nan (not a number)"),
    ({"rope_scaling": {**YARN, "type": "yarn", "original_max_position_embeddings": 40.5}}, "40.5 (not a whole"),
    ({"model_type": ["deepseek_v3"]}, "model_type=['deepseek_v3'] is not supported"),
    ({"hidden_size": "7168"}, "d_model"),
])
def test_a_value_of_a_wrong_type_is_named_in_one_line(fields, named):
    with pytest.raises(ConfigError) as error:
        hf_config.read(RELEASED_V3 | fields)

    assert named in str(error.value) and "\n" not in str(error.value)


def test_null_is_the_default_rope_theta():
    assert hf_config.read(RELEASED_V3 | {"rope_theta": None}).rope_theta == 10000


def test_renormalised_softmax_gates_are_refused():
    """In this case released code drops the route scale, and transformers ignores the field."""
    with pytest.raises(ConfigError, match="norm_topk_prob=True"):
        hf_config.read(RELEASED_V2_LITE | {"norm_topk_prob": True})


@pytest.mark.parametrize(("fields", "named"), [
    ({"latent_norm_eps": 1e-5}, "latent_norm_eps=1e-05"),
    ({"router_bias": "multiplicative"}, "router_bias='multiplicative'"),
    ({"router_bias": "none"}, "router_bias='none'"), ({"num_shared_experts": 0}, "num_shared_experts=0"),
    ({"score": "softmax", "router_bias": "none"}, "normalize_gates=True with softmax scores, model.mtp_depth=1")])
def test_a_model_that_no_family_has_is_not_exported(fields, named):
    with pytest.raises(ConfigError, match=named):
        hf_config.write(model_config("tiny", **fields), "float32")
