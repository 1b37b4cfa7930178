"""The MoE layer on a mesh: experts on other devices, residuals for the backward pass, and possible overlap."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import FP8Config, MeshConfig
from deepseek_jax.model.experts import ExpertWeights, MoE, resident_experts, routed_experts
from deepseek_jax.model.layers import SAVED_NAMES
from deepseek_jax.training.step import accumulate
from tests.model import naive
from tests.parallel.meshes import QUICKLY, batch_of, config_of, fresh_state, on, without_devices

MESH = MeshConfig(node=2, local=4)
CFG = naive.tiny(num_experts=16, d_model=128, expert_ffn_dim=64)


def arguments(cfg, rows=8):
    """Layer variables, inputs and biases."""
    rng = np.random.default_rng(0)
    x_BTD, bias_E = rng.standard_normal((rows, 8, cfg.d_model)).astype(cfg.dtype), np.zeros(16, np.float32)
    shapes = jax.eval_shape(MoE(cfg).init, jax.random.key(0), x_BTD, bias_E)
    return naive.fill(shapes), jnp.asarray(x_BTD), bias_E


def layer(cfg, mesh):
    """-> (output, its gradients by weights and inputs, stats)"""
    variables, x_BTD, bias_E = arguments(cfg)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(variables, x_BTD):
        y_BTD, pull, stats = jax.vjp(lambda v, x: MoE(cfg, mesh).apply(v, x, bias_E), variables, x_BTD, has_aux=True)
        return y_BTD, pull(jnp.cos(jnp.arange(y_BTD.size, dtype=jnp.float32)).reshape(y_BTD.shape).astype(y_BTD.dtype)
                           ), stats

    with on(mesh):
        return jax.device_get(run(variables, x_BTD))


def assert_close(found, expected, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max()), found, expected)


@pytest.mark.parametrize("mesh", [MESH, MeshConfig(replica=4), MeshConfig(replica=2, tensor=2)], ids=[
    "experts apart", "replicas", "replicas and tensor"])
def test_the_layer_is_the_layer_of_one_device_with_its_gradients(mesh):
    found, expected = layer(CFG, mesh), layer(CFG, MeshConfig())

    assert_close(found[:2], expected[:2], 2e-5)
    np.testing.assert_array_equal(found[2].counts_E, expected[2].counts_E)
    assert found[2].traffic.computed == 64 * CFG.experts_per_token and expected[2].traffic is None


def error(found, expected):
    """Relative error of all arrays together."""
    found, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_tokens_that_travel_in_fp8_err_by_percents():
    found, expected = layer(CFG, MeshConfig(node=2, local=4, dispatch_fp8=True)), layer(CFG, MeshConfig())

    assert 1e-3 < error(found[0], expected[0]) < 0.05
    assert 1e-3 < error(found[1], expected[1]) < 0.05


@pytest.mark.slow
def test_experts_elsewhere_compute_in_fp8_as_experts_here_do():
    cfg = naive.tiny(num_experts=16, d_model=128, expert_ffn_dim=64, fp8=FP8Config(enabled=True))
    found, expected = layer(cfg, MESH), layer(cfg, MeshConfig())

    assert_close(found[0], expected[0], 2e-5)
    assert error(found[1], expected[1]) < 0.05  # tiles along tokens have other tokens


@pytest.mark.parametrize("implementation", ["cpu", "ragged", "reference"])
def test_experts_here_ignore_choices_that_are_served_elsewhere(implementation):
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((4, 6, 5), (4, 6, 5), (4, 5, 6))]
    weights = ExpertWeights(*map(jnp.asarray, weights))
    x_ND, gates_NK = (jnp.asarray(x, jnp.float32) for x in (rng.standard_normal((40, 6)), rng.random((40, 3))))
    chosen_NK = rng.permuted(np.tile(np.arange(4), (40, 1)), axis=1)[:, :3].astype(np.int32)
    here_NK = rng.random((40, 3)) < 0.4

    def found(x_ND, *weights):
        id_NK, gate_NK = jnp.where(here_NK, chosen_NK + 1, 0), jnp.where(here_NK, gates_NK, 0)
        return resident_experts(x_ND, id_NK, gate_NK, ExpertWeights(*weights), 40, implementation=implementation)

    def expected(x_ND, *weights):
        return routed_experts(x_ND, chosen_NK, jnp.where(here_NK, gates_NK, 0), ExpertWeights(*weights),
                              "reference")

    (y_ND, computed), pull = jax.vjp(found, x_ND, *weights)
    same_ND, pull_same = jax.vjp(expected, x_ND, *weights)
    dy_ND = jnp.asarray(rng.standard_normal(y_ND.shape), jnp.float32)
    assert computed == here_NK.sum()
    assert_close((y_ND, pull((dy_ND, np.zeros((), jax.dtypes.float0)))), (same_ND, pull_same(dy_ND)), 2e-5)


def test_experts_here_with_little_room_drop_the_last_rows_and_say_how_many():
    rng = np.random.default_rng(2)
    shapes = ((2, 6, 5), (2, 6, 5), (2, 5, 6))
    weights = ExpertWeights(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    x_ND = jnp.asarray(rng.standard_normal((64, 6)), jnp.float32)
    run = functools.partial(resident_experts, x_ND, jnp.ones((64, 1), jnp.int32), jnp.ones((64, 1)), weights, 32)
    (all_ND, everything), (some_ND, some) = run(), run(capacity=1.0)

    assert everything == 64 and 32 <= some < 64
    np.testing.assert_array_equal((np.asarray(some_ND) == 0).all(axis=1).sum(), 64 - some)
    np.testing.assert_allclose(some_ND[:some], all_ND[:some], rtol=1e-6)


def equations(jaxpr):
    """All equations, including those of inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_a_capacity_bounds_the_rows_that_experts_compute():
    variables, x_BTD, bias_E = arguments(CFG)
    mesh = MeshConfig(node=2, local=4, capacity=1.0)
    with without_devices(mesh):
        jaxpr = jax.make_jaxpr(lambda v, x: MoE(CFG, mesh).apply(v, x, bias_E)[0])(variables, x_BTD).jaxpr
    rows = {v.aval.shape[0] for e in equations(jaxpr) if e.primitive.name == "logistic"
            for v in e.outvars if v.aval.shape[1:] == (CFG.expert_ffn_dim,)}
    even, most_padding = 64 * CFG.experts_per_token // 8, 3 * 8  # two experts a device, tiles of 8 rows
    assert len(rows) == 1 and even <= rows.pop() <= even + most_padding


@pytest.mark.parametrize(("wire", "dtype"), [(False, "float32"), (True, "float8_e4m3fn")])
def test_what_arrived_at_the_experts_is_kept_as_it_came(wire, dtype):
    variables, x_BTD, bias_E = arguments(CFG)
    mesh = MeshConfig(node=2, local=4, dispatch_fp8=wire)
    layer = jax.checkpoint(lambda v, x: MoE(CFG, mesh).apply(v, x, bias_E)[0],
                           policy=jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES))
    with without_devices(mesh):
        kept = jax.tree.leaves(jax.eval_shape(lambda v, x: jax.vjp(layer, v, x)[1], variables, x_BTD))
    arrived = {x.dtype.name for x in kept if x.ndim == 2 and x.shape[0] > 64 and x.shape[1] == CFG.d_model}
    assert arrived == {dtype}


@pytest.mark.parametrize("remat", ["none", "report"])
def test_nothing_travels_twice(remat):
    config = config_of(MESH, remat=remat, dtype="float32")
    state = fresh_state(config_of(dtype="float32").model)
    with without_devices(MESH):
        jaxpr = jax.make_jaxpr(lambda params, batch: accumulate(config, params, state.router, batch, 0))(
            state.params, batch_of(config, 0))

    sent = sum(e.primitive.name == "all_to_all" for e in equations(jaxpr.jaxpr))
    # Two layers with two hops each: tokens, choices and gates are sent, results return; gradients go the other way.
    assert sent == 2 * 2 * (2 + 2)


@pytest.mark.parametrize(("remat", "times"), [("dispatch", 1), ("full", 2)])
def test_tokens_that_travel_again_go_where_they_went(remat, times):
    """The routes of the rows are kept, so that the backward pass exchanges no sizes."""
    mesh = dataclasses.replace(MESH, buffers="ragged")
    config = config_of(mesh, remat=remat, dtype="float32")
    state = fresh_state(config_of(dtype="float32").model)
    with without_devices(mesh):
        jaxpr = jax.make_jaxpr(lambda params, batch: accumulate(config, params, state.router, batch, 0))(
            state.params, batch_of(config, 0))

    counted = lambda name: sum(e.primitive.name == name for e in equations(jaxpr.jaxpr))
    assert counted("ragged_all_to_all") > 2 * 2 * (2 + 2)  # some of them again
    assert counted("all_gather") == 2 * times


def test_the_shared_expert_waits_for_no_token_that_travels():
    variables, x_BTD, bias_E = arguments(CFG)
    with without_devices(MESH):
        jaxpr = jax.make_jaxpr(lambda v, x: MoE(CFG, MESH).apply(v, x, bias_E)[0])(variables, x_BTD).jaxpr

    late, products = set(), 0
    for equation in jaxpr.eqns:
        shared = "shared" in str(equation.source_info.name_stack)
        depends = any(v in late for v in equation.invars if not isinstance(v, jax.extend.core.Literal))
        products += shared
        assert not (shared and depends)
        # Equations with an exchange, and all that depend on them.
        if depends or any(e.primitive.name == "all_to_all" for e in equations(equation.params.get("jaxpr", jaxpr))
                          if equation.primitive.name == "shard_map"):
            late.update(equation.outvars)
    assert products >= 3 and late
