"""Two processes write a checkpoint in parts, read the same step, and only the parts that they need."""

import pytest

from deepseek_jax.checkpoint import agreement
from deepseek_jax.checkpoint.manifest import CheckpointError
from deepseek_jax.config import ConfigError
from deepseek_jax.storage import StorageError
from tests.checkpoint.processes import found_by_two

# Each process records which files it reads. `lags`: the newest step is hidden from process 1, as by a file system's
# cache. `harmed`: a chunk that only process 1 reads is damaged.
PARTS = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from deepseek_jax import io, storage
from deepseek_jax.checkpoint import agreement, manifest
from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.parallel.processes import Group, joined
me, workdir = int(sys.argv[2]), sys.argv[3]
read, found = [], {}
read_bytes, open_file, steps = storage.read_bytes, storage.open_file, manifest.steps
storage.read_bytes = lambda path: (read.append(str(path)), read_bytes(path))[1]
storage.open_file = lambda path: (read.append(str(path)), open_file(path))[1]
with joined(Group(sys.argv[1], 2, me)):
    sharding = NamedSharding(jax.make_mesh((2,), ("all",)), PartitionSpec("all"))
    make = lambda step: {"x": jax.make_array_from_process_local_data(sharding, np.full(8, 10 * step + me, np.int32)),
                         "step": np.int32(step)}
    like = {"x": jax.ShapeDtypeStruct((16,), np.int32, sharding=sharding), "step": jax.ShapeDtypeStruct((), np.int32)}

    def restored():
        state, meta = Checkpoints(workdir).restore(like)
        return int(state["step"]), meta["n"], state["x"].addressable_shards[0].data.tolist()

    checkpoints = Checkpoints(workdir)
    agreement.wait_for_all("ready")
    for step in (1, 2):
        checkpoints.save(step, make(step), {"n": step})
        checkpoints.wait()
    agreement.wait_for_all("saved")
    chunks = lambda: [name for path in read if (name := path.split("/")[-1])[0] == "c"]
    found["while saving"] = chunks()
    read.clear()
    found["whole"], found["read"] = restored(), chunks()
    if me == 1:
        manifest.steps = lambda directory: [1]
    found["lags"] = restored()
    manifest.steps = steps
    agreement.wait_for_all("before")
    if me == 1:
        chunk, = (p for p in manifest.directory_of(workdir).glob("2/state-*/x/c.1"))
        chunk.write_bytes(bytes(32))
    agreement.wait_for_all("harmed")
    found["harmed"] = restored()
    print("found " + json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The findings of two processes, and the output of the first one."""
    return found_by_two(PARTS, tmp_path_factory.mktemp("parts"))


def test_nobody_reads_back_what_was_written(found):
    assert [one["while saving"] for one in found[0]] == [[], []]


def test_each_process_reads_its_own_part_once(found):
    for me in (0, 1):
        assert found[0][me]["whole"] == [2, 2, [20 + me] * 8]
        assert sorted(found[0][me]["read"]) == ["c", f"c.{me}"]  # of `step`, which both have, and of `x`


def test_a_process_that_does_not_see_the_newest_yet_takes_it_all_the_same(found):
    assert [one["lags"] for one in found[0]] == [[2, 2, [20 + me] * 8] for me in (0, 1)]


def test_what_one_finds_damaged_none_takes(found):
    assert [one["harmed"] for one in found[0]] == [[1, 1, [10 + me] * 8] for me in (0, 1)]
    assert "x/c.1 fails its checksum); resuming from 1 instead" in found[1]


@pytest.mark.parametrize("kind", [ConfigError, StorageError, CheckpointError, OSError])
def test_what_the_first_cannot_do_is_raised_in_all(monkeypatch, kind):
    kept = {}

    class Store:
        key_value_set = staticmethod(kept.__setitem__)
        blocking_key_value_get = staticmethod(lambda key, _: kept[key])

    def refuse():
        raise kind("there is none.")

    monkeypatch.setattr(agreement, "store", lambda: Store)
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "_new_key", lambda: "key")
    for index in (0, 1):
        monkeypatch.setattr(agreement.jax, "process_index", lambda index=index: index)
        with pytest.raises(kind, match="^there is none.$") as raised:
            agreement.from_first(refuse)
        assert raised.type is kind
