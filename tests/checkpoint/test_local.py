"""The newest state on the machines themselves: taken where every process has it, and never a stale one."""

import errno
import os
import shutil

import pytest

from deepseek_jax import io
from deepseek_jax.checkpoint import agreement, arrays, manifest
from deepseek_jax.checkpoint.manager import CheckpointError, Checkpoints
from tests.checkpoint.processes import found_by_two
from tests.checkpoint.test_manager import abstract, bits, flip_a_bit, make_state


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def begin(workdir, tmp_path):
    return lambda: Checkpoints(workdir, local=str(tmp_path / "fast"))


def saved(checkpoints, local=(), shared=()):
    """Saves states of these steps, after what a start restores."""
    checkpoints.restore(abstract(make_state()))
    for step in shared:
        checkpoints.save(step, make_state(step), {"position": step})
    for step in local:
        checkpoints.save_local(step, make_state(step), {"position": step})
    checkpoints.close()


def restored(checkpoints):
    state, meta = checkpoints.restore(abstract(make_state()))
    assert bits(state) == bits(make_state(meta["position"]))
    return meta["position"]


def steps(tmp_path):
    return sorted(int(p.name) for p in tmp_path.glob("fast/*/process_0/*"))


def test_the_newest_local_state_is_restored_bit_for_bit_and_two_are_kept(begin, tmp_path):
    saved(begin(), local=(2, 3, 4, 5), shared=(1,))
    assert steps(tmp_path) == [4, 5] and restored(begin()) == 5


def test_a_newer_one_in_the_work_directory_counts_and_the_local_ones_go(begin, tmp_path):
    saved(begin(), local=(2, 3), shared=(4,))
    assert restored(begin()) == 4 and steps(tmp_path) == []


def test_of_a_damaged_one_the_one_before_is_taken_and_then_the_work_directory_s(begin, tmp_path):
    saved(begin(), local=(2, 3), shared=(1,))
    for step, left in ((3, 2), (2, 1)):
        chunk, = tmp_path.glob(f"fast/*/process_0/{step}/state-*/params.head/c*")
        flip_a_bit(chunk)
        assert restored(begin()) == left and max(steps(tmp_path), default=0) <= left


def test_a_damaged_one_in_the_work_directory_removes_nothing(begin, workdir, tmp_path):
    saved(begin(), local=(2, 3), shared=(1, 4))
    chunk, = workdir.glob("checkpoints/4/state-*/params.head/c*")
    flip_a_bit(chunk)
    assert restored(begin()) == 3 and steps(tmp_path) == [2, 3]


def test_a_start_without_them_leaves_none_to_come_back(begin, workdir):
    saved(begin(), local=(2, 5), shared=(1,))
    saved(Checkpoints(workdir))
    assert restored(begin()) == 1


@pytest.mark.parametrize("said", ["", "[1]", "{}", '{"run": "../../elsewhere"}', '{"run": 3}'])
def test_a_note_that_no_run_wrote_names_no_state(begin, workdir, tmp_path, said):
    saved(begin(), local=(2,), shared=(1,))
    note = workdir / "checkpoints/local.json"
    address = io.read_json(note)["address"]
    note.write_text(said if '"run"' not in said else f'{said[:-1]}, "address": "{address}"}}')
    assert restored(begin()) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["fast", "run"]


def test_a_copy_of_the_work_directory_has_states_of_its_own(begin, workdir, tmp_path):
    saved(begin(), local=(2,), shared=(1,))
    copy = shutil.copytree(workdir, tmp_path / "copy")
    other = Checkpoints(copy, local=str(tmp_path / "fast"))
    assert restored(other) == 1
    other.save_local(7, make_state(7), {"position": 7})
    other.close()
    assert restored(begin()) == 2
    assert restored(Checkpoints(copy, local=str(tmp_path / "fast"))) == 7


def test_states_that_nobody_takes_any_more_are_removed_and_those_of_others_are_not(begin, workdir, tmp_path):
    saved(begin(), local=(2,), shared=(1,))
    saved(Checkpoints(tmp_path / "another", local=str(tmp_path / "fast")), local=(3,))
    (workdir / "checkpoints/local.json").unlink()
    begin()
    assert steps(tmp_path) == [3]


def test_the_one_before_stays_until_all_processes_have_the_next(begin, tmp_path, monkeypatch):
    checkpoints, seen = begin(), []
    saved(checkpoints, shared=(1,))
    checkpoints = begin()
    checkpoints.restore(abstract(make_state()))
    monkeypatch.setattr(agreement, "said_by_any", lambda words: seen.append((words, steps(tmp_path))))
    for step in (2, 3, 4):
        checkpoints.save_local(step, make_state(step), {})
    checkpoints.close()
    assert seen == [(None, []), (None, [2]), (None, [2, 3])]


def test_a_killed_write_is_no_state(begin, tmp_path):
    saved(begin(), local=(2, 3), shared=(1,))
    newest, = tmp_path.glob("fast/*/process_0/3")
    newest.rename(newest.with_suffix(".partial"))
    (newest.with_suffix(".partial") / "manifest.json").unlink()
    assert restored(begin()) == 2


def test_states_of_a_work_directory_that_was_begun_anew_are_not_taken(begin, workdir):
    saved(begin(), local=(2,), shared=(1,))
    shutil.rmtree(workdir)
    assert begin().restore(abstract(make_state())) is None


def test_states_that_another_continuation_left_behind_are_not_taken(begin, workdir, tmp_path):
    saved(begin(), local=(2, 5), shared=(1,))
    away = Checkpoints(workdir, local=str(tmp_path / "elsewhere"))  # on other machines, from step 1
    saved(away, local=(2,))
    assert restored(begin()) == 1


def test_a_full_one_ends_in_one_line(begin, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = begin()
    saved(checkpoints, shared=(1,))
    checkpoints = begin()
    checkpoints.restore(abstract(make_state()))
    monkeypatch.setattr(arrays.Writer, "_file", no_space)
    checkpoints.save_local(2, make_state(2), {})
    with pytest.raises(CheckpointError, match="^step 2 was not written to train.checkpoint_local=.*fast: No .*two"):
        checkpoints.save_local(3, make_state(3), {})
    assert steps(tmp_path) == []
    checkpoints = begin()
    checkpoints.restore(abstract(make_state()))
    checkpoints.save_local(3, make_state(3), {})
    with pytest.raises(CheckpointError, match="^step 3 was not written"):
        checkpoints.close()


PARTS = """
import json, pathlib, shutil, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from deepseek_jax.checkpoint import agreement, manifest
from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.parallel.processes import Group, joined
me, folder = int(sys.argv[2]), pathlib.Path(sys.argv[3])
found = {}
with joined(Group(sys.argv[1], 2, me)):
    mesh = jax.make_mesh((2,), ("all",))
    split, same = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    part = lambda step: np.full(8, 10 * step + me, np.int32)
    make = lambda step: {"split": jax.make_array_from_process_local_data(split, part(step)),
                         "same": jax.make_array_from_process_local_data(same, np.full(4, step, np.int32))}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))

    def begin():
        agreement.wait_for_all(f"begin {len(found)}")
        return Checkpoints(folder / "run", local=str(folder / f"machine_{me}"))

    def restored():
        state, meta = begin().restore(like)
        step = meta["n"]
        assert np.array_equal(state["split"].addressable_shards[0].data, part(step))
        assert np.array_equal(state["same"].addressable_shards[0].data, np.full(4, step))
        return step

    checkpoints = begin()
    found["new"] = checkpoints.restore(like)
    checkpoints.save(1, make(1), {"n": 1})
    for step in (2, 3):
        checkpoints.save_local(step, make(step), {"n": step})
    checkpoints.close()
    found["both"] = restored()
    if me == 1:
        shutil.rmtree(next(folder.glob("machine_1/*/process_1/3")))
    found["one behind"] = restored()
    found["later"] = sorted(int(p.name) for p in folder.glob(f"machine_{me}/*/process_{me}/*"))
    if me == 1:
        shutil.rmtree(folder / "machine_1")
    found["one is new"] = restored()
    found["left"] = len(list(folder.glob(f"machine_{me}/*/process_{me}/*")))
    print("found " + json.dumps(found), flush=True)
"""


def test_two_processes_take_the_newest_that_both_have(tmp_path):
    for found in found_by_two(PARTS, tmp_path)[0]:
        assert found == {"new": None, "both": 3, "one behind": 2, "later": [2], "one is new": 1, "left": 0}
    assert manifest.steps(tmp_path / "run/checkpoints") == [1]
