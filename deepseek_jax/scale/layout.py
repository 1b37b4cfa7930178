"""The layout of a model on devices and the work of a step: the planner's input (no jax)."""

import dataclasses
import math
from typing import Any, Literal

from deepseek_jax.config import ConfigError, MeshConfig, ModelConfig
from deepseek_jax.config.mesh import check_parts
from deepseek_jax.pipeline.schedule import Schedule, make_schedule

LONGEST = 8  # micro-batches per rank in a computed schedule; more change neither bubble nor slots


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the work of one step on it.

    schedule: of the pipeline, a name that `deepseek_jax.pipeline` knows; unused if mesh.pipe = 1.
    microbatches: of the pipeline in a step; without a pipeline, of gradient accumulation.
    rows: sequences of a micro-batch on one device.
    deferred: weight gradients that may be pending on a pipeline rank; None: as many as the schedule defers.
    """

    mesh: MeshConfig
    schedule: str = "dualpipe"
    microbatches: int = 1
    rows: int = 1
    sequence_length: int = 4096
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ema: bool = False
    deferred: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.rows * self.sequence_length // self.mesh.parts

    @property
    def tokens_a_step(self) -> int:
        return self.tokens * self.microbatches * self.mesh.token_shards

    @property
    def pipeline(self) -> Schedule | None:
        """The schedule. A long one, except gpipe, is shortened, since its middle only repeats."""
        if self.mesh.pipe == 1:
            return None
        longest = LONGEST * self.mesh.pipe + self.microbatches % 2
        shown = self.microbatches if self.schedule == "gpipe" else min(self.microbatches, longest)
        return make_schedule(self.schedule, self.mesh.pipe, shown, self.deferred)

    @property
    def copies(self) -> int:
        """Stages whose weights a rank has: with DualPipe its own and those of its mirror rank."""
        return 2 if self.mesh.pipe > 1 and self.schedule == "dualpipe" else 1

    @property
    def name(self) -> str:
        """A description for tables."""
        m = self.mesh
        how = self.schedule if m.pipe > 1 else "no pipeline"
        split = f" in {m.parts} parts" if m.parts > 1 else ""
        return (f"pipe {m.pipe}, expert {m.nodes * m.local} over {m.nodes} nodes, {m.replica * m.context} replicas, "
                f"{how}, {self.microbatches} x {self.rows} sequences{split}")


@dataclasses.dataclass(frozen=True)
class Split:
    """The division of devices: ranks of the pipeline, devices that share the experts, devices that share heads and
    vocabulary. node_size: devices per node. parts: of a sequence, on the nodes that share experts first."""

    devices: int
    pipe: int = 1
    expert: int = 1
    tensor: int = 1
    node_size: int = 8
    parts: int = 1


def make_layout(c: ModelConfig, split: Split, sequences: int, rows: int = 1, sequence_length: int = 4096,
                schedule: str = "dualpipe", deferred: int | None = None, **mesh: Any) -> Layout:
    """Makes the layout: experts over complete nodes, replicas over the remaining devices.

    Args:
      sequences: of a step. rows, sequence_length, schedule, deferred: see Layout. mesh: other fields of MeshConfig.
    Raises:
      ConfigError: the numbers do not divide each other or the model.
    """
    devices, pipe, expert, tensor = split.devices, split.pipe, split.expert, split.tensor
    for name, value in (("devices", devices), ("pipe", pipe), ("expert", expert), ("rows", rows), ("tensor", tensor),
                        ("parts", split.parts), ("sequences", sequences), ("sequence_length", sequence_length)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be positive.")
    local = min(expert, max(1, split.node_size // tensor))
    nodes = max(1, expert // local)
    context_node = math.gcd(split.parts, nodes)
    context = split.parts // context_node
    if devices % (pipe * expert * tensor):
        fits = [e for e in _divisors(math.gcd(devices, c.num_experts)) if devices % (pipe * e * tensor) == 0]
        raise ConfigError(f"pipe={pipe} * expert={expert} * tensor={tensor} does not divide {devices} devices; with "
                          + (f"this pipe, expert can be {fits}." if fits else "none of them can pipe stay as it is."))
    if expert % local:
        raise ConfigError(f"expert={expert} does not fill nodes of {local} devices; take a multiple of {local}.")
    copies = devices // (pipe * expert * tensor)
    if copies % context:
        raise ConfigError(f"{split.parts} parts of a sequence on {nodes} nodes of experts take a multiple of {context} "
                          f"copies of them, and there are {copies}; take one of "
                          f"{[n for n in _divisors(nodes * copies) if _fits(n, nodes, copies)]}.")
    shape = MeshConfig(pipe=pipe, replica=copies // context, context=context, context_node=context_node,
                       node=nodes // context_node, local=local, tensor=tensor, **mesh)
    check_parts(shape, c, sequence_length)
    groups = c.num_groups if c.num_groups > 1 else c.num_experts
    if c.num_experts % expert or groups % nodes:
        raise ConfigError(f"expert={expert} over {nodes} nodes does not divide {c.num_experts} experts in "
                          f"{c.num_groups} groups, each of which lives on one node; take a divisor of both.")
    if pipe > max(c.num_moe_layers, 1):
        raise ConfigError(f"pipe={pipe} is more than the {c.num_moe_layers} MoE layers that stages are made of.")
    microbatches, left = divmod(sequences, shape.data_shards * rows)
    if left or not microbatches:
        raise ConfigError(f"{sequences} sequences a step do not fill {shape.data_shards} data-parallel ranks x {rows} "
                          f"sequences; take a multiple of {shape.data_shards * rows}.")
    layout = Layout(shape, schedule, microbatches, rows, sequence_length, deferred=deferred)
    layout.pipeline  # noqa: B018 (raises where the schedule does not exist)
    return layout


def _fits(parts, nodes, copies):
    return copies % (parts // math.gcd(parts, nodes)) == 0


def _divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]
