"""What a study is: arms that differ in a few config keys, the same seeds for all, claims about them (no jax).

    Study(name, arms={"none": {...}, "bias": {"balance.bias_speed": 0.005}}, claims=(Claim(...), ...), seeds=(0, 1, 2))

Seeds are paired: seed s starts every arm from the same random numbers and the same order of text, so that what
differs between two arms of a seed is what they differ in.
"""

import dataclasses
import hashlib
import json
from typing import Any

from deepseek_jax.config import Config, as_dict, default_config, freeze

# Small enough that an arm and seed takes under a minute on one core, its compilation aside; a whole DeepSeek-V3 still.
MODEL = {"vocab_size": 1024, "d_model": 128, "num_layers": 3, "num_dense_layers": 1, "num_heads": 4, "q_rank": 48,
         "kv_rank": 32, "nope_head_dim": 16, "rope_head_dim": 16, "v_head_dim": 16, "dense_ffn_dim": 256,
         "expert_ffn_dim": 64, "num_experts": 16, "experts_per_token": 2, "num_groups": 1, "groups_kept": 1,
         "mtp_depth": 0, "dtype": "float32", "attention_block": 128}
BASE = {
    **{f"model.{name}": value for name, value in MODEL.items()},
    "data.validation_fraction": 0.15, "data.fim_rate": 0.0,
    "data.split_punctuation_rate": 0.0,  # so that every seed reads the same tokens, in its own order
    "train.steps": 300, "train.batch_size": 8, "train.sequence_length": 128,
    "train.eval_batches": 48,  # 49,152 held-out tokens, the same ones for every arm and seed
    "optimizer.learning_rate": 3e-3, "optimizer.warmup": 0.05, "optimizer.constant_until": 0.4,
    "balance.bias_speed": 0.005,  # 0.001 could move a bias by only 0.4 in a run of this length
    "balance.sequence_loss_weight": 0.0,  # arms differ in one way of balancing, not in two
}
# A run that shows that all of it works, in seconds; its numbers mean nothing.
QUICK = {"model.vocab_size": 384, "model.d_model": 32, "model.num_layers": 2, "model.q_rank": 16, "model.kv_rank": 16,
         "model.dense_ffn_dim": 64, "model.expert_ffn_dim": 32, "data.sources": (("corpus/quick", 1.0),),
         "train.steps": 12, "train.batch_size": 4, "train.sequence_length": 64, "train.eval_batches": 2}
QUICK_SEEDS = (0, 1)


@dataclasses.dataclass(frozen=True)
class Claim:
    """The report's sentence as a comparison that an experiment can decide.

    says: the sentence. expected: how `metric` of `arm` lies to `against`, another arm of the same seeds or a number.
    """

    says: str
    metric: str
    arm: str
    against: str | float
    expected: str  # "lower" or "higher"


@dataclasses.dataclass(frozen=True)
class Study:
    """One experiment. Keys of `base` and of the arms are those of config files, with dots.

    quick_arms: what --quick runs. probe: "module:function", what else is measured of the model while it trains and at
    the end: function(config, params, router, loader, final) -> {name: float or nested list}. probes: how often.
    corpus: a function of corpora.py that writes the texts of sources named "corpus/...".
    network: "module:function", a context manager that puts other parts into the model: function(arm).
    after: {arm: the arm whose weights, of the same seed, it begins with}; that one runs first.
    """

    name: str
    arms: dict[str, dict[str, Any]]
    claims: tuple[Claim, ...]
    quick_arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    quick: dict[str, Any] = dataclasses.field(default_factory=dict)
    probe: str | None = None
    probes: int = 1
    corpus: str | None = None
    network: str | None = None
    after: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for claim in self.claims:
            for arm in (claim.arm, claim.against):
                if isinstance(arm, str) and arm not in self.arms:
                    raise ValueError(f"{self.name}: {claim.says!r} speaks of {arm!r}, which is no arm; there are "
                                     f"{', '.join(self.arms)}.")
        if wrong := [arm for arm, first in self.after.items() if not {arm, first} <= self.arms.keys()]:
            raise ValueError(f"{self.name}: {wrong[0]!r} comes after {self.after[wrong[0]]!r}, and one of them is no "
                             f"arm; there are {', '.join(self.arms)}.")

    def config(self, arm: str, seed: int = 0, quick: bool = False) -> Config:
        """The whole config of one run."""
        config = default_config("tiny")
        for part in (BASE, self.base, self.arms[arm], {**QUICK, **self.quick} if quick else {}):
            for name, value in part.items():
                section, key = name.split(".")
                config[section][key] = value
        config.train.seed = seed
        return freeze(config)

    def selected(self, quick: bool):
        """(arms, seeds) of a whole run or a quick one."""
        return (self.quick_arms, QUICK_SEEDS) if quick else (tuple(self.arms), self.seeds)

    def arm_hash(self, arm: str, quick: bool = False) -> str:
        """Changes with everything that an arm's numbers depend on, machine, versions and code aside."""
        config = as_dict(self.config(arm, 0, quick))
        del config["pipeline"]  # arms run without one
        parts = [config, self.probe, self.probes, self.corpus, self.network]
        if arm in self.after:
            parts.append(self.arm_hash(self.after[arm], quick))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def waves(self, arms) -> list[list[str]]:
        """The arms in groups, each after all that its own begin with."""
        depth = lambda arm: 1 + depth(self.after[arm]) if arm in self.after else 0
        return [[arm for arm in arms if depth(arm) == n] for n in sorted({depth(arm) for arm in arms})]

    def config_hash(self, quick: bool = False) -> str:
        """Of all arms, the seeds and the claims."""
        arms, seeds = self.selected(quick)
        parts = [{arm: self.arm_hash(arm, quick) for arm in arms}, seeds, [dataclasses.astuple(c) for c in self.claims]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
