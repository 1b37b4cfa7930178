"""Dispatch of tokens to their experts and back, once per node over the slow network (report section 3.2.2).

    hop 1, over nodes:    one copy of a token for each node that holds one of its experts, to the same `local` index
    hop 2, over `local`:  from there to the devices that hold the experts
    back:                 a node's partial sums are added before they cross again

The flat form sends directly to the devices, one copy each, in a single hop over both axes: it is the oracle, and the
baseline for two hops. A copy carries the expert choices that it still has to serve, and their gates. No scatter is
used: sending gathers rows into slots, returning gathers slots into rows, and each is the gradient of the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.parallel.mesh import NODES
from deepseek_jax.parallel.sharding import AXES, spec
from kernels_pallas.constants import BLOCK


class Wire(NamedTuple):
    """The format of values sent to the experts. The results return in the dtype of the values."""

    encode: Callable[[jax.Array], tuple[jax.Array, ...]]  # [R, D] -> arrays [R, ...]
    decode: Callable[[tuple[jax.Array, ...], Any], jax.Array]  # (those, dtype) -> [R, D]


PLAIN = Wire(lambda x_RD: (x_RD,), lambda parts, dtype: parts[0])


class ExpertLayout(NamedTuple):
    """The placement of experts: device (node, local) holds a contiguous share of num_experts, nodes first.

    most_nodes: maximum nodes per token, for capacities. wire: the format of values sent to the experts.
    """

    mesh: MeshConfig
    num_experts: int
    most_nodes: int
    wire: Wire = PLAIN


class Traffic(NamedTuple):
    """Counters of dispatch. float32, since sums over the layers and micro-batches of a large step overflow int32.

    nodes: nodes that a token's experts are on, summed over tokens. left: tokens with an expert on another node.
    across, inside: copies sent to another node, and to another device of the same node. flat_across: the value of
    `across` if every device got its own copy. choices and computed are equal, over the mesh, unless a capacity
    dropped some; dropped is their difference, int32, exact.
    """

    tokens: jax.Array
    choices: jax.Array
    computed: jax.Array
    nodes: jax.Array
    left: jax.Array
    across: jax.Array
    inside: jax.Array
    flat_across: jax.Array
    dropped: jax.Array


@flax.struct.dataclass
class Hop:
    """A plan of one hop. Each of R rows is sent at most once to each of P places, however many choices it has there.

    slot_RK: the slot of the copy that serves choice k; S if none is sent, or if an earlier choice has it. row_S: the
    row in each slot of the send buffer; R if the slot is empty. sent_P: copies for each place. lost: copies without
    room. ragged: offsets and sizes of the data sent; None with buffers of equal size.
    """

    slot_RK: jax.Array
    row_S: jax.Array
    sent_P: jax.Array
    lost: jax.Array
    ragged: tuple | None
    axis: str | tuple = flax.struct.field(pytree_node=False)
    landed: int = flax.struct.field(pytree_node=False)  # rows of the receive buffer


def route_hop(place_RK: jax.Array, axis: str | tuple[str, ...], places: int, room: int,
              wanted_QP: jax.Array | None = None) -> Hop:
    """Plans one hop of R rows over a mesh axis.

    Args:
      place_RK: int32, the destination of the row for each choice: an index along `axis`, or `places` for none.
      axis: name or names of the mesh axes. places: their size, P.
      room: rows of the receive buffer for each sender (static), or for all of them together (ragged). A ragged send
        buffer has the same size: with even loads a device sends as many rows as it receives.
      wanted_QP: int32, for ragged buffers: copies that each sender has for each place. A sender may have fewer, if a
        row was lost in an earlier hop, and then sends empty rows instead. None: static buffers.
    """
    R, K = place_RK.shape
    goes_RP = (place_RK[:, :, None] == jnp.arange(places)[None, None]).any(axis=1)
    rank_RP = jnp.cumsum(goes_RP, axis=0, dtype=jnp.int32) - goes_RP
    copies_P = goes_RP.sum(axis=0, dtype=jnp.int32)
    if wanted_QP is None:
        slots = landed = places * room
        start_P = jnp.arange(places, dtype=jnp.int32) * room
        moves, sent_P = None, jnp.minimum(copies_P, room)
    else:
        slots, landed = min(R * min(places, K), room), room
        moves = _moves(wanted_QP, slots, room, lax.axis_index(axis))
        start_P, sent_P = moves[0], jnp.minimum(copies_P, moves[1])
    safe_RK = jnp.minimum(place_RK, places - 1)
    rank_RK = jnp.take_along_axis(rank_RP, safe_RK, axis=1)
    earlier_RK = jnp.stack([(place_RK[:, :k] == place_RK[:, k:k + 1]).any(axis=1) for k in range(K)], axis=1)
    sent_RK = (place_RK < places) & ~earlier_RK & (rank_RK < sent_P[safe_RK])
    slot_RK = jnp.where(sent_RK, start_P[safe_RK] + rank_RK, slots)
    row_R1 = jnp.arange(R, dtype=jnp.int32)[:, None]
    row_S = jnp.full(slots, R, jnp.int32).at[slot_RK].set(jnp.broadcast_to(row_R1, (R, K)), mode="drop")
    return Hop(slot_RK, row_S, sent_P, (copies_P - sent_P).sum(), moves, axis, landed)


def _moves(wanted_QP, slots, room, me):
    """Limits ragged buffers: a sender's has `slots` rows, a receiver's `room`, and an excess is cut by the same share
    everywhere. Some rows may be empty, because they were lost in the previous hop, and the first must not take the room
    of the last.

    Returns:
      int32 [P] each: for each destination the offset and size here, and the offset there; then for each sender the
      offset and size of its rows here, and their offset at the sender.
    """
    sent_QP = _share(wanted_QP, slots, axis=1)
    start_QP = jnp.cumsum(sent_QP, axis=1) - sent_QP
    size_QP = _share(sent_QP, room, axis=0)
    landing_QP = jnp.cumsum(size_QP, axis=0) - size_QP
    return start_QP[me], size_QP[me], landing_QP[me], landing_QP[:, me], size_QP[:, me], start_QP[:, me]


def _share(rows_QP, room, axis):
    """The numbers, or if their sum along an axis exceeds `room`, their shares of `room`, rounded down."""
    sums = rows_QP.sum(axis, keepdims=True)
    return jnp.where(sums > room, jnp.floor(rows_QP * (room / sums.astype(jnp.float32))), rows_QP).astype(jnp.int32)


def _wanted(cfg, num_experts, chosen_NK):
    """{axes of a hop: int32 [Q, P]}: copies that each sender has for each place, if none is lost.

    All devices exchange this once, before the first hop: otherwise the second hop would have to wait for another
    exchange, and XLA uses as many products to hide an exchange of a few bytes as for one of tokens.
    """
    M, L = cfg.nodes, cfg.local
    place_NK = chosen_NK // (num_experts // (M * L))
    there_NML = (place_NK[:, :, None] == jnp.arange(M * L)[None, None]).any(axis=1).reshape(-1, M, L)
    count = lambda there: there.sum(axis=0, dtype=jnp.int32).ravel()
    all_MLX = lax.all_gather(jnp.concatenate([count(there_NML.any(axis=2)), count(there_NML)]), (*NODES, "local"))
    all_MLX = all_MLX.reshape(M, L, -1)
    node, local = lax.axis_index(NODES), lax.axis_index("local")
    return {(*NODES, "local"): all_MLX[:, :, M:].reshape(M * L, M * L), NODES: all_MLX[:, local, :M],
            "local": all_MLX[:, :, M:].reshape(M, L, M, L)[:, :, node].sum(axis=0)}


def _rows(x, index):
    return x.at[index].get(mode="fill", fill_value=0)


def _packed(parts):
    """Arrays [R, ...] of any dtypes side by side, as unsigned integers of the narrowest one's width."""
    width = min(part.dtype.itemsize for part in parts)
    units = lambda part: math.prod(part.shape[1:]) * part.dtype.itemsize // width
    return jnp.concatenate([lax.bitcast_convert_type(part, f"uint{8 * width}").reshape(part.shape[0], units(part))
                            for part in parts], axis=1)


def _unpacked(rows, parts):
    """The inverse, for any number of rows: arrays like `parts`."""
    found, at, width = [], 0, rows.dtype.itemsize
    for part in parts:
        units = part.dtype.itemsize // width
        size = math.prod(part.shape[1:]) * units
        bits = rows[:, at:at + size].reshape(-1, *part.shape[1:], *([units] if units > 1 else []))
        found.append(lax.bitcast_convert_type(bits, part.dtype))
        at += size
    return tuple(found)


def send(parts: tuple[jax.Array, ...], hop: Hop) -> tuple[jax.Array, ...]:
    """Sends rows [R, ...] to the destinations of the hop -> [landed, ...]; slots that received nothing are zero.

    All parts of a row are sent in one exchange: XLA runs few at a time, and a small one would delay a large one.
    """
    x_S = _packed([_rows(part, hop.row_S) for part in parts])
    if hop.ragged is None:
        return _unpacked(lax.all_to_all(x_S, hop.axis, 0, 0, tiled=True), parts)
    start, size, landing, _, arriving, _ = hop.ragged
    return _unpacked(lax.ragged_all_to_all(x_S, _room(hop.landed, x_S, arriving), start, size, landing, arriving,
                                           axis_name=hop.axis), parts)


def _room(rows, sent, arriving_P):
    """A receive buffer of zeros for `rows` rows like those of `sent`, unsigned, of which `arriving_P` are expected.

    Plain zeros are a constant, and XLA:GPU would fill the buffers of all layers at the beginning of a step; zeros that
    depend only on the counts would be filled when tokens are routed, long before gradients are sent. So these depend on
    the counts and on the sent data: they are the minimum of 0 and numbers that are never negative, which XLA does not
    know.
    """
    never_negative = (sent.ravel()[0] >> (8 * sent.dtype.itemsize - 8)).astype(jnp.int32)
    zero = jnp.minimum(jnp.minimum(arriving_P[0], never_negative), 0)
    return jnp.broadcast_to(zero.astype(sent.dtype), (rows, *sent.shape[1:]))


def bring_back(parts: tuple[jax.Array, ...], hop: Hop) -> tuple[jax.Array, ...]:
    """The inverse: [landed, ...] -> [R, ...], the sums over the copies of each row, added in float32."""
    y = _packed(parts)
    if hop.ragged is None:
        y_S = lax.all_to_all(y, hop.axis, 0, 0, tiled=True)
    else:
        _, size, _, landing, arriving, start = hop.ragged
        y_S = lax.ragged_all_to_all(y, _room(hop.row_S.shape[0], y, size), landing, arriving, start, size,
                                    axis_name=hop.axis)
    return tuple(_sum_of_copies(part, hop) for part in _unpacked(y_S, parts))


def _sum_of_copies(y_S, hop):
    dtype = jnp.promote_types(y_S.dtype, jnp.float32)
    rows = (_rows(y_S, slot_R).astype(dtype) for slot_R in hop.slot_RK.T)
    return functools.reduce(jnp.add, rows).astype(y_S.dtype)


def save(tree: Any, name: str = "dispatched") -> Any:
    """Marks values that are saved for the backward pass: received rows, which would have to be sent again, and
    "hops"."""
    return jax.tree.map(lambda x: checkpoint_name(x, name), tree)


def _dispatch(placement, x_ND, gates_NK, chosen_NK):
    hops, id_RK, parts = route_hops(placement, chosen_NK, (*placement.wire.encode(x_ND), gates_NK))
    id_RK, parts = save((id_RK, parts))
    return placement.wire.decode(parts[:-1], x_ND.dtype), parts[-1], id_RK, hops


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(placement: ExpertLayout, x_ND: jax.Array, gates_NK: jax.Array,
             chosen_NK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, tuple[Hop, ...]]:
    """Sends tokens to the experts that they chose. Its gradient is `combine`.

    Received rows are saved in the format in which they were sent: in FP8 on an FP8 wire.

    Returns:
      (x_RD, gates_RK, id_RK, hops): the rows that arrived; see `route_hops`.
    """
    return _dispatch(placement, x_ND, gates_NK, chosen_NK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(wire: Wire, y_RD: jax.Array, hops: tuple[Hop, ...]) -> jax.Array:
    """Returns rows [R, D] along all hops, summing at each: [N, D], in the order of the tokens and the dtype of y.

    Its gradient sends rows out again, in the wire format.
    """
    return _brought_back((y_RD,), hops)[0]


def _brought_back(parts, hops):
    for hop in reversed(hops):
        parts = bring_back(parts, hop)
    return parts


def _gradient_of_combine(wire, hops, dy_ND):
    parts = wire.encode(dy_ND)
    for hop in hops:
        parts = send(parts, hop)
    return wire.decode(save(parts), dy_ND.dtype), None


def _dispatched(placement, x_ND, gates_NK, chosen_NK):
    found = _dispatch(placement, x_ND, gates_NK, chosen_NK)
    return found, found[-1]


dispatch.defvjp(_dispatched, lambda placement, hops, gradients: (*_brought_back(gradients[:2], hops), None))
combine.defvjp(lambda wire, y, hops: (combine(wire, y, hops), hops), _gradient_of_combine)


def route_hops(placement: ExpertLayout, chosen_NK: jax.Array, parts: tuple[jax.Array, ...] = ()
               ) -> tuple[tuple[Hop, ...], jax.Array, tuple[jax.Array, ...]]:
    """Sends this device's tokens to their experts.

    Args:
      chosen_NK: int32, the experts that each token chose.
      parts: arrays [N, ...] that are sent along.
    Returns:
      (hops, local_RK, parts [R, ...]): for each row that arrives, int32 ids of its experts on this device, from 1;
      0: none.
    """
    (N, K), cfg, num_experts = chosen_NK.shape, placement.mesh, placement.num_experts
    E_node, E_device = num_experts // cfg.nodes, num_experts // (cfg.nodes * cfg.local)
    if cfg.dispatch == "flat":
        legs = [((*NODES, "local"), cfg.nodes * cfg.local, E_device, K)]
    else:
        legs = [(NODES, cfg.nodes, E_node, min(K, placement.most_nodes)), ("local", cfg.local, E_device, K)]
    wanted = _wanted(cfg, num_experts, chosen_NK) if cfg.buffers == "ragged" else {}
    hops, id_RK = [], chosen_NK + 1
    for axis, places, size, copies in legs:
        if places == 1:
            continue
        rows = id_RK.shape[0]
        room = rows * places if cfg.buffers == "ragged" else rows
        if cfg.capacity is not None:  # for an even load of K choices per token
            even = N * copies if cfg.buffers == "ragged" else N * copies / places
            room = min(room, math.ceil(cfg.capacity * even))
        place_RK = jnp.where(id_RK > 0, (id_RK - 1) // size, places)
        hop = save(route_hop(place_RK, axis, places, room, wanted.get(axis)), "hops")
        sent = send((*parts, id_RK), hop)
        parts, id_RK = sent[:-1], sent[-1]
        id_RK = id_RK - lax.axis_index(axis) * size
        id_RK = jnp.where((id_RK > 0) & (id_RK <= size), id_RK, 0)
        hops.append(hop)
    return tuple(hops), id_RK, parts


def count_traffic(cfg: MeshConfig, num_experts: int, chosen_NK: jax.Array, hops: tuple[Hop, ...],
                  computed: jax.Array) -> Traffic:
    """Counters of this device's tokens: copies sent, copies that flat dispatch would send, choices computed here.

    chosen_NK: int32, among all devices' experts. computed: int32 scalar, choices that this device computes.
    """
    def visits(places):
        size = num_experts // places
        return ((chosen_NK // size)[:, :, None] == jnp.arange(places)[None, None]).any(axis=1)

    node = lax.axis_index(NODES)
    nodes_NM = visits(cfg.nodes)
    away_M = jnp.arange(cfg.nodes) != node
    device_ML = visits(cfg.nodes * cfg.local).sum(axis=0, dtype=jnp.int32).reshape(cfg.nodes, cfg.local)
    across = inside = jnp.zeros((), jnp.int32)
    for hop in hops:
        shape = (cfg.nodes if hop.axis != "local" else 1, cfg.local if hop.axis != NODES else 1)
        sent_ML = hop.sent_P.reshape(shape)
        there_M = away_M if hop.axis != "local" else jnp.zeros((1,), bool)
        elsewhere_L = jnp.arange(cfg.local) != lax.axis_index("local") if hop.axis != NODES else jnp.zeros((1,), bool)
        across += (sent_ML * there_M[:, None]).sum(dtype=jnp.int32)
        inside += (sent_ML * (~there_M[:, None] & elsewhere_L[None])).sum(dtype=jnp.int32)
    counted = {"tokens": chosen_NK.shape[0], "choices": chosen_NK.size, "computed": computed,
               "nodes": nodes_NM.sum(), "left": (nodes_NM & away_M[None]).any(axis=1).sum(),
               "across": across, "inside": inside, "flat_across": (device_ML * away_M[:, None]).sum()}
    return Traffic(**{name: jnp.asarray(n, jnp.float32) for name, n in counted.items()},
                   dropped=jnp.asarray(chosen_NK.size - computed, jnp.int32))


def traffic_per_token(cfg: MeshConfig, model: ModelConfig, traffic: Traffic | None) -> dict[str, float]:
    """Averages of the counters over tokens and MoE layers; {} for None, on one device.

    nodes_per_token: nodes that its experts are on. leaving_node: share of tokens with an expert on another one.
    cross_node_bytes, inside_node_bytes: sent by dispatch to other nodes, and to other devices of a node; values,
    choices and gates of the copies, without the empty slots of static buffers. flat_cross_node_bytes:
    cross_node_bytes if every device got its own copy. dropped_choices: choices dropped because of a capacity, a sum.
    """
    if traffic is None:
        return {}
    per_token = {name: float(n) / float(traffic.tokens) for name, n in traffic._asdict().items()}
    size = copy_bytes(cfg, model)
    return {"nodes_per_token": per_token["nodes"], "leaving_node": per_token["left"],
            "cross_node_bytes": per_token["across"] * size, "inside_node_bytes": per_token["inside"] * size,
            "flat_cross_node_bytes": per_token["flat_across"] * size,
            "dropped_choices": int(traffic.dropped)}


def copy_bytes(cfg: MeshConfig, model: ModelConfig) -> int:
    """Bytes of one copy of a token sent to the experts: values (and exponents of scales), choices and gates."""
    width = jnp.dtype(model.dtype).itemsize
    values = model.d_model + -(-model.d_model // BLOCK) if cfg.dispatch_fp8 else model.d_model * width
    return values + model.experts_per_token * (4 + max(width, 4))


def to_experts(placement: ExpertLayout, experts: Callable[..., tuple[jax.Array, jax.Array]], x_ND: jax.Array,
               chosen_NK: jax.Array, gates_NK: jax.Array, weights: Any) -> tuple[jax.Array, Traffic]:
    """Runs the experts on the devices that hold them, on the tokens of the complete mesh.

    Inside a shard_map over NODES and `local` the arrays are this device's own; elsewhere they are global, and this
    function opens a shard_map, in which `tensor` also splits tokens.

    Args:
      experts: (x_RD, id_RK, gates_RK, weights) -> (y_RD, computed): the gated sum of each row's experts, with ids on
        this device from 1 (0: none), and the number of choices computed. Rows may be zeros.
      chosen_NK: int32 global ids. gates_NK: float32. weights: arrays whose first dimension is that of the experts.
    Returns:
      (y_ND, traffic): see `count_traffic`; summed over the mesh outside a shard_map.
    """
    def inside(x_ND, chosen_NK, gates_NK, weights):
        x_RD, gates_RK, id_RK, hops = dispatch(placement, x_ND, gates_NK, chosen_NK)
        y_RD, computed = experts(x_RD, id_RK, jnp.where(id_RK > 0, gates_RK, 0), weights)
        traffic = count_traffic(placement.mesh, placement.num_experts, chosen_NK, hops, computed)
        return combine(placement.wire, y_RD, hops), traffic

    def over_mesh(*arrays):
        y_ND, traffic = inside(*arrays)
        return y_ND, lax.psum(traffic, AXES["tokens"])

    if jax.sharding.get_abstract_mesh().manual_axes:
        return inside(x_ND, chosen_NK, gates_NK, weights)
    tokens = spec("tokens")
    return jax.shard_map(over_mesh, in_specs=(tokens, tokens, tokens, spec("experts")), out_specs=(tokens, spec()),
                         check_vma=False)(x_ND, chosen_NK, gates_NK, weights)
