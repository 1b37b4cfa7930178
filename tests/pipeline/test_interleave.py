"""Two passes in one cell: exchanges of one wait for products of the other, and the results are unchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import PartitionSpec as P

from deepseek_jax.pipeline import interleave
from deepseek_jax.pipeline.interleave import interleaved, middle, multiplies, phases
from deepseek_jax.pipeline.split import split
from tests.pipeline import toy
from tests.precision import float64

EXCHANGES = 2 * toy.LAYERS  # exchanges of one pass: to the experts and back, layer by layer


def once(h_BF):
    return lax.all_to_all(h_BF, "local", 0, 0, tiled=True)


def twice(h_BF):
    return lax.all_to_all(jnp.sin(lax.all_to_all(h_BF, "node", 0, 0, tiled=True)), "local", 0, 0, tiled=True)


def on_devices(f):
    """f on four devices, in a shard_map with the same arguments on all of them."""
    mesh = jax.make_mesh((2, 2), ("node", "local"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                         devices=jax.devices()[:4])
    return jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(("node", "local")), check_vma=False)


def cell(travel, remat, together):
    """(params, x, context, dy, dloss) -> y, dx, params + dparams of a cell with both passes, leaves with a new axis."""
    def run(params, x, context, dy, dloss):
        stage = lambda params, x, context: toy.stage(params, context[0], x, context[1], travel, remat)
        s = split(stage, params, x, context)
        prepared = s.prepare(params)
        _, residuals = s.forward(prepared, 2 * x, context)  # of another micro-batch
        forward, backward = (prepared, x, context), (prepared, context, residuals, dy, dloss)
        if together:
            (out, _), gradients = s.forward_and_backward(forward, backward, params, interleaved)
        else:
            (out, _), (dx, dparams) = s.forward(*forward), s.backward(*backward)
            gradients = dx, jax.tree.map(jnp.add, params, dparams)
        return jax.tree.map(lambda a: a[None], (out, gradients))

    return on_devices(run)


@pytest.mark.parametrize("travel", [once, twice])
@pytest.mark.parametrize("remat", ["none", "layers", "full"])
def test_both_passes_give_what_they_give_alone(travel, remat):
    with float64():
        found, alone = (jax.jit(cell(travel, remat, together))(*toy.example()) for together in (True, False))

    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


def needed_for(result, primitive, travel, together, stage=None, params=None):
    """How many operations y (0) or dx (1) of a cell needs, not counting those of the residuals."""
    whole = lambda params, x, context: toy.stage(params, context[0], x, context[1], travel, "none")
    counts: list[int] = []

    def wanted(s, params, x, context, dy, dloss, residuals):
        prepared = s.prepare(params)
        forward, backward = (prepared, x, context), (prepared, context, residuals, dy, dloss)
        if together:
            ((y, _, _), _), (dx, _) = s.forward_and_backward(forward, backward, params, interleaved)
        else:
            ((y, _, _), _), (dx, _) = s.forward(*forward), s.backward(*backward)
        return (y, dx)[result]

    def inside(params, x, context, dy, dloss):
        s = split(stage or whole, params, x, context)
        residuals = [jnp.zeros(r.shape, r.dtype) for r in s.residuals]
        jaxpr = jax.make_jaxpr(functools.partial(wanted, s))(params, x, context, dy, dloss, residuals).jaxpr
        counts.append(sum(e.primitive.name == primitive for e in dce_jaxpr(jaxpr, [True])[0].eqns))
        return x

    given = toy.example() if params is None else (params, *toy.example()[1:])
    jax.eval_shape(on_devices(inside), *given)
    return counts[0]


@pytest.mark.parametrize(("travel", "alone", "together"), [
    # Over the same axes, the last exchange of the forward pass starts when the last one of the backward pass has ended.
    (once, EXCHANGES, (2 * EXCHANGES, 2 * EXCHANGES - 1)),
    # The second hop of the last exchange waits for products of the backward pass that follow its last exchange.
    (twice, 2 * EXCHANGES, (4 * EXCHANGES, 4 * EXCHANGES - 2))])
def test_what_an_exchange_brings_waits_until_the_other_pass_has_sent_its_own(travel, alone, together):
    """All exchanges of a pass except its last need earlier products of the other pass: those wait for the exchanges
    before them, and run during an exchange."""
    with float64():
        for result in (0, 1):
            assert needed_for(result, "all_to_all", travel, together=False) == alone
            assert needed_for(result, "all_to_all", travel, together=True) == together[result]


def test_of_two_hops_the_second_starts_when_half_of_the_others_products_are_done(monkeypatch):
    with float64():
        needed = needed_for(0, "dot_general", twice, together=True)
        monkeypatch.setattr(interleave, "middle", lambda phase, exchanges: [])
        assert needed_for(0, "dot_general", twice, together=True) < needed


def test_a_layers_weight_gradients_are_added_up_before_the_backward_pass_goes_on():
    """With two layers of two products each, dx needs the gradients of all weights except those used first."""
    def stage(params, x, context):
        for p in params:
            x = x + once(jnp.tanh(once(x @ p["in"])) @ p["out"])
        return x, jnp.zeros((), x.dtype), ()

    with float64():
        shapes = {"in": (toy.D, toy.F), "out": (toy.F, toy.D)}
        params = [{name: jnp.ones(shape) for name, shape in shapes.items()} for _ in range(2)]
        needed = functools.partial(needed_for, 1, "dot_general", once, stage=stage, params=params)
        forward = input_gradients = 4
        assert needed(together=False) == input_gradients
        assert needed(together=True) == forward + input_gradients + 3


def pieces(stage):
    """The pieces of a toy model's stage: {"F": Piece, ...}."""
    found: dict = {}

    def inside(params, x, context, dy, dloss):
        found.update(split(stage, params, x, context).pieces)
        return x

    jax.eval_shape(on_devices(inside), *toy.example())
    return found


def test_half_of_the_products_ends_with_one_that_what_is_sent_needs():
    """A weight gradient, which nothing waits for, may run at any time and does not count."""
    stage = lambda params, x, context: toy.stage(params, context[0], x, context[1], once, "full")
    with float64():
        found = [phase for phase in phases(pieces(stage)["B"]) if phase.sent]

    assert len(found) > 2
    for phase in found:
        needed = set(phase.sent)
        for equation in reversed(phase.work):
            if needed.intersection(equation.outvars):
                needed.update(v for v in equation.invars if not isinstance(v, core.Literal))
        chain = [e for e in phase.work if multiplies(e) and needed.intersection(e.outvars)]
        assert needed.issuperset(middle(phase))
        assert bool(chain) == bool(middle(phase)), (chain, phase.work)


@pytest.mark.parametrize(("links", "exchanges", "place"),
                         [(8, 1, 4), (8, 2, 6), (4, 1, 2), (3, 1, 2), (1, 1, 0), (1, 2, 0)])
def test_the_middle_of_a_chain_comes_later_the_more_exchanges_are_under_way(links, exchanges, place):
    chain = jax.make_jaxpr(lambda x, w: functools.reduce(lambda y, _: jnp.sin(y @ w), range(links), x))(
        jnp.ones((2, 2)), jnp.ones((2, 2))).jaxpr
    products = [e for e in chain.eqns if multiplies(e)]

    found = middle(interleave.Phase(list(chain.eqns), [], list(chain.outvars), []), exchanges)

    assert found == products[place].outvars


def test_two_hops_are_one_exchange_and_the_second_brings_it():
    stage = lambda params, x, context: toy.stage(params, context[0], x, context[1], twice, "none")
    with float64():
        found = phases(pieces(stage)["F"])

    assert len(found) == EXCHANGES + 1
    for phase in found[:-1]:
        first, last = (e for e in phase.travel if e.primitive.name == "all_to_all")
        assert phase.sent == first.invars and phase.arrived == last.outvars
    assert not found[-1].sent and not found[-1].travel
