"""Training with an indexer is the same on every mesh: losses, the indexer's metrics, and its weights."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel.sharding import compute_shardings
from tests.parallel.meshes import batch_of, compiled_step, config_of, fresh_state, mesh_of, place_batch, start
from tests.precision import float64

STEPS, CHOSEN = 3, dict(index_topk=5, index_heads=3, index_head_dim=8, mtp_depth=0)
CASES = {
    "sparse training": ({}, MeshConfig(replica=2, local=2, tensor=2)),
    "its warm-up": (dict(index_warmup=True), MeshConfig(node=2, local=2, tensor=2)),
    "tokens cross two hops": ({}, MeshConfig(node=2, local=4)),
}


def trained(config):
    """(losses and the indexer's loss and recall of each step, parameters after the last)."""
    run, (state, _), seen = compiled_step(config), start(config), []
    for step in range(STEPS):
        state, metrics = run(state, place_batch(config, batch_of(config, step)), None)
        seen.append([float(x) for x in (metrics.loss, metrics.own["indexer_loss"], metrics.own["indexer_recall"])])
    return np.array(seen), jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_in_float64_a_mesh_trains_the_indexer_as_one_device_does(case):
    model, mesh = CASES[case]
    with float64():
        (on_one, params), (on_mesh, other) = (trained(config_of(m, rows=8, **CHOSEN | model)) for m in (None, mesh))

    assert on_one[0, 1] > 0 and 0 < on_one[0, 2] < 1
    np.testing.assert_allclose(on_mesh, on_one, rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), other, params)


def test_every_device_computes_with_complete_weights_of_the_indexer():
    params = fresh_state(config_of(dtype="float32", **CHOSEN).model).params
    shardings = compute_shardings(params, mesh_of(MeshConfig(node=2, local=2, tensor=2)))

    of_indexer = [(path, x.spec) for path, x in jax.tree.leaves_with_path(shardings) if "indexer" in str(path)]
    assert len(of_indexer) == 10 and not any(axis for _, spec in of_indexer for axis in spec)
