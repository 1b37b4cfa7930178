"""Conversion between Hugging Face's config.json and our ModelConfig.

Two dialects are read: that of the released files (`rope_theta` and `rope_scaling`) and that of transformers 5
(`rope_parameters`); where a file has both, `rope_scaling` counts, as in transformers. The released one is written,
which all readers know. Models with another name but the architecture of DeepSeek-V3 are read as such. A field that
requires a computation which this model does not have is an error that names it; no field that changes the result is
ignored.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from deepseek_jax import io
from deepseek_jax.config import PARTS, ConfigError, ModelConfig, Yarn, shown
from deepseek_jax.config.names import HUGGING_FACE, INDEXER
from deepseek_jax.interop import int4
from kernels_pallas.constants import BLOCK

# Keys whose null or absence has a meaning; and those for which absence means something else.
NULL = {"q_lora_rank": None, "n_shared_experts": 0, "n_group": 1, "topk_group": 1, "initializer_range": 0.02,
        "first_k_dense_replace": 0, "rms_norm_eps": 1e-6}
NULLS = {"glm4_moe_lite": {"first_k_dense_replace": 1, "rms_norm_eps": 1e-5}}
FAMILIES = {"deepseek_v3": ("DeepseekV3ForCausalLM", "sigmoid"), "deepseek_v2": ("DeepseekV2ForCausalLM", "softmax"),
            "deepseek_v32": ("DeepseekV32ForCausalLM", "sigmoid")}
# Other names of deepseek_v3, and whether transformers knows them; the fields decide whether a model is one.
ALIASES = {"kimi_k2": False, "joyai_llm_flash": False, "glm4_moe_lite": True}
WRAPPERS = ("kimi_k25", "kimi_vl")  # a vision model and a language model, which is their text_config
# Models with a similar name that are different.
OTHERS = {
    "glm_moe_dsa": "GLM-5, whose layers share indexers",
    "deepseek_v4": "DeepSeek-V4, another architecture", "glm5_next": "GLM-5.3-Flash, another architecture",
    "glm4_moe": "GLM-4.5, whose attention has no latents", "kimi_linear": "Kimi-Linear, with linear attention",
    "longcat_flash": "LongCat, some of whose experts compute nothing", "axk1": "A.X-K1, which has one more norm",
    "mistral_large4": "Mistral Large, with softmax gates and another scaling of positions"}
LATENT_EPS = 1e-6  # epsilon of the latents' norms in transformers, whatever rms_norm_eps says
# Fields with only one possibility here: the values that agree with it, in all families or by family. Absent keys agree.
ONLY = {"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",), "tie_word_embeddings": (False,),
        "moe_layer_freq": (1,), "attention_dropout": (0,), "partial_rotary_factor": (1,), "sliding_window": (None,),
        "zero_expert_num": (0,), "quantization": (None,),
        "index_topk": {"deepseek_v3": (None,), "deepseek_v2": (None,)},
        "rope_interleave": {"deepseek_v32": (True,)},
        "scoring_func": {"deepseek_v3": ("sigmoid",), "deepseek_v2": ("softmax",), "deepseek_v32": ("sigmoid",)},
        "topk_method": {"deepseek_v3": ("noaux_tc",), "deepseek_v2": ("greedy", "group_limited_greedy"),
                        "deepseek_v32": ("noaux_tc",)},
        # Released code would renormalise and drop the route scale; transformers does neither.
        "norm_topk_prob": {"deepseek_v3": (True, False), "deepseek_v2": (False, None), "deepseek_v32": (True, False)}}
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK]}
POWER_OF_TWO = {"scale_fmt": "ue8m0"}  # V3.1: block scales are powers of two
# compressed-tensors: how the routed experts of Kimi-K2-Thinking and its successors are packed.
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int4.GROUP}
FLOATS = ("routed_scaling_factor", "initializer_range", "rms_norm_eps")
LARGEST = 1e15  # of a number whose range nothing else limits
YARN = {"factor": "factor", "original_max_position_embeddings": "original_length", "beta_fast": "beta_fast",
        "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}


def load(folder: str) -> dict:
    """The config.json of a checkpoint. Raises ConfigError."""
    path = os.path.join(folder, "config.json")
    try:
        raw = io.read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); fetch it again.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object; fetch it again.")
    return raw


def read(raw: dict, mtp_depth: int = 0, dtype: str = "bfloat16") -> ModelConfig:
    """The model that a config.json describes.

    Args:
      mtp_depth: MTP modules that the checkpoint contains; its config may claim more.
      dtype: of activations.

    Raises:
      ConfigError: fields that this model does not have, all of them in one line; or missing ones.
    """
    raw = text_config(raw)
    family = _family(raw)
    null = NULL | NULLS.get(raw["model_type"], {})
    mistyped = list(_mistyped(raw))
    if mistyped:
        raise ConfigError(f"config.json has values of a wrong type: {', '.join(mistyped)}.")
    names = HUGGING_FACE | (INDEXER if family == "deepseek_v32" else {})
    missing = [name for name in names if raw.get(name) is None and (name in INDEXER or name not in null | ONLY.keys())]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}.")
    problems = [f"{name}={shown(raw[name])} (only {' or '.join(map(repr, allowed))})"
                for name, allowed in _allowed(raw, family) if raw.get(name) is not None and raw[name] not in allowed]
    problems += _quantization_problems(raw.get("quantization_config") or {})
    dense = _dense_layers(raw, null["first_k_dense_replace"], problems)
    yarn, theta = _read_rope(raw, problems)
    if problems:
        raise ConfigError(f"config.json asks for what this model does not have: {', '.join(problems)}.")
    values: dict[str, Any] = {ours: null.get(theirs) if raw.get(theirs) is None else raw[theirs]
                              for theirs, ours in names.items()}
    values |= {"num_dense_layers": dense, "latent_norm_eps": LATENT_EPS}
    values["normalize_gates"] = bool(raw.get("norm_topk_prob", family != "deepseek_v2"))
    if family == "deepseek_v2" and raw.get("topk_method") in ("greedy", None):  # groups are not used
        values |= {"num_groups": 1, "groups_kept": 1}
    score = FAMILIES[family][1]
    for name in ("route_scale", "norm_eps", "init_std"):
        values[name] = float(values[name])
    values |= {"score": score, "router_bias": "additive" if score == "sigmoid" else "none", "dtype": dtype}
    return ModelConfig(**values, mtp_depth=mtp_depth, rope_theta=theta, yarn=yarn, remat="report")


def text_config(raw: dict) -> dict:
    """The config.json of the language model: `raw` itself, or the part of it in a model that has a vision model too.

    Raises ConfigError where that part is missing.
    """
    if raw.get("model_type") not in list(WRAPPERS):  # a list takes what cannot be hashed
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"config.json: text_config={shown(text)} of model_type={raw['model_type']} is not an object; "
                          "fetch it again.")
    text = {"model_type": "deepseek_v3"} | text
    around = {name: raw[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config",
                                           "dtype", "torch_dtype") if raw.get(name) is not None}
    return around | {name: value for name, value in text.items() if value is not None or name not in around}


def _family(raw):
    """deepseek_v3, deepseek_v2 or deepseek_v32. Raises ConfigError for another model."""
    kind = raw.get("model_type")
    if kind is None and "model" in raw:
        raise ConfigError("config.json is that of a run of deepseek_jax.train; give its folder as --workdir.")
    if kind in list(OTHERS):
        raise ConfigError(f"config.json: model_type={shown(kind)} is not supported: it is {OTHERS[kind]}.")
    if kind not in [*FAMILIES, *ALIASES]:
        raise ConfigError(f"config.json: model_type={shown(kind)} is not supported; only "
                          f"{', '.join([*FAMILIES, *ALIASES, *WRAPPERS])} are.")
    return kind if kind in FAMILIES else "deepseek_v3"


def _mistyped(raw):
    """Values that `read` cannot use, as text; ModelConfig checks the rest."""
    if not isinstance(raw.get("mlp_layer_types") or [], list):
        yield f"mlp_layer_types={shown(raw['mlp_layer_types'])} (not a list)"
        return
    for name in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(raw.get(name) or {}, dict):
            yield f"{name}={shown(raw[name])} (not an object)"
            return
    depth = raw.get("num_nextn_predict_layers")
    if depth is not None and (type(depth) is not int or depth < 0):
        yield f"num_nextn_predict_layers={shown(depth)} (not a whole number from 0 on)"
    numbers = {name: raw.get(name) for name in ("rope_theta", *FLOATS)}
    for dialect in ("rope_scaling", "rope_parameters"):
        rope = raw.get(dialect) or {}
        numbers |= {f"{dialect}.{name}": rope.get(name) for name in ("rope_theta", *YARN)}
    for name, value in numbers.items():
        if value is not None and (type(value) not in (int, float) or value != value):
            yield f"{name}={shown(value)} (not a number)"
        elif value is not None and abs(value) > LARGEST:
            yield f"{name}={shown(value)} (beyond {LARGEST:g})"
        elif value is not None and name.endswith("original_max_position_embeddings") and value % 1:
            yield f"{name}={value!r} (not a whole number)"


def _allowed(raw, family):
    for name, allowed in ONLY.items():
        if not isinstance(allowed, dict):
            yield name, allowed
        elif family in allowed:
            yield name, allowed[family]
    yield "num_key_value_heads", (raw.get("num_attention_heads"), None)


def _quantization_problems(quantization):
    """The parts of a quantization_config that are neither FP8 as released nor the int4 of compressed-tensors."""
    method = quantization.get("quant_method")
    if not quantization:
        return
    if method == "fp8":
        found, wanted = quantization, {k: v for k, v in QUANTIZATION.items() if k != "activation_scheme"}
        yield from _unlike("quantization_config", {k: found.get(k, v) for k, v in wanted.items()}, wanted)
    elif method == "compressed-tensors":
        yield from _unlike("quantization_config", quantization, {"format": "pack-quantized"})
        groups = quantization.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) and groups else [None]:
            weights = group.get("weights") if isinstance(group, dict) else None
            yield from _unlike("quantization_config.config_groups.weights", weights, INT4)
    else:
        yield f"quantization_config.quant_method={shown(method)} (only 'fp8' or 'compressed-tensors')"


def _unlike(path, found, wanted):
    if not isinstance(found, dict):
        yield f"{path}={shown(found)} (not an object)"
        return
    for name, value in wanted.items():
        if found.get(name) != value:
            yield f"{path}.{name}={shown(found.get(name))} (only {value!r})"


def _dense_layers(raw, absent, problems):
    """The number of first layers without experts: first_k_dense_replace, or the same as a list of words."""
    stated, kinds, layers = raw.get("first_k_dense_replace"), raw.get("mlp_layer_types"), raw["num_hidden_layers"]
    if not kinds:
        return absent if stated is None else stated
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense) or len(kinds) != layers:
        problems.append(f"mlp_layer_types={shown(kinds)} (only 'dense' for the first layers and 'sparse' for the rest, "
                        f"num_hidden_layers={shown(layers)} words)")
    if stated not in (None, dense):
        problems.append(f"first_k_dense_replace={shown(stated)} against {dense} dense layers in mlp_layer_types")
    return dense


def _read_rope(raw, problems):
    """-> (Yarn or None, theta), as transformers reads both dialects; appends what is not supported to `problems`."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = next((float(held["rope_theta"]) for held in (rope, raw) if held.get("rope_theta") is not None), 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", *YARN}
    problems += [f"rope {name}={shown(value)}" for name, value in rope.items()
                 if name not in known and value not in (None, {"truncate": True, "partial_rotary_factor": 1}.get(name))]
    if kind == "default":
        return None, theta
    if kind != "yarn":
        problems.append(f"rope_type={shown(kind)} (only 'default' or 'yarn')")
        return None, theta
    lacking = [name for name in ("factor", "original_max_position_embeddings") if rope.get(name) is None]
    problems += [f"yarn without {name}" for name in lacking]
    scales = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
    if not all(scales) and not (scales[0] in (None, 0, 1) and not scales[1]):
        # The released code and transformers disagree about the amplitude then.
        problems.append(f"yarn with only one of mscale={scales[0]!r} and mscale_all_dim={scales[1]!r}")
    if lacking:
        return None, theta
    values = {ours: rope[theirs] for theirs, ours in YARN.items() if rope.get(theirs) is not None}
    if not all(scales):
        values |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    numbers: dict[str, Any] = {k: int(v) if k == "original_length" else float(v) for k, v in values.items()}
    return Yarn(**numbers), theta


def halves(raw: dict, cfg: ModelConfig) -> int:
    """The rotary dimension if the checkpoint keeps RoPE's pairs half-split; 0 if interleaved, as released."""
    return cfg.rope_head_dim if raw.get("rope_interleave") is False and cfg.score == "sigmoid" else 0


def write(cfg: ModelConfig, dtype: str, fp8: bool = False, special: dict | None = None) -> dict:
    """A config.json that transformers 5 and the released code read.

    Args:
      dtype: of the weights, and what computes with them.
      fp8: the checkpoint holds FP8 weights.
      special: bos_token_id and eos_token_id, an id or a list of them.

    Raises:
      ConfigError: the model has something that no published family has.
    """
    sparse = cfg.index_topk is not None
    family = "deepseek_v2" if cfg.score == "softmax" else "deepseek_v32" if sparse else "deepseek_v3"
    _check_writable(cfg)
    names = HUGGING_FACE | (INDEXER if sparse else {})
    raw = {theirs: getattr(cfg, ours) for theirs, ours in names.items()}
    rope, length = None, 4096
    if cfg.yarn is not None:
        rope = {"type": "yarn", "rope_type": "yarn"}
        rope |= {theirs: getattr(cfg.yarn, ours) for theirs, ours in YARN.items()}
        length = int(cfg.yarn.factor * cfg.yarn.original_length)
    raw |= {"architectures": [FAMILIES[family][0]], "model_type": family, "max_position_embeddings": length,
            "num_key_value_heads": cfg.num_heads, "rope_theta": cfg.rope_theta, "rope_scaling": rope,
            "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
            "moe_layer_freq": 1, "scoring_func": cfg.score, "torch_dtype": dtype, "dtype": dtype,
            "bos_token_id": None, "eos_token_id": None, **(special or {})}
    if family != "deepseek_v2":
        raw |= {"topk_method": "noaux_tc", "num_nextn_predict_layers": cfg.mtp_depth}
        raw |= {} if sparse else {"rope_interleave": True}
    else:
        raw |= {"topk_method": "greedy" if cfg.num_groups == 1 else "group_limited_greedy"}
    return raw | ({"quantization_config": QUANTIZATION} if fp8 else {})


def again(raw: dict) -> dict:
    """The config.json of a checkpoint as its export carries it: one that transformers opens without code of others.

    A name that transformers does not know becomes deepseek_v3, and of two RoPE dialects the one that counts stays. The
    architecture is named, and numbers that transformers wants as floats are.
    """
    raw = dict(raw)
    if not ALIASES.get(raw["model_type"], True):
        raw |= {"model_type": "deepseek_v3", "architectures": [FAMILIES["deepseek_v3"][0]]}
        raw.pop("auto_map", None)
    if raw["model_type"] in FAMILIES and not raw.get("architectures"):  # the text part of a model that sees
        raw["architectures"] = [FAMILIES[raw["model_type"]][0]]
    raw |= {name: float(raw[name]) for name in FLOATS if type(raw.get(name)) is int}  # transformers takes no int there
    if raw.get("rope_scaling") and "rope_parameters" in raw:
        del raw["rope_parameters"]
    return raw


def _check_writable(cfg):
    wrong = [f"model.{name}={getattr(cfg, name)!r}" for name, published in PARTS.items()
             if getattr(cfg, name) != published]
    if cfg.latent_norm_eps != LATENT_EPS:
        wrong.append(f"model.latent_norm_eps={cfg.latent_norm_eps} (transformers has {LATENT_EPS} whatever config.json "
                     "says)")
    if cfg.num_shared_experts == 0:
        wrong.append("model.num_shared_experts=0")
    if cfg.score == "sigmoid" and cfg.router_bias != "additive":
        wrong.append(f"model.router_bias={cfg.router_bias!r} with sigmoid scores")
    if cfg.score == "softmax":
        wrong += [f"{what} with softmax scores" for what, has in (
            (f"model.router_bias={cfg.router_bias!r}", cfg.has_router_bias),
            ("model.normalize_gates=True", cfg.normalize_gates),
            (f"model.mtp_depth={cfg.mtp_depth}", cfg.mtp_depth > 0),
            (f"model.index_topk={cfg.index_topk}", cfg.index_topk is not None)) if has]
    if cfg.yarn is not None and not cfg.yarn.mscale_all_dim and cfg.yarn.mscale != 1:
        wrong.append(f"model.yarn.mscale={cfg.yarn.mscale} without mscale_all_dim")
    if wrong:
        raise ConfigError(f"no published model family has {', '.join(wrong)}; such a model cannot be exported.")


def same_model(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configs compute the same, up to precision and how the work is scheduled."""
    how = dict(dtype="float32", remat="none", attention_block=1, init_std=1.0, index_warmup=False,
               implementation="auto")
    return dataclasses.replace(a, **how) == dataclasses.replace(b, **how)
