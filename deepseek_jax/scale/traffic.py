"""Traffic between devices: copies of tokens, activations between stages, gradients and weights (no jax).

Expected numbers, for routing that is uniform over the experts of a token's groups. A copy counts if it leaves its node,
or its device inside the node; data that stays on a device does not count.
"""

import math

from deepseek_jax.config import ModelConfig
from deepseek_jax.scale.costs import parameters
from deepseek_jax.scale.layout import Layout
from kernels_pallas.constants import BLOCK


def distinct(places: int, items_each: int, drawn: int) -> float:
    """Expected number of places that `drawn` different items come from, if each place has `items_each`."""
    total = places * items_each
    if drawn > total - items_each:
        return float(places)
    return places * (1 - math.comb(total - items_each, drawn) / math.comb(total, drawn))


def rooms(c: ModelConfig, layout: Layout) -> dict[tuple[str, ...], int]:
    """{axes of a hop: rows of its receive buffer}, in order, as in `dispatch.route_hops`."""
    mesh, K = layout.mesh, c.experts_per_token
    rows = tokens = layout.tokens // mesh.tensor
    kept = min(K, c.groups_kept if c.num_groups > 1 else mesh.nodes)
    of = lambda *axes: tuple(axis for axis in axes if mesh.sizes[axis] > 1)  # named as in a compiled program
    legs = [(of("context_node", "node"), mesh.nodes, kept), (of("local"), mesh.local, K)]
    if mesh.dispatch == "flat":
        legs = [(of("context_node", "node", "local"), mesh.nodes * mesh.local, K)]
    found: dict[tuple[str, ...], int] = {}
    for axes, places, copies_each in legs:
        if places == 1:
            continue
        room = rows * places if mesh.buffers == "ragged" else rows
        if mesh.capacity is not None:  # for an even load: the complete buffer, or each sender's part of it
            load = tokens * copies_each / (1 if mesh.buffers == "ragged" else places)
            room = min(room, math.ceil(mesh.capacity * load))
        rows = found[axes] = room if mesh.buffers == "ragged" else room * places
    return found


def copies(c: ModelConfig, layout: Layout, dispatch: str | None = None, limited: bool = True) -> dict[str, float]:
    """Copies of one token: {"nodes": number of nodes it is sent to, "across": to other nodes, "inside": to other
    devices of a node}.

    Args:
      dispatch: "two_hop" or "flat"; None: the mesh's.
      limited: False: as if the router kept all groups.
    """
    mesh, K = layout.mesh, c.experts_per_token
    dispatch = dispatch or mesh.dispatch
    kept = c.groups_kept if limited else c.num_groups
    group = c.num_experts // c.num_groups
    # A group is on one node: `reach` nodes have a kept group, and `nodes` of them a chosen expert.
    groups_a_node = max(1, c.num_groups // mesh.nodes)
    reach = distinct(mesh.nodes, groups_a_node, kept) if c.num_groups > 1 else mesh.nodes
    share = kept * group / max(reach, 1)  # experts to choose from, on each of those nodes
    nodes = reach * (1 - _none_of(kept * group, share, K))
    devices = reach * mesh.local * (1 - _none_of(kept * group, share / mesh.local, K))
    elsewhere = (mesh.nodes - 1) / mesh.nodes
    if dispatch == "two_hop":
        return {"nodes": nodes, "across": nodes * elsewhere, "inside": devices * (mesh.local - 1) / mesh.local}
    # Directly to the devices; those of the sender's node are reached inside the node.
    return {"nodes": nodes, "across": devices * elsewhere,
            "inside": devices / mesh.nodes * (mesh.local - 1) / mesh.local}


def _none_of(total, marked, drawn):
    """Probability that none of `drawn` out of `total` is one of `marked` (a real number)."""
    return math.prod(max(0.0, (total - marked - i) / (total - i)) for i in range(drawn))


def copy_bytes(c: ModelConfig, fp8: bool) -> float:
    """Bytes of one copy of a token; in FP8 with the exponent of a scale for each block."""
    return c.d_model + math.ceil(c.d_model / BLOCK) if fp8 else 2 * c.d_model


def layer_traffic(c: ModelConfig, layout: Layout, limited: bool = True) -> dict[str, float]:
    """Bytes that a device sends for one MoE layer and micro-batch, one way: {"dispatch across", "combine inside", ...}.

    A forward pass dispatches and combines once, and so does a backward pass: gradients of results are dispatched like
    tokens, gradients of tokens combined like results.
    """
    n = copies(c, layout, limited=limited)
    out, back = copy_bytes(c, layout.mesh.dispatch_fp8), copy_bytes(c, False)
    tokens = layout.tokens / layout.mesh.tensor
    return {f"{way} {where}": tokens * n[where] * size
            for way, size in (("dispatch", out), ("combine", back)) for where in ("across", "inside")}


def ring_traffic(c: ModelConfig, layout: Layout) -> dict[str, float]:
    """Bytes that a device sends around the ring of one layer and micro-batch, by pass: {"forward", "backward"}.

    Latents and segment ids, and in the backward pass also their float32 gradients, which need one more hop to return. A
    pipeline's hops are exchanges within pairs and send twice as much (`model.ring_attention`).
    """
    parts, numbers = layout.mesh.parts, c.kv_rank + c.rope_head_dim
    hop = layout.tokens * (2 if layout.mesh.pipe > 1 else 1)
    latents = hop * (parts - 1) * (2 * numbers + 4)
    again = latents * ("attention" in c.recomputed)
    return {"forward": latents, "backward": again + latents + hop * (4 * parts * numbers if parts > 1 else 0)}


def step_traffic(c: ModelConfig, layout: Layout) -> dict[str, float]:
    """Bytes that a device sends in one step, by purpose."""
    mesh = layout.mesh
    group = parameters(c)
    layers = (c.num_moe_layers + c.mtp_depth) / mesh.pipe
    one = layer_traffic(c, layout)
    around = sum(ring_traffic(c, layout).values()) * (c.num_layers + c.mtp_depth) / mesh.pipe
    expert = group["experts"] / (mesh.pipe * mesh.nodes * mesh.local)
    copies_of_expert = mesh.replica * mesh.context
    other = (sum(group.values()) - group["experts"]) / (mesh.pipe * mesh.tensor)
    ring = lambda n: (n - 1) / n
    stage = 0 if mesh.pipe == 1 else 2 * layout.microbatches * layout.tokens * c.d_model * 2
    return {**{name: 2 * layout.microbatches * layers * size for name, size in one.items()},
            "between stages": stage, "latents": layout.microbatches * around,
            "gradients": 4 * (expert * ring(copies_of_expert) + other * ring(mesh.token_shards)) * layout.copies,
            "weights": 2 * (expert * ring(copies_of_expert) + other * ring(mesh.token_shards)) * layout.copies}
