"""A stage's forward pass F, and its backward pass B split into Bi and W (report section 3.2.1, arXiv 2401.10241).

The equations of the stage's VJP are sorted, not computed again: those that the gradient of the input needs are Bi,
which the stage before waits for; of the rest, those that depend on the gradient of the output are W, and can wait.
What `jax.checkpoint` recomputes is recomputed once, in Bi, and W reads it; it begins when the gradient that it is for
has come, so that one layer's is there at a time and not all layers'. What depends neither on the activation
nor on a gradient (a table of positions) is computed where it is needed instead of being kept for every micro-batch;
what depends on parameters alone and is smaller than they are (a weight that is rounded or quantized) is computed once
a step, and the passes hold that in place of the parameters. A `lax.scan` over weights is one equation and falls into
Bi as a whole: write the layers of a stage as a Python loop.
"""

import collections
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from deepseek_jax.config.schema import ConfigError

# Calls that are no more than their body, once nobody differentiates them any more.
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call",
         "custom_vjp_call")


# What W is there for. Everything else that it needs is done where fewer bytes have to wait.
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated", "pallas_call", "custom_vmap_call")
DEFERRED = "deferred"  # jax.ad_checkpoint.checkpoint_name of what W waits with


_BARRIER = jax.make_jaxpr(lax.optimization_barrier)(0.0).eqns[0]


class Piece(NamedTuple):
    """Some of the equations, in order, and the atoms that are their results.

    waits: of the results of barriers, what has to be there before them.
    """

    equations: tuple
    results: tuple
    waits: dict


@dataclasses.dataclass(frozen=True)
class Split:
    """F, Bi, W and B of one stage as functions. Made by `split`.

    Where they say `prepared`, they want what `prepare` makes of the parameters, once a step.
    kept, deferred: shapes and dtypes of what F leaves for Bi, and Bi for W, for every micro-batch under way.
    loss, sums: shapes and dtypes of what the stage gives besides y.
    pieces: the equations of "F", "Bi", "W", of "B", which is Bi and W at once, and of "prepare".
    """

    kept: tuple[jax.ShapeDtypeStruct, ...]
    deferred: tuple[jax.ShapeDtypeStruct, ...]
    loss: jax.ShapeDtypeStruct
    sums: Any
    pieces: dict[str, Piece]
    # Variables: what is made of parameters, and context, which every piece may read; then what only some read.
    _params: tuple
    _prepared: tuple
    _context: tuple
    _x: tuple
    _kept: tuple
    _dy: tuple
    _deferred: tuple
    _constants: dict
    _trees: dict

    @property
    def kept_bytes(self) -> int:
        return _bytes(self.kept)

    @property
    def deferred_bytes(self) -> int:
        return _bytes(self.deferred)

    def prepare(self, params):
        """What the passes read of the parameters: them, or what is made of them alone."""
        return tuple(_run(self.pieces["prepare"], dict(zip(self._params, jax.tree.leaves(params))) | self._constants))

    def forward(self, prepared, x, context):
        """F: (y, loss, sums), kept."""
        results = _run(self.pieces["F"], self._env(prepared, context, (self._x, x)))
        width = len(results) - len(self.kept)
        return jax.tree.unflatten(self._trees["forward"], results[:width]), tuple(results[width:])

    def backward_input(self, prepared, context, kept, dy, dloss):
        """Bi: dx, deferred."""
        results = _run(self.pieces["Bi"], self._env(prepared, context, (self._kept, kept), (self._dy, (dy, dloss))))
        width = len(results) - len(self.deferred)
        return jax.tree.unflatten(self._trees["x"], results[:width]), tuple(results[width:])

    def backward_weights(self, prepared, context, deferred):
        """W: dparams."""
        results = _run(self.pieces["W"], self._env(prepared, context, (self._deferred, deferred)))
        return jax.tree.unflatten(self._trees["params"], results)

    def backward(self, prepared, context, kept, dy, dloss):
        """B: dx, dparams."""
        results = _run(self.pieces["B"], self._env(prepared, context, (self._kept, kept), (self._dy, (dy, dloss))))
        return jax.tree.unflatten(self._trees["backward"], results)

    def _env(self, prepared, context, *more):
        env = dict(zip(self._prepared, prepared)) | dict(zip(self._context, jax.tree.leaves(context)))
        env |= self._constants
        for variables, values in more:
            env |= dict(zip(variables, jax.tree.leaves(values)))
        return env


def split(stage, params, x, context) -> Split:
    """Splits a stage.

    Args:
      stage: pure; (params, x, context) -> (y, loss, sums). y has the shapes and dtypes of x; loss, a scalar, is what
        the stage itself adds to the objective; sums, any pytree, has no gradient. What the forward pass keeps is what
        `jax.vjp` keeps: wrap the stage in `jax.checkpoint`, with or without a policy, to keep less.
      params: get gradients.   context: per micro-batch or fixed, without gradients.
        All three may be arrays, tracers or shapes with dtypes. Inside a shard_map the stage may use its axes.
    Raises:
      ConfigError: the stage changes the shape of its activation.
    """
    trees = {}

    def ahead(params, x, context):
        def differentiated(params, x):
            y, loss, sums = stage(params, x, context)
            return (y, loss), sums

        (y, loss), vjp, sums = jax.vjp(differentiated, params, x, has_aux=True)
        kept, trees["vjp"] = jax.tree.flatten(vjp)
        return (y, loss, sums), kept

    def back(kept, dy, dloss):
        dparams, dx = jax.tree.unflatten(trees["vjp"], kept)((dy, dloss))
        return dx, dparams

    ahead_jaxpr, (outputs, kept) = jax.make_jaxpr(ahead, return_shape=True)(params, x, context)
    y, loss, sums = outputs
    _check_shapes(x, y, loss)
    back_jaxpr, gradients = jax.make_jaxpr(back, return_shape=True)(kept, y, loss)
    trees |= {"x": jax.tree.structure(x), "params": jax.tree.structure(params),
              "forward": jax.tree.structure(outputs), "backward": jax.tree.structure(gradients)}
    return _Sorter(ahead_jaxpr, back_jaxpr, params, x, outputs, len(kept)).split(trees, loss, sums)


def _check_shapes(x, y, loss):
    def describe(tree):
        return str(jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", tree))

    if describe(x) != describe(y):
        raise ConfigError(f"a stage turned its activation {describe(x)} into {describe(y)}; every stage of a pipeline "
                          "must give what the next one takes, so move what changes the shape into enter or leave.")
    if loss.shape:
        raise ConfigError(f"a stage's loss must be a scalar, not of shape {list(loss.shape)}; sum it.")


class _Sorter:
    """All equations of the VJP under one set of names, and for each variable what it depends on."""

    def __init__(self, ahead_jaxpr, back_jaxpr, params, x, outputs, num_kept):
        self.equations, self.constants, self.waits = [], {}, {}
        first, size = len(jax.tree.leaves(params)), len(jax.tree.leaves(x))
        arguments = [_fresh(v) for v in ahead_jaxpr.jaxpr.invars]
        self.constant = set()  # what depends on nothing
        self.of_params = set(arguments[:first])  # what depends on parameters and constants alone
        ahead_results = self._inline(ahead_jaxpr, arguments)
        self.num_ahead = len(self.equations)
        width = len(ahead_results) - num_kept
        self.dy = [_fresh(v) for v in back_jaxpr.jaxpr.invars[num_kept:]]
        back_results = self._inline(back_jaxpr, ahead_results[width:] + self.dy)

        self.x = arguments[first:first + size]
        self.params, self.context = arguments[:first], arguments[first + size:]
        same = self._merge_preparations()
        self.outputs = [same.get(v, v) if isinstance(v, core.Var) else v for v in ahead_results[:width]]
        self.dx, self.dparams = back_results[:size], back_results[size:]

    def _inline(self, jaxpr, arguments):
        """Appends the equations of `jaxpr` with fresh variables and bodies for calls; returns its results' atoms."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        env = dict(zip(inner.invars, arguments))
        for v, value in zip(inner.constvars, getattr(jaxpr, "consts", ())):
            env[v] = _fresh(v)
            self.constants[env[v]] = value
            self.constant.add(env[v])

        def atom(v):
            return v if isinstance(v, core.Literal) else env[v]

        for equation in inner.eqns:
            taken = [atom(v) for v in equation.invars]
            if equation.primitive.name in CALLS:
                body = equation.params.get("call_jaxpr", equation.params.get("jaxpr"))
                if equation.params.get("prevent_cse") and equation.params.get("differentiated"):
                    taken = self._held_back(taken)
                given = self._inline(body, taken)
            else:
                given = [_fresh(v) for v in equation.outvars]
                self._append(equation.replace(invars=taken, outvars=given))
            env |= dict(zip(equation.outvars, given))
        return [atom(v) for v in inner.outvars]

    def _append(self, equation):
        self.equations.append(equation)
        rest = set(_variables(equation.invars)) - self.constant
        if rest <= self.of_params and not equation.effects:
            (self.of_params if rest else self.constant).update(equation.outvars)

    def _held_back(self, atoms):
        """What a recomputation reads, behind barriers that wait for the gradients among it.

        jax puts one barrier around all of it, through which everything would depend on everything.
        """
        behind = {v: _fresh(v) for v in _variables(atoms) if v not in self.of_params | self.constant}
        for v, fresh in behind.items():
            self._append(_BARRIER.replace(invars=[v], outvars=[fresh]))
            self.waits[fresh] = tuple(behind)
        return [v if isinstance(v, core.Literal) else behind.get(v, v) for v in atoms]

    def _merge_preparations(self):
        """Finds what is made of parameters alone, and makes twice the same thing (F and Bi quantize a weight each) one.

        Sets self.preparation, {variable: index of its equation}. Returns {variable: the same one, made earlier}.
        """
        self.preparation, same, first = {}, {}, {}
        for i, equation in enumerate(self.equations):
            taken = [v if isinstance(v, core.Literal) else same.get(v, v) for v in equation.invars]
            self.equations[i] = equation = equation.replace(invars=taken)
            if equation.outvars[0] not in self.of_params | self.constant:
                continue
            if equation.outvars[0] in self.of_params:
                self.preparation |= dict.fromkeys(equation.outvars, i)
            # A literal's text says nothing of its type: zeros in FP8 are not zeros in bfloat16.
            atoms = ((str(v), str(v.aval)) if isinstance(v, core.Literal) else id(v) for v in taken)
            key = equation.primitive.name, str(equation.params), *atoms
            for v, earlier in zip(equation.outvars, first.setdefault(key, equation.outvars)):
                if v is not earlier:
                    same[v] = earlier
        return same

    def _prepared(self, indices, results):
        """What these equations and results read that is made of parameters alone, in its smallest form."""
        outside = [v for i in sorted(indices) if self.equations[i].outvars[0] not in self.preparation
                   for v in _variables(self.equations[i].invars)] + _variables(results)
        made = set(self.params) | self.preparation.keys()
        return tuple(dict.fromkeys(self._smallest(v) for v in outside if v in made))

    def _smallest(self, v):
        """v, or what it is a copy of in another shape, order or wider type."""
        while v in self.preparation:
            read = [u for u in _variables(self.equations[self.preparation[v]].invars) if u not in self.constant]
            if len(read) != 1 or _bytes(_structs(read)) > _bytes(_structs([v])):
                break
            v = read[0]
        return v

    def _reached(self, start):
        """Every variable that depends on one of `start`."""
        reached = set(start)
        for equation in self.equations:
            if any(v in reached for v in _variables(equation.invars)):
                reached.update(equation.outvars)
        return reached

    def _needed(self, targets, known=()):
        """Indices of the equations that compute `targets` from `known`, and from what no equation computes."""
        wanted, found = set(_variables(targets)) - set(known), set()
        for i in reversed(range(len(self.equations))):
            if any(v in wanted for v in self.equations[i].outvars):
                found.add(i)
                wanted.update(v for v in _variables(self.equations[i].invars) if v not in known)
        return found

    def _piece(self, results, known):
        """The equations that compute `results` from `known` and from what every piece may read."""
        equations = tuple(self.equations[i] for i in sorted(self._needed(results, known)))
        return Piece(equations, tuple(results), self.waits)

    def split(self, trees, loss, sums):
        on_x, on_dy = self._reached(self.x), self._reached(self.dy)
        self.waits = {v: tuple(u for u in among if u in on_dy) for v, among in self.waits.items()}
        back = self._needed(self.dx + self.dparams) - set(range(self.num_ahead))
        marked = [v for i in back for v in self.equations[i].outvars
                  if self.equations[i].primitive.name == "name" and self.equations[i].params["name"] == DEFERRED]
        in_w = self._weight_gradients(back - self._needed(self.dx + marked), on_x, on_dy)
        in_w -= self._shrinking(in_w, on_x | on_dy)
        kept = self._across(back, self.dx + self.dparams, on_x - self._made(range(self.num_ahead, len(self.equations))))
        deferred = self._across(in_w, self.dparams, (on_x | on_dy) - self._made(in_w))
        wanted = {"F": ([*self.outputs, *kept], self.x), "Bi": ([*self.dx, *deferred], [*kept, *self.dy]),
                  "W": (self.dparams, deferred), "B": ([*self.dx, *self.dparams], [*kept, *self.dy])}
        prepared = tuple(dict.fromkeys(v for results, known in wanted.values()
                                       for v in self._prepared(self._needed(results, known), results)))
        pieces = {name: self._piece(results, [*known, *prepared]) for name, (results, known) in wanted.items()}
        pieces["prepare"] = self._piece(prepared, self.params)
        return Split(kept=_structs(kept), deferred=_structs(deferred), loss=loss, sums=sums, pieces=pieces,
                     _params=tuple(self.params), _prepared=prepared, _context=tuple(self.context),
                     _x=tuple(self.x), _kept=kept, _dy=tuple(self.dy), _deferred=deferred, _constants=self.constants,
                     _trees=trees)

    def _weight_gradients(self, candidates, on_x, on_dy):
        """The equations of W: of those that the input's gradient does not need, what depends on the output's.

        What is recomputed for W alone is recomputed in Bi, unless W can do it from what it reads anyway, or from no
        more bytes than the result has (a transposed input).
        """
        in_w = {i for i in candidates if any(v in on_dy for v in self.equations[i].outvars)}
        for i in sorted(candidates - in_w, reverse=True):
            made = set(self.equations[i].outvars)
            elsewhere = candidates - in_w - {i}
            if any(v in made for j in elsewhere for v in _variables(self.equations[j].invars)):
                continue
            read = set(self._across(in_w, self.dparams, on_x | on_dy)) - self._made(in_w)
            more = set(_variables(self.equations[i].invars)) & on_x - read
            if _bytes(_structs(more)) <= _bytes(_structs(made & read)):
                in_w.add(i)
        return in_w

    def _shrinking(self, in_w, on_input):
        """Those equations of W that are no products and give fewer bytes than they alone read: sums, rounding."""
        readers = collections.Counter(v for i in in_w for v in set(_variables(self.equations[i].invars)))
        left = set(in_w)
        for i in sorted(in_w):
            equation = self.equations[i]
            read = set(_variables(equation.invars)) & on_input
            if equation.primitive.name in PRODUCTS or read & self._made(left):
                continue
            if _bytes(_structs(equation.outvars)) < _bytes(_structs(v for v in read if readers[v] == 1)):
                left.remove(i)
        return in_w - left

    def _made(self, indices):
        return {v for i in indices for v in self.equations[i].outvars}

    def _across(self, indices, results, made):
        """What these equations and results read of `made`, each once, in a fixed order."""
        read = [v for i in sorted(indices) for v in _variables(self.equations[i].invars)] + _variables(results)
        return tuple(dict.fromkeys(v for v in read if v in made))


_new = core.gensym()


def _fresh(v):
    return _new(v.aval)


def _variables(atoms):
    return [v for v in atoms if not isinstance(v, core.Literal)]


def _structs(variables):
    return tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables)


def _bytes(structs):
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in structs)


def _run(piece, env):
    """Evaluates a piece; returns its results."""
    env = dict(env)
    for equation in piece.equations:
        if first := [env[v] for v in piece.waits.get(equation.outvars[0], ()) if v in env]:
            env[equation.outvars[0]] = lax.optimization_barrier((_value(env, equation.invars[0]), *first))[0]
            continue
        bound = equation.primitive.get_bind_params(equation.params)
        subfunctions, params = bound if isinstance(bound, tuple) else ((), bound)  # a tuple before jax 0.12
        given = equation.primitive.bind(*subfunctions, *(_value(env, v) for v in equation.invars), **params)
        env |= zip(equation.outvars, given if equation.primitive.multiple_results else [given])
    return [_value(env, v) for v in piece.results]


def _value(env, atom):
    return atom.val if isinstance(atom, core.Literal) else env[atom]
