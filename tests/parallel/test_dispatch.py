"""Dispatch: every copy arrives once at the device of its experts, and returns; two hops equal the flat form."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from deepseek_jax.config import MeshConfig, model_config
from deepseek_jax.model import router as routing
from deepseek_jax.model.experts import FP8_WIRE
from deepseek_jax.parallel import dispatch
from deepseek_jax.parallel.dispatch import copy_bytes
from deepseek_jax.parallel.sharding import spec
from tests.parallel.meshes import QUICKLY, on

N, K, E, D = 32, 3, 16, 4
MESHES = {"node=2 local=4": MeshConfig(node=2, local=4), "node=4 local=2": MeshConfig(node=4, local=2),
          "local=8": MeshConfig(local=8), "replica=2 node=2 local=2": MeshConfig(replica=2, node=2, local=2),
          "node=2 local=2 tensor=2": MeshConfig(node=2, local=2, tensor=2),
          "flat": MeshConfig(node=2, local=4, dispatch="flat")}

# name -> the experts of each token; device d has experts 2d and 2d + 1
ROUTINGS = {
    "mixed": np.random.default_rng(0).permuted(np.tile(np.arange(E), (N, 1)), axis=1)[:, :K],
    "all to one expert": np.stack([np.full(N, 5), *np.random.default_rng(1).integers(6, 16, (2, 16)).repeat(2, 1)], 1),
    "all on one device": np.tile([[6, 7, 6]], (N, 1)),
    "none to a node": np.random.default_rng(2).permuted(np.tile(np.arange(E // 2), (N, 1)), axis=1)[:, :K],
    "all to the last": np.tile([[15, 14, 13]], (N, 1)),
}


def experts(x_RD, id_RK, gates_RK, weights):
    """sum over k of gate * tanh(x * w[expert]): not linear, so that exchanged rows change the result."""
    w_ED = jnp.concatenate([jnp.zeros((1, D)), weights[0]])
    return (gates_RK[:, :, None] * jnp.tanh(x_RD[:, None] * w_ED[id_RK])).sum(axis=1), (id_RK > 0).sum()


def local(x_ND, chosen_NK, gates_NK, w_ED):
    return experts(x_ND, chosen_NK + 1, gates_NK, (w_ED,))[0]


def arguments():
    rng = np.random.default_rng(3)
    return [rng.uniform(0.5, 1, shape).astype(np.float32) for shape in ((N, D), (N, K), (E, D), (N, D))]


@functools.cache
def through(cfg, wire=dispatch.PLAIN):
    """(tokens, choices, gates, weights, dy) -> (output, traffic, gradients), jitted once per mesh."""
    def run(x_ND, chosen_NK, gates_NK, w_ED, dy_ND):
        def f(x_ND, gates_NK, w_ED):
            return dispatch.to_experts(dispatch.ExpertLayout(cfg, E, cfg.node, wire), experts, x_ND, chosen_NK,
                                       gates_NK, (w_ED,))

        y_ND, pull, traffic = jax.vjp(f, x_ND, gates_NK, w_ED, has_aux=True)
        return y_ND, traffic, pull(dy_ND)

    return jax.jit(run, compiler_options=QUICKLY)


def dispatched(cfg, chosen_NK, **options):
    x_ND, gates_NK, w_ED, dy_ND = arguments()
    with on(cfg):
        y_ND, traffic, grads = jax.device_get(through(cfg, **options)(x_ND, chosen_NK.astype(np.int32), gates_NK, w_ED,
                                                                      dy_ND))
    return y_ND, jax.tree.map(int, traffic), grads


def expected(chosen_NK):
    x_ND, gates_NK, w_ED, dy_ND = arguments()
    y_ND, pull = jax.vjp(lambda *args: local(args[0], chosen_NK, *args[1:]), x_ND, gates_NK, w_ED)
    return y_ND, pull(dy_ND)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", MESHES)
def test_every_choice_is_served_once_and_gradients_come_back(name, routing):
    chosen_NK = ROUTINGS[routing]
    y_ND, traffic, grads = dispatched(MESHES[name], chosen_NK)

    assert traffic.computed == traffic.choices == N * K and traffic.tokens == N  # conservation
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
    assert {name: getattr(traffic, name) for name in counted} == counted
    assert traffic.nodes <= N * min(K, cfg.node)


def test_two_hops_are_the_flat_form_with_fewer_copies_between_nodes():
    chosen_NK = ROUTINGS["mixed"]
    (y_ND, traffic, grads), (flat_ND, flat_traffic, flat_grads) = (
        dispatched(MESHES[name], chosen_NK) for name in ("node=2 local=4", "flat"))

    np.testing.assert_allclose(y_ND, flat_ND, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, flat_grads)
    assert traffic.across < flat_traffic.across == traffic.flat_across


def test_counters_of_a_step_with_billions_of_choices_do_not_wrap():
    cfg = MESHES["node=2 local=4"]
    with on(cfg):
        _, traffic, _ = through(cfg)(*arguments()[:1], ROUTINGS["mixed"].astype(np.int32), *arguments()[1:])
    micro_batches = jnp.int32(2**26)

    said = dispatch.traffic_per_token(cfg, model_config("v3_671b"), jax.tree.map(lambda n: n * micro_batches, traffic))
    assert said == dispatch.traffic_per_token(cfg, model_config("v3_671b"), traffic)
    assert said["nodes_per_token"] > 1 and said["dropped_choices"] == 0


@pytest.mark.parametrize("form", ["two_hop", "flat"])
def test_a_capacity_counts_what_it_drops_and_drops_nothing_else(form):
    cfg = MeshConfig(node=2, local=4, dispatch=form, capacity=1.0)
    kept, dropped = ROUTINGS["mixed"], ROUTINGS["all on one device"]
    for chosen_NK in (kept, dropped):
        y_ND, traffic, _ = dispatched(cfg, chosen_NK)
        missing = traffic.dropped
        assert missing == traffic.choices - traffic.computed
        right_ND, _ = expected(chosen_NK)
        wrong = ~np.isclose(y_ND, right_ND, rtol=1e-5).all(axis=1)
        assert wrong.sum() <= missing <= wrong.sum() * K
        assert (missing > N) == (chosen_NK is dropped)


def test_a_generous_capacity_is_exact():
    cfg = MeshConfig(node=2, local=4, capacity=8.0)
    y_ND, traffic, _ = dispatched(cfg, ROUTINGS["all on one device"])

    assert traffic.computed == N * K
    np.testing.assert_allclose(y_ND, expected(ROUTINGS["all on one device"])[0], rtol=1e-6)


# Transfers of only the filled rows. XLA:CPU has no such operation: a function that follows its definition replaces it.


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Copies from each sender send_sizes[me] rows, beginning at its input_offsets[me], to output_offsets[me] here."""
    me = jax.lax.axis_index(axis_name)
    theirs = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    row = jnp.arange(output.shape[0])
    for rows, start_P, size_P, landing_P in zip(*theirs):
        at = row - landing_P[me]
        comes = (at >= 0) & (at < size_P[me])
        moved = rows[jnp.clip(start_P[me] + at, 0, rows.shape[0] - 1)]
        output = jnp.where(comes.reshape(-1, *[1] * (output.ndim - 1)), moved, output)
    # Receivers must know the sizes, and have room for the rows: a wrong size would hang or overwrite.
    fits = theirs[3][:, me] + theirs[2][:, me] <= output.shape[0]
    fits &= (theirs[1] + theirs[2] <= operand.shape[0]).all(axis=1)
    right = ((recv_sizes == theirs[2][:, me]) & fits).all()
    return jnp.where(right, output, ~jnp.zeros_like(output))


@pytest.fixture
def ragged(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)


@pytest.mark.parametrize("travel", [dispatch.send, dispatch.bring_back])
def test_what_ragged_rows_land_in_hangs_on_counts_and_is_no_constant(monkeypatch, travel):
    """XLA:GPU copies a constant for each layer at the beginning of a step, and keeps the copy until the layer runs."""
    landed_in = []
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", lambda x, output, *_, **__: landed_in.append(output) or output)
    slot_RK, row_S = jnp.zeros((4, 1), jnp.int32), jnp.zeros(6, jnp.int32)

    def lands_in(counts_P):
        travel((jnp.ones((4, 2)),), dispatch.Hop(slot_RK, row_S, counts_P, counts_P, (counts_P,) * 6, "local", 6))
        return landed_in[-1]

    counts = jnp.array([3, 1])
    _, hangs_on = dce_jaxpr(jax.make_jaxpr(lands_in)(counts).jaxpr, [True])
    assert hangs_on == [True] and not np.any(lands_in(counts)) and landed_in[-1].shape == (6, 2)


@pytest.mark.parametrize("routing", ["mixed", "all on one device", "none to a node"])
@pytest.mark.parametrize("axes", [dict(node=2, local=4), dict(replica=2, node=2, local=2),
                                  dict(node=2, local=4, dispatch="flat")], ids=str)
def test_ragged_buffers_carry_the_same(ragged, axes, routing):
    y_ND, traffic, grads = dispatched(MeshConfig(**axes, buffers="ragged"), ROUTINGS[routing])
    same_ND, same, same_grads = dispatched(MeshConfig(**axes), ROUTINGS[routing])

    assert traffic == same
    np.testing.assert_allclose(y_ND, same_ND, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, same_grads)


def test_a_ragged_receiver_that_is_full_drops_what_has_no_room_and_counts_it(ragged):
    cfg = MeshConfig(node=2, local=4, buffers="ragged", capacity=1.0)
    for name, most_kept in (("mixed", True), ("all on one device", False)):
        y_ND, traffic, grads = dispatched(cfg, ROUTINGS[name])
        missing = traffic.choices - traffic.computed
        wrong = ~np.isclose(y_ND, expected(ROUTINGS[name])[0], rtol=1e-5).all(axis=1)
        assert (missing < N) == most_kept and wrong.sum() <= missing <= wrong.sum() * K
        assert all(np.isfinite(g).all() for g in grads)


def test_a_ragged_sender_has_no_more_room_than_a_receiver_and_counts_what_it_cannot_send(ragged):
    """All 16 rows go to both of 2 devices. A sender has room for 10 of each, a receiver for 2 of each of 8 senders."""
    with on(MeshConfig(local=8)):
        place_RK = jnp.tile(jnp.arange(2, dtype=jnp.int32), (8 * 16, 1))
        wanted_QP = jnp.tile(jnp.array([16, 16, 0, 0, 0, 0, 0, 0]), (8, 1))
        hops = jax.jit(jax.shard_map(
            lambda place_RK: jax.tree.map(lambda a: a[None], dispatch.route_hop(place_RK, "local", 8, 20, wanted_QP)),
            in_specs=spec("batch"), out_specs=spec("batch"), check_vma=False))(place_RK)

    assert hops.row_S.shape == (8, 20)
    assert hops.sent_P[:, 2:].sum() == 0 and int(hops.lost.sum()) == 8 * 32 - int(hops.sent_P.sum())
    assert (hops.sent_P.sum(axis=1) <= 20).all() and hops.sent_P[0].tolist()[:2] == [2, 2]


def test_rows_lost_in_the_first_hop_leave_the_second_its_sizes(ragged):
    """Both ends of a transfer compute its size from the tokens' choices, whether all rows arrived or not."""
    cfg = MeshConfig(node=2, local=4, buffers="ragged", capacity=0.5)

    def sizes(chosen_NK):
        first, second = dispatch.route_hops(dispatch.ExpertLayout(cfg, E, cfg.node), chosen_NK)[0]
        _, size, _, _, arriving, _ = second.ragged
        return first.lost[None], second.sent_P[None], size[None], arriving[None]

    with on(cfg):
        lost, sent_LP, size_LP, arriving_LQ = jax.jit(jax.shard_map(
            sizes, in_specs=spec("tokens"), out_specs=spec("tokens"), check_vma=False))(ROUTINGS["mixed"])

    assert lost.sum() > 0
    assert (sent_LP <= size_LP).all() and (sent_LP < size_LP).any()
    for node in (slice(0, 4), slice(4, 8)):
        np.testing.assert_array_equal(size_LP[node], arriving_LQ[node].T)


def test_empty_rows_take_no_place_of_those_that_arrived(ragged):
    """All tokens choose two experts of each device of one node. The first hop has no room for all of their rows, and
    the second hop loses at most one row per device of those that arrived."""
    cfg = MeshConfig(node=2, local=4, buffers="ragged", capacity=1.25)
    chosen_NK = np.tile(np.arange(4), (N, 1)) * 2  # on devices 0 to 3, node 0

    def lost(chosen_NK):
        first, second = dispatch.route_hops(dispatch.ExpertLayout(cfg, E, 1), chosen_NK)[0]
        return first.lost[None], second.lost[None], second.sent_P[None]

    with on(cfg):
        first, second, sent_LP = jax.jit(jax.shard_map(
            lost, in_specs=spec("tokens"), out_specs=spec("tokens"), check_vma=False))(chosen_NK)

    assert first.sum() > 0
    assert second.max() <= 4 and (sent_LP[:4] > 0).all()


def test_one_exchange_of_sizes_serves_both_hops():
    cfg = MeshConfig(node=2, local=4, buffers="ragged")
    f = jax.shard_map(lambda chosen_NK: dispatch.route_hops(dispatch.ExpertLayout(cfg, E, cfg.node), chosen_NK)[1],
                      in_specs=spec("tokens"), out_specs=spec("tokens"), check_vma=False)

    with on(cfg):
        assert str(jax.make_jaxpr(f)(ROUTINGS["mixed"])).count("all_gather[") == 1


# FP8 on the way to the experts.


def test_fp8_tokens_arrive_as_the_nearest_e4m3_and_gradients_of_outputs_too():
    rng = np.random.default_rng(5)
    x_ND, dy_ND = rng.standard_normal((2, N, 256)).astype(np.float32)
    chosen_NK = ROUTINGS["mixed"].astype(np.int32)

    def run(cfg, wire):
        def f(x_ND):
            double = lambda x_RD, id_RK, gates_RK, _: (x_RD * (id_RK > 0).sum(axis=1, keepdims=True), (id_RK > 0).sum())
            placement = dispatch.ExpertLayout(cfg, E, cfg.node, wire)
            return dispatch.to_experts(placement, double, x_ND, chosen_NK, jnp.ones((N, K)), ())[0]

        with on(cfg):
            y_ND, pull = jax.jit(lambda x: jax.vjp(f, x), compiler_options=QUICKLY)(x_ND)
            return np.asarray(y_ND), np.asarray(jax.jit(pull, compiler_options=QUICKLY)(dy_ND)[0])

    for cfg in (MESHES["node=2 local=4"], MESHES["flat"]):
        for found, sent in zip(run(cfg, FP8_WIRE), (x_ND, dy_ND)):
            # Inside jit, like the tokens: outside, jax 0.7.2 rounds differently.
            once = np.asarray(jax.jit(lambda x: FP8_WIRE.decode(FP8_WIRE.encode(x), jnp.float32))(sent))
            np.testing.assert_allclose(found, K * once, rtol=1e-6)  # rounded once, not once per hop
            error = np.abs(once - sent) / np.abs(sent).max(axis=1, keepdims=True)
            assert 0 < error.max() < 2.0**-4


def test_fp8_copies_take_half_of_the_bytes():
    model = model_config("v3_671b")
    plain, fp8 = (copy_bytes(MeshConfig(dispatch_fp8=on), model) for on in (False, True))

    assert plain == 2 * 7168 + 8 * 8 and fp8 == 7168 + 56 + 8 * 8
    assert fp8 / plain < 0.52


# Node-limited routing.


def v3_choices(tokens, seed=0):
    """Random tokens routed as DeepSeek-V3 does: 256 experts, 4 of 8 groups, top 8."""
    cfg = model_config("v3_671b")
    rng = np.random.default_rng(seed)
    scores = jax.nn.sigmoid(rng.standard_normal((tokens, 256)).astype(np.float32))
    return np.asarray(routing.select(cfg, jnp.asarray(scores), jnp.zeros(256)))


def test_on_random_v3_routing_two_hops_send_at_most_55_percent_of_flat_across_nodes():
    chosen_NK = v3_choices(4096)
    node, device = chosen_NK // 32, chosen_NK // 4
    home = np.arange(len(chosen_NK)) % 8
    count = lambda of, size: sum(len({x for x in row if x // size != h}) for row, h in zip(of, home))

    assert max(len(set(row)) for row in node) <= 4
    assert count(node, 1) / count(device, 8) < 0.55


@pytest.mark.slow
def test_the_counters_of_a_64_device_mesh_measure_it():
    code = """
import jax, jax.numpy as jnp, numpy as np
from deepseek_jax.config import MeshConfig, model_config
from deepseek_jax.parallel.dispatch import ExpertLayout, to_experts, traffic_per_token
from deepseek_jax.parallel.mesh import make_mesh
from tests.parallel.test_dispatch import v3_choices
experts = lambda x, ids, gates, w: (x * gates.sum(1, keepdims=True), (ids > 0).sum())
for form in ("two_hop", "flat"):
    cfg, chosen = MeshConfig(node=8, local=8, dispatch=form), v3_choices(512)
    with jax.set_mesh(make_mesh(cfg)):
        run = lambda x: to_experts(ExpertLayout(cfg, 256, 4), experts, x, chosen, jnp.ones((512, 8)), ())[1]
        traffic = jax.jit(run)(jnp.ones((512, 2)))
    found = traffic_per_token(cfg, model_config("v3_671b"), jax.device_get(traffic))
    print(form, found["cross_node_bytes"], found["flat_cross_node_bytes"], found["nodes_per_token"],
          found["dropped_choices"])
"""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=64")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"XLA_FLAGS": flags}, check=True)
    (_, two, flat, nodes, dropped), (_, all_flat, same, _, _) = (line.split() for line in done.stdout.splitlines()[-2:])

    assert float(two) / float(flat) < 0.55 and all_flat == same == flat and dropped == "0" and float(nodes) <= 4
