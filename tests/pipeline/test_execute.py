"""A pipeline gives the results of the same model without one, for every schedule, mesh and remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline import ScheduleError, make_schedule
from deepseek_jax.pipeline.execute import Model, pipelined, rows
from deepseek_jax.pipeline.split import split
from tests.pipeline import toy
from tests.precision import float64


@functools.cache
def reference(stages, microbatches):
    """(loss, sums), gradients of params and shared."""
    arguments = toy.arguments(stages, microbatches)

    def loss(params, shared):
        return toy.serial(arguments._replace(params=params, shared=shared))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arguments.params, arguments.shared)


def run(schedule, mesh, remat):
    arguments = toy.arguments(schedule.stages, schedule.microbatches)
    order = np.array(rows(schedule))
    ranked = arguments._replace(params=jax.tree.map(lambda a: a[order], arguments.params),
                                fixed=jax.tree.map(lambda a: a[order], arguments.fixed))
    result = jax.jit(pipelined(schedule, toy.parallel(remat), mesh, toy.SPECS))(ranked)
    natural = np.argsort(order)
    return result._replace(params=jax.tree.map(lambda a: a[natural], result.params),
                           stage_sums=jax.tree.map(lambda a: a[natural], result.stage_sums))


def distance(a, b):
    """1 - cos of two arrays; 0 if both are zero."""
    a, b = np.ravel(a), np.ravel(b)
    return 0 if not a.any() and not b.any() else 1 - 2 * (a @ b) / (a @ a + b @ b)


@pytest.mark.parametrize(
    ("name", "mesh", "microbatches", "remat"),
    [
        ("gpipe", (2, 1, 1), 3, "none"),
        ("gpipe", (4, 1, 2), 4, "full"),
        ("1f1b", (2, 2, 1), 5, "full"),
        ("1f1b", (4, 1, 1), 6, "none"),
        ("zb1p", (4, 1, 2), 6, "layers"),
        ("zb1p", (2, 1, 1), 3, "full"),
        ("dualpipe", (2, 1, 2), 6, "none"),
        ("dualpipe", (4, 2, 1), 8, "full"),
        ("dualpipe", (4, 1, 1), 10, "layers"),
        ("dualpipev", (2, 2, 1), 5, "full"),
        ("dualpipev", (4, 1, 1), 8, "none"),
        ("dualpipev", (1, 1, 1), 3, "none"),
    ],
)
def test_loss_gradients_and_sums_are_those_of_the_serial_model(name, mesh, microbatches, remat):
    with float64():
        schedule = make_schedule(name, mesh[0], microbatches)
        (loss, sums), (dparams, dshared) = reference(schedule.stages, microbatches)

        result = run(schedule, toy.make_mesh(*mesh), remat)

        assert abs(result.loss / loss - 1) < 1e-12
        pairs = zip(jax.tree.leaves((dparams, dshared)), jax.tree.leaves((result.params, result.shared)), strict=True)
        assert max(distance(a, b) for a, b in pairs) < 1e-12
        np.testing.assert_array_equal(result.stage_sums["counts"], sums["counts"])
        assert result.sums["right"] == sums["right"]


def compiled(name, microbatches, batch=64):
    schedule = make_schedule(name, 2, microbatches)
    shapes = jax.eval_shape(lambda: toy.arguments(schedule.stages, microbatches, batch, jnp.float32))
    step = pipelined(schedule, toy.parallel("none"), toy.make_mesh(2), toy.SPECS)
    return schedule, jax.jit(step).lower(shapes)


@pytest.mark.parametrize("name", ["gpipe", "dualpipe"])
def test_the_program_has_the_same_size_for_any_number_of_micro_batches(name):
    sizes = [compiled(name, microbatches)[1].as_text().count("\n") for microbatches in (8, 64)]

    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "dualpipe"])
def test_memory_grows_by_the_slots_that_the_schedule_says_and_nothing_else(name):
    memory, slots = [], []
    for microbatches in (8, 24):
        schedule, lowered = compiled(name, microbatches)
        memory.append(lowered.compile().memory_analysis().temp_size_in_bytes)
        slots.append(schedule.slots)
    arguments = jax.tree.map(lambda a: a[0], toy.arguments(1, 1, 64, jnp.float32))
    x = jax.ShapeDtypeStruct((64, toy.D), jnp.float32)
    a_slot = split(_stage_of_one_device, arguments.params, x, (arguments.fixed, arguments.inputs))
    message = 64 * toy.D * 4

    grown = (slots[1].activations - slots[0].activations) * a_slot.residual_bytes + (
        slots[1].messages - slots[0].messages) * message

    assert abs((memory[1] - memory[0]) - grown) <= 0.02 * memory[0]
    assert (grown > 0) == (name == "gpipe")


def _stage_of_one_device(params, x, context):
    return toy.stage(params, context[0], x, context[1], lambda h: h, "none")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a._replace(params=jax.tree.map(lambda p: p[:1], a.params)),
         r"params\['down'\] of shape \[1, 2, 8, 6\] should begin with the 2 stages"),
        (lambda a: a._replace(inputs=jax.tree.map(lambda p: p[:3], a.inputs)),
         r"inputs\['threshold'\] of shape \[3, 4\] should begin with the 4 micro-batches"),
    ],
)
def test_arguments_that_do_not_fit_the_schedule_are_refused(change, complaint):
    step = pipelined(make_schedule("dualpipe", 2, 4), toy.parallel(), toy.make_mesh(2), toy.SPECS)

    with pytest.raises(ConfigError, match=complaint):
        jax.eval_shape(step, change(toy.arguments(2, 4, dtype=jnp.float32)))


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="for 4 ranks, the mesh has pipe=2; make both the same"):
        pipelined(make_schedule("1f1b", 4, 4), toy.parallel(), toy.make_mesh(2), toy.SPECS)


def test_a_stage_that_changes_its_activations_shape_is_refused():
    model = toy.parallel()
    narrow = Model(model.enter, lambda p, f, x, i: (x[:, :3], jnp.zeros(()), ()), model.leave)
    step = pipelined(make_schedule("1f1b", 2, 2), narrow, toy.make_mesh(2), toy.SPECS)

    with pytest.raises(ConfigError, match=r"turned its activation float32\[4, 6\] into float32\[4, 3\]"):
        jax.eval_shape(step, toy.arguments(2, 2, dtype=jnp.float32))


def test_a_table_that_is_wrong_is_not_run():
    schedule = make_schedule("1f1b", 2, 2)
    wrong = dataclasses.replace(schedule, table=schedule.table[:-1])

    with pytest.raises(ScheduleError, match="is missing"):
        pipelined(wrong, toy.parallel(), toy.make_mesh(2), toy.SPECS)


def test_only_a_v_has_its_rows_out_of_order():
    assert rows(make_schedule("dualpipe", 4, 8)) == [0, 1, 2, 3]
    assert rows(make_schedule("dualpipev", 4, 8)) == [0, 7, 1, 6, 2, 5, 3, 4]
