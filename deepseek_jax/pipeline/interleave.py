"""A forward and a backward pass in one cell: exchanges of one pass while the other multiplies (report section 3.2.1).

    multiplied     ATTN(F)       MLP(B)        MLP(F)       ATTN(B)
    on the way     DISPATCH(B)   DISPATCH(F)   COMBINE(B)   COMBINE(F)        and so on, layer after layer

The two passes are independent, so that XLA may run them in any order, and left alone it multiplies all of one pass
before the other: its exchanges then have nothing to hide behind. Here what an exchange brought is used only when the
products of the other pass are done that are to run meanwhile. An optimization barrier says so; it moves no data.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jax import lax
from jax.extend import core

from deepseek_jax.pipeline.split import PRODUCTS, Piece, evaluate, value_of, variables

EXCHANGES = ("all_to_all", "ragged_all_to_all")  # of tokens with experts on other devices


class Phase(NamedTuple):
    """Equations between two exchanges, and the exchange that follows.

    work: equations up to what is sent. travel: the exchange, of one hop or two, and what needs no product after it.
    sent: variables that the first hop sends. arrived: variables that the last hop brings.
    """

    work: list
    travel: list
    sent: list
    arrived: list


def phases(piece: Piece) -> list[Phase]:
    """Phase k of a pass needs the results of k exchanges, with products between them."""
    at: dict[Any, tuple[int, bool]] = {}  # variable -> (phase, whether it travelled in it)
    found: list[Phase] = []
    for equation in piece.equations:
        read = variables([*equation.invars, *piece.waits.get(equation.outvars[0], ())])
        phase, travelled = max((at[v] for v in read if v in at), default=(0, False))
        exchange = equation.primitive.name in EXCHANGES
        if travelled and not exchange and multiplies(equation):
            phase, travelled = phase + 1, False
        found += [Phase([], [], [], []) for _ in range(phase + 1 - len(found))]
        if exchange and not travelled:
            found[phase].sent.extend(variables(equation.invars))
        at |= dict.fromkeys(equation.outvars, (phase, travelled or exchange))
        (found[phase].travel if travelled or exchange else found[phase].work).append(equation)
    for phase in found:
        phase.arrived.extend(_last(phase.travel))
    return found


def multiplies(equation: Any) -> bool:
    """Whether it is a matrix product or a kernel, or has one inside."""
    inner = (e for jaxpr in core.jaxprs_in_params(equation.params) for e in jaxpr.eqns)
    return equation.primitive.name in PRODUCTS or any(map(multiplies, inner))


def _last(travel):
    """What the exchanges bring that no other one of `travel` sends on."""
    needed, last = set(), []
    for equation in reversed(travel):
        exchange, feeds = equation.primitive.name in EXCHANGES, needed.intersection(equation.outvars)
        if exchange and not feeds:
            last += equation.outvars
        if exchange or feeds:
            needed.update(variables(equation.invars))
    return last


def interleaved(forward: tuple[Piece, dict], backward: tuple[Piece, dict], x: Iterable[Any],
                sums: Sequence[Any]) -> tuple[list, list]:
    """Evaluates two pieces, each in its own environment {variable: value}.

    Args:
      x: variables of the activation that the forward piece is given.
      sums: arrays that the backward piece's last results, the gradients of weights, are added to. A layer's are
        complete before the backward pass goes on to the next one: put off, those of all layers would be kept.
    Returns:
      the results of both.
    """
    (ours, env), (theirs, other) = ((piece, dict(given)) for piece, given in (forward, backward))
    f, b = phases(ours), phases(theirs)
    gradients = list(zip(theirs.results[len(theirs.results) - len(sums):], sums, strict=True))
    totals: dict[int, Any] = {}
    _work(theirs, b, 0, other)
    _wait(env, x, _sent(b, 0, other))
    for k in range(max(len(f), len(b))):
        _work(ours, f, k, env)
        first = [*_sent(f, k, env), *_add(gradients, other, totals)]
        _travel(theirs, b, k, other, first, _half(f, k, env))
        _work(theirs, b, k + 1, other)
        _travel(ours, f, k, env, _sent(b, k + 1, other), _half(b, k + 1, other))
    _add(gradients, other, totals)
    results = [value_of(other, v) for v in theirs.results[:len(theirs.results) - len(sums)]]
    return [value_of(env, v) for v in ours.results], [*results, *(totals[i] for i in range(len(sums)))]


def _add(gradients, env, totals):
    """Adds the gradients that are computed by now to their sums; returns those sums."""
    new = {i: total + value_of(env, v) for i, (v, total) in enumerate(gradients)
           if i not in totals and (isinstance(v, core.Literal) or v in env)}
    totals |= new
    return list(new.values())


def _work(piece, found, k, env):
    if k < len(found):
        evaluate(found[k].work, piece.waits, env)


def _sent(found, k, env):
    return [env[v] for v in found[k].sent] if k < len(found) else []


def _half(found, k, env):
    """Results of the product after which half of the products of phase k are done."""
    products = [e for e in found[k].work if multiplies(e)] if k < len(found) else []
    return [env[v] for v in products[len(products) // 2].outvars] if products else []


def _wait(env, names, first):
    """Until `first` are computed."""
    if first:
        env |= {v: lax.optimization_barrier((env[v], *first))[0] for v in names}


def _travel(piece, found, k, env, first, half):
    """The exchange after phase k, whose result waits for `first`. Of two hops the second waits for `half`: XLA starts
    it as early as it can, and would wait for the first one at once."""
    if k >= len(found):
        return
    sent, arrived = set(found[k].sent), set(found[k].arrived)
    for equation in found[k].travel:
        if equation.primitive.name in EXCHANGES and sent.isdisjoint(equation.invars):
            _wait(env, equation.invars[:1], half)
        evaluate([equation], piece.waits, env)
        if arrived.issuperset(equation.outvars):
            _wait(env, equation.outvars, first)
