"""Every number of an experiment, in frozen dataclasses (no jax here).

Config files build an `ml_collections.ConfigDict` with `default_config(preset)` and change what they study; the
command line overrides single keys (`--config.train.steps=50`); `freeze` turns the result into `Config`. What cannot
work raises `ConfigError` there, in one line that says what would.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import math
import os

import ml_collections


class ConfigError(ValueError):
    """A mistake of the person who wrote the config or the command line: one line, with what would work."""


def _one_of(name, value, options):
    if value not in options:
        raise ConfigError(f"{name}={value!r} is unknown; take one of {', '.join(map(repr, options))}.")


def _nearest(key, options):
    options = sorted(options)
    close = difflib.get_close_matches(key, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are: {', '.join(options)}."


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Static YaRN context extension (arXiv 2309.00071, report section 4.3)."""

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of one model. Defaults are those of DeepSeek-V3 (report section 4.2)."""

    vocab_size: int = 129280
    d_model: int = 7168
    num_layers: int = 61
    num_dense_layers: int = 3
    num_heads: int = 128
    q_rank: int | None = 1536  # None: queries are projected directly, as in V2-Lite
    kv_rank: int = 512
    nope_head_dim: int = 128
    rope_head_dim: int = 64
    v_head_dim: int = 128
    dense_ffn_dim: int = 18432
    expert_ffn_dim: int = 2048
    num_experts: int = 256
    num_shared_experts: int = 1
    experts_per_token: int = 8
    num_groups: int = 8
    groups_kept: int = 4
    score: str = "sigmoid"  # "softmax": V2, without a routing bias
    router_bias: str = "additive"  # "multiplicative": the variant of arXiv 2408.15664; "none"
    normalize_gates: bool = True
    route_scale: float = 2.5
    mtp_depth: int = 1
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.006
    dtype: str = "bfloat16"  # of activations and products; parameters are float32 masters
    remat: str = "report"  # "none", "report" (norms, MLA up-projections, SwiGLU), "full"
    attention_block: int = 512  # query and key rows a block: memory grows with T * block, not T * T

    def __post_init__(self):
        _check_model(self)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        return self.nope_head_dim + self.rope_head_dim

    @property
    def has_router_bias(self) -> bool:
        return self.router_bias != "none"


def _check_model(c: ModelConfig):
    positive = ("vocab_size", "d_model", "num_layers", "num_heads", "kv_rank", "nope_head_dim", "rope_head_dim",
                "v_head_dim", "dense_ffn_dim", "expert_ffn_dim", "num_experts", "experts_per_token", "num_groups",
                "groups_kept", "attention_block", "rope_theta", "route_scale", "norm_eps", "init_std")
    for name in positive:
        if getattr(c, name) <= 0:
            raise ConfigError(f"model.{name}={getattr(c, name)} must be positive.")
    for name in ("num_dense_layers", "num_shared_experts", "mtp_depth"):
        if getattr(c, name) < 0:
            raise ConfigError(f"model.{name}={getattr(c, name)} cannot be negative; 0 leaves it out.")
    if c.q_rank is not None and c.q_rank <= 0:
        raise ConfigError(f"model.q_rank={c.q_rank} must be positive, or None to project queries directly.")
    if c.num_dense_layers > c.num_layers:
        raise ConfigError(f"model.num_dense_layers={c.num_dense_layers} is more than num_layers={c.num_layers}.")
    if c.rope_head_dim % 2:
        raise ConfigError(f"model.rope_head_dim={c.rope_head_dim} must be even: RoPE rotates pairs.")
    if c.num_experts % c.num_groups:
        fits = [g for g in range(1, c.num_experts + 1) if c.num_experts % g == 0]
        raise ConfigError(f"model.num_groups={c.num_groups} does not divide num_experts={c.num_experts}; "
                          f"take one of {fits}.")
    if c.groups_kept > c.num_groups:
        raise ConfigError(f"model.groups_kept={c.groups_kept} is more than num_groups={c.num_groups}.")
    group = c.num_experts // c.num_groups
    if c.score == "sigmoid" and 1 < c.num_groups and group < 2:
        raise ConfigError(f"model.num_groups={c.num_groups} leaves {group} expert a group; the group score adds the "
                          f"two best of a group, so take at most {c.num_experts // 2} groups.")
    if c.experts_per_token > group * c.groups_kept:
        raise ConfigError(f"model.experts_per_token={c.experts_per_token} asks for more than the "
                          f"{group * c.groups_kept} experts that the {c.groups_kept} kept groups hold; "
                          "lower it or raise groups_kept.")
    _one_of("model.score", c.score, ("sigmoid", "softmax"))
    _one_of("model.router_bias", c.router_bias, ("additive", "multiplicative", "none"))
    _one_of("model.dtype", c.dtype, ("bfloat16", "float32", "float64"))
    _one_of("model.remat", c.remat, ("none", "report", "full"))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences (report section 4.1)."""

    # (path, weight) pairs. A path is a folder, a file or a glob; "stdlib" is the running Python's own library.
    sources: tuple[tuple[str, float], ...] = (("stdlib", 1.0),)
    validation_fraction: float = 0.05  # of the files, chosen by the hash of their relative path
    fim_rate: float = 0.1  # share of documents rearranged prefix-suffix-middle, before packing
    split_punctuation_rate: float = 0.1  # of the tokens that join punctuation and line breaks: split at random
    mask_documents: bool = False  # attend only inside a document; the report packs without such a mask
    cache_dir: str | None = None  # token shards; None: inside the work directory
    prefetch: int = 4  # batches


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the report's learning-rate shape, in fractions of the run (report section 4.2)."""

    learning_rate: float = 2.2e-4
    warmup: float = 0.0085
    constant_until: float = 0.676  # 10T of 14.8T tokens
    cosine_until: float = 0.966  # 14.3T
    cosine_to: float = 0.1  # of learning_rate; held until tail_from
    tail_from: float = 0.989
    tail_to: float = 0.0332
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: str = "float32"  # the report keeps bfloat16

    def __post_init__(self):
        marks = (0.0, self.warmup, self.constant_until, self.cosine_until, self.tail_from, 1.0)
        if list(marks) != sorted(marks):
            raise ConfigError("optimizer: 0 <= warmup <= constant_until <= cosine_until <= tail_from <= 1 must hold; "
                              f"got {', '.join(f'{m:g}' for m in marks[1:-1])}.")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ConfigError("optimizer.learning_rate and optimizer.clip_norm must be positive.")
        _one_of("optimizer.moment_dtype", self.moment_dtype, ("bfloat16", "float32"))


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """How expert loads are kept even (report section 2.1.2, arXiv 2408.15664)."""

    bias_rule: str = "sign"  # or "proportional"
    bias_speed: float = 0.001  # 0 freezes the bias
    bias_until: float = 0.966  # fraction of the run after which the speed is 0
    sequence_loss_weight: float = 1e-4
    aux_loss_weight: float = 0.0  # the classic batch-wise auxiliary loss, as a baseline

    def __post_init__(self):
        _one_of("balance.bias_rule", self.bias_rule, ("sign", "proportional"))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run: how long, how much a step, what is saved."""

    steps: int = 1000
    batch_size: int = 8  # sequences a step
    sequence_length: int = 512
    micro_batches: int = 1  # gradient accumulation: batch_size is split into this many
    ramp_from: int | None = None  # sequences a step at the start; None: no ramp
    ramp_until: float = 0.032  # fraction of the run (469B of 14.8T tokens)
    mtp_weights: tuple[tuple[float, float], ...] = ((0.0, 0.3), (0.676, 0.1))  # (from this fraction on, lambda)
    ema_decay: float = 0.0  # 0: no moving average is kept
    loss_chunk: int = 1024  # tokens whose logits exist at once
    seed: int = 0
    eval_every: int = 100
    eval_batches: int = 0  # 0: the whole validation set
    checkpoint_every: int = 100
    checkpoints_kept: int = 3
    sample_tokens: int = 96
    sample_prompt: str = "def "

    def __post_init__(self):
        for name in ("steps", "batch_size", "sequence_length", "micro_batches", "loss_chunk", "checkpoints_kept",
                     "eval_every", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be positive.")
        if self.batch_size % self.micro_batches:
            fits = [m for m in range(1, self.batch_size + 1) if self.batch_size % m == 0]
            raise ConfigError(f"train.micro_batches={self.micro_batches} does not divide batch_size="
                              f"{self.batch_size}; take one of {fits}.")
        rows = self.batch_size // self.micro_batches
        if self.ramp_from is not None and (not 0 < self.ramp_from <= self.batch_size or self.ramp_from % rows):
            raise ConfigError(f"train.ramp_from={self.ramp_from} must be a multiple of the {rows} sequences of a "
                              f"micro-batch, and at most batch_size={self.batch_size}.")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay={self.ema_decay} must lie in [0, 1).")

    def micro_batches_at(self, step: int) -> int:
        """Micro-batches of step `step`: the batch ramp moves in whole micro-batches, so that steps compile once."""
        ramp_steps = math.ceil(self.ramp_until * self.steps)
        if self.ramp_from is None or step >= ramp_steps:
            return self.micro_batches
        first = self.ramp_from * self.micro_batches // self.batch_size
        return first + (self.micro_batches - first) * step // ramp_steps

    def sequences_before(self, step: int) -> int:
        """Sequences consumed by all steps before `step`: the data position."""
        rows = self.batch_size // self.micro_batches
        ramp_steps = math.ceil(self.ramp_until * self.steps) if self.ramp_from is not None else 0
        ramped = sum(self.micro_batches_at(s) for s in range(min(step, ramp_steps)))
        return rows * (ramped + self.micro_batches * max(0, step - ramp_steps))


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the weights come from. Spelled `init.from` in config files and on the command line."""

    from_: str | None = None  # a work directory: its parameters and router bias, with a fresh optimizer


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    balance: BalanceConfig = BalanceConfig()
    init: InitConfig = InitConfig()


_SMALL = dict(q_rank=96, kv_rank=64, nope_head_dim=32, rope_head_dim=16, v_head_dim=32, dense_ffn_dim=704,
              expert_ffn_dim=128, num_experts=32, experts_per_token=4, num_groups=4, groups_kept=2,
              vocab_size=8192, d_model=256, num_heads=4, init_std=0.02, attention_block=128)
_V2 = dict(vocab_size=102400, num_dense_layers=1, score="softmax", router_bias="none", normalize_gates=False,
           num_shared_experts=2, experts_per_token=6, mtp_depth=0,
           yarn=Yarn(mscale=0.707, mscale_all_dim=0.707))

PRESETS = {
    # As `small`, but shallow: learns real text in minutes on two CPU cores.
    "tiny": dict(_SMALL, num_layers=4, num_dense_layers=1, remat="none"),
    # The shape that this project and its peers are timed at.
    "small": dict(_SMALL, num_layers=6, num_dense_layers=1, remat="none"),
    "v2_lite_16b": dict(_V2, d_model=2048, num_layers=27, num_heads=16, q_rank=None, dense_ffn_dim=10944,
                        expert_ffn_dim=1408, num_experts=64, num_groups=1, groups_kept=1, route_scale=1.0),
    "v2_236b": dict(_V2, d_model=5120, num_layers=60, num_heads=128, dense_ffn_dim=12288, expert_ffn_dim=1536,
                    num_experts=160, num_groups=8, groups_kept=3, route_scale=16.0),
    "v3_671b": dict(yarn=Yarn()),
}


def model_config(name: str, **overrides) -> ModelConfig:
    """The preset `name` with fields replaced. Raises ConfigError for an unknown name, field or an impossible shape."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r}; {_nearest(name, PRESETS)}")
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    for key in overrides:
        if key not in fields:
            raise ConfigError(f"unknown config key model.{key}; {_nearest(key, fields)}")
    return ModelConfig(**{**PRESETS[name], **overrides})


def default_config(preset: str) -> ml_collections.ConfigDict:
    """The whole experiment at its defaults around a model preset, ready to be changed by a config file."""
    return ml_collections.ConfigDict(as_dict(Config(model=model_config(preset))), type_safe=False)


def as_dict(config) -> dict:
    """Nested plain dicts of a frozen config, in the spelling of config files. JSON-able."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        out[f.name.rstrip("_")] = as_dict(value) if dataclasses.is_dataclass(value) else value
    return out


def freeze(config) -> Config:
    """Checks a ConfigDict (or nested dict) and freezes it. Raises ConfigError."""
    return _build(Config, dict(config), "")


def load_config(path: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Runs `get_config()` of a config file, applies `--config.a.b=value` overrides, freezes. Raises ConfigError."""
    if not os.path.isfile(path):
        raise ConfigError(f"no config file {path}; those of this project lie in experiments/configs.")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} does not define get_config().")
    config = module.get_config()
    for override in overrides:
        _override(config, override)
    return freeze(config)


def _override(config, text: str):
    if not text.startswith("--config.") or "=" not in text:
        raise ConfigError(f"cannot read {text!r}; overrides look like --config.train.steps=50")
    path, value = text.removeprefix("--config.").split("=", 1)
    *parents, key = path.split(".")
    node = config
    for depth, part in enumerate(parents):
        if not hasattr(node, "keys") or part not in node:
            options = node.keys() if hasattr(node, "keys") else ()
            raise ConfigError(f"unknown config key {'.'.join(parents[:depth + 1])}; {_nearest(part, options)}")
        node = node[part]
    if not hasattr(node, "keys") or key not in node:
        raise ConfigError(f"unknown config key {path}; {_nearest(key, node.keys() if hasattr(node, 'keys') else ())}")
    try:
        node[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        node[key] = value


def _build(cls, values, prefix):
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown config key {prefix}{key}; {_nearest(key, fields)}")
        field = fields[key]
        kwargs[field.name] = _convert(field, value, f"{prefix}{key}")
    return cls(**kwargs)


_SECTIONS = {"ModelConfig": ModelConfig, "DataConfig": DataConfig, "TrainConfig": TrainConfig, "InitConfig": InitConfig,
             "OptimizerConfig": OptimizerConfig, "BalanceConfig": BalanceConfig, "Yarn": Yarn}
_SCALARS = {"int": int, "float": float, "str": str, "bool": bool}


def _convert(field, value, path):
    """Checks `value` against the field's annotation and returns it (ints become floats, lists become tuples)."""
    kind, _, optional = field.type.partition(" | ")
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{path} cannot be None.")
    if kind in _SECTIONS:
        if not hasattr(value, "items"):
            raise ConfigError(f"{path}={value!r} should be a section with keys, not a single value.")
        return _build(_SECTIONS[kind], value, path + ".")
    if kind.startswith("tuple"):
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, (tuple, list)) and len(v) == 2 for v in value):
            raise ConfigError(f"{path}={value!r} should be a tuple of pairs, such as {field.default!r}.")
        return tuple(tuple(v) for v in value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, _SCALARS[kind]) or (kind == "int" and isinstance(value, bool)):
        raise ConfigError(f"{path}={value!r} should be {kind}, not {type(value).__name__}.")
    return value
