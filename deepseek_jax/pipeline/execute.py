"""Runs a schedule: one `lax.scan` over its ticks, in one `shard_map` (report section 3.2.1).

In each tick every rank looks up its cell in the schedule's table and takes the matching branch of a switch; then
activations and gradients move to the neighbouring ranks. Residuals, pending weight gradients, messages and sums of
gradients are held in fixed-size buffers in the scan carry. A branch reads and writes slots of the buffers themselves,
which XLA does in place: neither a copy of a slot nor a gradient separate from its sum ever exists. Compile time and
memory do not depend on the number of micro-batches, apart from the inputs and the number of slots that the schedule
needs.

Embedding, head and loss run outside the switch, on all ranks at once: in an SPMD program every rank waits for the
slowest one, so the ranks share this work, although only the first or the last stage needs its result.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline.interleave import interleaved
from deepseek_jax.pipeline.schedule import Schedule
from deepseek_jax.pipeline.split import split
from deepseek_jax.pipeline.tables import Ranks, Tables, stacked, tabulate
from deepseek_jax.pipeline.ticks import Slots
from deepseek_jax.pipeline.validate import validate


class Model(NamedTuple):
    """The model, as three pure functions of one device's shards. They run inside the shard_map.

    They may use collectives over every mesh axis, except over `pipe` in `stage`, because ranks take different branches
    there. The objective is the SUM of the losses that all devices return. A function that computes the same loss on
    several devices returns a part of it on each, or all of it on one; then its collectives are transposed correctly.

    enter: (shared, inputs) -> x. Runs on all ranks; only the first stage's rank uses its result.
    stage: (params, fixed, x, inputs) -> (y, loss, sums). The same program for every stage. y has the shape and dtype of
      x. loss: the stage's own term of the objective. sums: any pytree, summed over micro-batches, stage by stage.
      For remat, wrap the stage or its layers in `jax.checkpoint`.
    leave: (shared, y, inputs) -> (loss, sums). Runs on all ranks, all of which receive the last stage's y.
    parts: (params of a stage, as in the arguments) -> those that `stage` takes, whose gradients are summed leaf by
      leaf. whole: the inverse.
    """

    enter: Callable
    stage: Callable
    leave: Callable
    parts: Callable[[Any], Any] = lambda params: params
    whole: Callable[[Any], Any] = lambda parts: parts


class Arguments(NamedTuple):
    """The arguments of a step: arrays, or their PartitionSpecs.

    params: leaves [stages, ...], sharded over `pipe` along the first axis, in the order of `rows`.
    fixed: like params, but without gradients, for example routing biases and which layers are padding.
    shared: parameters of enter and leave. inputs: leaves [micro-batches, ...], not sharded along the first axis.
    """

    params: Any
    fixed: Any
    shared: Any
    inputs: Any


class Result(NamedTuple):
    """The result of a step, summed over micro-batches and over all devices that do not have shards of the same array.

    loss: scalar.   params, shared: gradients, sharded like the parameters.
    stage_sums: the stages' sums, leaves [stages, ...] in the order of `rows`.   sums: those of `leave`.
    """

    loss: Any
    params: Any
    shared: Any
    stage_sums: Any
    sums: Any


def rows(schedule: Schedule) -> list[int]:
    """The stage of each row of the stacked parameters, so that `pipe` shards them to the right ranks.

    The natural order, except in a V, where a rank's two stages are adjacent: `x[jnp.array(rows(schedule))]`.
    """
    route = schedule.route
    directions = range(2 if route.v_shaped else 1)
    return [route.stage(rank, direction) for rank in range(schedule.ranks) for direction in directions]


def pipelined(schedule: Schedule, model: Model, mesh: Any, specs: Arguments, axis: str = "pipe",
              shorter: tuple[Schedule, ...] = ()) -> Callable[..., Result]:
    """Makes the function of a step: Arguments -> Result, with gradients. Call it under jit.

    Args:
      mesh: jax.sharding.Mesh or AbstractMesh.
      specs: PartitionSpecs, trees or prefixes of trees. Gradients are summed over the mesh axes that a parameter's spec
        does not name, sums over all axes (stage_sums: all except `pipe`).
      axis: the mesh axis of the pipeline's ranks.
      shorter: schedules of fewer micro-batches that a step may follow instead. Then the function takes, after the
        Arguments, an int32 scalar: which of (*shorter, schedule). Inputs of later micro-batches are not read.
    Raises:
      ScheduleError: the schedule's table is wrong.
      ConfigError: mesh, parameters or inputs do not fit the schedule, or a stage changes the shape of its activation.
    """
    schedules = (*shorter, schedule)
    for one in schedules:
        validate(one)
    if mesh.shape[axis] != schedule.ranks:
        raise ConfigError(f"the schedule is for {schedule.ranks} ranks, the mesh has {axis}={mesh.shape[axis]}; make "
                          "both the same.")
    tables = stacked(schedules) if shorter else tabulate(schedule)
    slots = Slots(*map(max, zip(*(one.slots for one in schedules))))

    def body(arguments, which):
        table = jax.tree.map(jnp.asarray, (tables.ranks, tables.ends))
        chosen = _at(table, which) if shorter else table
        result = _Device(dataclasses.replace(schedule, slots=slots), tables, chosen, model, arguments, axis).run()
        total = functools.partial(lax.psum, axis_name=mesh.axis_names)
        others = tuple(name for name in mesh.axis_names if name != axis)
        return Result(
            loss=total(result.loss), params=_reduce(result.params, specs.params, mesh),
            shared=_reduce(result.shared, specs.shared, mesh), sums=jax.tree.map(total, result.sums),
            stage_sums=jax.tree.map(lambda s: lax.psum(s, others) if others else s, result.stage_sums))

    def step(arguments: Arguments, which: jax.Array | int = 0) -> Result:
        _check(schedule, arguments)
        out = Result(loss=P(), params=specs.params, shared=specs.shared, stage_sums=P(axis), sums=P())
        return jax.shard_map(body, mesh=mesh, in_specs=(specs, P()), out_specs=out, check_vma=False)(arguments, which)

    return step


def _check(schedule, arguments):
    for what, tree, length in (("params", arguments.params, schedule.stages),
                               ("fixed", arguments.fixed, schedule.stages),
                               ("inputs", arguments.inputs, schedule.microbatches)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not leaf.shape or leaf.shape[0] != length:
                kind = "micro-batches" if what == "inputs" else "stages"
                raise ConfigError(f"{what}{jax.tree_util.keystr(path)} of shape {list(leaf.shape)} should begin with "
                                  f"the {length} {kind} of the schedule.")


def _reduce(grads, specs, mesh):
    """Sums each gradient over the mesh axes that its spec does not name."""
    def one(spec, tree):
        named = {name for part in spec if part is not None
                 for name in (part if isinstance(part, tuple) else (part,))}
        axes = tuple(name for name in mesh.axis_names if name not in named)
        return jax.tree.map(lambda g: lax.psum(g, axes) if axes else g, tree)

    return jax.tree.map(one, specs, grads, is_leaf=lambda s: isinstance(s, P))


def _at(tree, index):
    """tree[index] along the first axis of every leaf."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def _put(tree, index, value):
    return jax.tree.map(lambda a, v: lax.dynamic_update_index_in_dim(a, v, index, 0), tree, value)


def _flat(tree):
    """Every leaf with a single axis. Slots are flat because XLA:GPU would give a matrix that is read transposed another
    layout than the buffer in the carry, and then copy the buffer, with all its slots, in every tick."""
    flat = lambda a: jax.ShapeDtypeStruct((math.prod(a.shape),), a.dtype)
    return jax.tree.map(lambda a: flat(a) if isinstance(a, jax.ShapeDtypeStruct) else a.reshape(-1), tree)


def _take(tree, index, like):
    """Slot `index` of the buffers, in the shapes of `like`, and the buffers to use afterwards.

    A buffer may be written only after this read, otherwise XLA would copy all of it.
    """
    taken = jax.tree.map(lambda a: lax.optimization_barrier((lax.dynamic_index_in_dim(a, index, keepdims=False), a)),
                         tree)
    return (jax.tree.map(lambda shape, _, pair: pair[0].reshape(shape.shape), like, tree, taken),
            jax.tree.map(lambda _, pair: pair[1], tree, taken))


def _add_at(tree, index, value):
    return _put(tree, index, _add(_at(tree, index), value))  # `a.at[index].add` would be a scatter


def _add(*trees):
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)


def _zeros(tree, *lead):
    return jax.tree.map(lambda a: jnp.zeros((*lead, *a.shape), a.dtype), tree)


def _where(condition, tree, other=None):
    if other is None:
        return jax.tree.map(lambda a: jnp.where(condition, a, jnp.zeros_like(a)), tree)
    return jax.tree.map(functools.partial(jnp.where, condition), tree, other)


class _Held(NamedTuple):
    """The buffers that branches update in place."""

    residuals: Any  # [slots, size]: the residuals that F saves for B or Bi
    pending: Any  # [slots, size]: the arrays that Bi saves for W, of pending weight gradients
    dparams: list  # the sums of the stages' gradients so far, one entry per direction


class _Carry(NamedTuple):
    """The buffers of a device, with their slots along the first axis, and the sums so far.

    messages: [slots + 1, ...], activations and gradients that arrived; the last slot is scratch.
    result: without `params`, which are `held.dparams`.
    """

    held: _Held
    messages: Any
    result: Result


class _Cell(NamedTuple):
    """The inputs of a branch, apart from parameters and buffers. Fields that it does not need have arbitrary values."""

    x: Any
    dy: Any
    at: Ranks  # its slots
    forward: Any  # inputs of the forward pass's micro-batch
    backward: Any  # inputs of the backward pass's micro-batch


class _Done(NamedTuple):
    """The results of a branch in addition to the buffers; zero where it has none."""

    y: Any
    dx: Any
    loss: Any
    sums: Any


@dataclasses.dataclass
class _Device:
    """The program of one device: every method is traced inside the shard_map."""

    schedule: Schedule
    tables: Tables
    table: Any  # ranks and ends of the ticks to run
    model: Model
    arguments: Arguments
    axis: str

    def __post_init__(self):
        self.rank = lax.axis_index(self.axis)
        self.copies = 2 if self.schedule.route.both_ways else 1
        params = [self.model.parts(stage) for stage in self._own(self.arguments.params)]
        # One entry per direction. The entry that a branch reads is known when it is traced, so nothing is copied.
        self.fixed = self._with_mirror(self._own(self.arguments.fixed))
        self.inputs = self.arguments.inputs
        one = _at(self.inputs, 0)
        self.x = jax.eval_shape(self.model.enter, self.arguments.shared, one)
        self.split = split(lambda params, x, context: self.model.stage(params, context[0], x, context[1]),
                           params[0], self.x, (self.fixed[0], one))
        self.like_params = params[0]
        self.dloss = jnp.ones((), self.split.loss.dtype)
        self.prepared = self._with_mirror([self.split.prepare(stage) for stage in params])
        _, self.leave_sums = jax.eval_shape(self.model.leave, self.arguments.shared, self.x, one)

    @property
    def mirrors(self):
        """DualPipe: each rank also runs its mirror rank's stage, in the other direction."""
        return self.copies == 2 and not self.schedule.route.v_shaped

    def _own(self, tree):
        """The stages whose parameters this rank stores."""
        return [jax.tree.map(lambda a, d=d: a[d], tree) for d in range(1 if self.mirrors else self.copies)]

    def _with_mirror(self, own):
        """The stages that this rank runs, one per direction."""
        return own + [self._mirrored(own[0])] if self.mirrors else own

    def _mirrored(self, tree):
        """The mirror rank's arrays."""
        last = self.schedule.ranks - 1
        pairs = [(rank, last - rank) for rank in range(last + 1)]
        return jax.tree.map(lambda a: lax.ppermute(a, self.axis, pairs), tree)

    def run(self) -> Result:
        slots = self.schedule.slots
        result = Result(loss=jnp.zeros((), self.split.loss.dtype), params=(), shared=_zeros(self.arguments.shared),
                        stage_sums=_zeros(self.split.sums, self.copies), sums=_zeros(self.leave_sums))
        held = _Held(_zeros(_flat(self.split.residuals), slots.activations),
                     _zeros(_flat(self._pending), slots.deferred),
                     [_zeros(self.like_params) for _ in range(self.copies)])
        carry = _Carry(held, _zeros(self.x, slots.messages + 1), result)
        carry, _ = lax.scan(self._tick, carry, self.table)
        dparams, sums = carry.held.dparams, carry.result.stage_sums
        if self.mirrors:
            # Two ranks ran each stage: the mirror rank's sums for this rank's stage are added to its own.
            dparams = [_add(dparams[0], self._mirrored(dparams[1]))]
            sums = jax.tree.map(lambda a: a[:1] + self._mirrored(a[1:]), sums)
        whole = [self.model.whole(own) for own in dparams]
        return carry.result._replace(params=jax.tree.map(lambda *own: jnp.stack(own), *whole), stage_sums=sums)

    @property
    def _pending(self):
        return self.split.pending if self.schedule.slots.deferred else ()

    def _tick(self, carry, row):
        ranks, ends = row
        mine = jax.tree.map(lambda column: column[self.rank], ranks)
        cell = _Cell(x=self._enter(ends, _at(carry.messages, mine.forward_message)),
                     dy=_at(carry.messages, mine.backward_message), at=mine,
                     forward=_at(self.inputs, mine.forward), backward=_at(self.inputs, mine.backward))
        branches = [functools.partial(self._branch, branch) for branch in self.tables.branches]
        done, held = lax.switch(mine.branch, branches, cell, carry.held)

        messages = self._exchange(carry.messages, mine.arrivals, done.y, done.dx)
        result, messages = self._leave(ends, done.y, carry.result, messages)
        result = self._backward_of_enter(ends, done.dx, result)
        # The direction, and with it the stage, of a cell's forward pass; if it has none, zeros are added.
        forward = jnp.asarray([dict(branch).get("F", 0) for branch in self.tables.branches])[mine.branch]
        result = result._replace(loss=result.loss + done.loss,
                                 stage_sums=_add_at(result.stage_sums, forward, done.sums))
        return _Carry(held, messages, result), None

    def _branch(self, branch, cell: _Cell, held: _Held) -> tuple[_Done, _Held]:
        """One kind of cell: `branch` is () or its operations, each (kind, direction)."""
        split, at = self.split, cell.at
        done = _Done(y=cell.x, dx=cell.dy, loss=jnp.zeros((), split.loss.dtype), sums=_zeros(split.sums))
        kinds = dict(branch)
        read = ()
        if "B" in kinds or "Bi" in kinds:
            read, residuals = _take(held.residuals, at.activation_in, split.residuals)
            held = held._replace(residuals=residuals)
        both = self._overlapped(kinds, cell, read, held) if {"F", "B"} <= kinds.keys() else {}
        for kind, d in branch:
            prepared, context = self.prepared[d], (self.fixed[d], cell.forward if kind == "F" else cell.backward)
            if kind == "F":
                (y, loss, sums), residuals = both["F"] if both else split.forward(prepared, cell.x, context)
                done = done._replace(y=y, loss=loss, sums=sums)
                held = held._replace(residuals=_put(held.residuals, at.activation_out, _flat(residuals)))
            elif kind == "Bi":
                dx, pending = split.backward_input(prepared, context, read, cell.dy, self.dloss)
                done = done._replace(dx=dx)
                held = held._replace(pending=_put(held.pending, at.deferred, _flat(pending)))
            elif both:
                dx, sums = both["B"]
                done = done._replace(dx=dx)
                held = held._replace(dparams=[sums if i == d else other for i, other in enumerate(held.dparams)])
            else:
                if kind == "B":
                    dx, dparams = split.backward(prepared, context, read, cell.dy, self.dloss)
                    done = done._replace(dx=dx)
                else:
                    pending, buffers = _take(held.pending, at.deferred, split.pending)
                    held = held._replace(pending=buffers)
                    dparams = split.backward_weights(prepared, context, pending)
                sums = [_add(sum_, dparams) if i == d else sum_ for i, sum_ in enumerate(held.dparams)]
                held = held._replace(dparams=sums)
        return done, held

    def _overlapped(self, kinds, cell: _Cell, residuals, held: _Held):
        """F and B of a cell that has both: the results of `Split.forward_and_backward`, by kind."""
        forward, backward = kinds["F"], kinds["B"]
        results = self.split.forward_and_backward(
            (self.prepared[forward], cell.x, (self.fixed[forward], cell.forward)),
            (self.prepared[backward], (self.fixed[backward], cell.backward), residuals, cell.dy, self.dloss),
            held.dparams[backward], interleaved)
        return dict(zip("FB", results))

    def _exchange(self, messages, arrivals, y, dx):
        """Two permutations between neighbours. Arrivals go to the slots of the table, or to the scratch slot."""
        last = self.schedule.ranks - 1
        up, down = [(r, r + 1) for r in range(last)], [(r + 1, r) for r in range(last)]
        if self.copies == 1:
            from_before, from_after = (y, None), (None, dx)
        else:  # activations of one direction are sent the same way as gradients of the other
            from_before = from_after = (y, dx)

        def permuted(sent, pairs):
            return jax.tree.map(lambda a: lax.ppermute(a, self.axis, pairs), sent)

        arrived_from_after = permuted(from_after, down)
        if self.schedule.route.v_shaped:  # the last rank is its own neighbour
            arrived_from_after = _where(self.rank == last, from_after, arrived_from_after)
        arrived = (*permuted(from_before, up), *arrived_from_after)
        for i, message in enumerate(arrived):
            if message is not None:
                messages = _put(messages, arrivals[i], message)
        return messages

    def _enter(self, ends, x):
        """x, replaced by the embedding on the rank where a micro-batch enters in this tick."""
        for i, (_, rank) in enumerate(self.tables.entrances):
            def entered(m, x, rank=rank):
                return _where(self.rank == rank, self.model.enter(self.arguments.shared, _at(self.inputs, m)), x)

            x = lax.cond(ends.enter[i] >= 0, entered, lambda m, x: x, ends.enter[i], x)
        return x

    def _leave(self, ends, y, result, messages):
        """Loss and gradient of the micro-batches that left their last stage in this tick."""
        shared = self.arguments.shared
        for i, (_, rank) in enumerate(self.tables.exits):
            def left(m, y, summed, rank=rank):
                y = lax.psum(_where(self.rank == rank, y), self.axis)
                (loss, sums), (dshared, dy) = jax.value_and_grad(self.model.leave, argnums=(0, 1), has_aux=True)(
                    shared, y, _at(self.inputs, m))
                return loss, sums, lax.psum(dy, self.axis), _add(summed, dshared)

            def nothing(m, y, summed):
                return jnp.zeros((), self.split.loss.dtype), _zeros(self.leave_sums), _zeros(self.x), summed

            loss, sums, dy, summed = lax.cond(ends.left[i] >= 0, left, nothing, ends.left[i], y, result.shared)
            here = (self.rank == rank) & (ends.left[i] >= 0)
            slot = jnp.where(here, ends.gradient_slot[i], self.schedule.slots.messages)
            messages = _put(messages, slot, dy)
            result = result._replace(loss=result.loss + loss, sums=_add(result.sums, sums), shared=summed)
        return result, messages

    def _backward_of_enter(self, ends, dx, result):
        """Gradients of `enter` for the micro-batches whose dx left the first stage in this tick."""
        shared = self.arguments.shared
        for i, (_, rank) in enumerate(self.tables.entrances):
            def back(m, dx, summed, rank=rank):
                _, vjp = jax.vjp(lambda s: self.model.enter(s, _at(self.inputs, m)), shared)
                return _add(summed, vjp(_where(self.rank == rank, dx))[0])

            summed = lax.cond(ends.back[i] >= 0, back, lambda m, dx, summed: summed, ends.back[i], dx, result.shared)
            result = result._replace(shared=summed)
        return result
