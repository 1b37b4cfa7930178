"""The newest state on local disks: restored if every process has it, and never from an old step."""

import errno
import os
import re
import shutil

import pytest

from deepseek_jax import io
from deepseek_jax.checkpoint import agreement, arrays, local, manifest
from deepseek_jax.checkpoint.manager import CheckpointError, Checkpoints
from tests.checkpoint.processes import found_by
from tests.checkpoint.test_manager import abstract, bits, flip_a_bit, make_state


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def begin(workdir, tmp_path):
    return lambda: Checkpoints(workdir, local=str(tmp_path / "fast"))


def saved(checkpoints, local=(), shared=()):
    """Saves states of these steps, after restoring as at a start."""
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


# Each process has a machine, represented by a folder. Pieces are so small that every exchange takes several.
MACHINES = """
import json, pathlib, shutil, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from deepseek_jax.checkpoint import agreement, exchange, manifest
from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.parallel.processes import Group, joined
COUNT = %d
me, folder = int(sys.argv[2]), pathlib.Path(sys.argv[3])
one, other = 1, (1 + COUNT // 2) %% COUNT  # which keep copies of each other
found, machines = {}, [f"machine_{i}" for i in range(COUNT)]
exchange.PIECE = 64
with joined(Group(sys.argv[1], COUNT, me)):
    mesh = jax.make_mesh((2, jax.device_count() // 2), ("a", "b"))
    where = {"split": PartitionSpec(("a", "b")), "half": PartitionSpec("a"), "same": PartitionSpec()}
    where = {name: NamedSharding(mesh, spec) for name, spec in where.items()}
    whole = lambda step: {"split": np.arange(48, dtype=np.int32).reshape(16, 3) + 100 * step,
                          "half": np.arange(8, dtype="bfloat16") + step, "same": np.full(5, step, np.int8)}
    make = lambda step: {name: jax.make_array_from_callback(x.shape, where[name], lambda index: x[index])
                         for name, x in whole(step).items()}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))

    def begin():
        agreement.wait_for_all(f"begin {len(found)}")
        return Checkpoints(folder / "run", local=str(folder / machines[me]))

    def restored(name, local=()):
        checkpoints = begin()
        state, meta = checkpoints.restore(like)
        for key, x in whole(meta["n"]).items():
            assert state[key].dtype == x.dtype
            for shard in state[key].addressable_shards:
                assert np.array_equal(shard.data, x[shard.index]), (name, key)
        for step in local:
            checkpoints.save_local(step, make(step), {"n": step})
        checkpoints.close()
        found[name] = meta["n"]
        agreement.wait_for_all(f"end {len(found)}")

    def lose(*processes):
        if me in processes:
            shutil.rmtree(folder / machines[me])

    def damage(pattern):
        for path in (folder / machines[me]).glob(f"*/{pattern}/state-*/split/c*"):
            path.write_bytes(bytes(len(path.read_bytes())))

    checkpoints = begin()
    found["new"] = checkpoints.restore(like)
    checkpoints.save(1, make(1), {"n": 1})
    for step in (2, 3):
        checkpoints.save_local(step, make(step), {"n": step})
    checkpoints.close()
    restored("all are there")
    lose(one)
    restored("a machine is new")
    lose(one)
    restored("and again, before the next is saved", local=(4, 5))
    if me == one:
        shutil.rmtree(next(folder.glob(f"machine_{one}/*/process_{one}/5")))
    restored("a part is missing")
    damage(f"process_{one}/5")
    restored("a part is damaged")
    damage(f"process_{one}/5")
    damage(f"process_*/copy_of_{one}/5")
    restored("and its copy too")
    if me == one:
        own = next((folder / machines[me]).glob(f"*/process_{one}"))
        before = own.relative_to(folder / machines[me]), shutil.copytree(own, folder / "before")
        (folder / "before/4").rename(folder / "before/5")  # as if it had come there in another way
    found["later"] = max(int(p.name) for p in folder.glob("machine_*/*/**/*") if p.name.isdecimal())
    damage("process_0/4")  # of which another has the copy
    machines[:2] = machines[1::-1]
    restored("processes have other numbers", local=(5, 6))
    found["folders"] = [p.name for p in (folder / machines[me]).glob("*/process_*") if p.is_dir()] == [f"process_{me}"]
    lose(one)
    if me == one:
        shutil.copytree(before[1], folder / machines[me] / before[0])
    if me == other:
        shutil.rmtree(next((folder / machines[me]).glob(f"*/*/copy_of_{one}")))
    restored("both are lost, and an older one comes back")
    found["left"] = len([p for p in folder.glob("machine_*/*/**/*") if p.name.isdecimal()])
    print("found " + json.dumps(found), flush=True)
"""


@pytest.mark.parametrize("count, devices", [(2, 2), (4, 1)])
def test_a_lost_machine_costs_nothing_and_two_with_the_same_part_a_checkpoint(count, devices, tmp_path):
    found, said = found_by(count, MACHINES % count, tmp_path, devices)
    for one in found:
        assert one == {"new": None, "all are there": 3, "a machine is new": 3, "and again, before the next is saved": 3,
                       "a part is missing": 5, "a part is damaged": 5, "and its copy too": 4, "later": 4,
                       "processes have other numbers": 4, "folders": True,
                       "both are lost, and an older one comes back": 1, "left": 0}
    assert manifest.steps(tmp_path / "run/checkpoints") == [1]
    neighbour = (1 + count // 2) % count
    assert said.count(f"Parts of step 3 that machines have lost: process 1 from process {neighbour}.") == 2
    assert "Not taken: step 5 on the machines, where no part of process 1 is left. Step 4 counts." in said
    assert "Not taken: step 6 on the machines, where no part of process 1 is left. The work directory counts." in said


# Several processes on a machine write to one folder; without a second machine there is no place for copies.
TOGETHER = """
import json, pathlib, shutil, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from deepseek_jax.checkpoint import agreement
from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.parallel.processes import Group, joined
me, folder, found = int(sys.argv[2]), pathlib.Path(sys.argv[3]), {}
with joined(Group(sys.argv[1], 4, me)):
    split = NamedSharding(jax.make_mesh((4,), ("all",)), PartitionSpec("all"))
    make = lambda step: {"x": jax.make_array_from_callback((8,), split, lambda i: np.arange(8)[i] + 10 * step)}
    for machines, home in ((2, me // 2), ("2 dealt", me % 2), (1, 0)):
        machine = folder / f"{machines} machines" / str(home)

        def begin():
            agreement.wait_for_all(f"begin {machines} {len(found)}")
            return Checkpoints(folder / f"run of {machines}", local=str(machine))

        checkpoints = begin()
        assert checkpoints.restore(make(0)) is None
        checkpoints.save(1, make(1), {})
        checkpoints.save_local(2, make(2), {})
        checkpoints.close()
        agreement.wait_for_all(f"saved {machines}")
        found[f"copies on {machines}"] = len(list(machine.glob("*/*/copy_of_*")))
        agreement.wait_for_all(f"seen {machines}")
        if me == 3:
            shutil.rmtree(machine)
        state = begin().restore(make(0))[0]
        found[f"after a loss of {machines}"] = (state["x"].addressable_shards[0].data[0].tolist() - 2 * me) // 10
    print("found " + json.dumps(found), flush=True)
"""


def test_copies_are_on_another_machine_or_nowhere(tmp_path):
    found, said = found_by(4, TOGETHER, tmp_path)
    for one in found:
        assert one == {"copies on 2": 2, "after a loss of 2": 2, "copies on 2 dealt": 2,
                       "after a loss of 2 dealt": 2, "copies on 1": 0, "after a loss of 1": 1}
    note = r"note: processes share .*/1 machines/0, so there are no copies in it, and with a machine all"
    assert len(re.findall(note, said)) == 2 == said.count("note: ")


def test_of_the_processes_of_a_machine_one_removes_states_of_those_that_are_elsewhere(workdir, tmp_path):
    checkpoints = local.LocalCheckpoints(str(tmp_path / "fast"), workdir)
    (gone := checkpoints.run / "process_7").mkdir()
    checkpoints._here, checkpoints._me = [0, 1], 1
    checkpoints._tidy(0)
    assert gone.exists()
    checkpoints._me = 0
    checkpoints._tidy(0)
    assert not gone.exists() and checkpoints.own.exists()


def test_a_disk_that_fails_in_giving_ends_in_one_line(begin, workdir, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
        yield

    saved(begin(), local=(2,), shared=(1,))
    monkeypatch.setattr(local, "_in_order", broken)
    monkeypatch.setattr(local, "_rounds", lambda *_: [((0, 0),)])  # as if process 0 sent its part to another
    with pytest.raises(CheckpointError, match="^step 2 was not passed .*train.checkpoint_local=.*fast: Input/output"):
        begin().restore(abstract(make_state()))


@pytest.mark.parametrize("home, away", [
    ([0, 1, 2, 3], 2), ([0, 0, 2, 2], 2), ([0, 1, 0, 1], 3), ([0, 1, 2, 0, 1, 2], 4), ([0, 1, 2], 1), ([0, 0, 2], None),
    ([0, 0], None), ([0], None)])
def test_no_copy_is_on_the_machine_of_what_it_is_a_copy_of(home, away):
    assert local._away(home) == away


@pytest.mark.parametrize("holders, rounds", [
    ({0: [0, 2], 1: [1, 3], 2: [2, 0], 3: [3, 1]}, []),
    ({0: [0], 1: [3], 2: [2], 3: [3]}, [((3, 1),)]),
    ({0: [1], 1: [0], 2: [2], 3: [3]}, [((1, 0), (0, 1))]),
    ({0: [3], 1: [3], 2: [2, 3], 3: [3]}, [((3, 0),), ((3, 1),)]),
    ({0: [2, 3], 1: [2, 3], 2: [2, 3], 3: [2, 3]}, [((2, 0), (3, 1))])])
def test_nobody_gives_or_takes_two_parts_at_once(holders, rounds):
    assert local._rounds(holders, 4) == rounds


def test_a_process_of_an_earlier_start_that_is_no_more_is_given_nothing():
    assert local._rounds({0: [0], 1: [1], 2: [0], 3: [1]}, 2) == []
    assert local._rounds({0: [0], 1: [0], 2: [0]}, 2) == [((0, 1),)]
