"""F, Bi and W together equal the stage and its VJP, with nothing computed twice and W deferred."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline.split import DEFERRED, split
from tests.pipeline import toy
from tests.precision import float64

REMAT = ("none", "layers", "full")
PRODUCTS = 4 * toy.LAYERS  # gate, up, down, and the gate once more for the stage's own loss


def stage(remat):
    return lambda params, x, context: toy.stage(params, context[0], x, context[1], lambda h: h, remat)


def products(equations):
    return sum(equation.primitive.name == "dot_general" for equation in equations)


def count(split, piece):
    return products(split.pieces[piece].equations)


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("remat", REMAT)
def test_the_pieces_give_what_the_vjp_gives(remat):
    with float64():
        params, x, context, dy, dloss = toy.example()
        (y, loss), vjp, sums = jax.vjp(
            lambda p, x: (lambda y, loss, sums: ((y, loss), sums))(*stage(remat)(p, x, context)), params, x,
            has_aux=True)
        dparams, dx = vjp((dy, dloss))

        s = split(stage(remat), params, x, context)
        prepared = s.prepare(params)
        out, residuals = s.forward(prepared, x, context)
        dx_first, pending = s.backward_input(prepared, context, residuals, dy, dloss)

        assert_close(out, (y, loss, sums))
        assert_close(dx_first, dx)
        assert_close(s.backward_weights(prepared, context, pending), dparams)
        assert_close(s.backward(prepared, context, residuals, dy, dloss), (dx, dparams))


@pytest.mark.parametrize("remat", REMAT)
def test_no_product_is_computed_twice_beyond_remat(remat):
    with float64():
        params, x, context, dy, dloss = toy.example()

        s = split(stage(remat), params, x, context)

        recomputed = {"none": 0, "layers": 0, "full": PRODUCTS}[remat]
        assert count(s, "F") == PRODUCTS
        assert PRODUCTS <= count(s, "Bi") <= PRODUCTS + recomputed
        assert count(s, "W") == PRODUCTS
        assert count(s, "B") == count(s, "Bi") + count(s, "W")


def test_a_choice_by_platform_that_a_recomputation_does_not_read_is_no_piece():
    """jax keeps the equation, without results."""
    def chosen(params, x, context):
        y, loss, sums = stage("full")(params, x, context)
        return jax.checkpoint(lambda y: lax.platform_dependent(y, cpu=jnp.copy, default=jnp.negative))(y), loss, sums

    with float64():
        params, x, context, *_ = toy.example()

        assert all(count(split(chosen, params, x, context), piece) == count(split(stage("full"), params, x, context),
                                                                            piece) for piece in ("F", "Bi", "W"))


def test_what_crosses_is_the_layers_inputs_and_output_gradients():
    with float64():
        params, x, context, dy, dloss = toy.example()

        s = split(stage("full"), params, x, context)

        wide, narrow = toy.B * toy.F * 8, toy.B * toy.D * 8
        a_layer = 2 * narrow + 3 * wide  # x and dy of down; the input of down; dy of gate and of up
        loss = narrow + wide  # the layer's output, dy of the gate's second use
        assert s.residual_bytes == narrow
        # The first layer's output is the second one's input.
        assert s.pending_bytes == toy.LAYERS * (a_layer + loss) - (toy.LAYERS - 1) * narrow


def test_keeping_less_is_the_stages_choice():
    with float64():
        params, x, context, _, _ = toy.example()

        kept = [split(stage(remat), params, x, context).residual_bytes for remat in REMAT]

        assert kept[0] > kept[1] > kept[2]


def test_what_depends_on_no_activation_is_not_kept():
    def with_a_table(params, x, context):
        table = jnp.sin(context[:, None] * params["w"].sum())
        return x + jnp.tanh(x @ params["w"].astype(jnp.bfloat16).astype(x.dtype)) * table, jnp.zeros(()), ()

    params, x, positions = {"w": jnp.eye(8)}, jnp.ones((4, 8)), jnp.arange(4.0)
    s = split(with_a_table, params, x, positions)

    assert {(a.shape, a.dtype) for a in s.residuals} == {(x.shape, x.dtype)}  # neither the cast weight nor the table


def test_the_gradient_of_a_stages_own_loss_is_split_like_any_other():
    """A product that only the loss needs has its weight gradient in W, although it does not depend on dy."""
    def auxiliary(params, x, context):
        return x, jnp.sum((x @ params) ** 2), ()

    s = split(auxiliary, jnp.ones((8, 8)), jnp.ones((4, 8)), ())

    assert [count(s, piece) for piece in ("F", "Bi", "W")] == [1, 1, 1]


def rounded(x):
    """Stands for a quantizer: W reads its output, which has a quarter of the bytes."""
    return checkpoint_name(x.astype(jnp.float8_e4m3fn), DEFERRED)


@jax.custom_vjp
def low_precision(x, w):
    return x @ w


def _low_precision_bwd(kept, dy):
    x, w = kept
    return dy @ w.T, (rounded(x).astype(x.dtype).T @ rounded(dy).astype(x.dtype))


low_precision.defvjp(lambda x, w: (x @ w, (x, w)), _low_precision_bwd)


def test_w_waits_with_what_is_marked_and_not_with_what_it_was_made_from():
    def products_in_fp8(params, x, context):
        return x + low_precision(jnp.tanh(low_precision(x, params[0])), params[1]), jnp.zeros(()), ()

    params = jnp.ones((2, 8, 8), jnp.float32)
    s = split(products_in_fp8, (params[0], params[1]), jnp.ones((4, 8), jnp.float32), ())

    assert {a.dtype for a in s.pending} == {jnp.dtype(jnp.float8_e4m3fn)}
    assert s.pending_bytes == 4 * 4 * 8  # x and dy of two products
    assert [count(s, piece) for piece in ("F", "Bi", "W")] == [2, 2, 2]


def test_what_shrinks_is_done_before_it_waits():
    """The gradient of a norm's scale is a sum over tokens: D numbers are kept, not twice B x D."""
    def normed(params, x, context):
        return x + jnp.tanh(x) * params[None], jnp.zeros(()), ()

    s = split(normed, jnp.ones(8, jnp.float32), jnp.ones((64, 8), jnp.float32), ())

    assert s.pending_bytes == 8 * 4


def test_a_product_that_only_w_needs_is_done_before_it_waits_if_that_keeps_less():
    @jax.checkpoint
    def bottleneck(w, x, narrow):
        return x + (x @ narrow) @ w

    s = split(lambda params, x, context: (bottleneck(params, x, context), jnp.zeros(()), ()),
              jnp.ones((2, 8)), jnp.ones((4, 8)), jnp.ones((8, 2)))

    assert s.pending_bytes == 4 * (4 * 2 + 4 * 8)  # the narrow product and dy, not x and dy
    assert [count(s, piece) for piece in ("F", "Bi", "W")] == [2, 3, 1]


def test_what_is_marked_waits_as_it_is_and_not_what_it_was_made_of():
    """Quantizing reads its input twice (largest value, quotient), so counting bytes does not show that it shrinks."""
    @jax.custom_vjp
    def linear(x, w):
        return x @ w

    def backward(kept, dy):
        x, w = kept
        scale = jnp.abs(dy).max() / 448
        narrow = checkpoint_name((dy / scale).astype(jnp.float8_e4m3fn), DEFERRED)
        return dy @ w.T, x.T @ (narrow.astype(jnp.float32) * scale)

    linear.defvjp(lambda x, w: (x @ w, (x, w)), backward)
    s = split(lambda params, x, context: (linear(x, params), jnp.zeros(()), ()), jnp.eye(8), jnp.ones((64, 8)), ())

    assert sorted((a.shape, str(a.dtype)) for a in s.pending) == [
        ((), "float32"), ((64, 8), "float32"), ((64, 8), "float8_e4m3fn")]


def test_rounded_weights_are_made_once_and_held_in_place_of_the_masters():
    """Both passes use rounded weights; they read one rounded copy of each weight, in its smallest form."""
    def narrow(params, x, context):
        for w in params["w"]:
            w = jnp.pad(w.astype(jnp.bfloat16), ((0, 0), (0, 16)), constant_values=jnp.zeros((), jnp.bfloat16))
            x = x + jnp.tanh(x @ jnp.swapaxes(w, 0, 1)[:16]) * params["scale"].astype(jnp.bfloat16)[None]
        return x, jnp.zeros(()), ()

    params = {"w": [jnp.eye(16, dtype=jnp.float32)] * 3, "scale": jnp.ones(16, jnp.float32)}
    x = jnp.ones((4, 16), jnp.bfloat16)
    s = split(jax.checkpoint(narrow), params, x, ())
    prepared = s.prepare(params)

    assert sorted((a.shape, str(a.dtype)) for a in prepared) == [((16,), "bfloat16")] + 3 * [((16, 16), "bfloat16")]
    casts = [e for name in ("F", "Bi", "W", "B") for e in s.pieces[name].equations
             if e.primitive.name == "convert_element_type" and e.invars[0].aval.shape == (16, 16)
             and e.outvars[0].aval.dtype == jnp.bfloat16 and e.invars[0].aval.dtype == jnp.float32]
    assert not casts


def test_constants_of_different_types_are_different():
    def zeros_of_two_types(params, x, context):
        narrow, wide = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((4, 8), jnp.float32)
        one = (lax.optimization_barrier(narrow) + jnp.bfloat16(1)).astype(x.dtype)
        return x + one * params + wide, jnp.zeros(()), ()

    params, x = jnp.ones((4, 8), jnp.float32), jnp.ones((4, 8), jnp.float32)
    s = split(zeros_of_two_types, params, x, ())
    types = [v.aval.dtype for piece in s.pieces.values() for e in piece.equations
             if e.primitive.name == "optimization_barrier" for v in e.invars]
    (y, _, _), _ = s.forward(s.prepare(params), x, ())

    assert set(types) == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(y, 2)


def test_what_is_recomputed_waits_for_the_gradient_that_it_is_for():
    """Otherwise all layers of a stage would be recomputed at once, and all their residuals would be in memory."""
    with float64():
        params, x, context, dy, dloss = toy.example()
        s = split(stage("full"), params, x, context)
        _, residuals = s.forward(s.prepare(params), x, context)
        backward = jax.make_jaxpr(s.backward)(s.prepare(params), context, residuals, dy, dloss)

    barriers = [e for e in backward.eqns if e.primitive.name == "optimization_barrier"]
    assert barriers and all(len(e.invars) > 1 for e in barriers)


def test_a_scan_over_weights_stays_whole():
    def scanned(params, x, context):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0], jnp.zeros(()), ()

    with float64():
        params, x, dy = jnp.ones((3, 4, 4)) / 4, jnp.ones((2, 4)), jnp.ones((2, 4))
        s = split(scanned, params, x, ())
        prepared, dloss = s.prepare(params), jnp.ones(())
        _, residuals = s.forward(prepared, x, ())

        dx, pending = s.backward_input(prepared, (), residuals, dy, dloss)

        _, vjp = jax.vjp(lambda p, x: scanned(p, x, ())[0], params, x)
        assert_close((s.backward_weights(prepared, (), pending), dx), vjp(dy))
        names = [equation.primitive.name for equation in s.pieces["W"].equations]
        assert "scan" not in names


def test_shapes_are_enough_to_split():
    with float64():
        structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), toy.example()[:3])

        assert split(stage("full"), *structs).residual_bytes == toy.B * toy.D * 8


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (lambda p, x, c: (x[:2], jnp.zeros(()), ()), r"turned its activation float32\[4, 8\] into float32\[2, 8\]"),
        (lambda p, x, c: (x.astype(jnp.bfloat16), jnp.zeros(()), ()), r"into bfloat16\[4, 8\]"),
        (lambda p, x, c: (x, jnp.zeros(3), ()), r"loss must be a scalar, not of shape \[3\]"),
    ],
)
def test_a_stage_that_cannot_stand_in_a_pipeline_is_refused(bad, complaint):
    with pytest.raises(ConfigError, match=complaint):
        split(bad, jnp.ones(()), jnp.ones((4, 8)), ())
