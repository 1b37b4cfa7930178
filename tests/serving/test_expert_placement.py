"""Expert placement: the test vectors of the EPLB repository, and outputs that do not depend on the placement."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, MeshConfig
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.serving.decode import decode, prefill
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.expert_placement import Placement, apply, balance_experts, pack, replicate
from deepseek_jax.serving.sequence import Request
from deepseek_jax.serving.weights import prepare
from tests.model import naive

CFG = naive.tiny(num_layers=3)
LOADS = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
HIERARCHICAL = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
GLOBAL = [[10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1], [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7]]


@pytest.mark.parametrize(("groups", "nodes", "expected"), [(4, 2, HIERARCHICAL), (1, 1, GLOBAL), (3, 2, GLOBAL)])
def test_the_published_loads_are_placed_as_published(groups, nodes, expected):
    assert balance_experts(LOADS, places=16, groups=groups, nodes=nodes, devices=8).expert_LP.tolist() == expected


def test_every_expert_has_a_place_and_no_device_holds_more_than_its_share():
    loads_LE = np.random.default_rng(0).pareto(1.0, (3, 32)) * 100
    placed = balance_experts(loads_LE, places=48, groups=8, nodes=4, devices=16)

    assert placed.expert_LP.shape == (3, 48)
    assert all(set(row) == set(range(32)) for row in placed.expert_LP.tolist())


def test_the_busiest_device_is_relieved():
    loads_E = np.r_[np.full(15, 10.0), 150.0]
    busiest = lambda expert_P, count_E: (loads_E / count_E)[expert_P].reshape(8, -1).sum(axis=1).max()

    expert_P = balance_experts([loads_E], places=24, groups=1, nodes=1, devices=8).expert_LP[0]

    count_E = np.bincount(expert_P)
    assert count_E[15] > 4 and busiest(expert_P, count_E) < 0.5 * busiest(np.arange(16), np.ones(16))


def test_packs_of_one_are_the_identity():
    assert pack(np.array([3.0, 1.0, 2.0], np.float32), 3)[0].tolist() == [0, 1, 2]


def test_replicas_go_to_the_largest_load_per_replica():
    assert replicate(np.array([9.0, 1.0, 4.0], np.float32), 5)[0].tolist() == [0, 1, 2, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(dict(places=10), "fewer than the 12"), (dict(places=17), "multiple of devices"), (dict(groups=5), "of groups=5")])
def test_numbers_that_do_not_divide_say_so(arguments, message):
    with pytest.raises(ConfigError, match=message):
        balance_experts(LOADS, **{**dict(places=16, groups=4, nodes=2, devices=8), **arguments})


def test_no_output_token_changes_when_experts_move_and_are_duplicated():
    engine = Engine(CFG, naive.variables_of(CFG), EngineConfig(max_sequences=2, max_length=64, chunk=16))
    before = continuations(engine)

    placed = balance_experts(engine.loads_LE, places=12, groups=4, nodes=2, devices=4)
    engine.apply_placement(placed)

    assert engine.weights.layers[1].ffn["gate"].shape[0] == 12
    assert continuations(engine) == before
    assert max(placed.replicas(0)[1]) > 1


@pytest.mark.slow
def test_no_output_token_changes_on_a_mesh_whose_devices_share_the_experts_as_planned():
    mesh = make_mesh(MeshConfig(node=2, local=2), jax.devices()[:4])
    make = functools.partial(Engine, CFG, naive.variables_of(CFG), EngineConfig(2, 64, depth=1, chunk=16))
    before = continuations(make())

    engine = make(mesh)
    assert here(engine) == [CFG.num_experts // 4] * 4
    assert continuations(engine) == before

    for loads_LE in (engine.loads_LE, engine.loads_LE[:, ::-1]):
        engine.apply_placement(balance_experts(loads_LE, places=12, groups=4, nodes=2, devices=4))
        engine.warm_up()
        compiled = decode._cache_size(), prefill._cache_size()

        assert here(engine) == [3] * 4
        assert continuations(engine) == before
        assert (decode._cache_size(), prefill._cache_size()) == compiled


@pytest.mark.parametrize("before", [[7, 0, 1, 2, 3, 4, 5, 6], [7, 7, 6, 5, 4, 3, 2, 1, 1, 0]],
                         ids=["moved", "duplicated"])
def test_placing_again_lays_out_the_same_experts_not_those_of_the_earlier_places(before):
    weights = prepare(CFG, naive.variables_of(CFG))
    last = Placement(np.array([[2, 4, 6, 0, 1, 3, 5, 7, 7, 2]] * 2), 8)

    twice = apply(apply(weights, Placement(np.array([before] * 2), 8)), last)

    jax.tree.map(np.testing.assert_array_equal, twice, apply(weights, last))


@pytest.mark.parametrize(
    ("expert_LP", "experts", "message"),
    [([[*range(8)]] * 3, 8, "3 layers does not fit 2 MoE layers"), ([[*range(6)]] * 2, 6, "6 experts does not give"),
     ([[*range(7), 0]] * 2, 8, "each of the 8 experts of MoE layer 0 a place")])
def test_a_placement_for_another_model_is_refused(expert_LP, experts, message):
    with pytest.raises(ConfigError, match=message):
        apply(prepare(CFG, naive.variables_of(CFG)), Placement(np.array(expert_LP), experts))


def test_experts_that_cannot_be_shared_out_evenly_say_so():
    mesh = make_mesh(MeshConfig(local=3), jax.devices()[:3])
    with pytest.raises(ConfigError, match="over 3 devices .*number of places"):
        Engine(CFG, naive.variables_of(CFG), EngineConfig(max_sequences=1, max_length=32), mesh=mesh)


def continuations(engine):
    made = [engine.submit(Request(prompt, 12)) for prompt in [(5, 9, 3, 60), (7, 1)]]
    engine.run()
    return [[token.id for token in s.made] for s in made]


def here(engine):
    """The experts of the second layer on each device."""
    return [shard.data.shape[0] for shard in engine.weights.layers[1].ffn["gate"].addressable_shards]
