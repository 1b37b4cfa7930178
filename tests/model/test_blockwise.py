"""Attention on devices with a kernel for it: the kernel is used, gives the same result, and keeps no more residuals."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.config import FP8Config, MeshConfig, model_config
from deepseek_jax.model import DeepSeekV3, attention, blockwise, experts
from deepseek_jax.model.attention import MLA
from deepseek_jax.model.blockwise import attend, largest_logits
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.transformer import rematerialized
from deepseek_jax.pipeline.split import split
from kernels_pallas import api
from tests.model import naive
from tests.parallel.meshes import mesh_of

SCALE, BLOCK = 0.1, 16
PUBLISHED = dict(num_heads=2, nope_head_dim=128, rope_head_dim=64, v_head_dim=128, dtype="bfloat16")


@pytest.fixture
def twins(monkeypatch):
    """Replaces Hopper's kernels by their twins. Returns the shapes of q that they were called with."""
    shapes = {"forward": [], "backward": []}

    def twin(part, *arrays, **options):
        shapes[part].append(arrays[0].shape)
        return getattr(api, f"mla_attention_{part}")(*arrays, **options, implementation="reference")

    monkeypatch.setattr(blockwise, "api", types.SimpleNamespace(
        chosen_here=lambda operation: "hopper", mla_attention_forward=functools.partial(twin, "forward"),
        mla_attention_backward=functools.partial(twin, "backward")))
    return shapes


def qkv(B=1, T=40, H=2, dtype=jnp.bfloat16, A=192, V=128):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, H, width)), dtype) for width in (A, A, V)]


def with_gradients(f, arrays):
    """The output and its three gradients under a random cotangent."""
    do = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[2].shape), arrays[2].dtype)

    def run(*arrays):
        o, pull = jax.vjp(f, *arrays)
        return o, *pull(do)

    return jax.jit(run, compiler_options=naive.QUICKLY)(*arrays)


def distance(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kept", [None, "e5m6"])
@pytest.mark.parametrize("segments", [None, np.repeat([0, 1, 0], [13, 17, 10])], ids=["one segment", "three"])
def test_the_kernel_takes_the_place_of_blocks_and_changes_nothing_but_roundings(request, kept, segments):
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)[None]
    f = lambda q, k, v: attend(q, k, v, ids, SCALE, BLOCK, kept)
    expected = with_gradients(f, qkv())
    shapes = request.getfixturevalue("twins")
    found = with_gradients(f, qkv())

    assert shapes == {"forward": [(1, 40, 2, 192)], "backward": [(1, 40, 2, 192)]}
    for name, a, b in zip(("o", "dq", "dk", "dv"), found, expected):
        assert a.dtype == b.dtype and distance(a, b) < 2.0**-7, name


@pytest.mark.parametrize(
    ("arrays", "chosen"),
    [
        (dict(dtype=jnp.float32), "hopper"),
        (dict(A=128), "hopper"),
        (dict(V=64), "hopper"),
        (dict(), "reference"),
        (dict(V=64), "tpu"),
        (dict(dtype=jnp.float32), "tpu"),
    ],
)
def test_other_heads_dtypes_and_devices_keep_the_blocks_bit_for_bit(monkeypatch, twins, arrays, chosen):
    f = lambda q, k, v: attend(q, k, v, None, SCALE, BLOCK)
    monkeypatch.setattr(blockwise.api, "chosen_here", lambda operation: chosen)
    found = with_gradients(f, qkv(**arrays))
    monkeypatch.setattr(blockwise, "_kernel_here", lambda *_: None)

    jax.tree.map(np.testing.assert_array_equal, found, with_gradients(f, qkv(**arrays)))
    assert twins == {"forward": [], "backward": []}


def test_attention_that_is_asked_of_xla_has_no_kernel(twins):
    f = lambda implementation: lambda q, k, v: attend(q, k, v, None, SCALE, BLOCK, None, implementation)
    with_gradients(f("xla"), qkv())
    assert twins == {"forward": [], "backward": []}
    with_gradients(f("auto"), qkv())
    assert twins["forward"]


def test_attention_and_experts_of_a_model_are_of_the_implementation_that_its_config_asks_for(monkeypatch):
    cfg, asked = model_config("tiny", num_layers=1, num_dense_layers=0, mtp_depth=0, implementation="xla"), []
    monkeypatch.setattr(attention, "attend", lambda q, k, v, ids, scale, block, saved, implementation: (
        asked.append(implementation), attend(q, k, v, ids, scale, block))[1])
    monkeypatch.setattr(experts, "implementation_here", lambda name: (asked.append(name), "cpu")[1])
    jax.eval_shape(lambda: DeepSeekV3(cfg).init(jax.random.key(0), np.zeros((1, 8), np.int32)))
    assert set(asked) == {"xla"} and len(asked) >= 2


def test_a_described_device_counts_and_a_kernel_is_asked_for_by_its_operation(monkeypatch):
    monkeypatch.setattr(api, "NEEDS_JAX", (0,))  # independent of the installed packages
    monkeypatch.setattr(api, "device_here", lambda: types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H800"))
    q, k, v = qkv()
    assert blockwise._kernel_here(q, v, "e5m6") == "hopper" and api.chosen_here("mla_decode") == "hopper"
    monkeypatch.setattr(api, "device_here", lambda: types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100"))
    assert blockwise._kernel_here(q, v, None) is None
    monkeypatch.setattr(api, "device_here", lambda: types.SimpleNamespace(platform="tpu", device_kind="TPU v5p"))
    assert (api.chosen_here("fp8_matmul"), api.chosen_here("mla_decode")) == ("tpu", "reference")
    assert blockwise._kernel_here(q, v, None) == "tpu" and blockwise._kernel_here(q, v, "e5m6") is None


def test_on_a_tpu_attention_is_one_differentiable_kernel_of_each_devices_rows_and_heads(monkeypatch):
    arrays, ids = qkv(B=4, T=24, H=4), jnp.arange(24, dtype=jnp.int32)[None].repeat(4, 0) // 9
    f = lambda q, k, v: attend(q, k, v, ids, SCALE, BLOCK)
    expected, shapes = with_gradients(f, arrays), []

    def twin(q, k, v, ids, *, scale):
        shapes.append(q.shape)
        return api.mla_attention(q, k, v, ids, scale=scale, implementation="reference")

    monkeypatch.setattr(blockwise, "api", types.SimpleNamespace(chosen_here=lambda operation: "tpu",
                                                                mla_attention=twin))
    with jax.set_mesh(mesh_of(MeshConfig(node=2, local=2, tensor=2))):
        found = with_gradients(f, arrays)

    assert set(shapes) == {(1, 24, 2, 192)}
    for name, a, b in zip(("o", "dq", "dk", "dv"), found, expected):
        assert distance(a, b) < 2.0**-7, name


@pytest.mark.parametrize("segmented", [False, True])
def test_on_a_mesh_every_device_attends_to_its_own_rows_and_heads(twins, segmented):
    arrays = qkv(B=4, T=24, H=4)
    ids = jnp.arange(24, dtype=jnp.int32)[None].repeat(4, 0) // 9 if segmented else None
    f = lambda q, k, v: attend(q, k, v, ids, SCALE, BLOCK, "e5m6")
    expected = with_gradients(f, arrays)
    with jax.set_mesh(mesh_of(MeshConfig(node=2, local=2, tensor=2))):
        found = with_gradients(f, arrays)

    assert twins["forward"] == twins["backward"] == [(4, 24, 4, 192), (1, 24, 2, 192)]
    for name, a, b in zip(("o", "dq", "dk", "dv"), found, expected):
        assert distance(a, b) < 2.0**-7, name


def test_inside_a_shard_map_the_kernel_is_handed_the_arrays_at_hand(twins):
    arrays = qkv(B=4, T=24, H=2)
    f = lambda q, k, v: attend(q, k, v, None, SCALE, BLOCK)
    rows = PartitionSpec(("node", "local"))
    with jax.set_mesh(mesh_of(MeshConfig(node=2, local=2))):
        found = with_gradients(jax.shard_map(f, in_specs=(rows,) * 3, out_specs=rows, check_vma=False), arrays)

    assert twins["forward"] == twins["backward"] == [(1, 24, 2, 192)]
    for a, b in zip(found, with_gradients(f, arrays)):
        assert distance(a, b) < 2.0**-7


def layer(T=128, **overrides):
    """(cfg, f(params, x_BTD), params, x_BTD) of an attention layer with the heads of the published models."""
    cfg = naive.tiny(**(PUBLISHED | overrides))
    rng = np.random.default_rng(2)
    x_BTD = jnp.asarray(rng.standard_normal((1, T, cfg.d_model)), jnp.bfloat16)
    rope = rope_table(cfg, jnp.arange(T)[None], jnp.float32)
    segments = jnp.arange(T, dtype=jnp.int32)[None] // 50
    params = naive.fill(jax.eval_shape(MLA(cfg).init, jax.random.key(0), x_BTD, rope, segments))
    module = rematerialized(MLA, cfg, scanned=False)(cfg)
    return cfg, lambda params, x_BTD: module.apply(params, x_BTD, rope, segments), params, x_BTD


def kernels(equations):
    """The number of kernel calls in a program."""
    count = 0
    for equation in equations:
        if equation.primitive.name in ("custom_vmap_call", "mpmd_map", "pallas_call", "core_map"):
            count += 1
        else:
            bodies = (getattr(value, "jaxpr", value) for value in equation.params.values())
            count += sum(kernels(body.eqns) for body in bodies if hasattr(body, "eqns"))
    return count


@pytest.fixture
def hopper(monkeypatch):
    """Programs are compiled for a Hopper GPU; they cannot run."""
    from tests.kernels import interpreter  # noqa: F401 (skips where these kernels cannot be traced)

    monkeypatch.setattr(api, "runs_here", lambda: "hopper")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("report", 0), ("full", 1)])
def test_the_forward_kernel_runs_again_only_where_nothing_is_kept(hopper, remat, again, fp8):
    cfg, f, params, x_BTD = layer(remat=remat, fp8=FP8Config(enabled=fp8, implementation="reference"))
    step = jax.make_jaxpr(jax.grad(lambda params, x: f(params, x).astype(jnp.float32).sum()))(params, x_BTD)
    assert kernels(step.jaxpr.eqns) == 3 + again  # forward, dq, dk and dv


@pytest.mark.parametrize("remat", ["none", "report", "full"])
def test_what_is_kept_of_attention_is_the_output_once_and_a_number_a_query(twins, remat):
    """Under "report" these and the latents are kept; queries, keys and values are recomputed."""
    cfg, f, params, x_BTD = layer(remat=remat)
    _, pull_back = jax.eval_shape(functools.partial(jax.vjp, f), params, x_BTD)
    shapes = [x.shape for x in jax.tree.leaves(pull_back)]
    T, H = 128, cfg.num_heads
    heads = [s for s in shapes if np.prod(s) == T * H * 192]
    assert shapes.count((1, H, T)) == (remat != "full")
    assert shapes.count((1, T, H, 128)) == {"none": 2, "report": 1, "full": 0}[remat]  # the output, and values
    assert len(heads) == (2 if remat == "none" else 0)


@pytest.mark.parametrize("remat", ["none", "report", "full"])
def test_a_stage_of_a_pipeline_is_split_around_the_kernels(hopper, remat):
    cfg, f, params, x_BTD = layer(remat=remat)
    stage = lambda params, x, context: (x + f(params, x), jnp.zeros(()), ())
    pieces = split(stage, params, x_BTD, ()).pieces
    counted = {name: kernels(pieces[name].equations) for name in ("F", "Bi", "W")}
    assert counted == {"F": 1, "Bi": 3 if remat == "full" else 2, "W": 0}  # dx needs dq, dk and dv


def test_the_passes_of_a_split_stage_give_the_gradients_of_the_whole(twins):
    cfg, f, params, x_BTD = layer(T=24, remat="report")
    stage = lambda params, x, context: (x + f(params, x), jnp.zeros(()), ())
    s = split(stage, params, x_BTD, ())

    @functools.partial(jax.jit, compiler_options=naive.QUICKLY)
    def both(params, x, dy):
        prepared = s.prepare(params)
        _, kept = s.forward(prepared, x, ())
        dx, deferred = s.backward_input(prepared, (), kept, dy, jnp.zeros(()))
        _, pull_back = jax.vjp(lambda params, x: x + f(params, x), params, x)
        return (s.backward_weights(prepared, (), deferred), dx), pull_back(dy)

    found, expected = both(params, x_BTD, x_BTD[:, ::-1])
    jax.tree.map(lambda a, b: np.testing.assert_array_less(distance(a, b), 2.0**-7), found, expected)


@pytest.mark.parametrize("documents", [None, [0] * 17 + [1] * 23])
def test_the_largest_logit_is_that_of_a_pair_that_attention_sees(documents):
    q, k, _ = qkv(B=3, dtype=jnp.float32, A=12)
    q, k = q.at[:, 20, 1].set(3.0), k.at[:, 39, 1].set(100.0)  # a future key for all queries except the last
    segments = None if documents is None else jnp.broadcast_to(jnp.asarray(documents), (3, 40))

    found = jax.jit(lambda q, k: largest_logits(q, k, segments, SCALE, BLOCK), compiler_options=naive.QUICKLY)(q, k)

    scores_BHTS = SCALE * np.einsum("BTHA,BSHA->BHTS", q, k)
    seen_TS = np.tril(np.ones((40, 40), bool))
    if documents:
        seen_TS &= np.equal.outer(documents, documents)
    np.testing.assert_allclose(found, np.where(seen_TS, scores_BHTS, -np.inf).max(axis=(0, 2, 3)), rtol=1e-5)
