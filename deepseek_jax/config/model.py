"""The shape of one model, its context extension, and the recipe of FP8 training."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Literal

from deepseek_jax.config.schema import NOT_NEGATIVE, POSITIVE, Checked, ConfigError, shown

GROUP_LIMITED = "group_limited"  # top-k of the best groups of experts (report section 2.1.2)
IN_TURN = "deepseek_jax.model.router:in_turn"  # the rule of balance.force_balanced
PARTS = {"router": GROUP_LIMITED, "attention": "mla"}  # of the published models
UNROLLED_LAYERS = 8  # a stack of more layers runs as a loop over them
REPORT_RECOMPUTES = ("norms", "mla_up", "swiglu")  # report section 3.2.3
# Further values that the backward pass can recompute, with the checkpoint name that is then not saved: the latents'
# projections, the router's scores, attention's output projection, SwiGLU's inputs, attention itself, and dispatch.
RECOMPUTABLE = {"latents": "latent", "router": "routing", "output": "residual", "swiglu_inputs": "ffn_in",
                "attention": "attention", "dispatch": "dispatched"}
KERNEL_HEADS = (192, 128)  # head sizes of queries and values that the kernels support: those of the published models
# Larger values, far from any published model, could only come from a damaged or hostile config.json and would fill the
# memory or never end.
MOST_EXPERTS, MOST_MATRICES = 2**14, 2**20  # of a layer; of all experts of all layers
MOST = {"vocab_size": 2**24, "num_layers": 2**12, "num_experts": MOST_EXPERTS, "num_shared_experts": 2**10,
        "mtp_depth": 2**6, "num_heads": 2**14, "nope_head_dim": 2**14, "rope_head_dim": 2**14, "v_head_dim": 2**14,
        "d_model": 2**20, "q_rank": 2**20, "kv_rank": 2**20, "dense_ffn_dim": 2**20, "expert_ffn_dim": 2**20,
        "index_topk": 2**31 - 1, "index_heads": 2**14, "index_head_dim": 2**14}
YARN_RANGES = {"factor": (1e-3, 1e6), "original_length": (1, 2**31 - 1), "beta_fast": (1e-6, 1e6),
               "beta_slow": (1e-6, 1e6), "mscale": (0, 1e3), "mscale_all_dim": (0, 1e3)}
OWN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"  # "package.module:name"


@dataclasses.dataclass(frozen=True)
class Yarn(Checked, section="model.yarn"):
    """Static YaRN context extension (arXiv 2309.00071, report section 4.3)."""

    factor: Annotated[float, POSITIVE, "how many times longer the context becomes"] = 40.0
    original_length: Annotated[int, POSITIVE, "tokens of context before"] = 4096
    beta_fast: Annotated[float, POSITIVE, "frequencies with more rotations than this stay"] = 32.0
    beta_slow: Annotated[float, POSITIVE, "frequencies with fewer rotations than this are divided by factor"] = 1.0
    mscale: Annotated[float, NOT_NEGATIVE, "weight of the scale of queries and keys"] = 1.0
    mscale_all_dim: Annotated[float, NOT_NEGATIVE, "weight of the scale of the softmax"] = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name, (least, most) in YARN_RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"model.yarn.{name}={getattr(self, name)!r} must lie in [{least:g}, {most:g}].")


@dataclasses.dataclass(frozen=True)
class FP8Config(Checked, section="fp8"):
    """FP8 training (report section 3.3). All keys except `enabled` and `implementation` are for studying the recipe."""

    enabled: Annotated[bool, "train in FP8"] = False
    scale: Annotated[Literal["float32", "power_of_two"], "of tiles; power_of_two also where the report does not ask "
                                                          "for it"] = "float32"
    tiles: Annotated[Literal["fine", "tensor"], "tensor: one scale an array"] = "fine"
    gradient_tiles: Annotated[Literal["1x128", "128x128"], "128x128 diverged on the report's 16B "
                                                           "model"] = "1x128"
    gradient_format: Annotated[Literal["e4m3", "e5m2"], "e5m2: more range, less precision, as used elsewhere"] = "e4m3"
    accumulator_bits: Annotated[int, NOT_NEGATIVE, "of a tensor core's partial sums; 0: float32, 14: Hopper's, "
                                                   "modelled by the reference"] = 0
    promote_every: Annotated[int | None, POSITIVE, "elements of K after which such a partial sum is added in float32; "
                                                   "None: never"] = 128
    implementation: Annotated[Literal["auto", "reference", "hopper", "tpu"], "of the kernels, as kernels_pallas.api "
                                                                             "has them"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        if self.accumulator_bits > 24:
            raise ConfigError(f"fp8.accumulator_bits={self.accumulator_bits} is more than the 24 of float32; take 0 "
                              "for float32.")
        if self.promote_every is not None and self.promote_every % 32:
            raise ConfigError(f"fp8.promote_every={self.promote_every} must be a multiple of 32, the depth of one "
                              "WGMMA; or None.")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked, section="model"):
    """The shape of one model. Defaults are those of DeepSeek-V3 (report section 4.2)."""

    vocab_size: Annotated[int, POSITIVE, "token ids"] = 129280
    d_model: Annotated[int, POSITIVE, "width of the residual stream"] = 7168
    num_layers: Annotated[int, POSITIVE, "blocks, MTP modules not counted"] = 61
    num_dense_layers: Annotated[int, NOT_NEGATIVE, "first blocks without experts"] = 3
    num_heads: Annotated[int, POSITIVE, "attention heads"] = 128
    q_rank: Annotated[int | None, POSITIVE, "of the query latent; None: queries are projected directly, as in "
                                            "V2-Lite"] = 1536
    kv_rank: Annotated[int, POSITIVE, "of the key-value latent, which the cache stores"] = 512
    nope_head_dim: Annotated[int, POSITIVE, "dims of a head's queries and keys without RoPE"] = 128
    rope_head_dim: Annotated[int, POSITIVE, "dims with RoPE; their key is shared by the heads"] = 64
    v_head_dim: Annotated[int, POSITIVE, "dims of a head's values"] = 128
    dense_ffn_dim: Annotated[int, POSITIVE, "hidden width of the dense blocks"] = 18432
    expert_ffn_dim: Annotated[int, POSITIVE, "hidden width of one expert"] = 2048
    num_experts: Annotated[int, POSITIVE, "routed experts a layer"] = 256
    num_shared_experts: Annotated[int, NOT_NEGATIVE, "experts that every token uses"] = 1
    experts_per_token: Annotated[int, POSITIVE, "routed experts that a token uses"] = 8
    num_groups: Annotated[int, POSITIVE, "groups of experts; 1: no group limit"] = 8
    groups_kept: Annotated[int, POSITIVE, "groups that a token may choose from"] = 4
    score: Annotated[Literal["sigmoid", "softmax"], "affinity; softmax: V2"] = "sigmoid"
    router_bias: Annotated[Literal["additive", "multiplicative", "none"], "multiplicative: the variant of arXiv "
                                                                          "2408.15664; none: V2"] = "additive"
    normalize_gates: Annotated[bool, "the gates of a token sum to route_scale"] = True
    route_scale: Annotated[float, POSITIVE, "factor on the gates"] = 2.5
    mtp_depth: Annotated[int, NOT_NEGATIVE, "multi-token prediction modules"] = 1
    rope_theta: Annotated[float, POSITIVE, "base of the rotary frequencies"] = 10000.0
    yarn: Annotated[Yarn | None, "context extension; None: none"] = None
    norm_eps: Annotated[float, POSITIVE, "epsilon of RMSNorm, except for the latents"] = 1e-6
    latent_norm_eps: Annotated[float, POSITIVE, "epsilon of RMSNorm of both latents; transformers has 1e-6 whatever "
                                                "norm_eps is"] = 1e-6
    init_std: Annotated[float, POSITIVE, "standard deviation of all weights at the start"] = 0.006
    dtype: Annotated[Literal["bfloat16", "float32", "float64"], "of activations and products; parameters are float32 "
                                                                "masters"] = "bfloat16"
    remat: Annotated[str, "recomputed in the backward pass: none, report (norms, mla_up, swiglu), full, or names of "
                          "values to recompute in addition to the report's, such as latents,router"] = "report"
    attention_block: Annotated[int, POSITIVE, "query and key rows per block: memory grows with T * block, not "
                                              "T * T"] = 512
    implementation: Annotated[Literal["auto", "xla"], "of attention and of experts in bfloat16; auto: the device's "
                                                      "kernels where they exist, xla: no kernels"] = "auto"
    router: Annotated[str, "routing rule: group_limited, or your own as package.module:function"] = GROUP_LIMITED
    attention: Annotated[str, "attention: mla, or your own module as package.module:name"] = "mla"
    index_topk: Annotated[int | None, POSITIVE, "tokens that a token attends to, chosen by the indexer of V3.2; None: "
                                                "all, as in V3"] = None
    index_heads: Annotated[int, POSITIVE, "heads of the indexer"] = 64
    index_head_dim: Annotated[int, POSITIVE, "dims of a head of the indexer; the first rope_head_dim have RoPE"] = 128
    index_warmup: Annotated[bool, "train only the indexer: attention stays dense, all other weights as they "
                                  "are"] = False
    fp8: Annotated[FP8Config, "in config files a separate section, next to model"] = FP8Config()

    def __post_init__(self):
        super().__post_init__()
        _check_model(self)

    @property
    def num_moe_layers(self) -> int:
        """Blocks with experts, MTP modules not counted."""
        return self.num_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        """Dims of a head's queries and keys."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def recomputed(self) -> frozenset[str]:
        """The names of the values that the backward pass recomputes; for "full" all of them (and all unnamed ones
        too)."""
        if self.remat == "full":
            return frozenset((*REPORT_RECOMPUTES, *RECOMPUTABLE))
        names = {"none": (), "report": REPORT_RECOMPUTES}
        return frozenset(names.get(self.remat, (*REPORT_RECOMPUTES, *self.remat.split(","))))

    @property
    def has_router_bias(self) -> bool:
        """Whether selection uses a bias, added or multiplied."""
        return self.router_bias != "none"


def _check_model(c: ModelConfig):
    for name, builtin in PARTS.items():
        value = getattr(c, name)
        if value != builtin and not re.fullmatch(OWN, value):
            raise ConfigError(f"model.{name}={value!r} is unknown; take {builtin!r}, or name your own as "
                              "'package.module:name'.")
    known = (*REPORT_RECOMPUTES, *RECOMPUTABLE)
    wrong = [name for name in c.remat.split(",") if name not in known]
    if wrong and c.remat not in ("none", "report", "full"):
        which = shown(c.remat) if wrong == [c.remat] else f"{shown(c.remat)}: {shown(wrong[0])}"
        raise ConfigError(f"model.remat={which} is unknown; take none, report or full, or names, commas between, of "
                          f"{', '.join(known)}.")
    for name, most in MOST.items():
        if (getattr(c, name) or 0) > most:
            raise ConfigError(f"model.{name}={shown(getattr(c, name))} is more than {most:,}, the most there may be.")
    if c.num_dense_layers > c.num_layers:
        raise ConfigError(f"model.num_dense_layers={c.num_dense_layers} is more than num_layers={c.num_layers}.")
    matrices = (c.num_moe_layers + c.mtp_depth) * c.num_experts
    if matrices > MOST_MATRICES:
        raise ConfigError(f"model.num_layers={c.num_layers} times num_experts={c.num_experts} is {matrices:,} experts, "
                          f"more than {MOST_MATRICES:,}, the most there may be.")
    if c.yarn is not None and c.rope_theta <= 1:
        raise ConfigError(f"model.rope_theta={c.rope_theta:g} must be more than 1: YaRN takes its logarithm.")
    if c.rope_head_dim % 2:
        raise ConfigError(f"model.rope_head_dim={c.rope_head_dim} must be even: RoPE rotates pairs.")
    if c.num_experts % c.num_groups:
        fits = [g for g in range(1, c.num_experts + 1) if c.num_experts % g == 0]
        raise ConfigError(f"model.num_groups={c.num_groups} does not divide num_experts={c.num_experts}; "
                          f"take one of {fits}.")
    if c.groups_kept > c.num_groups:
        raise ConfigError(f"model.groups_kept={c.groups_kept} is more than num_groups={c.num_groups}.")
    _check_indexer(c)
    group = c.num_experts // c.num_groups
    if c.score == "sigmoid" and 1 < c.num_groups and group < 2:
        raise ConfigError(f"model.num_groups={c.num_groups} leaves {group} expert a group; the group score adds the "
                          f"two best of a group, so take at most {c.num_experts // 2} groups.")
    if c.experts_per_token > group * c.groups_kept:
        raise ConfigError(f"model.experts_per_token={c.experts_per_token} asks for more than the "
                          f"{group * c.groups_kept} experts that the {c.groups_kept} kept groups hold; "
                          "lower it or raise groups_kept.")


def _check_indexer(c: ModelConfig):
    if c.index_topk is None:
        if c.index_warmup:
            raise ConfigError("model.index_warmup=True trains the indexer; with model.index_topk=None there is none; "
                              "set it.")
        return
    for wrong, complaint in (
            (c.q_rank is None, "reads the query latent, and model.q_rank=None leaves it out; set model.q_rank"),
            (c.index_head_dim <= c.rope_head_dim,
             f"rotates the first {c.rope_head_dim} dims (rope_head_dim) of its heads, which have "
             f"model.index_head_dim={c.index_head_dim}; take more"),
            (c.attention != PARTS["attention"],
             f"is part of {PARTS['attention']!r}, not of model.attention={c.attention!r}; take index_topk=None")):
        if wrong:
            raise ConfigError(f"model.index_topk={c.index_topk}: the indexer {complaint}.")
