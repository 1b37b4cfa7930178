"""config.json: both dialects in, one file that both readers take out, and a name for everything unsupported."""

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


@pytest.mark.parametrize(("raw", "preset", "depth"), [
    (RELEASED_V3, "v3_671b", 1), (RELEASED_V2_LITE, "v2_lite_16b", 0)])
def test_released_configs_are_the_presets(raw, preset, depth):
    assert hf_config.same_model(hf_config.read(raw, depth), model_config(preset))


def test_both_dialects_say_the_same():
    new = {k: v for k, v in RELEASED_V3.items() if k not in ("rope_scaling", "rope_theta")}
    new |= {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0}, "rope_interleave": True}

    assert hf_config.read(new, 1) == hf_config.read(RELEASED_V3, 1)


@pytest.mark.parametrize("preset", ["tiny", "v2_lite_16b", "v2_236b", "v3_671b"])
def test_what_is_written_is_read_again_in_either_dialect(preset):
    cfg = model_config(preset)
    raw = json.loads(json.dumps(hf_config.write(cfg, "bfloat16", fp8=True)))
    old = {k: v for k, v in raw.items() if k not in ("rope_parameters", "rope_interleave")}
    new = {k: v for k, v in raw.items() if k not in ("rope_scaling", "rope_theta")}

    for dialect in (raw, old, new):
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
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
    ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ({"topk_method": "greedy"}, "topk_method='greedy'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"rope_scaling": {**YARN, "type": "yarn", "attention_factor": 0.5}}, "rope attention_factor=0.5"),
    ({"rope_scaling": {**YARN, "type": "yarn", "truncate": False}}, "rope truncate=False"),
    ({"rope_scaling": {**YARN, "type": "yarn", "mscale": 0.7, "mscale_all_dim": 0}}, "only one of mscale"),
    ({"rope_scaling": {"type": "yarn", "factor": 40}}, "yarn without original_max_position_embeddings"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config={'quant_method': 'awq'}"),
    ({"quantization_config": hf_config.QUANTIZATION | {"weight_block_size": [64, 64]}}, "quantization_config"),
    ({"model_type": "deepseek_v32"}, "model_type='deepseek_v32'"),
    ({"hidden_size": None}, "lacks hidden_size"),
])
def test_what_is_not_supported_is_named_in_one_line(fields, named):
    with pytest.raises(ConfigError) as error:
        hf_config.read(RELEASED_V3 | fields)

    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("fields", "named"), [
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn' (not an object)"),
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
    """Released code drops the route scale then, transformers ignores the field."""
    with pytest.raises(ConfigError, match="norm_topk_prob=True"):
        hf_config.read(RELEASED_V2_LITE | {"norm_topk_prob": True})


@pytest.mark.parametrize(("fields", "named"), [
    ({"norm_eps": 1e-5}, "norm_eps"), ({"router_bias": "multiplicative"}, "router_bias='multiplicative'"),
    ({"router_bias": "none"}, "router_bias='none'"), ({"num_shared_experts": 0}, "num_shared_experts=0"),
    ({"score": "softmax", "router_bias": "none"}, "normalize_gates=True with softmax scores, model.mtp_depth=1")])
def test_a_model_that_no_family_has_is_not_exported(fields, named):
    with pytest.raises(ConfigError, match=named):
        hf_config.write(model_config("tiny", **fields), "float32")
