"""Checkpoints in buckets: the same guarantees as on a disk, without a rename."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax import io, storage
from deepseek_jax.checkpoint import chunks, manager, manifest
from deepseek_jax.checkpoint.arrays import Stored
from deepseek_jax.checkpoint.manager import CheckpointError, Checkpoints, restore_items
from deepseek_jax.config import ConfigError
from tests.buckets import SCHEMES, stores
from tests.checkpoint.test_manager import GOLDEN, abstract, bits, make_state, save_steps


@pytest.fixture(params=SCHEMES)
def store(request):
    return stores()[request.param]


@pytest.fixture
def address(store):
    return store.address()


def part(address, step, name):
    """The name of a checkpoint's object below its folder; the middle of the name is that of the attempt."""
    return next(found for found in storage.entries(f"{address}/checkpoints/{step}") if found.endswith(name))


def restored(address, like):
    found = Checkpoints(address).restore(abstract(like))
    return found and found[0]


def test_a_state_comes_back_bit_for_bit_and_older_ones_go(address):
    save_steps(address, (1, 2, 3), keep=2)
    assert bits(restored(address, make_state())) == bits(make_state(3))
    assert Checkpoints(address).steps() == [2, 3]
    assert sorted(storage.names(f"{address}/checkpoints")) == ["2", "3"]
    items, step, meta = restore_items(address, ("params",), step=2)
    assert step == 2 and meta == {"position": 20} and bits(items["params"]) == bits(make_state(2)["params"])


def test_the_manifest_is_written_last(store, address):
    store.requests.clear()
    save_steps(address, (1,))
    written = [path for method, path in store.requests if method == "PUT"]
    assert store.scheme == "gs" or ("manifest.json" in written[-1] and sum("manifest.json" in p for p in written) == 1)
    found = storage.entries(f"{address}/checkpoints/1")
    files = io.read_json(f"{address}/checkpoints/1/manifest.json")["files"]
    assert {name: entry.size for name, entry in found.items() if name != "manifest.json"} == {
        name: size for name, (size, _) in files.items()}


@pytest.mark.parametrize("harm, why", [
    (lambda path, name: storage.remove(f"{path}/{name}"), "is missing"),
    (lambda path, name: storage.put(f"{path}/{name}", b"short"), "has 5 of"),
    (lambda path, name: storage.put(f"{path}/{name}", bytes(storage.size(f"{path}/{name}"))), "fails its checksum")])
def test_a_damaged_one_is_named_and_the_one_before_it_is_read(address, harm, why, capsys):
    save_steps(address, (1, 2))
    harm(f"{address}/checkpoints/2", part(address, 2, "params.embed.table/c.0.0"))
    assert bits(restored(address, make_state())) == bits(make_state(1))
    assert "Damaged checkpoint" in (said := capsys.readouterr().out) and why in said
    with pytest.raises(ConfigError, match="is damaged"):
        restore_items(address, step=2)


def test_an_object_that_the_store_has_lost_makes_no_checkpoint(address, monkeypatch):
    save_steps(address, (1,))
    put, lost = storage.put, "params.head/c.0.0"
    monkeypatch.setattr(storage, "put", lambda to, data: None if str(to).endswith(lost) else put(to, data))
    with pytest.raises(CheckpointError, match=r"written, state-\w+/params.head/c.0.0 is missing\. Those before it"):
        save_steps(address, (2,))
    assert Checkpoints(address).steps() == [1]


def test_what_an_attempt_that_failed_still_writes_and_removes_hits_no_later_one(address, monkeypatch):
    put, late = storage.put, []
    monkeypatch.setattr(storage, "put", lambda to, data: (late.append((to, bytes(data))), put(to, data)))
    checkpoints = Checkpoints(address)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    written = [(to, data) for to, data in late if "/state" in str(to)]
    checkpoints.save(1, make_state(2), {})
    checkpoints.close()
    assert written and not {to for to, _ in written} & {f"{address}/{name}" for name in storage.entries(address)}
    for to, data in written:
        put(to, data)
    assert bits(restored(address, make_state())) == bits(make_state(2))


def test_one_that_was_written_on_a_disk_is_read_in_a_bucket(address, tmp_path):
    save_steps(tmp_path, (1,))
    storage.upload_folder(tmp_path, address, last=("manifest.json",))
    assert bits(restored(address, make_state())) == bits(make_state(1))


def test_one_that_orbax_wrote_is_refused_in_a_bucket(address, monkeypatch):
    monkeypatch.setattr(manager.ocp, "Checkpointer", lambda *_: pytest.fail("Orbax was asked"))
    storage.upload_folder(GOLDEN, address, last=("manifest.json",))
    with pytest.raises(ConfigError, match=f"^{address}/checkpoints/2 was written by Orbax, and is read from disks"):
        restore_items(address)


def test_a_manifest_with_the_checksums_of_a_store_is_read_as_well(address):
    save_steps(address, (1,))
    path = f"{address}/checkpoints/1/manifest.json"
    files = io.read_json(path)["files"]
    io.write_json(path, {"files": {name: [*about, "of the store"] for name, about in files.items()}})
    assert bits(restored(address, make_state())) == bits(make_state(1))


def test_one_without_a_manifest_is_none_and_is_removed(address):
    save_steps(address, (1, 2))
    storage.remove(f"{address}/checkpoints/2/manifest.json")
    assert manifest.steps(storage.as_path(f"{address}/checkpoints")) == [1]
    assert bits(restored(address, make_state())) == bits(make_state(1))  # its first process cleans up
    assert storage.names(f"{address}/checkpoints") == ["1"]


@pytest.mark.parametrize("writes", [0, 3, 12])
def test_a_store_that_dies_in_a_save_leaves_the_one_before_it(store, address, writes, impatient):
    save_steps(address, (1,))
    checkpoints = Checkpoints(address)
    with store.dying_after(writes), pytest.raises(CheckpointError, match=f"checkpoint 2 was not written to {address}"):
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait()
    assert bits(restored(address, make_state())) == bits(make_state(1))


def test_a_store_that_refuses_one_request_in_ten_saves_and_restores_all_the_same(store, address, impatient):
    with store.refusing(10):
        save_steps(address, (1, 2))
        assert bits(restored(address, make_state())) == bits(make_state(2)) and store.faults > 3


def test_parts_of_devices_are_written_once_each_and_read_onto_another_mesh(address, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 64)  # bytes
    spread = lambda *shape: Mesh(np.array(jax.devices()[:8]).reshape(shape), ("a", "b"))
    x = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
    first = NamedSharding(spread(4, 2), PartitionSpec("a"))
    second = NamedSharding(spread(2, 4), PartitionSpec("b", "a"))
    checkpoints = Checkpoints(address)
    checkpoints.save(1, {"x": jax.device_put(x, first)}, {})
    checkpoints.close()
    found = storage.entries(f"{address}/checkpoints/1").items()
    sizes = {name.split("/")[-1]: e.size for name, e in found if "/x/" in name}
    described = sizes.pop("zarr.json")
    assert described and sum(sizes.values()) == x.nbytes and set(sizes.values()) == {48}
    found = Checkpoints(address).restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=second)})[0]["x"]
    assert found.sharding == second and np.array_equal(found, x)


def test_a_part_of_a_leaf_is_read_across_its_chunks(address, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 100)
    x = np.arange(6 * 10 * 4, dtype=np.int32).reshape(6, 10, 4)
    checkpoints = Checkpoints(address)
    checkpoints.save(1, {"x": jnp.asarray(x)}, {})
    checkpoints.close()
    path = storage.as_path(f"{address}/checkpoints/1")
    cut = (slice(1, 5), slice(3, 8), slice(0, 3))
    leaf = io.read_json(path / "meta.json")["leaves"]["x"]
    assert np.array_equal(Stored(path, leaf, manifest.files_of(path), "x")[cut], x[cut])


def test_a_copy_on_a_disk_is_a_checkpoint_whose_checksums_count(address, tmp_path):
    save_steps(address, (4,))
    storage.download_folder(address, tmp_path)
    assert bits(restored(tmp_path, make_state())) == bits(make_state(4))
    file = tmp_path / "checkpoints/4" / part(address, 4, "params.head/c.0.0")
    file.write_bytes(bytes(len(file.read_bytes())))
    found, = manifest.damages(tmp_path / "checkpoints/4")
    assert "params.head/c.0.0 fails its checksum" in found


def test_one_of_another_dtype_is_refused(address):
    save_steps(address, (1,))
    other = make_state()
    other["params"]["embed"]["table"] = other["params"]["embed"]["table"].astype(jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"params/embed/table is float32\[16, 6\] there and bfloat16"):
        restored(address, other)
