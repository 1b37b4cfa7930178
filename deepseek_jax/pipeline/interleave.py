"""A forward and a backward pass in one cell: one pass exchanges while the other multiplies (report section 3.2.1).

    multiplied     ATTN(F)       MLP(B)        MLP(F)       ATTN(B)
    on the way     DISPATCH(B)   DISPATCH(F)   COMBINE(B)   COMBINE(F)        and so on, layer after layer

The two passes are independent, so XLA may run them in any order; by itself it computes all products of one pass before
the other, and the exchanges are not hidden. Here the result of an exchange is used only after those products of the
other pass that should overlap with it. An optimization barrier enforces this; it moves no data.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jax import lax
from jax.extend import core

from deepseek_jax.pipeline.split import PRODUCTS, Piece, evaluate, value_of, variables

EXCHANGES = ("all_to_all", "ragged_all_to_all")  # exchanges of tokens with experts on other devices


class Phase(NamedTuple):
    """Equations between two exchanges, and the exchange that follows.

    work: equations up to the sent variables. travel: the exchange, of one hop or two, and equations after it without
    products. sent: variables that the first hop sends. arrived: variables that the last hop receives.
    """

    work: list
    travel: list
    sent: list
    arrived: list


class Pass:
    """A piece's phases and its environment {variable: value}. There are no phases after the last."""

    def __init__(self, piece: Piece, given: dict):
        self.piece, self.env, self._phases = piece, dict(given), phases(piece)

    def __len__(self) -> int:
        return len(self._phases)

    def phase(self, k: int) -> Phase:
        return self._phases[k] if k < len(self) else Phase([], [], [], [])

    def evaluate(self, equations: list) -> None:
        evaluate(equations, self.piece.waits, self.env)

    def wait(self, names: Iterable[Any], first: Iterable[Any]) -> None:
        """Evaluates equations until `first` are computed."""
        if first := tuple(first):
            self.env |= {v: lax.optimization_barrier((self.env[v], *first))[0] for v in names}

    def values(self, names: Iterable[Any]) -> list:
        return [value_of(self.env, v) for v in names]


def phases(piece: Piece) -> list[Phase]:
    """Phase k of a pass needs the results of k exchanges, with products between them."""
    at: dict[Any, tuple[int, bool]] = {}  # variable -> (phase, whether it was exchanged in it)
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
    """Whether it is a matrix product or a kernel, or contains one."""
    inner = (e for jaxpr in core.jaxprs_in_params(equation.params) for e in jaxpr.eqns)
    return equation.primitive.name in PRODUCTS or any(map(multiplies, inner))


def _last(travel):
    """The results of the exchanges that no other exchange of `travel` sends on."""
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
      x: variables of the activation passed to the forward piece.
      sums: arrays that the backward piece's last results, the gradients of weights, are added to. A layer's gradients
        are added before the backward pass continues with the next layer: otherwise those of all layers would be kept.
    Returns:
      the results of both.
    """
    f, b = Pass(*forward), Pass(*backward)
    width = len(b.piece.results) - len(sums)
    gradients = list(zip(b.piece.results[width:], sums, strict=True))
    totals: dict[int, Any] = {}
    b.evaluate(b.phase(0).work)
    f.wait(x, b.values(b.phase(0).sent))
    for k in range(max(len(f), len(b))):
        _overlap(f, f.phase(k), b, b.phase(k), lambda: _add(gradients, b.env, totals))
        _overlap(b, b.phase(k + 1), f, f.phase(k))
    _add(gradients, b.env, totals)
    return f.values(f.piece.results), [*b.values(b.piece.results[:width]), *(totals[i] for i in range(len(sums)))]


def _add(gradients, env, totals):
    """Adds the gradients that have been computed to their sums; returns those sums."""
    new = {i: total + value_of(env, v) for i, (v, total) in enumerate(gradients)
           if i not in totals and (isinstance(v, core.Literal) or v in env)}
    totals |= new
    return list(new.values())


def _overlap(busy, now, other, under_way, more: Callable[[], list] = list):
    """The work of phase `now` of one pass while the exchange of phase `under_way` of the other is in flight.

    By itself XLA hides one hop behind all available products and the next behind none. So barriers set when each result
    is used: that of the first of two hops when about half of the products are done; that of the last hop when the
    values that the other exchange sends, and `more`, are computed. If the other exchange uses the same axes, it starts
    when this one is done, since it would have to wait for it anyway.
    """
    busy.evaluate(now.work)
    half, first = busy.values(middle(now, len(under_way.arrived))), [*busy.values(now.sent), *more()]
    for equation in under_way.travel:
        other.evaluate([equation])
        if equation.primitive.name in EXCHANGES:
            arrived = other.values(equation.outvars)
            last = set(under_way.arrived).issuperset(equation.outvars)
            other.wait(equation.outvars, first if last else half)
            if last and equation.params["axis_name"] == _first_axes(now):
                busy.wait(now.sent, arrived)


def _first_axes(phase):
    return next((e.params["axis_name"] for e in phase.travel if e.primitive.name in EXCHANGES), None)


def middle(phase: Phase, exchanges: int = 1) -> list:
    """Results of a product in the middle of the longest chain of products that leads to what is sent.

    Products that none of these needs, of weights' gradients, may be computed before or after it. The first hops of
    several exchanges follow each other, and then only the last one's second hop is left: for n exchanges it is the
    product after n of n + 1 parts.
    """
    chains: dict[Any, tuple] = {}  # variable -> products
    for equation in phase.work:
        longest = max((chains[v] for v in variables(equation.invars) if v in chains), key=len, default=())
        chains |= dict.fromkeys(equation.outvars, (*longest, equation) if multiplies(equation) else longest)
    longest = max((chains[v] for v in phase.sent or chains if v in chains), key=len, default=())
    links = len(longest)
    return longest[min(-(-links * exchanges // (exchanges + 1)), links - 1)].outvars if longest else []
