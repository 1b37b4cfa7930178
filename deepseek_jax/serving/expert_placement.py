"""The placement of experts on devices (report section 3.4; the EPLB repository): busy experts get replicas.

If the groups divide evenly among the nodes, a group's experts stay on one node (so that a token is sent to few nodes);
inside a node the busiest experts are duplicated, and the replicas are packed onto devices for equal load. Otherwise all
devices are treated as one node. Plans are computed in NumPy from measured loads; `apply` moves the weights accordingly.
Outputs stay the same.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.serving.weights import DecodeWeights, Places


class Placement(NamedTuple):
    """expert_LP: the expert at each of P places, device by device. experts: how many there are."""

    expert_LP: np.ndarray
    experts: int

    def replicas(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(places [E, X] of each expert, padded by repetition; the number of its places [E])."""
        places = [np.flatnonzero(self.expert_LP[layer] == e) for e in range(self.experts)]
        most = max(map(len, places))
        return (np.stack([np.resize(p, most) for p in places]).astype(np.int32),
                np.array([len(p) for p in places], np.int32))


def balance_experts(loads_LE: np.ndarray, places: int, groups: int, nodes: int, devices: int) -> Placement:
    """Balances measured loads.

    Args:
      loads_LE: tokens that chose each expert, per MoE layer (the engine's `loads_LE`).
      places: total number of experts including replicas, a multiple of `devices`.
      groups: expert groups of the router; kept on one node each when they divide evenly among the nodes.
    Raises:
      ConfigError: numbers that do not divide, or fewer places than experts.
    """
    loads_LE = np.asarray(loads_LE, np.float32)
    if loads_LE.ndim != 2:
        raise ConfigError(f"loads of shape {loads_LE.shape} should be [layers, experts].")
    E = loads_LE.shape[1]
    if places < E:
        raise ConfigError(f"places={places} are fewer than the {E} experts.")
    if places % devices or devices % nodes or E % groups:
        raise ConfigError(f"places={places} must be a multiple of devices={devices}, those of nodes={nodes}, and the "
                          f"{E} experts of groups={groups}.")
    if groups % nodes:
        groups = nodes = 1
    return Placement(np.stack([_place(load_E, places, groups, nodes, devices) for load_E in loads_LE]), E)


def _place(load_E, places, groups, nodes, devices):
    E, per_node = len(load_E), places // nodes
    size = E // groups
    node_of, rank_of = pack(load_E.reshape(groups, size).sum(axis=1, dtype=np.float32), nodes)
    order = np.argsort(node_of * (groups // nodes) + rank_of)  # groups, node by node
    expert_NX = (order[:, None] * size + np.arange(size)).reshape(nodes, -1)
    out = []
    for expert_X in expert_NX:
        load_X = load_E[expert_X]
        replica_P, count_X = replicate(load_X, per_node)
        device_of, place_of = pack((load_X / count_X)[replica_P], devices // nodes)
        order = np.argsort(device_of * (places // devices) + place_of)
        out.append(expert_X[replica_P[order]])
    return np.concatenate(out).astype(np.int32)


def pack(weight_N: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns items to packs of equal size, the heaviest first, each to the lightest pack that is not full.

    weight_N: float, of each of N items, a multiple of packs. Returns (pack, rank inside it) of each item, int [N].
    """
    N = len(weight_N)
    if N == packs:
        return np.arange(N), np.zeros(N, int)
    pack_of, rank_of, weight, held = np.zeros(N, int), np.zeros(N, int), np.zeros(packs, np.float32), [0] * packs
    for item in np.argsort(-weight_N, kind="stable"):
        best = min((p for p in range(packs) if held[p] < N // packs), key=lambda p: weight[p])
        pack_of[item], rank_of[item] = best, held[best]
        weight[best] += weight_N[item]
        held[best] += 1
    return pack_of, rank_of


def replicate(weight_N: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
    """Duplicates the item of the largest weight per replica until all places are taken.

    weight_N: float. Returns (item of each place int [places], replicas of each item float32 [N]).
    """
    item_P, count_N = list(range(len(weight_N))), np.ones(len(weight_N), np.float32)
    while len(item_P) < places:
        item = int(np.argmax(weight_N / count_N))
        item_P.append(item)
        count_N[item] += 1
    return np.array(item_P), count_N


def apply(weights: DecodeWeights, placement: Placement) -> DecodeWeights:
    """Decoding weights with every MoE layer's experts at their places.

    Weights that were already placed are placed again. The router still chooses experts; a token's row number selects
    the replica. MTP modules are not changed.

    Raises:
      ConfigError: a placement for other layers or experts, or one that leaves an expert without a place.
    """
    layers, moe = list(weights.layers), [i for i, w in enumerate(weights.layers) if w.router is not None]
    if len(moe) != len(placement.expert_LP):
        raise ConfigError(f"a placement of {len(placement.expert_LP)} layers does not fit {len(moe)} MoE layers.")
    for layer, i in enumerate(moe):
        w, expert_P = layers[i], placement.expert_LP[layer]
        assert w.router is not None
        experts = w.router.shape[1]
        if placement.experts != experts or not np.array_equal(np.unique(expert_P), np.arange(experts)):
            raise ConfigError(f"a placement of {placement.experts} experts does not give each of the {experts} experts "
                              f"of MoE layer {layer} a place.")
        # The present place of each expert: its own number, until it is placed for the first time.
        row_P = expert_P if w.places is None else np.asarray(w.places.table_EX)[expert_P, 0]
        table_EX, count_E = placement.replicas(layer)
        placed = {name: w.ffn[name][row_P] for name in ("gate", "up", "down")}
        layers[i] = w._replace(ffn=w.ffn | placed, places=Places(jnp.asarray(table_EX), jnp.asarray(count_E)))
    return weights._replace(layers=tuple(layers))
