"""The mesh: devices along each axis, and the sizes that they have to divide (no jax here)."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

from deepseek_jax.config.model import PARTS, ModelConfig
from deepseek_jax.config.schema import NOT_NEGATIVE, POSITIVE, Checked, ConfigError
from deepseek_jax.config.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked, section="mesh"):
    """How many devices along each axis, and how tokens travel between them (report section 3.2).

    The report's 2048 GPUs are pipe=16, replica=2, node=8, local=8, with unsplit sequences. All ones: one device. A run
    may be resumed on another mesh; a batch ramp in a pipeline's micro-batches then has other sizes from there on
    (docs/pipeline.md).
    """

    pipe: Annotated[int, POSITIVE, "pipeline ranks"] = 1
    replica: Annotated[int, POSITIVE, "copies of all experts"] = 1
    node: Annotated[int, POSITIVE, "experts are split over nodes (slow network)"] = 1
    local: Annotated[int, POSITIVE, "experts are split over the devices of a node (fast network)"] = 1
    tensor: Annotated[int, POSITIVE, "splits heads, dense feed-forward networks and vocabulary"] = 1
    context: Annotated[int, POSITIVE, "parts of each sequence, in a ring that latents are passed around"] = 1
    context_node: Annotated[int, POSITIVE, "the same, over nodes that share the experts, like those of `node`"] = 1
    dispatch: Annotated[Literal["two_hop", "flat"],
                        "two_hop: one copy per token and node, then forwarded inside the node; flat: directly to the "
                        "devices"] = "two_hop"
    dispatch_fp8: Annotated[bool, "tokens are sent to the experts in E4M3, with a scale for every 128 values"] = False
    buffers: Annotated[Literal["static", "ragged"],
                       "ragged: no padding is sent (TPU, GPU; not on a CPU)"] = "static"
    capacity: Annotated[float | None, POSITIVE,
                        "size of buffers, in multiples of an even load; overflow is dropped; None: room for all"] = None

    @property
    def sizes(self) -> dict[str, int]:
        """{axis: devices along it}, slowest network first: a token needs fewer bytes over `context` than to its
        experts."""
        axes = ("pipe", "replica", "context", "context_node", "node", "local", "tensor")
        return {axis: getattr(self, axis) for axis in axes}

    @property
    def nodes(self) -> int:
        """Nodes that share the experts."""
        return self.context_node * self.node

    @property
    def parts(self) -> int:
        """The number of parts of each sequence."""
        return self.context * self.context_node

    @property
    def parts_key(self) -> str:
        """The keys whose product is `parts`, for messages."""
        return _named("context", context=self.context, context_node=self.context_node)

    @property
    def data_shards(self) -> int:
        """The number of parts of a batch's rows."""
        return self.replica * self.node * self.local

    @property
    def token_shards(self) -> int:
        """The number of parts of a batch's tokens."""
        return self.data_shards * self.parts

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self.pipe * self.token_shards * self.tensor


@dataclasses.dataclass(frozen=True)
class PipelineConfig(Checked, section="pipeline"):
    """The pipeline schedule (report section 3.2.1). It may also be changed when a run is resumed."""

    schedule: Annotated[str, "one of those of python -m deepseek_jax.pipeline"] = "dualpipe"
    microbatches: Annotated[int, POSITIVE,
                            "micro-batches of a batch (of train.batch_size / train.accumulation_steps sequences)"] = 8
    deferred: Annotated[int | None, NOT_NEGATIVE,
                        "weight gradients that may be pending on a rank; None: as many as the schedule defers"] = None


def _named(usual: str, **sizes: int) -> str:
    """The keys of a product that are not 1; the usual one if all are 1."""
    return " * ".join(f"mesh.{key}" for key, size in sizes.items() if size > 1) or f"mesh.{usual}"


def _divisors(*counts: int) -> list[int]:
    common = math.gcd(*counts)
    return [n for n in range(1, common + 1) if common % n == 0]


def check_mesh(mesh: MeshConfig, c: ModelConfig, train: TrainConfig) -> None:
    """Raises ConfigError where a size does not divide what it splits of the model or the batch."""
    groups = c.num_groups if c.num_groups > 1 else c.num_experts
    nodes = f"{_named('node', context_node=mesh.context_node, node=mesh.node)}={mesh.nodes}"
    if groups % mesh.nodes:
        what = "num_groups" if c.num_groups > 1 else "num_experts"
        raise ConfigError(f"{nodes} does not divide model.{what}={groups}, and a group of experts lives "
                          f"on one node; take one of {_divisors(groups)}.")
    if c.num_experts // mesh.nodes % mesh.local:
        raise ConfigError(f"mesh.local={mesh.local} does not divide the {c.num_experts // mesh.nodes} experts of a "
                          f"node (model.num_experts / {nodes.partition('=')[0]}); take one of "
                          f"{_divisors(c.num_experts // mesh.nodes)}.")
    split = {"num_heads": c.num_heads, "vocab_size": c.vocab_size,
             "dense_ffn_dim": c.dense_ffn_dim if c.num_dense_layers else 0,
             "num_shared_experts * expert_ffn_dim": c.num_shared_experts * c.expert_ffn_dim}
    if wrong := [f"model.{name}={size}" for name, size in split.items() if size % mesh.tensor]:
        raise ConfigError(f"mesh.tensor={mesh.tensor} does not divide {' and '.join(wrong)}; take one of "
                          f"{_divisors(*split.values())}.")
    rows = train.batch_size // train.accumulation_steps
    if rows % mesh.data_shards:
        raise ConfigError(f"mesh.replica * mesh.node * mesh.local={mesh.data_shards} does not divide the {rows} "
                          "sequences of a micro-batch (train.batch_size / train.accumulation_steps); take a product of "
                          f"{_divisors(rows)}, or {mesh.data_shards * train.accumulation_steps} sequences.")
    check_parts(mesh, c, train.sequence_length)
    length = train.sequence_length // mesh.parts
    if rows // mesh.data_shards * length % mesh.tensor:
        raise ConfigError(f"mesh.tensor={mesh.tensor} does not divide the {rows // mesh.data_shards} x {length} tokens "
                          "of a device; make train.sequence_length a multiple of it.")


def check_parts(mesh: MeshConfig, c: ModelConfig, length: int) -> None:
    """Raises ConfigError where sequences of `length` tokens cannot be split as the mesh says."""
    if mesh.parts == 1:
        return
    key, blocks = mesh.parts_key, 2 * mesh.parts
    tokens = length // blocks
    tile = max(n for n in range(1, min(c.attention_block, max(tokens, 1)) + 1) if tokens % n == 0)
    for wrong, complaint in (
            (length % blocks,
             f"train.sequence_length={length} is no multiple of the {blocks} blocks that a sequence is cut into; take "
             f"{-(-length // blocks) * blocks}"),
            (2 * tile < min(64, tokens, c.attention_block),
             f"train.sequence_length={length} makes blocks of {tokens} tokens, which divide into nothing larger than "
             f"{tile} for attention; take {-(-length // (64 * blocks)) * 64 * blocks}"),
            (mesh.pipe > 1 and mesh.parts % 2, f"mesh.pipe={mesh.pipe} takes an even number of parts; take "
                                               f"{key}={mesh.parts + 1}"),
            (c.index_topk is not None, f"model.index_topk={c.index_topk} chooses among all tokens of a sequence, which "
                                       f"no device has; take {key}=1"),
            (c.attention != PARTS["attention"], f"model.attention={c.attention!r} would see parts of sequences; take "
                                                f"{key}=1")):
        if wrong:
            raise ConfigError(f"{key}={mesh.parts}: {complaint}.")
