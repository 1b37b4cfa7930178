"""Runs a schedule: one `lax.scan` over its ticks, in one `shard_map` (report section 3.2.1).

In a tick every rank looks up its cell in the schedule's table and takes that branch of a switch; then activations and
gradients move one rank up and one down. What waits lies in slots of static buffers in the scan's carry: a branch takes
one slot and gives one, and reads and writes stand outside it. Neither compile time nor memory knows how many
micro-batches there are, beyond the inputs themselves (and what the schedule keeps).

What happens at the ends of the pipeline happens outside the switch, on all ranks at once: one SPMD program makes every
rank wait for the slowest, so embedding, head and loss are work to be shared, not to be given to one rank.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline.schedule import Schedule
from deepseek_jax.pipeline.split import split
from deepseek_jax.pipeline.tables import Tables, tabulate
from deepseek_jax.pipeline.validate import validate


class Model(NamedTuple):
    """The model, as three pure functions of one device's shards, run inside the shard_map.

    They may use collectives over every mesh axis but for `pipe` in `stage`: there, ranks are in different branches.
    The objective is the SUM of the losses that all devices return. A function that computes the same loss on several
    devices returns a part of it on each, or all of it on one; its collectives are then transposed as they should be.

    enter: (shared, inputs) -> x. On all ranks; the rank of the first stage uses its own result.
    stage: (params, fixed, x, inputs) -> (y, loss, sums). The same program for every stage. y is like x. loss: what the
      stage itself adds to the objective. sums, any pytree, are added up over micro-batches, stage by stage.
      Remat is the stage's own: wrap it, or its layers, in `jax.checkpoint`.
    leave: (shared, y, inputs) -> (loss, sums). On all ranks, each of which is given the last stage's y.
    """

    enter: Callable
    stage: Callable
    leave: Callable


class Arguments(NamedTuple):
    """What a step takes: arrays, or what they are sharded by.

    params: leaves [stages, ...], sharded over `pipe` along the first axis, in the order of `rows`.
    fixed: like params, without gradients: routing biases, which layers are padding.
    shared: what enter and leave need. inputs: leaves [micro-batches, ...], not sharded along the first axis.
    """

    params: Any
    fixed: Any
    shared: Any
    inputs: Any


class Result(NamedTuple):
    """Of a whole step, summed over micro-batches and over all devices that do not hold parts of the same thing.

    loss: scalar.   params, shared: gradients, laid out like what they are gradients of.
    stage_sums: leaves [stages, ...] in the order of `rows`.   sums: what leave gave.
    """

    loss: Any
    params: Any
    shared: Any
    stage_sums: Any
    sums: Any


def rows(schedule: Schedule) -> list[int]:
    """Which stage each row of the stacked parameters belongs to, so that `pipe` shards them to the right ranks.

    Natural order, but for a V, where a rank's two stages stand next to each other: `x[jnp.array(rows(schedule))]`.
    """
    route = schedule.route
    held = range(2 if route.v_shaped else 1)
    return [route.stage(rank, direction) for rank in range(schedule.ranks) for direction in held]


def pipelined(schedule: Schedule, model: Model, mesh, specs: Arguments, axis="pipe"):
    """Makes the function of a step: Arguments -> Result. Differentiates; jit it.

    Args:
      specs: of PartitionSpecs, trees or prefixes of trees. Gradients are summed over the mesh axes that a parameter's
        spec does not name, sums over all axes (stage_sums: but for `pipe`).
      axis: the mesh axis of the pipeline's ranks.
    Raises:
      ScheduleError: the table is wrong.
      ConfigError: mesh, parameters or inputs do not fit the schedule; a stage changes the shape of its activation.
    """
    validate(schedule)
    if mesh.shape[axis] != schedule.ranks:
        raise ConfigError(f"the schedule is for {schedule.ranks} ranks, the mesh has {axis}={mesh.shape[axis]}; make "
                          "both the same.")
    tables = tabulate(schedule)

    def body(arguments):
        result = _Device(schedule, tables, model, arguments, axis).run()
        total = functools.partial(lax.psum, axis_name=mesh.axis_names)
        others = tuple(name for name in mesh.axis_names if name != axis)
        return Result(
            loss=total(result.loss), params=_reduce(result.params, specs.params, mesh),
            shared=_reduce(result.shared, specs.shared, mesh), sums=jax.tree.map(total, result.sums),
            stage_sums=jax.tree.map(lambda s: lax.psum(s, others) if others else s, result.stage_sums))

    def step(arguments: Arguments) -> Result:
        _check(schedule, arguments)
        out = Result(loss=P(), params=specs.params, shared=specs.shared, stage_sums=P(axis), sums=P())
        return jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)(arguments)

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


class _Carry(NamedTuple):
    activations: Any  # [slots, ...] of what F keeps
    deferred: Any  # [slots, ...] of what Bi keeps
    messages: Any  # [slots + 1, ...] of activations and gradients that arrived
    result: Result  # sums so far, of this device


class _Cell(NamedTuple):
    """What a branch takes, beyond parameters."""

    x: Any
    dy: Any
    kept: Any
    deferred: Any
    forward: Any  # inputs of the micro-batch that goes forward
    backward: Any


class _Done(NamedTuple):
    """What every branch gives; where it has nothing new, what it took, or zero."""

    y: Any
    dx: Any
    kept: Any
    deferred: Any
    dparams: Any
    loss: Any
    sums: Any


@dataclasses.dataclass
class _Device:
    """The program of one device: every method is traced inside the shard_map."""

    schedule: Schedule
    tables: Tables
    model: Model
    arguments: Arguments
    axis: str

    def __post_init__(self):
        self.rank = lax.axis_index(self.axis)
        self.copies = 2 if self.schedule.route.both_ways else 1
        params = self._own(self.arguments.params)
        # By direction. Each branch reads one of the two: which one is fixed when it is traced, so nothing is copied.
        self.fixed = self._with_mirror(self._own(self.arguments.fixed))
        self.inputs = self.arguments.inputs
        one = _at(self.inputs, 0)
        self.x = jax.eval_shape(self.model.enter, self.arguments.shared, one)
        self.split = split(lambda params, x, context: self.model.stage(params, context[0], x, context[1]),
                           params[0], self.x, (self.fixed[0], one))
        self.like_params = params[0]
        self.prepared = self._with_mirror([self.split.prepare(stage) for stage in params])
        _, self.leave_sums = jax.eval_shape(self.model.leave, self.arguments.shared, self.x, one)

    @property
    def mirrors(self):
        """DualPipe: each rank also has its mirror rank's stage, for the other direction."""
        return self.copies == 2 and not self.schedule.route.v_shaped

    def _own(self, tree):
        """The stages whose parameters are here."""
        return [jax.tree.map(lambda a, d=d: a[d], tree) for d in range(1 if self.mirrors else self.copies)]

    def _with_mirror(self, own):
        """The stages that this rank runs, one a direction."""
        return own + [self._mirrored(own[0])] if self.mirrors else own

    def _mirrored(self, tree):
        last = self.schedule.ranks - 1
        pairs = [(rank, last - rank) for rank in range(last + 1)]
        return jax.tree.map(lambda a: lax.ppermute(a, self.axis, pairs), tree)

    def run(self) -> Result:
        slots = self.schedule.slots
        result = Result(loss=jnp.zeros((), self.split.loss.dtype), params=_zeros(self.like_params, self.copies),
                        shared=_zeros(self.arguments.shared), stage_sums=_zeros(self.split.sums, self.copies),
                        sums=_zeros(self.leave_sums))
        carry = _Carry(_zeros(self.split.kept, slots.activations), _zeros(self._deferred, slots.deferred),
                       _zeros(self.x, slots.messages + 1), result)
        table = jax.tree.map(jnp.asarray, (self.tables.ranks, self.tables.ends))
        carry, _ = lax.scan(self._tick, carry, table)
        result = carry.result
        if self.mirrors:
            # Each stage was trained in two places: what the mirror rank found belongs to this one's copy.
            params, sums = (jax.tree.map(lambda a: a[:1] + self._mirrored(a[1:]), tree)
                            for tree in (result.params, result.stage_sums))
            result = result._replace(params=params, stage_sums=sums)
        return result

    @property
    def _deferred(self):
        return self.split.deferred if self.schedule.slots.deferred else ()

    def _tick(self, carry, row):
        ranks, ends = row
        mine = jax.tree.map(lambda column: column[self.rank], ranks)
        cell = _Cell(
            x=self._entering(ends, _at(carry.messages, mine.forward_message)),
            dy=_at(carry.messages, mine.backward_message), kept=_at(carry.activations, mine.activation_in),
            deferred=_at(carry.deferred, mine.deferred), forward=_at(self.inputs, mine.forward),
            backward=_at(self.inputs, mine.backward))
        branches = [functools.partial(self._branch, branch) for branch in self.tables.branches]
        done = lax.switch(mine.branch, branches, cell)

        messages = self._exchange(carry.messages, mine.arrivals, done.y, done.dx)
        result, messages = self._leaving(ends, done.y, carry.result, messages)
        result = self._back_at_the_entrance(ends, done.dx, result)
        # Which copy of the stage it was: where a cell has no such operation, zeros are added.
        forward, backward = (jnp.asarray([dict(b).get(kind, 0) for b in self._directions])[mine.branch]
                             for kind in ("F", "B"))
        result = result._replace(
            loss=result.loss + done.loss, params=_add_at(result.params, backward, done.dparams),
            stage_sums=_add_at(result.stage_sums, forward, done.sums))
        return _Carry(_put(carry.activations, mine.activation_out, done.kept),
                      _put(carry.deferred, mine.deferred, done.deferred), messages, result), None

    @property
    def _directions(self):
        """Of each branch, the directions of its forward and of its backward operation."""
        return [[("F" if kind == "F" else "B", direction) for kind, direction in branch]
                for branch in self.tables.branches]

    def _branch(self, branch, cell: _Cell) -> _Done:
        """One kind of cell: `branch` is () or its operations, each (kind, direction)."""
        split = self.split
        done = _Done(y=cell.x, dx=cell.dy, kept=cell.kept, deferred=cell.deferred, dparams=_zeros(self.like_params),
                     loss=jnp.zeros((), split.loss.dtype), sums=_zeros(split.sums))
        dloss = jnp.ones((), split.loss.dtype)
        operations = {kind: (self.prepared[d], (self.fixed[d], cell.forward if kind == "F" else cell.backward))
                      for kind, d in branch}
        # F and B of an overlapped cell know nothing of each other: the compiler is free to put the collectives of one
        # around the products of the other, and does.
        for kind, (prepared, context) in operations.items():
            if kind == "F":
                (y, loss, sums), kept = split.forward(prepared, cell.x, context)
                done = done._replace(y=y, loss=loss, sums=sums, kept=kept)
            elif kind == "B":
                dx, dparams = split.backward(prepared, context, cell.kept, cell.dy, dloss)
                done = done._replace(dx=dx, dparams=dparams)
            elif kind == "Bi":
                dx, deferred = split.backward_input(prepared, context, cell.kept, cell.dy, dloss)
                done = done._replace(dx=dx, deferred=deferred)
            else:
                done = done._replace(dparams=split.backward_weights(prepared, context, cell.deferred))
        return done

    def _exchange(self, messages, arrivals, y, dx):
        """Two neighbour permutations; what arrives goes where the table says, or into the slot that nobody reads."""
        last = self.schedule.ranks - 1
        up, down = [(r, r + 1) for r in range(last)], [(r + 1, r) for r in range(last)]
        if self.copies == 1:
            from_before, from_after = (y, None), (None, dx)
        else:  # activations of one direction and gradients of the other go the same way
            from_before = from_after = (y, dx)

        def permuted(sent, pairs):
            return jax.tree.map(lambda a: lax.ppermute(a, self.axis, pairs), sent)

        came_from_after = permuted(from_after, down)
        if self.schedule.route.v_shaped:  # the turn
            came_from_after = _where(self.rank == last, from_after, came_from_after)
        came = (*permuted(from_before, up), *came_from_after)
        for i, message in enumerate(came):
            if message is not None:
                messages = _put(messages, arrivals[i], message)
        return messages

    def _entering(self, ends, x):
        """x, or on the rank where a micro-batch enters in this tick, that one."""
        for i, (_, rank) in enumerate(self.tables.entrances):
            def entered(m, x, rank=rank):
                return _where(self.rank == rank, self.model.enter(self.arguments.shared, _at(self.inputs, m)), x)

            x = lax.cond(ends.enter[i] >= 0, entered, lambda m, x: x, ends.enter[i], x)
        return x

    def _leaving(self, ends, y, result, messages):
        """Loss and gradient of the micro-batches that came out of their last stage."""
        shared = self.arguments.shared
        for i, (_, rank) in enumerate(self.tables.exits):
            def left(m, y, rank=rank):
                y = lax.psum(_where(self.rank == rank, y), self.axis)
                (loss, sums), (dshared, dy) = jax.value_and_grad(self.model.leave, argnums=(0, 1), has_aux=True)(
                    shared, y, _at(self.inputs, m))
                return loss, sums, dshared, lax.psum(dy, self.axis)

            def nothing(m, y):
                loss = jnp.zeros((), self.split.loss.dtype)
                return loss, _zeros(self.leave_sums), _zeros(shared), _zeros(self.x)

            loss, sums, dshared, dy = lax.cond(ends.left[i] >= 0, left, nothing, ends.left[i], y)
            here = (self.rank == rank) & (ends.left[i] >= 0)
            slot = jnp.where(here, ends.gradient_slot[i], self.schedule.slots.messages)
            messages = _put(messages, slot, dy)
            result = result._replace(loss=result.loss + loss, sums=_add(result.sums, sums),
                                     shared=_add(result.shared, dshared))
        return result, messages

    def _back_at_the_entrance(self, ends, dx, result):
        """Gradients of what the entrance did: only the first stage's rank has one to give."""
        shared = self.arguments.shared
        for i, (_, rank) in enumerate(self.tables.entrances):
            def back(m, dx, rank=rank):
                _, vjp = jax.vjp(lambda s: self.model.enter(s, _at(self.inputs, m)), shared)
                return vjp(_where(self.rank == rank, dx))[0]

            dshared = lax.cond(ends.back[i] >= 0, back, lambda m, dx: _zeros(shared), ends.back[i], dx)
            result = result._replace(shared=_add(result.shared, dshared))
        return result
