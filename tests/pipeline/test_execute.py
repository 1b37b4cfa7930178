"""A pipeline computes what the same model computes without one, whatever the schedule, mesh and remat."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.pipeline import make_schedule
from deepseek_jax.pipeline.execute import pipelined, rows
from tests.pipeline import toy


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
    with jax.enable_x64(True):
        schedule = make_schedule(name, mesh[0], microbatches)
        (loss, sums), (dparams, dshared) = reference(schedule.stages, microbatches)

        result = run(schedule, toy.make_mesh(*mesh), remat)

        assert abs(result.loss / loss - 1) < 1e-12
        pairs = zip(jax.tree.leaves((dparams, dshared)), jax.tree.leaves((result.params, result.shared)), strict=True)
        assert max(distance(a, b) for a, b in pairs) < 1e-12
        np.testing.assert_array_equal(result.stage_sums["counts"], sums["counts"])
        assert result.sums["right"] == sums["right"]
