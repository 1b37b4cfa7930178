"""Every number of an experiment, in frozen dataclasses (no jax here).

Config files build an `ml_collections.ConfigDict` with `default_config(preset)` and change what they study; the
command line overrides single keys (`--config.train.steps=50`); `freeze` turns the result into `Config`. What cannot
work raises `ConfigError` there, in one line that says what would.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import os
import re
import traceback
from typing import Any

import ml_collections

from deepseek_jax.config.mesh import MeshConfig, PipelineConfig, check_mesh
from deepseek_jax.config.schema import Checked, ConfigError, build, did_you_mean, key

GROUP_LIMITED = "group_limited"  # top-k of the best groups of experts (report section 2.1.2)
OWN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"  # "package.module:name"


@dataclasses.dataclass(frozen=True)
class Yarn(Checked, section="model.yarn", positive="factor original_length beta_fast beta_slow"):
    """Static YaRN context extension (arXiv 2309.00071, report section 4.3)."""

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclasses.dataclass(frozen=True)
class FP8Config(Checked, section="fp8", positive="promote_every", not_negative="accumulator_bits",
                choices={"scale": ("float32", "power_of_two"), "tiles": ("fine", "tensor"),
                         "gradient_tiles": ("1x128", "128x128"), "gradient_format": ("e4m3", "e5m2"),
                         "implementation": ("auto", "reference", "hopper", "tpu")}):
    """FP8 training (report section 3.3). All but `enabled` and `implementation` is there to study the recipe."""

    enabled: bool = False
    scale: str = "float32"  # "power_of_two": also where the report does not ask for it
    tiles: str = "fine"  # "tensor": one scale an array
    gradient_tiles: str = "1x128"  # "128x128": what diverged on the report's 16B model
    gradient_format: str = "e4m3"  # "e5m2": more range, less precision, as others train
    accumulator_bits: int = 0  # of a tensor core's partial sums; 0: float32, 14: Hopper's, modelled on "reference"
    promote_every: int | None = 128  # elements of K after which such a partial sum moves to float32; None: never
    implementation: str = "auto"  # of the kernels, as kernels_pallas.api has them

    def __post_init__(self):
        super().__post_init__()
        if self.accumulator_bits > 24:
            raise ConfigError(f"fp8.accumulator_bits={self.accumulator_bits} is more than the 24 of float32; take 0 "
                              "for float32.")
        if self.promote_every is not None and self.promote_every % 32:
            raise ConfigError(f"fp8.promote_every={self.promote_every} must be a multiple of 32, the depth of one "
                              "WGMMA; or None.")


@dataclasses.dataclass(frozen=True)
class ModelConfig(
        Checked, section="model",
        positive="vocab_size d_model num_layers num_heads q_rank kv_rank nope_head_dim rope_head_dim v_head_dim "
                 "dense_ffn_dim expert_ffn_dim num_experts experts_per_token num_groups groups_kept attention_block "
                 "rope_theta route_scale norm_eps init_std",
        not_negative="num_dense_layers num_shared_experts mtp_depth",
        choices={"score": ("sigmoid", "softmax"), "router_bias": ("additive", "multiplicative", "none"),
                 "dtype": ("bfloat16", "float32", "float64"), "remat": ("none", "report", "full")}):
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
    router: str = GROUP_LIMITED  # the routing rule, or one's own as "package.module:function"
    attention: str = "mla"  # or one's own module as "package.module:name"
    fp8: FP8Config = FP8Config()  # in config files a section of its own, `fp8`, beside `model`

    def __post_init__(self):
        super().__post_init__()
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
    for name, value, builtin in (("router", c.router, GROUP_LIMITED), ("attention", c.attention, "mla")):
        if value != builtin and not re.fullmatch(OWN, value):
            raise ConfigError(f"model.{name}={value!r} is unknown; take {builtin!r}, or name your own as "
                              "'package.module:name'.")
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


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked, section="data", between="validation_fraction", fraction="fim_rate split_punctuation_rate",
                 not_negative="prefetch"):
    """Where text comes from and how it becomes sequences (report section 4.1)."""

    # (path, weight) pairs. A path is a folder, a file or a glob; "stdlib" is the running Python's own library.
    sources: tuple[tuple[str, float], ...] = (("stdlib", 1.0),)
    validation_fraction: float = 0.05  # of the files, chosen by the hash of their relative path
    fim_rate: float = 0.1  # share of documents rearranged prefix-suffix-middle, before packing
    split_punctuation_rate: float = 0.1  # of the tokens that join punctuation and line breaks: split at random
    mask_documents: bool = False  # attend only inside a document; the report packs without such a mask
    cache_dir: str | None = None  # token shards; None: inside the work directory
    prefetch: int = 4  # batches

    def __post_init__(self):
        super().__post_init__()
        if not self.sources:
            raise ConfigError("data.sources is empty; give (path, weight) pairs, such as (('stdlib', 1.0),).")
        for path, weight in self.sources:
            if not path or weight <= 0:
                raise ConfigError(f"data.sources: {(path, weight)!r} must be a path and a positive weight; leave out "
                                  "what is not wanted.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked, section="optimizer", positive="learning_rate clip_norm", below_one="b1 b2",
                      not_negative="cosine_to tail_to weight_decay",
                      choices={"moment_dtype": ("bfloat16", "float32", "float64")}):
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
        super().__post_init__()
        marks = (0.0, self.warmup, self.constant_until, self.cosine_until, self.tail_from, 1.0)
        if list(marks) != sorted(marks):
            raise ConfigError("optimizer: 0 <= warmup <= constant_until <= cosine_until <= tail_from <= 1 must hold; "
                              f"got {', '.join(f'{m:g}' for m in marks[1:-1])}.")


BIAS_RULES = ("sign", "proportional")


@dataclasses.dataclass(frozen=True)
class BalanceConfig(Checked, section="balance", fraction="bias_until",
                    not_negative="bias_speed sequence_loss_weight aux_loss_weight"):
    """How expert loads are kept even (report section 2.1.2, arXiv 2408.15664)."""

    bias_rule: str = "sign"  # or "proportional", or one's own as "package.module:NAME"
    bias_speed: float = 0.001  # 0 freezes the bias
    bias_until: float = 0.966  # fraction of the run after which the speed is 0
    sequence_loss_weight: float = 1e-4
    aux_loss_weight: float = 0.0  # the classic batch-wise auxiliary loss, as a baseline

    def __post_init__(self):
        super().__post_init__()
        if self.bias_rule not in BIAS_RULES and not re.fullmatch(OWN, self.bias_rule):
            raise ConfigError(f"balance.bias_rule={self.bias_rule!r} is unknown; take one of "
                              f"{', '.join(map(repr, BIAS_RULES))}, or name your own as 'package.module:NAME'.")


@dataclasses.dataclass(frozen=True)
class TrainConfig(
        Checked, section="train", fraction="ramp_until", below_one="ema_decay",
        positive="steps batch_size sequence_length micro_batches ramp_from loss_chunk eval_every checkpoint_every "
                 "checkpoints_kept",
        not_negative="eval_batches sample_tokens"):
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
    eval_batches: int = 0  # of the validation set, while training; the last evaluation takes all, as 0 does always
    checkpoint_every: int = 100
    checkpoints_kept: int = 3
    sample_tokens: int = 96
    sample_prompt: str = "def "

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size % self.micro_batches:
            fits = [m for m in range(1, self.batch_size + 1) if self.batch_size % m == 0]
            raise ConfigError(f"train.micro_batches={self.micro_batches} does not divide batch_size="
                              f"{self.batch_size}; take one of {fits}.")
        rows = self.batch_size // self.micro_batches
        if self.ramp_from is not None and (self.ramp_from > self.batch_size or self.ramp_from % rows):
            raise ConfigError(f"train.ramp_from={self.ramp_from} must be a multiple of the {rows} sequences of a "
                              f"micro-batch, and at most batch_size={self.batch_size}.")
        starts = [start for start, _ in self.mtp_weights]
        if starts != sorted(starts) or any(not 0 <= start <= 1 or weight < 0 for start, weight in self.mtp_weights):
            raise ConfigError(f"train.mtp_weights={self.mtp_weights!r} must be pairs of a fraction of the run, "
                              "ascending in [0, 1], and a weight that is not negative.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"train.seed={self.seed} must lie in [0, 2^32).")

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
class InitConfig(Checked, section="init"):
    """Where the weights come from. Spelled `init.from` in config files and on the command line."""

    from_: str | None = None  # a work directory: its parameters and router bias, with a fresh optimizer


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """One experiment."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    balance: BalanceConfig = BalanceConfig()
    init: InitConfig = InitConfig()
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009 (it is frozen)
    pipeline: PipelineConfig = PipelineConfig()  # noqa: RUF009

    def __post_init__(self):
        super().__post_init__()
        check_mesh(self.mesh, self.model, self.train)


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
    "small": dict(_SMALL, num_layers=6, num_dense_layers=1, remat="none", attention_block=256),
    "v2_lite_16b": dict(_V2, d_model=2048, num_layers=27, num_heads=16, q_rank=None, dense_ffn_dim=10944,
                        expert_ffn_dim=1408, num_experts=64, num_groups=1, groups_kept=1, route_scale=1.0),
    "v2_236b": dict(_V2, d_model=5120, num_layers=60, num_heads=128, dense_ffn_dim=12288, expert_ffn_dim=1536,
                    num_experts=160, num_groups=8, groups_kept=3, route_scale=16.0),
    "v3_671b": dict(yarn=Yarn()),
}


def model_config(name: str, **overrides) -> ModelConfig:
    """The preset `name` with fields replaced. Raises ConfigError for an unknown name, field or an impossible shape."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r}; {did_you_mean(name, PRESETS)}")
    return build(ModelConfig, {**PRESETS[name], **overrides}, "model")


def default_config(preset: str) -> Any:
    """The whole experiment at its defaults around a model preset, ready to be changed by a config file."""
    return ml_collections.ConfigDict(as_dict(Config(model=model_config(preset))), type_safe=False)


def as_dict(config) -> dict:
    """Nested plain dicts of a frozen config, in the spelling of config files. JSON-able."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        out[key(f)] = as_dict(value) if dataclasses.is_dataclass(value) else value
    if isinstance(config, Config):
        out["fp8"] = out["model"].pop("fp8")
    return out


def freeze(config) -> Config:
    """Checks a ConfigDict (or nested dict) and freezes it. Raises ConfigError."""
    if not hasattr(config, "items") or "fp8" not in config:
        return build(Config, config)
    sections = dict(config.items())
    fp8, model = build(FP8Config, sections.pop("fp8"), "fp8"), sections.get("model")
    if hasattr(model, "items"):
        if "fp8" in model:
            raise ConfigError("model.fp8 and fp8 are one section; say fp8 beside model, --config.fp8.enabled=True.")
        sections["model"] = {**model, "fp8": fp8}
    return build(Config, sections)


def load_config(path: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Runs `get_config()` of a config file, applies `--config.a.b=value` overrides, freezes. Raises ConfigError."""
    config = _run_file(path)
    if not hasattr(config, "items"):
        raise ConfigError(f"get_config() of {path} gave {config!r}; it must return what it made of default_config().")
    for override in overrides:
        _override(config, override)
    return freeze(config)


def _run_file(path):
    if not os.path.isfile(path):
        raise ConfigError(f"no config file {path}; those of this project lie in experiments/configs.")
    if not path.endswith(".py"):
        raise ConfigError(f"{path} is no Python file; a config file ends in .py and defines get_config().")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path} does not define get_config().")
        return module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # whatever the file does
        where = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = f", line {where[-1]}" if where else ""
        # What ml_collections says of a wrong name, on a line of its own.
        near = re.search('Did you mean "(.*?)" instead of "(.*?)"', str(error))
        what = f"unknown config key {near[2]}; did you mean {near[1]}?" if near else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}{line}: {what}") from error


def _override(config, text: str):
    if not text.startswith("--config.") or "=" not in text:
        raise ConfigError(f"cannot read {text!r}; overrides look like --config.train.steps=50")
    path, value = text.removeprefix("--config.").split("=", 1)
    *parents, last = parts = path.split(".")
    node = config
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if node is None:
            raise ConfigError(f"{above} is None in this config; give all of it: --config.{above}=\"{{{part!r}: "
                              f"{value}}}\"")
        if not hasattr(node, "keys"):
            raise ConfigError(f"{above}={node!r} is a single value, so there is no {path}; say --config.{above}=VALUE.")
        if part not in node:
            raise ConfigError(f"unknown config key {'.'.join(parts[:depth + 1])}; {did_you_mean(part, node.keys())}")
        node, section = node[part], node
    try:
        section[last] = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # no literal: a word
        section[last] = value
