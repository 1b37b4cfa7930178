"""Training is the same on every mesh: losses to rounding, routing biases to the bit."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import FP8Config, LoraConfig, MeshConfig
from tests.parallel.meshes import config_of, train
from tests.precision import float64

STEPS = 20
# Every mesh once, with one or four micro-batches and with or without recomputation.
CASES = {
    "local=8": dict(mesh=MeshConfig(local=8), accumulation_steps=4),
    "node=2 local=4": dict(mesh=MeshConfig(node=2, local=4), remat="report"),
    "node=4 local=2": dict(mesh=MeshConfig(node=4, local=2), accumulation_steps=4, remat="report"),
    "replica=2 node=2 local=2": dict(mesh=MeshConfig(replica=2, node=2, local=2)),
    "node=2 local=2 tensor=2": dict(mesh=MeshConfig(node=2, local=2, tensor=2), remat="report"),
    "context=4 local=2": dict(mesh=MeshConfig(context=4, local=2), remat="report"),
    "context=2 node=2 local=2": dict(mesh=MeshConfig(context=2, node=2, local=2), accumulation_steps=4),
    "flat": dict(mesh=MeshConfig(node=2, local=2, dispatch="flat"), accumulation_steps=4, remat="full"),
}
QUICK = ["replica=2 node=2 local=2", "node=2 local=2 tensor=2"]


@pytest.fixture(scope="module")
def alone():
    """Losses and biases of one device."""
    with float64():
        losses, router, _ = train(config_of(), STEPS)
    assert losses[-1] < losses[0] - 0.5 and max(np.abs(b).max() for b in router.values()) > 0.03  # it learns
    return losses, router


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow)
                                            for case in CASES if case not in QUICK)])
def test_in_float64_twenty_steps_are_those_of_one_device(case, alone):
    with float64():
        losses, router, metrics = train(config_of(**CASES[case]), STEPS)

    np.testing.assert_allclose(losses, alone[0], rtol=1e-9)
    jax.tree.map(np.testing.assert_array_equal, router, alone[1])
    assert metrics.traffic.computed == metrics.traffic.choices == 2 * 32 * 16 * 3


@pytest.mark.slow  # in float64 the quick cases check more
@pytest.mark.parametrize("case", ["node=2 local=4", "node=2 local=2 tensor=2"])
def test_in_float32_the_first_step_agrees(case):
    (loss, router, _), (other, other_router, _) = (
        train(config_of(dtype="float32", **options), 1) for options in ({}, CASES[case]))

    np.testing.assert_allclose(other, loss, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, other_router, router)
    assert all(np.abs(b).max() > 0 for b in router.values())


@pytest.mark.slow
def test_in_fp8_a_mesh_trains_as_one_device_does():
    """Tiles end where a device's tokens and heads end, so a few numbers are rounded differently."""
    on_one, on_mesh = (train(config_of(mesh=mesh, dtype="float32", fp8=FP8Config(enabled=True)), 5)[0]
                       for mesh in (None, MeshConfig(node=2, local=2, tensor=2)))

    assert on_one[-1] < on_one[0] - 0.05
    np.testing.assert_allclose(on_mesh, on_one, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_adapters_of_a_split_base_train_as_on_one_device(fp8):
    adapters = LoraConfig(rank=3, fp8=fp8)
    with float64():
        (on_one, *_), (on_mesh, *_) = (train(config_of(mesh, lora=adapters, mtp_depth=0, rows=8), 4)
                                       for mesh in (None, MeshConfig(node=2, local=2, tensor=2)))

    np.testing.assert_allclose(on_mesh, on_one, rtol=1e-9)


@pytest.mark.parametrize("mesh", [MeshConfig(node=2, local=2, tensor=2),
                                  pytest.param(MeshConfig(replica=2, local=4), marks=pytest.mark.slow)])
def test_muon_and_clipped_logits_on_a_mesh_are_those_of_one_device(mesh):
    def made(mesh):
        return train(config_of(mesh, accumulation_steps=2, optimizer={"kind": "muon", "qk_clip": 0.002}), 4)

    with float64():
        (on_one, _, metrics), (on_mesh, _, there) = made(None), made(mesh)

    np.testing.assert_allclose(on_mesh, on_one, rtol=1e-9)
    np.testing.assert_allclose(there.own["max_logit"], metrics.own["max_logit"], rtol=1e-9)
    assert on_one[-1] < on_one[0] - 0.05 and metrics.own["max_logit"] > 0.002
