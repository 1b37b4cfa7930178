"""The policy loss on the model: masks, router replay, and the changes of one step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model import DeepSeekV3
from deepseek_jax.posttraining.update import policy_loss, replayed, view
from deepseek_jax.training.step import Inputs, start_state, train_step
from deepseek_jax.training.types import Normalizers
from tests.model import naive
from tests.posttraining import policies

CONFIG = policies.config_of()
MODEL, T, ROWS = CONFIG.model, CONFIG.train.sequence_length, 4
VARIABLES = naive.variables_of(MODEL)
DEEP = policies.config_of(model=dict(num_layers=3, mtp_depth=0)).model  # with two layers of experts
LAYERS, K = MODEL.num_moe_layers, MODEL.experts_per_token


def micro_of(seed=0, counted=(5, 12)):
    rng = np.random.default_rng(seed)
    shape = (ROWS, T + 1)
    at = np.broadcast_to(np.arange(T + 1), shape)
    return {"tokens": rng.integers(6, 288, shape).astype(np.int32), "segment_ids": np.ones(shape, np.int32),
            "weights": ((at >= counted[0]) & (at < counted[1])).astype(np.float32),
            "sampled": rng.normal(-5, 0.5, shape).astype(np.float32),
            "advantages": np.broadcast_to(np.float32([[1], [-1], [0.5], [-0.5]]), shape)}


@functools.cache
def gradients():
    def loss(params, micro):
        normalizers = Normalizers(jnp.float32(28), jnp.ones(1), 0.3, 1.0)
        value, sums = policy_loss(CONFIG, params, Inputs(VARIABLES["router"], micro, normalizers, jnp.int32(0)))
        return value, sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def apply():
    return jax.jit(lambda variables, tokens, chosen: DeepSeekV3(DEEP).apply(
        variables, tokens, logits=False, capture=("chosen",), chosen=chosen))


def changed(tree, other):
    tree, other = jax.device_get((tree, other))  # compared by NumPy: nothing is compiled for it
    return [jax.tree_util.keystr(path) for (path, a), b in
            zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other)) if (a != b).any()]


def routes_of(chosen_LBTK, micro):
    """Routes as a rollout records them: [L, K, B, T + 1]."""
    return {"routes": np.pad(np.moveaxis(np.asarray(chosen_LBTK), -1, 1), [(0, 0)] * 3 + [(0, 1)],
                             constant_values=-1)}


def test_replaying_its_own_routes_changes_no_bit():
    micro = micro_of()
    own = view(CONFIG, VARIABLES["params"], VARIABLES["router"], micro)
    assert own.chosen_LBTK.shape == (LAYERS, ROWS, T, K)
    (_, plain), free = gradients()(VARIABLES["params"], micro)
    (_, same), forced = gradients()(VARIABLES["params"], micro | routes_of(own.chosen_LBTK, micro))
    assert changed(free, forced) == [] and plain.losses.nats == same.losses.nats


def test_others_routes_are_taken_exactly_and_gates_are_of_its_own_scores():
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(micro_of()["tokens"][:, :-1])
    theirs = np.argsort(rng.random((2, ROWS, T, DEEP.num_experts)), axis=-1)[..., :K].astype(np.int32)
    theirs[:, 1:, 3] = -1  # not recorded: the router decides
    output, own = (apply()(naive.variables_of(DEEP), tokens, jnp.asarray(x)) for x in (theirs, -np.ones_like(theirs)))
    known = theirs[..., :1] >= 0
    np.testing.assert_array_equal(np.where(known, output.captured["chosen"], -1), np.where(known, theirs, -1))
    assert (np.asarray(output.hidden_BTD) != own.hidden_BTD).mean() > 0.9
    np.testing.assert_array_equal(output.captured["chosen"][0, 1:, 3], own.captured["chosen"][0, 1:, 3])
    assert (np.diff(np.sort(own.captured["chosen"])) > 0).all()  # different experts, chosen by the router


def test_the_router_learns_through_the_gates_of_replayed_experts():
    micro = micro_of()
    theirs = np.zeros((LAYERS, ROWS, T, K), np.int32) + np.arange(K, dtype=np.int32)
    (_, _), grads = gradients()(VARIABLES["params"], micro | routes_of(theirs, micro))
    router = np.asarray(grads["layers"]["ffn"]["router"]["weight"][0])
    assert (np.abs(router[:, :K]).max(axis=0) > 0).all() and not router[:, K:].any()
    experts = np.asarray(grads["layers"]["ffn"]["gate"][0])
    assert np.abs(experts[:K]).max() > 0 and not experts[K:, ...].any()


def test_prompts_and_padding_have_no_loss():
    micro = micro_of()
    off = {name: np.where(micro["weights"] > 0, micro[name], 7 + micro[name]) for name in ("sampled", "advantages")}
    (_, _), before = gradients()(VARIABLES["params"], micro)
    (_, _), after = gradients()(VARIABLES["params"], micro | off)
    assert changed(before, after) == []
    behind = micro | {"tokens": np.where(np.arange(T + 1) >= 12, 9, micro["tokens"])}
    (_, _), after = gradients()(VARIABLES["params"], behind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1e-6 + np.abs(a).max())), before, after)
    (_, _), none = gradients()(VARIABLES["params"], micro | {"weights": np.zeros_like(micro["weights"])})
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(none))


def test_answers_do_not_see_each_other():
    micro = micro_of()
    alone = micro | {"weights": micro["weights"] * np.float32([[1], [0], [0], [0]])}
    (_, _), before = gradients()(VARIABLES["params"], alone)
    others = alone | {"tokens": np.concatenate([alone["tokens"][:1], micro_of(5)["tokens"][1:]])}
    (_, _), after = gradients()(VARIABLES["params"], others)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1e-6 + np.abs(a).max())), before, after)


def test_mtp_modules_get_no_gradient_and_the_main_model_all_of_it():
    (_, _), grads = gradients()(VARIABLES["params"], micro_of())
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads["mtp_1"]))
    assert all(np.asarray(g).any() for name in ("embedding", "head", "dense_layers", "norm")
               for g in jax.tree.leaves(grads[name]))


def test_micro_batches_add_up_to_the_batch_and_a_frozen_bias_keeps_its_bits():
    config = policies.config_of(model=dict(num_layers=1, num_dense_layers=0, mtp_depth=0))
    variables = naive.variables_of(config.model)
    halves = [micro_of(seed) for seed in (0, 1)]
    batch = jax.tree.map(lambda *x: np.stack(x), *halves) | {"active": np.int32(2)}
    joined = jax.tree.map(lambda *x: np.concatenate(x)[None], *halves) | {"active": np.int32(1)}
    whole = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=1))
    state = start_state(config, variables["params"], variables["router"], jax.random.key(0))
    run = lambda c, b: jax.jit(functools.partial(train_step, c, loss=policy_loss))(state, b)
    (after, split), (_, once) = run(config, batch), run(whole, joined)

    np.testing.assert_allclose(split.grad_norm, once.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(split.loss, once.loss, rtol=1e-4)
    assert split.own.keys() == {"clipped", "ratio_error"} and float(split.own["ratio_error"]) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), split.own, once.own)
    np.testing.assert_array_equal(np.asarray(after.router["bias"]).view(np.int32),
                                  np.asarray(state.router["bias"]).view(np.int32))
    assert changed(after.params, state.params)


def test_routes_are_handed_over_in_the_layout_of_the_model():
    routes = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    found = replayed({"routes": jnp.asarray(routes)})
    assert found.shape == (2, 4, 4, 3) and replayed({}) is None
    assert found[1, 2, 3, 0] == routes[1, 0, 2, 3]


@pytest.mark.slow
def test_replay_runs_on_a_mesh():
    from deepseek_jax.config import MeshConfig
    from deepseek_jax.parallel.runner import Runner

    config = policies.config_of()
    on_mesh = dataclasses.replace(config, mesh=MeshConfig(node=2, local=2, tensor=2))
    variables = naive.variables_of(config.model)
    theirs = np.zeros((LAYERS, ROWS, T, K), np.int32) + np.arange(K, dtype=np.int32)
    batch = jax.tree.map(lambda *x: np.stack(x), *[m | routes_of(theirs, m) for m in map(micro_of, (0, 1))])
    batch["active"] = np.int32(2)
    state = start_state(config, variables["params"], variables["router"], jax.random.key(0))
    run = lambda c, runner: runner.jit(functools.partial(train_step, c, loss=policy_loss),
                                       jax.eval_shape(lambda: state))(state, runner.shard_batch(batch))
    (_, one), (_, many) = run(config, Runner(config)), run(on_mesh, Runner(on_mesh))
    np.testing.assert_allclose(one.loss, many.loss, rtol=1e-5)
    np.testing.assert_allclose(one.grad_norm, many.grad_norm, rtol=1e-4)
    np.testing.assert_array_equal(one.counts["bias"], many.counts["bias"])
