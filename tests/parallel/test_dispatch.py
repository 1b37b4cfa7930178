"""Dispatch: every copy arrives where its experts are, once, and comes back; two hops are the flat form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel import dispatch
from tests.parallel.meshes import QUICKLY, on

N, K, E, D = 32, 3, 16, 4
MESHES = {"node=2 local=4": MeshConfig(node=2, local=4), "node=4 local=2": MeshConfig(node=4, local=2),
          "local=8": MeshConfig(local=8), "replica=2 node=2 local=2": MeshConfig(replica=2, node=2, local=2),
          "node=2 local=2 tensor=2": MeshConfig(node=2, local=2, tensor=2),
          "flat": MeshConfig(node=2, local=4, dispatch="flat")}

# name -> the experts of each token, of which device d holds 2d and 2d + 1
ROUTINGS = {
    "mixed": np.random.default_rng(0).permuted(np.tile(np.arange(E), (N, 1)), axis=1)[:, :K],
    "all to one expert": np.stack([np.full(N, 5), *np.random.default_rng(1).integers(6, 16, (2, 16)).repeat(2, 1)], 1),
    "all on one device": np.tile([[6, 7, 6]], (N, 1)),
    "none to a node": np.random.default_rng(2).permuted(np.tile(np.arange(E // 2), (N, 1)), axis=1)[:, :K],
    "all to the last": np.tile([[15, 14, 13]], (N, 1)),
}


def experts(x_RD, id_RK, gates_RK, weights):
    """sum over k of gate * tanh(x * w[expert]): not linear, so that an expert can tell rows apart."""
    w_ED = jnp.concatenate([jnp.zeros((1, D)), weights[0]])
    return (gates_RK[:, :, None] * jnp.tanh(x_RD[:, None] * w_ED[id_RK])).sum(axis=1), (id_RK > 0).sum()


def local(x_ND, chosen_NK, gates_NK, w_ED):
    return experts(x_ND, chosen_NK + 1, gates_NK, (w_ED,))[0]


def arguments():
    rng = np.random.default_rng(3)
    return [rng.uniform(0.5, 1, shape).astype(np.float32) for shape in ((N, D), (N, K), (E, D), (N, D))]


@functools.cache
def through(cfg, wire=dispatch.PLAIN):
    """(tokens, choices, gates, weights, dy) -> (output, traffic, gradients), jitted once a mesh."""
    def run(x_ND, chosen_NK, gates_NK, w_ED, dy_ND):
        def f(x_ND, gates_NK, w_ED):
            return dispatch.to_experts(cfg, E, cfg.node, experts, x_ND, chosen_NK, gates_NK, (w_ED,), wire)

        y_ND, pull, traffic = jax.vjp(f, x_ND, gates_NK, w_ED, has_aux=True)
        return y_ND, traffic, pull(dy_ND)

    return jax.jit(run, compiler_options=QUICKLY)


def dispatched(cfg, chosen_NK, **options):
    x_ND, gates_NK, w_ED, dy_ND = arguments()
    with on(cfg):
        y_ND, traffic, grads = jax.device_get(through(cfg, **options)(x_ND, chosen_NK.astype(np.int32), gates_NK, w_ED,
                                                                      dy_ND))
    return y_ND, {name: int(n) for name, n in traffic.items()}, grads


def expected(chosen_NK):
    x_ND, gates_NK, w_ED, dy_ND = arguments()
    y_ND, pull = jax.vjp(lambda *args: local(args[0], chosen_NK, *args[1:]), x_ND, gates_NK, w_ED)
    return y_ND, pull(dy_ND)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", MESHES)
def test_every_choice_is_served_once_and_gradients_come_back(name, routing):
    chosen_NK = ROUTINGS[routing]
    y_ND, traffic, grads = dispatched(MESHES[name], chosen_NK)

    assert traffic["computed"] == traffic["choices"] == N * K and traffic["tokens"] == N  # conservation
    same_ND, same_grads = expected(chosen_NK)
    np.testing.assert_allclose(y_ND, same_ND, rtol=1e-6)
    for found, right in zip(grads, same_grads):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", MESHES)
def test_copies_are_those_that_the_nodes_and_devices_of_the_choices_ask_for(name, routing):
    cfg, chosen_NK = MESHES[name], ROUTINGS[routing]
    _, traffic, _ = dispatched(cfg, chosen_NK)

    counted = dict.fromkeys(("nodes", "left", "across", "inside", "flat_across"), 0)
    shard = np.arange(N) * cfg.devices // N // cfg.tensor % (cfg.node * cfg.local)  # where a token starts
    for home, choices in zip(shard, chosen_NK):
        devices = {(e * cfg.node * cfg.local // E) for e in choices}
        nodes, here = {d // cfg.local for d in devices}, home // cfg.local
        counted["nodes"] += len(nodes)
        counted["left"] += bool(nodes - {here})
        counted["flat_across"] += sum(d // cfg.local != here for d in devices)
        if cfg.dispatch == "flat":
            counted["across"] += sum(d // cfg.local != here for d in devices)
            counted["inside"] += sum(d // cfg.local == here and d != home for d in devices)
        else:
            counted["across"] += len(nodes - {here})
            counted["inside"] += sum(d % cfg.local != home % cfg.local for d in devices)
    assert {name: traffic[name] for name in counted} == counted
    assert traffic["nodes"] <= N * min(K, cfg.node)


def test_two_hops_are_the_flat_form_with_fewer_copies_between_nodes():
    chosen_NK = ROUTINGS["mixed"]
    (y_ND, traffic, grads), (flat_ND, flat_traffic, flat_grads) = (
        dispatched(MESHES[name], chosen_NK) for name in ("node=2 local=4", "flat"))

    np.testing.assert_allclose(y_ND, flat_ND, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, flat_grads)
    assert traffic["across"] < flat_traffic["across"] == traffic["flat_across"]


@pytest.mark.parametrize("form", ["two_hop", "flat"])
def test_a_capacity_counts_what_it_drops_and_drops_nothing_else(form):
    cfg = MeshConfig(node=2, local=4, dispatch=form, capacity=1.0)
    kept, dropped = ROUTINGS["mixed"], ROUTINGS["all on one device"]
    for chosen_NK in (kept, dropped):
        y_ND, traffic, _ = dispatched(cfg, chosen_NK)
        missing = traffic["choices"] - traffic["computed"]
        right_ND, _ = expected(chosen_NK)
        wrong = ~np.isclose(y_ND, right_ND, rtol=1e-5).all(axis=1)
        assert wrong.sum() <= missing <= wrong.sum() * K
        assert (missing > N) == (chosen_NK is dropped)


def test_a_generous_capacity_is_exact():
    cfg = MeshConfig(node=2, local=4, capacity=8.0)
    y_ND, traffic, _ = dispatched(cfg, ROUTINGS["all on one device"])

    assert traffic["computed"] == N * K
    np.testing.assert_allclose(y_ND, expected(ROUTINGS["all on one device"])[0], rtol=1e-6)
