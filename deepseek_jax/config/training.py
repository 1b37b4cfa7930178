"""A run: its data, optimizer, balancing, length, and where its weights come from."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Annotated, Literal

from deepseek_jax.config.model import OWN
from deepseek_jax.config.schema import (
    BELOW_ONE,
    BETWEEN,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Checked,
    ConfigError,
    usable_path,
)


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked, section="data"):
    """The sources of text, and how text becomes sequences (report section 4.1)."""

    sources: Annotated[tuple[tuple[str, float], ...],
                       "(path, weight) pairs; a path is a folder, a file or a glob; hf:FOLDER is a data set of the "
                       "Hugging Face hub, stdlib the running Python's standard library"] = (("stdlib", 1.0),)
    stages: Annotated[tuple[tuple[int, tuple[tuple[str, float], ...]], ...],
                      "(step, (path, weight) pairs): from that step on, these sources with these weights, and "
                      "no others"] = ()
    tokenizer: Annotated[str | None, "a tokenizer.json, or a folder that has one, such as a checkpoint's; None: the "
                         "tokenizer of the run or checkpoint that a run begins from, or one trained on its text"] = None
    validation_fraction: Annotated[float, BETWEEN, "share of the files, chosen by hash of relative path"] = 0.05
    validation: Annotated[str | None, "a separate source of held-out text, read like one of sources; of those, "
                          "nothing is then held out"] = None
    validation_tokens: Annotated[int | None, POSITIVE, "at most this many tokens are held out, in equal shares of the "
                                 "sources, and of their files no more than validation_fraction; None: no bound"] = None
    fim_rate: Annotated[float, FRACTION, "share of documents rearranged prefix-suffix-middle, before packing"] = 0.1
    split_punctuation_rate: Annotated[float, FRACTION,
                                      "share of tokens joining punctuation and line breaks to split at random"] = 0.1
    mask_documents: Annotated[bool, "attention stays inside a document; the report packs without such a mask"] = False
    packing: Annotated[Literal["stream", "whole"],
                       "stream: documents one after another, cut where a sequence ends; whole: none is cut, as "
                       "conversations need it"] = "stream"
    cache_dir: Annotated[str | None, "of token shards; None: inside the work directory"] = None
    prefetch: Annotated[int, NOT_NEGATIVE, "batches read ahead"] = 4

    def __post_init__(self):
        super().__post_init__()
        if not self.sources:
            raise ConfigError("data.sources is empty; give (path, weight) pairs, such as (('stdlib', 1.0),).")
        for path, weight in self.sources:
            if not path or weight < 0 or (weight == 0 and all(path not in dict(later) for _, later in self.stages)):
                raise ConfigError(f"data.sources: {(path, weight)!r} must be a path and a positive weight; leave out "
                                  "what is not wanted.")
            for part in (path, path.removeprefix("hf:")):
                usable_path("data.sources", part)
        if self.validation is not None:
            for part in (self.validation, self.validation.removeprefix("hf:")):
                usable_path("data.validation", part)
            if self.validation in [path for path, _ in self.sources]:
                raise ConfigError(f"data.validation={self.validation} is one of data.sources too; hold out other text.")
        if self.tokenizer is not None:
            object.__setattr__(self, "tokenizer", usable_path("data.tokenizer", self.tokenizer))
        if self.cache_dir is not None:
            usable_path("data.cache_dir", self.cache_dir)
        if self.packing == "whole" and not self.mask_documents:
            raise ConfigError("data.packing='whole' packs documents that must not see each other; set "
                              "data.mask_documents=True.")
        if self.packing == "whole" and self.fim_rate:
            raise ConfigError("data.fim_rate rearranges a stream; with data.packing='whole' set data.fim_rate=0.")
        paths = [path for path, _ in self.sources]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ConfigError(f"data.sources names {twice[0]!r} twice; name it once, with the sum of the weights.")
        self._check_stages(paths)

    def _check_stages(self, known):
        if not any(weight for _, weight in self.sources):
            raise ConfigError("data.sources: all weights are 0; give one to what is read before the first of "
                              "data.stages.")
        steps = [step for step, _ in self.stages]
        if steps != sorted(set(steps)) or (steps and steps[0] < 1):
            raise ConfigError(f"data.stages begin at the steps {', '.join(map(str, steps))}; they must ascend, from 1 "
                              "on: data.sources has the weights before.")
        for step, weights in self.stages:
            where, paths = f"data.stages: from step {step} on", [path for path, _ in weights]
            if not weights:
                raise ConfigError(f"{where} nothing is read; give (path, weight) pairs.")
            for path, weight in weights:
                if path not in known:
                    raise ConfigError(f"{where}, {path!r} is none of data.sources; known are "
                                      f"{', '.join(map(repr, known))}.")
                if weight <= 0:
                    raise ConfigError(f"{where}, {(path, weight)!r} must have a positive weight; leave out what is not "
                                      "wanted.")
                if paths.count(path) > 1:
                    raise ConfigError(f"{where}, {path!r} is named twice; name it once, with the sum of the weights.")
        for weights in (self.sources, *(stage for _, stage in self.stages)):
            total = sum(weight for _, weight in weights)
            if lost := [pair for pair in weights if pair[1] > 0 and not pair[1] / total]:
                raise ConfigError(f"data.sources: {lost[0]!r} has no share of a sum of {total:g}; give weights "
                                  "that are nearer to each other and to 1.")

    def weights_at(self, step: int) -> tuple[float, ...]:
        """The weight of each source in that step; 0: it is not read."""
        weights = dict(next((stage for first, stage in reversed(self.stages) if first <= step), self.sources))
        return tuple(weights.get(path, 0.0) for path, _ in self.sources)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked, section="optimizer"):
    """AdamW or Muon, and the report's learning-rate schedule, in fractions of the run (report section 4.2)."""

    kind: Annotated[Literal["adamw", "muon"], "muon: as for the Kimi models, for all matrices except embedding and "
                                              "head; those and norms use AdamW"] = "adamw"
    learning_rate: Annotated[float, POSITIVE, "the highest"] = 2.2e-4
    warmup: Annotated[float, "share of the run in which the learning rate rises"] = 0.0085
    constant_until: Annotated[float, "10T of 14.8T tokens"] = 0.676
    cosine_until: Annotated[float, "14.3T of 14.8T tokens"] = 0.966
    cosine_to: Annotated[float, NOT_NEGATIVE, "of learning_rate; held until tail_from"] = 0.1
    tail_from: Annotated[float, "start of the last level"] = 0.989
    tail_to: Annotated[float, NOT_NEGATIVE, "of learning_rate"] = 0.0332
    b1: Annotated[float, BELOW_ONE, "AdamW's decay of the first moment"] = 0.9
    b2: Annotated[float, BELOW_ONE, "AdamW's decay of the second moment"] = 0.95
    schedule_steps: Annotated[int | None, POSITIVE, "steps that fractions of the run refer to, here, in balance and in "
                              "train; None: train.steps"] = None
    weight_decay: Annotated[float, NOT_NEGATIVE, "decoupled; not applied to the scales of norms"] = 0.1
    clip_norm: Annotated[float, POSITIVE, "gradients are clipped to this global norm"] = 1.0
    moment_dtype: Annotated[Literal["bfloat16", "float32", "float64"], "the report keeps bfloat16"] = "float32"
    qk_clip: Annotated[float | None, POSITIVE, "largest attention logit, above which a head's projections are scaled "
                       "down after the step; Kimi K2 has 100; None: neither measured nor clipped"] = None

    def __post_init__(self):
        super().__post_init__()
        marks = (0.0, self.warmup, self.constant_until, self.cosine_until, self.tail_from, 1.0)
        if list(marks) != sorted(marks):
            raise ConfigError("optimizer: 0 <= warmup <= constant_until <= cosine_until <= tail_from <= 1 must hold; "
                              f"got {', '.join(f'{m:g}' for m in marks[1:-1])}.")


BIAS_RULES = ("sign", "proportional")


@dataclasses.dataclass(frozen=True)
class BalanceConfig(Checked, section="balance"):
    """How expert loads are balanced (report section 2.1.2, arXiv 2408.15664)."""

    bias_rule: Annotated[str, "sign, proportional, or your own as package.module:NAME"] = "sign"
    bias_speed: Annotated[float, NOT_NEGATIVE, "step of the bias; 0 freezes it"] = 0.001
    bias_until: Annotated[float, FRACTION, "fraction of the run after which the speed is 0"] = 0.966
    sequence_loss_weight: Annotated[float, NOT_NEGATIVE, "alpha of the sequence-wise balance loss"] = 1e-4
    aux_loss_weight: Annotated[float, NOT_NEGATIVE, "of the classic batch-wise auxiliary loss, as a baseline"] = 0.0
    force_balanced: Annotated[bool, "for measuring speed only: experts are assigned in turn, whatever the router "
                                    "says, and no routing is learned"] = False

    def __post_init__(self):
        super().__post_init__()
        if self.bias_rule not in BIAS_RULES and not re.fullmatch(OWN, self.bias_rule):
            raise ConfigError(f"balance.bias_rule={self.bias_rule!r} is unknown; take one of "
                              f"{', '.join(map(repr, BIAS_RULES))}, or name your own as 'package.module:NAME'.")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked, section="train"):
    """The run: its length, batch size, evaluations and checkpoints."""

    steps: Annotated[int, POSITIVE, "optimizer steps"] = 1000
    batch_size: Annotated[int, POSITIVE, "sequences a step"] = 8
    sequence_length: Annotated[int, POSITIVE, "tokens a sequence"] = 512
    accumulation_steps: Annotated[int, POSITIVE, "micro-batches that batch_size is split into"] = 1
    ramp_from: Annotated[int | None, POSITIVE, "sequences per step at the start; None: no ramp"] = None
    ramp_until: Annotated[float, FRACTION, "fraction of the run (469B of 14.8T tokens)"] = 0.032
    mtp_weights: Annotated[tuple[tuple[float, float], ...],
                           "(from this fraction of the run on, lambda) pairs"] = ((0.0, 0.3), (0.676, 0.1))
    indexer_loss_weight: Annotated[float, NOT_NEGATIVE, "weight of the loss of the indexer (model.index_topk)"] = 1.0
    ema_decay: Annotated[float, BELOW_ONE, "decay of the moving average of the weights; 0: none is kept"] = 0.0
    loss_chunk: Annotated[int, POSITIVE, "tokens whose logits exist at once"] = 1024
    seed: Annotated[int, "of weights and data order"] = 0
    eval_every: Annotated[int, POSITIVE, "steps"] = 100
    eval_batches: Annotated[int, NOT_NEGATIVE,
                            "of the validation set, while training; 0: all"] = 0
    final_eval_batches: Annotated[int, NOT_NEGATIVE, "of the validation set, at the end of the run; 0: all"] = 0
    checkpoint_every: Annotated[int, POSITIVE, "steps"] = 100
    checkpoint_minutes: Annotated[float | None, POSITIVE, "minutes since the last checkpoint after which one is saved "
                                  "too; None: by steps only"] = None
    checkpoints_kept: Annotated[int, POSITIVE, "how many of the newest checkpoints are kept"] = 3
    checkpoint_keep_period: Annotated[int | None, POSITIVE, "checkpoints at multiples of this many steps are never "
                                      "removed (Orbax's keep_period)"] = None
    checkpoint_local: Annotated[str | None, "a folder on each machine, such as /dev/shm/run, for the newest state and "
                                "a copy of another machine's, from which a restart continues; needs room for two of "
                                "each"] = None
    checkpoint_local_every: Annotated[int, POSITIVE, "steps"] = 10
    tracker: Annotated[Literal["wandb", "mlflow"] | None,
                       "also gets the metrics; None: only TensorBoard's files"] = None
    prometheus: Annotated[str | None, "a file for Prometheus' textfile collector; None: none"] = None
    profile: Annotated[str, "A:B, a trace of the steps after A up to B; empty: none"] = ""
    stall_minutes: Annotated[float | None, POSITIVE, "without the end of a step, after which a process prints the "
                             "stacks of its threads and ends with 76; None: no limit"] = None
    sample_tokens: Annotated[int, NOT_NEGATIVE, "written at the end of a run; 0: no sample"] = 96
    sample_prompt: Annotated[str, "what the sample continues; empty: the first words of the held-out text"] = ""

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size % self.accumulation_steps:
            fits = [m for m in range(1, self.batch_size + 1) if self.batch_size % m == 0]
            raise ConfigError(f"train.accumulation_steps={self.accumulation_steps} does not divide batch_size="
                              f"{self.batch_size}; take one of {fits}.")
        found = re.fullmatch(r"(\d+):(\d+)", self.profile)
        if self.profile and not (found and int(found[1]) < int(found[2])):
            raise ConfigError(f"train.profile={self.profile!r} should be two numbers of steps, such as '100:105'.")
        if self.prometheus is not None:
            object.__setattr__(self, "prometheus", usable_path("train.prometheus", self.prometheus, on_disk=True))
        if self.checkpoint_local is not None:
            folder = usable_path("train.checkpoint_local", self.checkpoint_local, on_disk=True)
            if not os.path.isabs(folder):
                raise ConfigError(f"train.checkpoint_local={folder} must begin with a slash, as /dev/shm/run does: it "
                                  "is a folder on each machine.")
            object.__setattr__(self, "checkpoint_local", folder)
        starts = [start for start, _ in self.mtp_weights]
        if starts != sorted(starts) or any(not 0 <= start <= 1 or weight < 0 for start, weight in self.mtp_weights):
            raise ConfigError(f"train.mtp_weights={self.mtp_weights!r} must be pairs of a fraction of the run, "
                              "ascending in [0, 1], and a weight that is not negative.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"train.seed={self.seed} must lie in [0, 2^32).")


@dataclasses.dataclass(frozen=True)
class InitConfig(Checked, section="init"):
    """Where the weights come from. Spelled `init.from` in config files and on the command line."""

    from_: Annotated[str | None, "a work directory: its parameters and router bias, with a fresh optimizer; RUN@STEP: "
                     "all of its state after that step, a branch of that run"] = None

    def __post_init__(self):
        super().__post_init__()
        if self.from_ is not None:  # a shell does not expand the ~ in --config.init.from=~/run
            object.__setattr__(self, "from_", usable_path("init.from", self.from_))

    @property
    def folder(self) -> str | None:
        """The work directory that `from_` names, without a step."""
        return self.from_ if self.from_ is None or self.step is None else self.from_.rpartition("@")[0]

    @property
    def step(self) -> int | None:
        """The step at which the run branches off; None: it starts at step 0."""
        found = re.fullmatch(r".+@(\d+)", self.from_ or "")
        return found and int(found[1])
