"""Meshes of TPUs follow the torus and the slices, and a process reads the rows that its devices hold."""

import os
import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.config import ConfigError, MeshConfig
from deepseek_jax.parallel import mesh
from tests.parallel.groups import free_port
from tests.parallel.torus import chips, ring


@pytest.fixture
def arranged(monkeypatch):
    """The order of devices in make_mesh, which itself accepts only jax's devices."""
    monkeypatch.setattr(mesh, "Mesh", lambda devices, names, axis_types: devices)
    return lambda cfg, devices: mesh.make_mesh(cfg, devices)


@pytest.mark.parametrize(("cfg", "sizes", "slices"), [
    (MeshConfig(node=8, local=4), (2, 4, 4), 1), (MeshConfig(pipe=4, node=4, local=4), (4, 4, 4), 1),
    (MeshConfig(pipe=16, replica=2, node=8, local=8), (8, 16, 16), 1),
    (MeshConfig(replica=2, node=8, local=4), (2, 4, 4), 2)])
def test_neighbours_on_local_share_a_link_and_those_on_node_are_nearer_than_in_the_order_of_processes(
        arranged, cfg, sizes, slices):
    devices = chips(*sizes, slices=slices)
    found = arranged(cfg, devices)
    plain = np.empty(len(devices), object)
    plain[:] = devices
    plain = plain.reshape(found.shape)
    axes = list(cfg.sizes)
    rows = lambda x, axis: np.moveaxis(x, axes.index(axis), -1).reshape(-1, x.shape[axes.index(axis)])
    assert max(ring(list(row), sizes) for row in rows(found, "local")) == 1
    furthest = lambda x: max(ring(list(row), sizes) for row in rows(x, "node"))
    assert furthest(found) < furthest(plain)
    assert sorted(chip.id for chip in found.flat) == list(range(len(devices)))


@pytest.mark.parametrize(("cfg", "axis"), [(MeshConfig(replica=2, node=8, local=4), 1),
                                           (MeshConfig(pipe=2, node=8, local=4), 0)])
def test_only_stages_or_replicas_are_divided_over_slices(arranged, cfg, axis):
    found = arranged(cfg, chips(2, 4, 4, slices=2))
    number = np.array([chip.slice_index for chip in found.flat]).reshape(found.shape)
    assert [np.unique(part).tolist() for part in np.moveaxis(number, axis, 0)] == [[0], [1]]


def test_slices_that_would_divide_a_node_are_refused(arranged):
    with pytest.raises(ConfigError, match="2 TPU slices.*mesh.pipe=1 times mesh.replica=1 must be a multiple of 2"):
        arranged(MeshConfig(node=16, local=4), chips(2, 4, 4, slices=2))


# Two processes with two devices each, alternating in the mesh: rows are 10 * the part that was read + their position.
ROWS = """
import sys
import jax, numpy as np
from deepseek_jax.config import Config, MeshConfig, TrainConfig, load_config
from deepseek_jax.parallel import mesh, runner
from deepseek_jax.parallel.processes import Group, joined
with joined(Group(sys.argv[1], 2, int(sys.argv[2]))):
    a, b, c, d = jax.devices()
    for sizes in ({"local": 4}, {"local": 2, "tensor": 2}, {"context": 2, "local": 2}):
        cfg = load_config("tiny", [f"--config.mesh.{k}={n}" for k, n in sizes.items()] + ["--config.train.batch_size=8",
                          "--config.train.accumulation_steps=1", "--config.train.ramp_from=None"])
        run = runner.Runner.__new__(runner.Runner)
        run.mesh, run.rows = mesh.make_mesh(cfg.mesh, [a, c, b, d]), 8
        part, parts = run.share()
        rows = 10 * part + np.arange(8 // parts)
        placed = run.shard_batch({"tokens": np.stack([rows, rows + 100], axis=1)[None], "active": np.int32(1)})
        held = {s.device.id: s.data[0, :, 0].tolist() for s in placed["tokens"].addressable_shards}
        print("rows", part, parts, sorted(held.values()), int(placed["active"]), flush=True)
        placed = run.shard_batch({"tokens": np.array(run.places())[None, :, None]})["tokens"]
        print("places", all(s.data[0, :, 0].tolist() == list(range(8))[s.index[1]] for s in placed.addressable_shards),
              flush=True)
"""


def test_devices_of_two_processes_that_take_turns_in_the_mesh_hold_each_row_once():
    address = f"localhost:{free_port()}"
    environ = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    both = [subprocess.Popen([sys.executable, "-c", ROWS, address, str(i)], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env=environ) for i in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    found = [[line for line in words.splitlines() if line.startswith("rows")] for words in said]
    assert [words.count("places True") for words in said] == [3, 3], said
    assert found[0] == ["rows 0 2 [[0, 1], [2, 3]] 1", "rows 0 1 [[0, 1, 2, 3], [4, 5, 6, 7]] 1",
                        "rows 0 2 [[0, 1, 2, 3], [0, 1, 2, 3]] 1"], said
    assert found[1] == ["rows 1 2 [[10, 11], [12, 13]] 1", "rows 0 1 [[0, 1, 2, 3], [4, 5, 6, 7]] 1",
                        "rows 1 2 [[10, 11, 12, 13], [10, 11, 12, 13]] 1"], said
