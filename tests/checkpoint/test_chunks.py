"""A state as zarr chunks: every part is written once and read once, and any library for zarr can read it."""

import jax
import numpy as np
import pytest
import tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax import io, storage
from deepseek_jax.checkpoint.manager import Checkpoints


def spread(x, *axes):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))


def saved(folder, state):
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {})
    checkpoints.close()
    return folder / "checkpoints/1"


def test_what_several_devices_hold_is_read_once(tmp_path, monkeypatch):
    x = spread(np.arange(32, dtype=np.float32).reshape(8, 4), "a")  # each part is on two devices
    saved(tmp_path, {"x": x})
    read, read_bytes = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda path: (read.append(str(path)), read_bytes(path))[1])
    found = Checkpoints(tmp_path).restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)})[0]["x"]
    assert np.array_equal(found, x) and found.sharding == x.sharding
    assert sorted(name.split("/")[-1] for name in read if "/x/c" in name) == [f"c.{i}.0" for i in range(4)]


def test_leaves_that_would_share_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the same name with dots for slashes"):
        saved(tmp_path, {"a.b": {"c": np.ones(1)}, "a": {"b": {"c": np.zeros(1)}}})


def test_an_array_is_one_of_zarr_version_3(tmp_path):
    x = np.arange(48, dtype=np.int32).reshape(8, 6)
    path = saved(tmp_path, {"x": spread(x, "a", "b")})
    folder = path / io.read_json(path / "meta.json")["leaves"]["x"]["zarr"]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    assert np.array_equal(tensorstore.open(spec, read=True).result().read().result(), x)
