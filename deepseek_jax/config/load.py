"""From a config file and the command line to a frozen config.

Config files build an `ml_collections.ConfigDict` with `default_config(preset)` and change what they study; the command
line overrides single keys (`--config.train.steps=50`); `freeze` turns the result into `Config`. An impossible config
raises `ConfigError` there, in one line that says what would work.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import importlib.util
import math
import os
import re
import traceback
from collections.abc import Sequence
from typing import Any

from deepseek_jax import configs, io, storage
from deepseek_jax.config.mesh import MeshConfig, PipelineConfig, check_mesh
from deepseek_jax.config.model import GROUP_LIMITED, IN_TURN, OWN, FP8Config, ModelConfig
from deepseek_jax.config.posttraining import DistillConfig, GrpoConfig, LoraConfig, PreferenceConfig, RolloutConfig
from deepseek_jax.config.presets import model_config
from deepseek_jax.config.schema import Checked, ConfigError, build, did_you_mean, key
from deepseek_jax.config.training import BalanceConfig, DataConfig, InitConfig, OptimizerConfig, TrainConfig

HISTORY = "history"  # a key in a run's config.json (`deepseek_jax.history`), not a section
RENAMED = {"train.micro_batches": "train.accumulation_steps"}  # keys of earlier versions, still accepted


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    """One experiment."""

    model: ModelConfig
    data: DataConfig = DataConfig()  # noqa: RUF009 (frozen)
    train: TrainConfig = TrainConfig()  # noqa: RUF009 (frozen)
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009 (frozen)
    balance: BalanceConfig = BalanceConfig()  # noqa: RUF009 (frozen)
    init: InitConfig = InitConfig()  # noqa: RUF009 (frozen)
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009 (frozen)
    pipeline: PipelineConfig = PipelineConfig()  # noqa: RUF009 (frozen)
    lora: LoraConfig = LoraConfig()  # noqa: RUF009 (frozen)
    distill: DistillConfig = DistillConfig()  # noqa: RUF009 (frozen)
    preference: PreferenceConfig = PreferenceConfig()  # noqa: RUF009 (frozen)
    rollout: RolloutConfig = RolloutConfig()  # noqa: RUF009 (frozen)
    grpo: GrpoConfig = GrpoConfig()  # noqa: RUF009 (frozen)

    def __post_init__(self):
        super().__post_init__()
        if self.balance.force_balanced:
            if self.model.router not in (GROUP_LIMITED, IN_TURN):
                raise ConfigError(f"balance.force_balanced=True takes the place of model.router={self.model.router!r}; "
                                  "omit one of them.")
            object.__setattr__(self, "model", dataclasses.replace(self.model, router=IN_TURN))
        elif self.model.router == IN_TURN:
            raise ConfigError(f"model.router={IN_TURN!r} is that of balance.force_balanced=True, which measures speed; "
                              f"take --config.model.router={GROUP_LIMITED} with the rest of that run's config.")
        check_mesh(self.mesh, self.model, self.train)
        self._check_ramp()
        self._check_optimizer()
        if self.data.tokenizer is not None and (begun := self.init.folder or self.distill.from_):
            raise ConfigError(f"data.tokenizer={self.data.tokenizer}: the weights of {begun} know their own tokenizer; "
                              "omit it.")
        if self.data.validation is not None and self.preference.objective is not None:
            raise ConfigError("data.validation is for documents, and pairs are held out by data.validation_fraction; "
                              "omit it.")
        if self.data.stages and self.preference.objective is not None:
            raise ConfigError("data.stages is for documents, and pairs have one mixture; omit it.")
        if self.data.validation_tokens is not None and self.preference.objective is not None:
            raise ConfigError("data.validation_tokens is for documents, and pairs are held out by "
                              "data.validation_fraction; omit it.")
        if self.init.step is not None and (self.lora.rank is not None or self.preference.objective is not None):
            raise ConfigError(f"init.from={self.init.from_} branches a run, which trains what it trained; take "
                              f"init.from={self.init.folder}.")
        if self.lora.rank is not None:
            self._check_lora()
        elif self.lora.fp8:
            raise ConfigError("lora.fp8=True keeps the base of adapters in FP8, and lora.rank=None trains none; add "
                              "--config.lora.rank=16, or take fp8.enabled=True to train in FP8.")

    @property
    def schedule_steps(self) -> int:
        """The number of steps that fractions of the run refer to."""
        return self.optimizer.schedule_steps or self.train.steps

    @property
    def ramps_pipeline(self) -> bool:
        """Whether the batch ramp moves in micro-batches of a pipeline: so if a step is a single pass of its
        schedule."""
        return self.train.ramp_from is not None and self.mesh.pipe > 1 and self.train.accumulation_steps == 1

    @property
    def microbatches(self) -> int:
        """Parts of a full batch that the ramp counts: accumulation steps, or micro-batches of a pipeline."""
        return self.pipeline.microbatches if self.ramps_pipeline else self.train.accumulation_steps

    @property
    def ramp_levels(self) -> tuple[int, ...]:
        """The numbers of micro-batches that steps have, ascending. In a pipeline they grow by two: one enters at each
        end of DualPipe."""
        last, stride = self.microbatches, 2 if self.ramps_pipeline else 1
        if self.train.ramp_from is None:
            return (last,)
        return (*range(self.train.ramp_from * last // self.train.batch_size, last, stride), last)

    def microbatches_at(self, step: int) -> int:
        """Micro-batches of step `step`: the batch ramp moves in complete micro-batches, so that steps compile once."""
        ramp_steps = math.ceil(self.train.ramp_until * self.schedule_steps)
        levels = self.ramp_levels
        return levels[-1] if step >= ramp_steps else levels[(len(levels) - 1) * step // ramp_steps]

    def sequences_at(self, step: int) -> int:
        """Sequences of step `step`."""
        return self.microbatches_at(step) * (self.train.batch_size // self.microbatches)

    def sequences_before(self, step: int) -> int:
        """Sequences consumed by all steps before `step`, in a run whose settings never changed (`data.position`)."""
        train, levels = self.train, self.ramp_levels
        ramp_steps = math.ceil(train.ramp_until * self.schedule_steps) if len(levels) > 1 else 0
        # The step at which each level begins; the last entry is where the ramp ends.
        starts = [-(-i * ramp_steps // max(1, len(levels) - 1)) for i in range(len(levels))]
        ramped = sum(micro * (min(step, end) - min(step, start))
                     for micro, start, end in zip(levels, starts, starts[1:]))
        return ramped * (train.batch_size // self.microbatches) + train.batch_size * max(0, step - ramp_steps)

    def _check_ramp(self):
        first, batch = self.train.ramp_from, self.train.batch_size
        if first is None or batch % self.microbatches:  # refused elsewhere (`pipeline.model.check`)
            return
        rows = batch // self.microbatches
        if first > batch or first % rows:
            raise ConfigError(f"train.ramp_from={first} must be a multiple of the {rows} sequences of a micro-batch, "
                              f"and at most batch_size={batch}{self._finer_ramp()}.")

    def _check_optimizer(self):
        model, kind, tau = self.model, self.optimizer.kind, self.optimizer.qk_clip
        part = model.attention
        own = [f"model.attention={part!r}"] if re.fullmatch(OWN, part) else []
        adapters = [] if self.lora.rank is None else [f"lora.rank={self.lora.rank}"]
        if kind == "muon" and (unfit := own + adapters):
            raise ConfigError(f"optimizer.kind='muon' knows the matrices of this model's own parts, and not those of "
                              f"{' and '.join(unfit)}; take --config.optimizer.kind=adamw.")
        split = [f"mesh.{name}={size}" for name, size in (("pipe", self.mesh.pipe), ("context", self.mesh.context),
                                                        ("context_node", self.mesh.context_node)) if size > 1]
        other = [f"{name}={value}" for name, value in (("preference.objective", self.preference.objective),
                                                       ("distill.from", self.distill.from_)) if value is not None]
        if tau is not None and other:
            raise ConfigError(f"optimizer.qk_clip={tau:g} is for pre-training and fine-tuning, and the objective of "
                              f"{other[0]} measures no logits; take --config.optimizer.qk_clip=None.")
        sparse = [] if model.index_topk is None else [f"model.index_topk={model.index_topk}"]
        if tau is not None and (unfit := own + sparse + adapters + split):
            raise ConfigError(f"optimizer.qk_clip={tau:g} measures the logits of MLA over complete sequences in one "
                              f"stage, not with {' and '.join(unfit)}; take --config.optimizer.qk_clip=None.")

    def _finer_ramp(self):
        """Advice for a ramp that is too fine: a number of accumulation steps that would work."""
        first, batch = self.train.ramp_from or 1, self.train.batch_size
        rows = math.gcd(batch, first)
        fits = first <= batch and self.mesh.pipe == 1 and rows % self.mesh.data_shards == 0
        return f"; take train.accumulation_steps={batch // rows}, which makes them smaller" if fits else ""

    def _check_lora(self):
        if self.model.fp8.enabled:
            raise ConfigError("fp8.enabled=True is for training all weights; take fp8.enabled=False, and lora.fp8=True "
                              "for a base that is kept in FP8.")
        if self.mesh.pipe > 1:
            raise ConfigError(f"mesh.pipe={self.mesh.pipe}: pipelines train all parameters; take mesh.pipe=1, or "
                              "lora.rank=None.")
        if self.mesh.parts > 1:
            raise ConfigError(f"{self.mesh.parts_key}={self.mesh.parts}: sequences are split where all parameters are "
                              f"trained; take {self.mesh.parts_key}=1, or lora.rank=None.")
        if self.model.index_warmup:
            raise ConfigError("model.index_warmup trains the indexer alone, and lora.rank adapters alone; take one.")
        if self.model.attention != "mla" and self.lora.fp8:
            raise ConfigError(f"lora.fp8=True knows the weights of model.attention='mla' alone, not those of "
                              f"{self.model.attention!r}; take lora.fp8=False.")
        if self.model.attention != "mla" and self.lora.targets != "experts":
            raise ConfigError(f"lora.targets={self.lora.targets!r} knows the weights of model.attention='mla' alone, "
                              f"not those of {self.model.attention!r}; take lora.targets='experts'.")


def default_config(preset: str) -> Any:
    """A ConfigDict of all settings with their defaults and a model preset, for a config file to change."""
    import ml_collections  # only config files need it

    return ml_collections.ConfigDict(as_dict(Config(model=model_config(preset))), type_safe=False)


def as_dict(config: Any) -> dict[str, Any]:
    """A frozen config as nested plain dicts, with the keys of config files; can be written as JSON."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        out[key(f)] = as_dict(value) if dataclasses.is_dataclass(value) else value
    if isinstance(config, Config):
        out["fp8"] = out["model"].pop("fp8")
    return out


def freeze(config: Any) -> Config:
    """Checks a ConfigDict (or nested dict) and freezes it. Raises ConfigError."""
    if not hasattr(config, "items"):
        return build(Config, config)
    config = _with_new_names({name: part for name, part in config.items() if name != HISTORY})
    if "fp8" not in config:
        return build(Config, config)
    sections = dict(config.items())
    fp8: Any = build(FP8Config, sections.pop("fp8"), "fp8")
    model: Any = sections.get("model")
    if hasattr(model, "items"):
        if "fp8" in model:
            raise ConfigError("model.fp8 and fp8 are one section; say fp8 next to model, --config.fp8.enabled=True.")
        sections["model"] = {**model, "fp8": fp8}
    return build(Config, sections)


def _with_new_names(config):
    """The config with keys of earlier versions renamed to the present ones."""
    model = config.get("model")
    if hasattr(model, "keys") and "norm_eps" in model and "latent_norm_eps" not in model:  # was a single number
        config = copy.deepcopy(config)
        config["model"]["latent_norm_eps"] = config["model"]["norm_eps"]
    for old, new in RENAMED.items():
        section, old_name, new_name = old.split(".")[0], old.split(".")[1], new.split(".")[1]
        values = config.get(section)
        if not hasattr(values, "keys") or old_name not in values:
            continue
        config = copy.deepcopy(config)
        value = config[section][old_name]
        default = getattr(getattr(Config, section), new_name)
        if config[section].get(new_name, default) not in (default, value):
            raise ConfigError(f"{old} is the earlier name of {new}, and both are given; leave {old} out.")
        config[section][new_name] = value
        del config[section][old_name]
    return config


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config, applies `--config.a.b=value` overrides, freezes.

    Args:
      path: a Python file with get_config(), the config.json of a work directory, or the name of one of
        `deepseek_jax.configs`.
    Raises:
      ConfigError: it cannot be read, or does not describe a run.
    """
    named = os.path.join(os.path.dirname(configs.__file__), f"{path}.py")
    if re.fullmatch(r"[a-z]\w*", path) and os.path.isfile(named) and not os.path.exists(path):
        path = named
    if not storage.is_file(path):
        names = named_configs()
        close = difflib.get_close_matches(path, names, n=1)
        raise ConfigError(f"no config file {path}; " + (f"did you mean {close[0]}?" if close else
                          f"take one of {', '.join(names)}, a Python file with get_config(), or the config.json of a "
                          "run."))
    config = _read_json(path) if path.endswith(".json") else _run_file(path)
    if not hasattr(config, "items"):
        gave = type(config).__name__ if dataclasses.is_dataclass(config) else repr(config)
        raise ConfigError(f"get_config() of {path} gave {gave}; it must return what it made of default_config().")
    config = _with_new_names(config)  # first, so that an override wins
    for override in overrides:
        _override(config, override)
    return freeze(_with_model(config, path))


def named_configs() -> list[str]:
    """The names of the configs in the package."""
    return sorted(name[:-3] for name in os.listdir(os.path.dirname(configs.__file__)) if name[0] not in "_.")


def _with_model(config, path):
    """The config; where its model is None, with that of the run which init.from names."""
    if "model" not in config or config["model"] is not None:
        return config
    init = config.get("init")
    run = init.get("from") if hasattr(init, "get") else None
    if not isinstance(run, str) or not run:
        raise ConfigError(f"{path} takes its model from another run; name it: --config.init.from=RUN.")
    theirs = os.path.join(InitConfig(run).folder or "", "config.json")
    if not storage.is_file(theirs):
        raise ConfigError(f"init.from={run} holds no config.json; give the work directory of a run.")
    return dict(config.items()) | {"model": _with_new_names(_read_json(theirs))["model"]}


def _read_json(path):
    try:
        config = io.read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}).") from error
    if not isinstance(config, dict) or "model" not in config:
        theirs = isinstance(config, dict) and "model_type" in config
        raise ConfigError(f"{path} is no config of a run; " + (
            "it is a Hugging Face checkpoint's: python -m deepseek_jax.convert from-hf makes a work directory of that."
            if theirs else "a work directory's config.json is one."))
    return config


def _run_file(path):
    if storage.is_remote(path):
        raise ConfigError(f"{path}: of buckets only the config.json of a run is read; copy a Python file here.")
    if not path.endswith(".py"):
        raise ConfigError(f"{path} is no Python file; a config file ends in .py and defines get_config().")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    assert spec is not None and spec.loader is not None  # for a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path} does not define get_config().")
        return module.get_config()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the file may do anything
        frames = traceback.extract_tb(error.__traceback__)
        where = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        line = f", line {where[-1]}" if where else ""
        # ml_collections' message for an unknown name, on a separate line.
        near = re.search('Did you mean "(.*?)" instead of "(.*?)"', str(error))
        what = f"unknown config key {near[2]}; did you mean {near[1]}?" if near else f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            what += "; activate the environment that has it (. .venv/bin/activate), or install it"
        for old, new in RENAMED.items():  # may be set, but not read
            if str(error).strip("\"'") == old.split(".")[1]:
                what = f"{old} is now {new}"
        raise ConfigError(f"{path}{line}: {what}") from error


def _override(config, text: str):
    if not text.startswith("--config.") or "=" not in text:
        raise ConfigError(f"cannot read {text!r}; overrides look like --config.train.steps=50")
    path, value = text.removeprefix("--config.").split("=", 1)
    for old, new in RENAMED.items():
        path = re.sub(rf"^{re.escape(old)}(?=\.|$)", new, path)
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
        section[last] = ast.literal_eval(value.encode(errors="backslashreplace").decode())  # names need not be UTF-8
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # no literal: a word
        section[last] = value
