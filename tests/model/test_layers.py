"""The parts of a block, and its residuals for the backward pass under each remat."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model import layers
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.transformer import Block, DeepSeekV3, rematerialized
from deepseek_jax.model.types import TokenContext
from tests.model import naive
from tests.precision import float64

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("x_shape", "w_shape"), [((2, 3, 8), (8, 4)), ((2, 3, 8), (8, 2, 5)), ((7, 8), (8, 8))])
def test_linear_is_an_einsum_and_so_are_its_gradients(x_shape, w_shape, dtype):
    x = np.asarray(jnp.asarray(RNG.standard_normal(x_shape), dtype).astype(jnp.float32))
    w, dy = (RNG.standard_normal(s).astype(np.float32) for s in (w_shape, x_shape[:-1] + w_shape[1:]))
    dy = np.asarray(jnp.asarray(dy, dtype).astype(jnp.float32))

    def run(x, w, dy):
        y, pull = jax.vjp(layers.linear, x, w)
        return y, *pull(dy)

    y, dx, dw = jax.jit(run)(jnp.asarray(x, dtype), w, jnp.asarray(dy, dtype))

    rounded_w = np.asarray(jnp.asarray(w, dtype).astype(jnp.float32))
    exact_x, exact_w, exact_dy = (a.astype(np.float64).reshape(shape) for a, shape in (
        (x, (-1, 8)), (rounded_w, (8, -1)), (dy, (-1, np.prod(w_shape[1:])))))
    expected = exact_x @ exact_w, exact_dy @ exact_w.T, exact_x.T @ exact_dy
    for name, a, b, shape, kind in zip(("y", "dx", "dw"), (y, dx, dw), expected, (dy.shape, x_shape, w_shape),
                                       (dtype, dtype, jnp.float32)):  # a float32 master's gradient is float32
        assert a.shape == shape and a.dtype == kind, name
        tolerance = 0.01 if kind == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(a.astype(jnp.float32)).reshape(b.shape), b, rtol=tolerance,
                                   atol=tolerance * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_and_swiglu_compute_wide_and_keep_their_dtype(dtype):
    x, y = (jnp.asarray(3 * RNG.standard_normal((4, 6)), dtype) for _ in range(2))
    scale = RNG.standard_normal(6).astype(np.float32)
    wide_x, wide_y = (np.asarray(a.astype(jnp.float32)).astype(np.float64) for a in (x, y))

    found = layers.rms_norm(x, scale, 1e-6), layers.swiglu(x, y)
    expected = naive.norm(wide_x, {"scale": scale}), naive.silu(wide_x) * wide_y

    for a, b in zip(found, expected):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=1e-5 if dtype == jnp.float32 else 0.005, atol=1e-6)


def test_the_norm_of_zeros_is_zero_and_eps_counts_against_small_inputs():
    x = jnp.array([[0.0, 0.0], [1e-3, 1e-3]])

    np.testing.assert_allclose(layers.rms_norm(x, jnp.ones(2), 1e-6), [[0, 0], [0.5**0.5, 0.5**0.5]], rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_sums_are_kept_in_float32_or_wider(dtype, expected):
    with float64():
        assert layers.wide(dtype) == expected


REMATS = ("none", "report", "full")


def loss_and_gradients(remat):
    cfg = naive.tiny(remat=remat, num_layers=1, num_dense_layers=0, mtp_depth=0)
    tokens = np.random.default_rng(1).integers(0, 64, (2, 8)).astype(np.int32)
    variables = naive.variables_of(cfg)

    def loss(params):
        output = DeepSeekV3(cfg).apply({**variables, "params": params}, tokens)
        return (jax.nn.log_softmax(output.logits_BTW) ** 2).mean() + output.sequence_loss

    return jax.jit(jax.value_and_grad(loss), compiler_options=naive.QUICKLY)(variables["params"])


def test_remat_changes_neither_loss_nor_gradients():
    expected, *others = (loss_and_gradients(remat) for remat in (*REMATS, "latents,router,output,swiglu_inputs"))

    for found in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def kept(remat, moe):
    """The residuals of one block for the backward pass: a Counter of (dtype, shape)."""
    cfg = naive.tiny(remat=remat)
    x_BTD = np.zeros((2, 8, cfg.d_model), np.float32)
    bias_E = np.zeros(cfg.num_experts, np.float32) if moe else None
    context = TokenContext(rope_table(cfg, np.zeros((2, 8), np.int32), jnp.float32), tokens_BT=np.zeros((2, 8), int),
                           positions_BT=np.zeros((2, 8), int))
    block = rematerialized(Block, cfg, scanned=True)(cfg, moe=moe)
    variables = jax.eval_shape(block.init, jax.random.key(0), x_BTD, bias_E, context)

    def pull(variables, x_BTD):
        return jax.vjp(lambda v, x: block.apply(v, x, bias_E, context)[0], variables, x_BTD)[1]

    residuals = jax.tree.leaves(jax.eval_shape(pull, variables, x_BTD))
    return collections.Counter((str(r.dtype), r.shape) for r in residuals)


ATTENTION = {
    (2, 8, 12): 1, (2, 8, 20): 1,  # the latents, before their norms
    (2, 2, 8, 6): 1, (2, 2, 8): 1,  # attention's output and log-sum-exp
    (2, 8, 32): 1,  # the residual stream between attention and FFN
}


@pytest.mark.parametrize(
    ("moe", "ffn"),
    [
        (False, {(2, 8, 24): 2}),  # gate and up of the dense FFN; not their product
        (True, {(2, 8, 10): 2, (16, 8): 1}),  # of the shared expert; and the scores
    ],
)
def test_the_report_remat_keeps_latents_attention_and_swiglu_inputs_and_recomputes_the_rest(moe, ffn):
    beyond_full = kept("report", moe) - kept("full", moe)

    assert all(dtype == "float32" for dtype, _ in beyond_full)
    found = collections.Counter({shape: count for (_, shape), count in beyond_full.items()})
    routed = {shape: found.pop(shape) for shape in list(found) if len(shape) == 2 and shape[0] >= 48}  # 16 tokens * 3
    if moe and jax.__version_info__ < (0, 8):
        found[16, 8] -= 1  # jax 0.7 keeps the scores a second time
    assert found == {**ATTENTION, **ffn}
    # Gate and up of the routed experts, 10 columns each, side by side or not; not their product.
    assert sum(shape[1] * count for shape, count in routed.items()) == (20 if moe else 0)


@pytest.mark.parametrize(("name", "shapes"), [
    ("latents", {(2, 8, 12): 1, (2, 8, 20): 1}), ("attention", {(2, 2, 8, 6): 1, (2, 2, 8): 1}),
    ("output", {(2, 8, 32): 1}), ("swiglu_inputs", {(2, 8, 24): 2}), ("norms", {})])
def test_what_a_name_recomputes_is_not_kept_and_all_else_is(name, shapes):
    spared = kept("report", False) - kept(name, False)

    assert {shape: count for (_, shape), count in spared.items()} == shapes
    more = kept(name, False) - kept("report", False)
    assert all(dtype == "int32" for dtype, _ in more)  # attention processes these in blocks


def test_without_remat_norms_up_projections_and_swiglu_are_kept_too():
    everything = {shape for _, shape in kept("none", False)}

    # norm outputs as read by the linears, the rotated and concatenated queries and keys, SwiGLU's output
    assert {(16, 32), (16, 12), (2, 2, 8, 12), (16, 24)} <= everything
    assert not {(16, 32), (16, 12), (2, 2, 8, 12), (16, 24)} & {shape for _, shape in kept("report", False)}


def test_the_report_remat_keeps_less_than_none_and_more_than_full():
    def count(remat):
        return sum(np.prod(shape) * n * np.dtype(dtype).itemsize for (dtype, shape), n in kept(remat, True).items())

    none, report, full = map(count, REMATS)
    assert full < report < none


def test_remat_saves_memory_in_the_compiled_program_too():
    def temporary_bytes(remat):
        cfg = naive.tiny(remat=remat, num_dense_layers=3, mtp_depth=0, dense_ffn_dim=256, attention_block=64)
        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        params = jax.eval_shape(lambda: DeepSeekV3(cfg).init(jax.random.key(0), np.zeros((2, 64), np.int32)))["params"]

        def loss(params, tokens):
            return (DeepSeekV3(cfg).apply({"params": params}, tokens, logits=False).hidden_BTD ** 2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile(compiler_options=naive.QUICKLY)
        return compiled.memory_analysis().temp_size_in_bytes

    # XLA of jax 0.10 orders operations so that, at this size, most recomputed arrays live as long as without remat.
    share = 0.75 if jax.__version_info__ >= (0, 11) else 1.0
    assert temporary_bytes("report") < share * temporary_bytes("none")
