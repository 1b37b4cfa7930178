"""The learning rate at the marks of its schedule, and the updates of AdamW and Muon for each kind of parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import OptimizerConfig
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.training.optimizer import decayed, learning_rate, make_optimizer, matrices, scale_by_muon
from tests.model import naive

MARKS = dict(warmup=0.1, constant_until=0.5, cosine_until=0.8, cosine_to=0.1, tail_from=0.9, tail_to=0.03)
PLAIN = dict(warmup=0.0, constant_until=1.0, cosine_until=1.0, tail_from=1.0, weight_decay=0.0, clip_norm=1e9)


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 0.01), (49, 0.5), (99, 1.0),  # warm-up is linear, and its first step already changes weights
        (100, 1.0), (499, 1.0),
        (500, 0.1 + 0.45 * (1 + np.cos(np.pi / 300))), (574, 0.1 + 0.45 * (1 + np.cos(np.pi / 4))), (649, 0.55),
        (799, 0.1), (899, 0.1),  # the first level of the tail, at which the cosine ends
        (900, 0.03), (999, 0.03),
    ],
)
def test_the_learning_rate_at_its_marks(step, share):
    rate = learning_rate(OptimizerConfig(learning_rate=2e-4, **MARKS), 1000)(jnp.int32(step))

    assert rate.dtype == jnp.float32
    np.testing.assert_allclose(rate, 2e-4 * share, rtol=1e-5)


def test_the_defaults_are_the_levels_of_the_report():
    rate = learning_rate(OptimizerConfig(), 14_800)  # a step has a billion tokens
    levels = [float(rate(jnp.int32(tokens - 1))) for tokens in (10_000, 14_300, 14_600, 14_800)]

    np.testing.assert_allclose(levels, [2.2e-4, 2.2e-5, 2.2e-5, 7.3e-6], rtol=2e-3)


def test_after_warm_up_the_rate_never_rises():
    rate = learning_rate(OptimizerConfig(**MARKS), 200)
    rates = jax.vmap(rate)(jnp.arange(200))

    assert (jnp.diff(rates[:20]) > 0).all() and (jnp.diff(rates[20:]) <= 0).all()


def test_without_warm_up_the_first_step_takes_the_whole_rate():
    assert learning_rate(OptimizerConfig(learning_rate=0.5, warmup=0.0), 10)(jnp.int32(0)) == 0.5


def run(cfg, params, gradients, steps=100):
    """The parameters before each step and after the last one, and the last optimizer state."""
    optimizer = make_optimizer(cfg, steps)
    state, seen = optimizer.init(params), [params]
    for grads in gradients:
        updates, state = optimizer.update(grads, state, seen[-1])
        seen.append(jax.tree.map(jnp.add, seen[-1], updates))
    return seen, state


def test_each_step_moves_by_the_rate_of_that_step():
    cfg = OptimizerConfig(**{**PLAIN, **MARKS, "warmup": 0.5, "learning_rate": 0.1})
    seen, _ = run(cfg, {"w": jnp.zeros(3)}, [{"w": jnp.array([1.0, -2.0, 0.5])}] * 5, steps=10)

    moved = -jnp.diff(jnp.stack([p["w"] for p in seen]), axis=0)
    rates = jax.vmap(learning_rate(cfg, 10))(jnp.arange(5))
    # Adam of a constant gradient is its sign.
    np.testing.assert_allclose(moved, rates[:, None] * jnp.array([[1.0, -1.0, 1.0]]), rtol=1e-4)


def test_moments_in_bfloat16_are_stored_so_and_come_close_to_float32():
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((8, 8))}
    gradients = [{"w": jnp.asarray(1 + 0.3 * rng.standard_normal((8, 8)), jnp.float32)} for _ in range(20)]
    narrow, wide = (run(OptimizerConfig(**PLAIN, learning_rate=0.01, moment_dtype=d), params, gradients)
                    for d in ("bfloat16", "float32"))

    kinds = lambda state: [str(x.dtype) for x in jax.tree.leaves(state) if x.ndim]
    assert kinds(narrow[1]) == ["bfloat16"] * 2 and kinds(wide[1]) == ["float32"] * 2
    assert narrow[0][-1]["w"].dtype == jnp.float32
    difference = jnp.abs(narrow[0][-1]["w"] - wide[0][-1]["w"]).max()
    assert 0 < difference < 0.02 * jnp.abs(wide[0][-1]["w"]).max()


def test_weight_decay_shrinks_weights_and_leaves_the_scales_of_norms():
    params = {"norm": {"scale": jnp.full(4, 2.0)}, "ffn": {"up": jnp.full((4, 4), 2.0)}}
    cfg = OptimizerConfig(**{**PLAIN, "weight_decay": 0.1}, learning_rate=0.01)
    seen, _ = run(cfg, params, [jax.tree.map(jnp.zeros_like, params)])

    np.testing.assert_array_equal(seen[-1]["norm"]["scale"], 2.0)
    np.testing.assert_allclose(seen[-1]["ffn"]["up"], 2.0 * (1 - 0.01 * 0.1), rtol=1e-6)


def test_of_the_model_only_norm_scales_are_not_decayed():
    shapes = jax.eval_shape(lambda: DeepSeekV3(naive.tiny()).init(jax.random.key(0), np.zeros((1, 4), np.int32)))
    mask = jax.tree_util.tree_leaves_with_path(decayed(shapes["params"]))

    spared = {jax.tree_util.keystr(path, simple=True, separator="/") for path, shrinks in mask if not shrinks}
    assert spared and all(name.split("/")[-2].endswith("norm") for name in spared)
    assert len(spared) == sum("norm" in jax.tree_util.keystr(path) for path, _ in mask)


@pytest.mark.parametrize(("size", "passed"), [(10.0, 1.0), (0.5, 0.5)])
def test_gradients_are_clipped_by_their_norm_over_all_parameters(size, passed):
    gradients = {"a": jnp.array([0.6]) * size, "b": jnp.array([[0.8]]) * size}  # norm: size
    _, state = run(OptimizerConfig(**{**PLAIN, "clip_norm": 1.0}), jax.tree.map(jnp.zeros_like, gradients), [gradients])

    first, second = (jnp.concatenate([m["a"], m["b"][0]]) for m in (state[1].mu, state[1].nu))
    np.testing.assert_allclose(first, 0.1 * passed * np.array([0.6, 0.8]), rtol=1e-5)
    np.testing.assert_allclose(second, 0.05 * (passed * np.array([0.6, 0.8])) ** 2, rtol=1e-5)


MUON = {**PLAIN, "kind": "muon", "learning_rate": 0.1}


@functools.cache
def model_params():
    return naive.variables_of(naive.tiny())["params"]


def orthogonalized(x_IO):
    """Five Newton-Schulz steps with Jordan's coefficients, in NumPy."""
    x_IO = np.asarray(x_IO, np.float64) / np.linalg.norm(x_IO)
    for _ in range(5):
        a_II = x_IO @ x_IO.T
        x_IO = 3.4445 * x_IO + (-4.7750 * a_II + 2.0315 * a_II @ a_II) @ x_IO
    return x_IO


def test_muon_takes_layers_and_experts_as_matrices_and_the_heads_of_one_together():
    cfg, found = naive.tiny(), {}
    shapes = {path: x.shape for path, x in traverse_util.flatten_dict(model_params()).items()}
    for path, numbers in traverse_util.flatten_dict(matrices(model_params())).items():
        if numbers is not None:
            shape = shapes[path]
            sizes = [int(np.prod([shape[axis] for axis in axes])) for axes in numbers]
            found["/".join(path)] = (int(np.prod(shape)) // int(np.prod(sizes)), *sizes)

    D, H, qk = cfg.d_model, cfg.num_heads, cfg.nope_head_dim + cfg.rope_head_dim
    expected = {"attention/q_a": (D, 12), "attention/q_b": (12, H * qk), "attention/kv_a": (D, 16 + 4),
                "attention/kv_b": (16, H * (8 + 6)), "attention/o": (H * 6, D)}
    for end, sizes in expected.items():
        assert found[f"layers/{end}"] == (2, *sizes) and found[f"mtp_1/block/{end}"] == (1, *sizes)
    assert found["layers/ffn/up"] == (2 * 8, D, 10) and found["layers/ffn/down"] == (2 * 8, 10, D)
    assert found["dense_layers/ffn/up"] == (1, D, 24) and found["layers/ffn/router/weight"] == (2, D, 8)
    assert found["mtp_1/projection"] == (1, 2 * D, D)
    assert not {"embedding", "head", "norm/scale"} & found.keys()


def test_muon_moves_a_matrix_by_its_orthogonal_part_at_the_size_of_adams():
    params = model_params()
    grads = naive.fill(params, seed=1)
    (before, after), _ = run(OptimizerConfig(**MUON), params, [grads])

    moved = jax.tree.map(lambda a, b: (np.asarray(b) - a) / -0.1, before, after)["layers"]["attention"]
    for layer in range(2):
        kv_a, o = moved["kv_a"][layer], moved["o"][layer].reshape(-1, 32)
        g_kv_a, g_o = (np.asarray(grads["layers"]["attention"][name][layer]) for name in ("kv_a", "o"))
        np.testing.assert_allclose(kv_a, 0.2 * np.sqrt(32) * orthogonalized(g_kv_a.T).T, atol=2e-4)
        np.testing.assert_allclose(o, 0.2 * np.sqrt(32) * orthogonalized(g_o.reshape(-1, 32)), atol=2e-4)


def test_what_is_no_matrix_moves_as_under_adamw():
    params = model_params()
    gradients = [naive.fill(params, seed=seed) for seed in (1, 2)]
    muon, adam = (run(OptimizerConfig(**{**MUON, "kind": kind}), params, gradients)[0][-1]
                  for kind in ("muon", "adamw"))

    same = lambda a, b: np.allclose(a, b, rtol=0, atol=1e-6)
    assert same(muon["embedding"], adam["embedding"]) and same(muon["head"], adam["head"])
    assert same(muon["norm"]["scale"], adam["norm"]["scale"])
    assert not same(muon["mtp_1"]["projection"], adam["mtp_1"]["projection"])


def test_muon_decays_what_adamw_decays():
    params = model_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    muon, adam = (run(OptimizerConfig(**{**MUON, "kind": kind, "weight_decay": 0.1}), params, [zeros])[0][-1]
                  for kind in ("muon", "adamw"))

    jax.tree.map(np.testing.assert_array_equal, muon, adam)
    np.testing.assert_allclose(muon["head"], params["head"] * (1 - 0.1 * 0.1), rtol=1e-6)


def test_muon_remembers_one_number_a_weight_of_a_matrix_in_the_dtype_of_moments():
    params = model_params()
    state = make_optimizer(OptimizerConfig(**MUON, moment_dtype="bfloat16"), 10).init(params)

    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        found.setdefault(names[-1], set()).add(str(x.dtype))
    assert found["kv_a"] == found["embedding"] == found["scale"] == {"bfloat16"} and found["ns_coeffs"] == {"float32"}
    matrix = sum(x.size for x, numbers in zip(jax.tree.leaves(params), jax.tree.leaves(
        matrices(params), is_leaf=lambda x: x is None or isinstance(x, tuple))) if numbers is not None)
    rest = sum(x.size for x in jax.tree.leaves(params)) - matrix
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1 or x.size > 3) == matrix + 2 * rest


def test_muon_moves_by_nesterovs_momentum():
    """Two steps with different gradients; both means are corrected for starting at zero, as in optax."""
    norm = {"scale": jnp.zeros(4)}
    params = {"layers": {"ffn": {"up": jnp.zeros((1, 1, 6, 4))}}, "norm": norm}
    first, second = (np.random.default_rng(seed).standard_normal((6, 4)) for seed in (0, 1))
    gradients = [{"layers": {"ffn": {"up": jnp.asarray(g, jnp.float32)[None, None]}}, "norm": norm}
                 for g in (first, second)]
    (_, before, after), _ = run(OptimizerConfig(**MUON), params, gradients)

    beta = 0.95
    mean = (1 - beta) * (beta * first + second) / (1 - beta ** 3)
    ahead = beta * mean + (1 - beta) * second / (1 - beta ** 2)
    moved = (after["layers"]["ffn"]["up"] - before["layers"]["ffn"]["up"])[0, 0] / -0.1
    np.testing.assert_allclose(moved, 0.2 * np.sqrt(6) * orthogonalized(ahead.T).T, atol=2e-4)


@pytest.mark.parametrize("columns", [1, 2])
def test_muon_never_gathers_experts_of_other_devices(columns):
    """The axis of experts stays sharded, so no array of the compiled update has all experts."""
    mesh = jax.make_mesh((8 // columns, columns), ("expert", "column"), (jax.sharding.AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(None, "expert", None, "column"))
    grads = {"layers": {"ffn": {"up": jax.ShapeDtypeStruct((2, 8, 64, 32), jnp.float32, sharding=split)}},
             "norm": {"scale": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    muon = scale_by_muon(OptimizerConfig(kind="muon"))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim == 4 else None),
                         jax.eval_shape(muon.init, grads))
    program = jax.jit(muon.update).lower(grads, state, grads).compile().as_text()

    gathered = [line for line in program.splitlines() if " all-gather(" in line or " all-gather-start(" in line]
    assert not [line for line in gathered if "[2,8," in line or "[16," in line], gathered
    assert columns > 1 or not gathered
