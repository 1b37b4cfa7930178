"""A stage's forward pass F, and its backward pass B split into Bi and W (report section 3.2.1, arXiv 2401.10241).

The equations of the stage's VJP are divided between Bi and W; none is computed twice:

    Bi    computes the gradient of the input, which the previous stage waits for
    W     the remaining equations that depend on the gradient of the output; it can be deferred

Further rules decide where values are computed, and so how much has to be saved:

- Values that `jax.checkpoint` recomputes are recomputed once, in Bi, and W reads them. The recomputation of a layer
starts only
  when the gradient that needs it is available, so that the layers' residuals do not all exist at once.
- What depends neither on the activation nor on a gradient (a table of positions) is computed where it is needed, not
  saved for every micro-batch.
- What depends only on parameters and is smaller than they are (a rounded or quantized weight) is computed once a step,
  by `prepare`, and takes the place of the parameters in all passes.

A `lax.scan` over weights is a single equation, so all of it is in Bi: write a stage's layers as a Python loop.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from deepseek_jax.config.schema import ConfigError

# Calls that can be replaced by their body, because they are not differentiated again.
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call",
         "custom_vjp_call")

# The operations that belong to W. For all others, the number of pending bytes decides.
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated", "pallas_call", "custom_vmap_call")
DEFERRED = "deferred"  # jax.ad_checkpoint.checkpoint_name of arrays that W should read


_BARRIER = jax.make_jaxpr(lax.optimization_barrier)(0.0).eqns[0]


class Piece(NamedTuple):
    """Some of the equations, in order, and their results.

    waits: {result of a barrier: the variables that must be computed before it}.
    """

    equations: tuple
    results: tuple
    waits: dict


@dataclasses.dataclass(frozen=True)
class Split:
    """F, Bi, W and B of one stage as functions. Made by `split`.

    `prepared` is the result of `prepare`, which is called once a step.
    residuals: shapes and dtypes of what F saves for B or Bi, for every micro-batch in flight.
    pending: shapes and dtypes of what Bi saves for W, for every pending weight gradient.
    loss, sums: shapes and dtypes of the stage's other results.
    pieces: the equations of "F", "Bi", "W", of "B", which is Bi and W in one, and of "prepare".
    """

    residuals: tuple[jax.ShapeDtypeStruct, ...]
    pending: tuple[jax.ShapeDtypeStruct, ...]
    loss: jax.ShapeDtypeStruct
    sums: Any
    pieces: dict[str, Piece]
    # Variables: of the parameters, of `prepared` and of the context, which every piece may read; then of single pieces.
    _params: tuple
    _prepared: tuple
    _context: tuple
    _x: tuple
    _residuals: tuple
    _dy: tuple
    _pending: tuple
    _constants: dict
    _trees: dict

    @property
    def residual_bytes(self) -> int:
        """Bytes of the residuals of one micro-batch."""
        return _bytes(self.residuals)

    @property
    def pending_bytes(self) -> int:
        """Bytes kept for one deferred weight gradient."""
        return _bytes(self.pending)

    def prepare(self, params: Any) -> tuple[jax.Array, ...]:
        """The arrays that the passes read instead of the parameters: the parameters, or arrays that depend only on
        them."""
        return tuple(_run(self.pieces["prepare"], dict(zip(self._params, jax.tree.leaves(params))) | self._constants))

    def forward(self, prepared: tuple, x: Any, context: Any) -> tuple[Any, tuple[jax.Array, ...]]:
        """F. Returns (y, loss, sums), of which y is like x and the loss is a scalar, and residuals."""
        return self._of_forward(_run(self.pieces["F"], self._env(prepared, context, (self._x, x))))

    def backward_input(self, prepared: tuple, context: Any, residuals: tuple, dy: Any,
                       dloss: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        """Bi. dy, dloss: gradients of y and the loss. Returns dx, like x, and pending, for `backward_weights`."""
        results = _run(self.pieces["Bi"], self._of_backward(prepared, context, residuals, dy, dloss))
        width = len(results) - len(self.pending)
        return jax.tree.unflatten(self._trees["x"], results[:width]), tuple(results[width:])

    def backward_weights(self, prepared: tuple, context: Any, pending: tuple) -> Any:
        """W. Returns dparams, like the parameters."""
        results = _run(self.pieces["W"], self._env(prepared, context, (self._pending, pending)))
        return jax.tree.unflatten(self._trees["params"], results)

    def backward(self, prepared: tuple, context: Any, residuals: tuple, dy: Any, dloss: jax.Array) -> tuple[Any, Any]:
        """B: Bi and W. Returns dx, like x, and dparams, like the parameters."""
        env = self._of_backward(prepared, context, residuals, dy, dloss)
        return jax.tree.unflatten(self._trees["backward"], _run(self.pieces["B"], env))

    def forward_and_backward(self, forward: tuple, backward: tuple, dparams: Any,
                             interleaved: Callable) -> tuple[tuple, tuple]:
        """F and B of two micro-batches, evaluated by `interleave.interleaved`.

        Args:
          forward, backward: the arguments of those methods. dparams: the sums that B's are added to.
        Returns:
          the results of those methods, with the sums instead of B's dparams.
        """
        prepared, x, context = forward
        ours, theirs = interleaved((self.pieces["F"], self._env(prepared, context, (self._x, x))),
                                   (self.pieces["B"], self._of_backward(*backward)), self._x, jax.tree.leaves(dparams))
        return self._of_forward(ours), jax.tree.unflatten(self._trees["backward"], theirs)

    def _of_forward(self, results):
        width = len(results) - len(self.residuals)
        return jax.tree.unflatten(self._trees["forward"], results[:width]), tuple(results[width:])

    def _of_backward(self, prepared, context, residuals, dy, dloss):
        return self._env(prepared, context, (self._residuals, residuals), (self._dy, (dy, dloss)))

    def _env(self, prepared, context, *more):
        env = dict(zip(self._prepared, prepared)) | dict(zip(self._context, jax.tree.leaves(context)))
        env |= self._constants
        for variables, values in more:
            env |= dict(zip(variables, jax.tree.leaves(values)))
        return env


def split(stage: Callable[[Any, Any, Any], tuple[Any, jax.Array, Any]], params: Any, x: Any, context: Any) -> Split:
    """Splits a stage.

    Args:
      stage: pure; (params, x, context) -> (y, loss, sums). y has the shapes and dtypes of x; loss, a scalar, is the
        stage's own term of the objective; sums, any pytree, has no gradient. The residuals are those of `jax.vjp`:
        wrap the stage in `jax.checkpoint`, with or without a policy, to save less.
      params, x: pytrees that get gradients.   context: pytree without gradients.
        All three may be arrays, tracers or shapes with dtypes. Inside a shard_map the stage may use its axes.
    Raises:
      ConfigError: the stage changes the shape of its activation.
    """
    trees = {}

    def forward(params, x, context):
        def differentiated(params, x):
            y, loss, sums = stage(params, x, context)
            return (y, loss), sums

        (y, loss), vjp, sums = jax.vjp(differentiated, params, x, has_aux=True)
        residuals, trees["vjp"] = jax.tree.flatten(vjp)
        return (y, loss, sums), residuals

    def backward(residuals, dy, dloss):
        dparams, dx = jax.tree.unflatten(trees["vjp"], residuals)((dy, dloss))
        return dx, dparams

    forward_jaxpr, (outputs, residuals) = jax.make_jaxpr(forward, return_shape=True)(params, x, context)
    y, loss, sums = outputs
    _check_shapes(x, y, loss)
    backward_jaxpr, gradients = jax.make_jaxpr(backward, return_shape=True)(residuals, y, loss)
    trees |= {"x": jax.tree.structure(x), "params": jax.tree.structure(params),
              "forward": jax.tree.structure(outputs), "backward": jax.tree.structure(gradients)}
    return _Sorter(forward_jaxpr, backward_jaxpr, params, x, len(residuals)).split(trees, loss, sums)


def _check_shapes(x, y, loss):
    def describe(tree):
        return str(jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", tree))

    if describe(x) != describe(y):
        raise ConfigError(f"a stage turned its activation {describe(x)} into {describe(y)}; every stage of a pipeline "
                          "must give what the next one takes, so move what changes the shape into enter or leave.")
    if loss.shape:
        raise ConfigError(f"a stage's loss must be a scalar, not of shape {list(loss.shape)}; sum it.")


class _Sorter:
    """All equations of forward and backward pass with one set of variables, and what each variable depends on."""

    def __init__(self, forward_jaxpr, backward_jaxpr, params, x, num_residuals):
        self.equations, self.constants, self.waits = [], {}, {}
        first, size = len(jax.tree.leaves(params)), len(jax.tree.leaves(x))
        arguments = [_fresh(v) for v in forward_jaxpr.jaxpr.invars]
        self.constant = set()  # variables that depend on no argument
        self.of_params = set(arguments[:first])  # variables that depend only on parameters
        forward_results = self._inline(forward_jaxpr, arguments)
        self.num_forward = len(self.equations)
        width = len(forward_results) - num_residuals
        self.dy = [_fresh(v) for v in backward_jaxpr.jaxpr.invars[num_residuals:]]
        backward_results = self._inline(backward_jaxpr, forward_results[width:] + self.dy)

        self.x = arguments[first:first + size]
        self.params, self.context = arguments[:first], arguments[first + size:]
        same = self._merge_preparations()
        self.outputs = [same.get(v, v) if isinstance(v, core.Var) else v for v in forward_results[:width]]
        self.dx, self.dparams = backward_results[:size], backward_results[size:]

    def _inline(self, jaxpr, arguments):
        """Appends the equations of `jaxpr`, with fresh variables and with calls inlined. Returns its results' atoms."""
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
                    taken = self._behind_barriers(taken)
                given = self._inline(body, taken)
            else:
                given = [_fresh(v) for v in equation.outvars]
                self._append(equation.replace(invars=taken, outvars=given))
            env |= dict(zip(equation.outvars, given))
        return [atom(v) for v in inner.outvars]

    def _append(self, equation):
        if not equation.outvars:  # the remains of a choice by platform in a recomputation, whose results are not read
            return
        self.equations.append(equation)
        rest = set(variables(equation.invars)) - self.constant
        if rest <= self.of_params and not equation.effects:
            (self.of_params if rest else self.constant).update(equation.outvars)

    def _behind_barriers(self, atoms):
        """The inputs of a recomputation, each behind a barrier that waits for the gradients among the inputs.

        jax uses a single barrier for all inputs, which would make every result depend on every input.
        """
        behind = {v: _fresh(v) for v in variables(atoms) if v not in self.of_params | self.constant}
        for v, fresh in behind.items():
            self._append(_BARRIER.replace(invars=[v], outvars=[fresh]))
            self.waits[fresh] = tuple(behind)
        return [v if isinstance(v, core.Literal) else behind.get(v, v) for v in atoms]

    def _merge_preparations(self):
        """Finds variables that depend only on parameters, and merges equal ones: F and Bi both quantize a weight.

        Sets self.preparation, {variable: index of its equation}. Returns {variable: the earlier, equal one}.
        """
        self.preparation, same, first = {}, {}, {}
        for i, equation in enumerate(self.equations):
            taken = [v if isinstance(v, core.Literal) else same.get(v, v) for v in equation.invars]
            self.equations[i] = equation = equation.replace(invars=taken)
            if equation.outvars[0] not in self.of_params | self.constant:
                continue
            if equation.outvars[0] in self.of_params:
                self.preparation |= dict.fromkeys(equation.outvars, i)
            # A literal's text does not include its type: zeros in FP8 are not zeros in bfloat16.
            atoms = ((str(v), str(v.aval)) if isinstance(v, core.Literal) else id(v) for v in taken)
            key = equation.primitive.name, str(equation.params), *atoms
            for v, earlier in zip(equation.outvars, first.setdefault(key, equation.outvars)):
                if v is not earlier:
                    same[v] = earlier
        return same

    def _prepared(self, indices, results):
        """The preparations that these equations and results read, in their smallest form."""
        outside = [v for i in sorted(indices) if self.equations[i].outvars[0] not in self.preparation
                   for v in variables(self.equations[i].invars)] + variables(results)
        made = set(self.params) | self.preparation.keys()
        return tuple(dict.fromkeys(self._smallest(v) for v in outside if v in made))

    def _smallest(self, v):
        """v, or a variable of at most as many bytes from which alone it is computed: by a reshape, transpose or wider
        type."""
        while v in self.preparation:
            read = [u for u in variables(self.equations[self.preparation[v]].invars) if u not in self.constant]
            if len(read) != 1 or _bytes(_structs(read)) > _bytes(_structs([v])):
                break
            v = read[0]
        return v

    def _reached(self, start):
        """Every variable that depends on one of `start`."""
        reached = set(start)
        for equation in self.equations:
            if any(v in reached for v in variables(equation.invars)):
                reached.update(equation.outvars)
        return reached

    def _needed(self, targets, known=()):
        """Indices of the equations that compute `targets` from `known` and from arguments."""
        wanted, found = set(variables(targets)) - set(known), set()
        for i in reversed(range(len(self.equations))):
            if any(v in wanted for v in self.equations[i].outvars):
                found.add(i)
                wanted.update(v for v in variables(self.equations[i].invars) if v not in known)
        return found

    def _piece(self, results, known):
        """The equations that compute `results` from `known` and from the context."""
        equations = tuple(self.equations[i] for i in sorted(self._needed(results, known)))
        return Piece(equations, tuple(results), self.waits)

    def split(self, trees: dict[str, Any], loss: Any, sums: Any) -> Split:
        on_x, on_dy = self._reached(self.x), self._reached(self.dy)
        self.waits = {v: tuple(u for u in among if u in on_dy) for v, among in self.waits.items()}
        backward = self._needed(self.dx + self.dparams) - set(range(self.num_forward))
        marked = [v for i in backward for v in self.equations[i].outvars
                  if self.equations[i].primitive.name == "name" and self.equations[i].params["name"] == DEFERRED]
        in_w = self._weight_gradients(backward - self._needed(self.dx + marked), on_x, on_dy)
        in_w -= self._shrinking(in_w, on_x | on_dy)
        residuals = self._across(backward, self.dx + self.dparams,
                                 on_x - self._made(range(self.num_forward, len(self.equations))))
        pending = self._across(in_w, self.dparams, (on_x | on_dy) - self._made(in_w))
        # piece -> (its results, its inputs apart from `prepared` and context)
        wanted = {"F": ([*self.outputs, *residuals], self.x), "Bi": ([*self.dx, *pending], [*residuals, *self.dy]),
                  "W": (self.dparams, pending), "B": ([*self.dx, *self.dparams], [*residuals, *self.dy])}
        prepared = tuple(dict.fromkeys(v for results, known in wanted.values()
                                       for v in self._prepared(self._needed(results, known), results)))
        pieces = {name: self._piece(results, [*known, *prepared]) for name, (results, known) in wanted.items()}
        pieces["prepare"] = self._piece(prepared, self.params)
        return Split(residuals=_structs(residuals), pending=_structs(pending), loss=loss, sums=sums, pieces=pieces,
                     _params=tuple(self.params), _prepared=prepared, _context=tuple(self.context), _x=tuple(self.x),
                     _residuals=residuals, _dy=tuple(self.dy), _pending=pending, _constants=self.constants,
                     _trees=trees)

    def _weight_gradients(self, candidates, on_x, on_dy):
        """The equations of W: those candidates, which dx does not need, that depend on dy.

        Recomputation that only W needs is done in Bi, except where W can do it from arrays that it reads anyway or from
        no more bytes than the result has (a transposed input).
        """
        in_w = {i for i in candidates if any(v in on_dy for v in self.equations[i].outvars)}
        for i in sorted(candidates - in_w, reverse=True):
            made = set(self.equations[i].outvars)
            elsewhere = candidates - in_w - {i}
            if any(v in made for j in elsewhere for v in variables(self.equations[j].invars)):
                continue
            read = set(self._across(in_w, self.dparams, on_x | on_dy)) - self._made(in_w)
            more = set(variables(self.equations[i].invars)) & on_x - read
            if _bytes(_structs(more)) <= _bytes(_structs(made & read)):
                in_w.add(i)
        return in_w

    def _shrinking(self, in_w, on_input):
        """The equations of W, except products, whose result is smaller than the inputs that only they read: sums,
        rounding.

        Done in Bi, they make the pending arrays smaller.
        """
        readers = collections.Counter(v for i in in_w for v in set(variables(self.equations[i].invars)))
        left = set(in_w)
        for i in sorted(in_w):
            equation = self.equations[i]
            read = set(variables(equation.invars)) & on_input
            if equation.primitive.name in PRODUCTS or read & self._made(left):
                continue
            if _bytes(_structs(equation.outvars)) < _bytes(_structs(v for v in read if readers[v] == 1)):
                left.remove(i)
        return in_w - left

    def _made(self, indices):
        return {v for i in indices for v in self.equations[i].outvars}

    def _across(self, indices, results, made):
        """The variables of `made` that these equations and results read, each once, in a fixed order."""
        read = [v for i in sorted(indices) for v in variables(self.equations[i].invars)] + variables(results)
        return tuple(dict.fromkeys(v for v in read if v in made))


def _fresh(v):
    return core.Var(v.aval)


def variables(atoms: Iterable[Any]) -> list[Any]:
    """Those of `atoms` that are not literals."""
    return [v for v in atoms if not isinstance(v, core.Literal)]


def _structs(variables):
    return tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables)


def _bytes(structs):
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in structs)


def evaluate(equations: Iterable[Any], waits: dict, env: dict[Any, Any]) -> None:
    """Evaluates equations in order; puts their results into `env`, {variable: value}. waits: see Piece."""
    for equation in equations:
        if first := [env[v] for v in waits.get(equation.outvars[0], ()) if v in env]:
            env[equation.outvars[0]] = lax.optimization_barrier((value_of(env, equation.invars[0]), *first))[0]
            continue
        bound = equation.primitive.get_bind_params(equation.params)
        subfunctions, params = bound if isinstance(bound, tuple) else ((), bound)  # a tuple before jax 0.12
        given = equation.primitive.bind(*subfunctions, *(value_of(env, v) for v in equation.invars), **params)
        env.update(zip(equation.outvars, given if equation.primitive.multiple_results else [given]))


def _run(piece, env):
    """Evaluates a piece; returns its results."""
    env = dict(env)
    evaluate(piece.equations, piece.waits, env)
    return [value_of(env, v) for v in piece.results]


def value_of(env: dict[Any, Any], atom: Any) -> Any:
    """The value of a variable or a literal."""
    return atom.val if isinstance(atom, core.Literal) else env[atom]
