"""Checkpoints: a saved state is restored bit for bit, and a damaged one is not restored at all."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax import io, storage
from deepseek_jax.checkpoint import agreement, arrays, manifest
from deepseek_jax.checkpoint.format import FORMAT
from deepseek_jax.checkpoint.manager import CheckpointError, Checkpoints, restore_items
from deepseek_jax.config import ConfigError

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "workdir_v0.1" / "run"  # written by Orbax


READERS = storage.read_bytes, storage.open_file


def make_state(seed=0, width=6):
    """A state with every kind of leaf that a training state has."""
    rng = np.random.default_rng(seed)
    params = {"embed": {"table": jnp.asarray(rng.standard_normal((16, width)), jnp.float32)},
              "head": jnp.asarray(rng.standard_normal((width, 3)), jnp.bfloat16)}
    return {"params": params, "router": {"bias": jnp.asarray(rng.standard_normal((2, 4)), jnp.float32)},
            "ema": jax.tree.map(lambda x: x * 0.5, params), "opt_state": optax.adamw(1e-3).init(params),
            "rng": jax.random.key(seed), "old_rng": jax.random.PRNGKey(seed), "empty": jnp.zeros((0, 4)),
            "step": jnp.int32(seed)}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def bits(tree):
    def leaf_bits(x):
        data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return str(x.dtype), x.shape, np.asarray(data).tobytes()

    return jax.tree.structure(tree), [leaf_bits(x) for x in jax.tree.leaves(tree)]


def save_steps(workdir, steps, keep=3):
    checkpoints = Checkpoints(workdir, keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {"position": step * 10})
    checkpoints.close()


def test_dots_behind_a_link_lead_where_the_link_does(tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    save_steps(tmp_path / "far", (1,))
    assert Checkpoints(tmp_path / "link" / "..").steps() == [1]


def biggest_file(path):
    return max((p for p in path.glob("state-*/**/c*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_state_comes_back_bit_for_bit_with_its_structure(tmp_path):
    state = make_state(3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {"position": 30, "config": {"a": [1, 2]}})
    restored, meta = checkpoints.restore(abstract(state))
    checkpoints.close()
    assert bits(restored) == bits(state)
    assert meta == {"position": 30, "config": {"a": [1, 2]}}


def test_a_new_work_directory_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path).restore(abstract(make_state())) is None


def test_buffers_may_be_donated_or_changed_as_soon_as_save_returns(tmp_path):
    n = 1 << 22
    x, numbers = jnp.arange(n, dtype=jnp.float32), np.arange(n, dtype=np.int32)
    target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype), "numbers": jax.ShapeDtypeStruct((n,), np.int32)}
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    jax.block_until_ready(overwrite(x + 0))  # compiled, so that below it runs at once
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": x, "numbers": numbers}, {})
    numbers[:] = -1
    jax.block_until_ready(overwrite(x))  # jax may copy instead while a writer still uses x: that is correct too
    restored, _ = checkpoints.restore(target)
    checkpoints.close()
    assert np.array_equal(restored["x"], np.arange(n, dtype=np.float32))
    assert np.array_equal(restored["numbers"], np.arange(n))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_state_sharded_one_way_restores_into_another(tmp_path):
    devices = np.array(jax.devices()[:8])
    eight, two_by_four = Mesh(devices, ("a",)), Mesh(devices.reshape(2, 4), ("a", "b"))
    x = jnp.arange(16 * 8, dtype=jnp.bfloat16).reshape(16, 8)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jax.device_put(x, NamedSharding(eight, PartitionSpec("a")))}, {})
    target = NamedSharding(two_by_four, PartitionSpec("b", "a"))
    restored, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target)})
    plain, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    assert restored["x"].sharding == target
    assert bits(restored) == bits(plain) == bits({"x": x})
    assert len(plain["x"].devices()) == 1


def test_the_newest_checkpoints_stay_and_older_ones_go(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4], keep=2)
    assert Checkpoints(tmp_path).steps() == [3, 4]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4"]


def test_those_of_the_keep_period_stay_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_period=4)
    for step in (2, 4, 6, 8, 9, 10):
        checkpoints.save(step, make_state(step), {})
    checkpoints.close()
    assert checkpoints.steps() == [4, 8, 9, 10]


def test_an_old_checkpoint_goes_only_after_the_newer_is_committed(tmp_path, monkeypatch):
    save_steps(tmp_path, [1], keep=1)
    seen, commit = [], manifest.commit
    monkeypatch.setattr(manifest, "commit", lambda *paths: (
        seen.append(list(manifest.damages(tmp_path / "checkpoints/1"))), commit(*paths)))
    save_steps(tmp_path, [2], keep=1)
    assert seen == [[]]
    assert manifest.steps(tmp_path / "checkpoints") == [2]


def truncate(path):
    os.truncate(biggest_file(path), biggest_file(path).stat().st_size // 2)


DAMAGES = {
    "a flipped bit": lambda path: flip_a_bit(biggest_file(path)),
    "a truncated file": truncate,
    "a missing file": lambda path: biggest_file(path).unlink(),
    "no arrays at all": lambda path: shutil.rmtree(*path.glob("state-*")),
    "garbled array metadata": lambda path: flip_a_bit(*path.glob("state-*/params.head/zarr.json")),
    "a flipped bit in meta.json": lambda path: flip_a_bit(path / "meta.json"),
    "garbled manifest": lambda path: (path / "manifest.json").write_bytes(b"\xff\x00{"),
    "another manifest": lambda path: (path / "manifest.json").write_text("[1]"),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    save_steps(workdir, [1, 2])
    return workdir


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_it_is_restored(two_checkpoints, tmp_path, capsys, damage):
    workdir = shutil.copytree(two_checkpoints, tmp_path / "copy")
    DAMAGES[damage](workdir / "checkpoints/2")
    restored, meta = Checkpoints(workdir).restore(abstract(make_state()))
    said = capsys.readouterr().out.strip().split("\n")
    assert bits(restored) == bits(make_state(1)) and meta == {"position": 10}
    assert len(said) == 1 and "2 (" in said[0] and "resuming from 1" in said[0]
    assert " bytes)" in said[0] or damage != "a truncated file"


def test_any_flipped_bit_of_any_file_is_noticed(two_checkpoints, tmp_path):
    path = shutil.copytree(two_checkpoints / "checkpoints/2", tmp_path / "2")
    for file in [p for p in path.rglob("*") if p.is_file() and p.stat().st_size and p.name != "manifest.json"]:
        flip_a_bit(file)
        found, = manifest.damages(path)
        assert file.name in found
        flip_a_bit(file)
    assert not list(manifest.damages(path))


def test_a_damaged_checkpoint_is_replaced_when_training_gets_there_again(tmp_path):
    save_steps(tmp_path, [1, 2])
    flip_a_bit(biggest_file(tmp_path / "checkpoints/2"))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(abstract(make_state()))
    checkpoints.save(2, make_state(5), {"position": 5})
    restored, _ = checkpoints.restore(abstract(make_state()))
    assert bits(restored) == bits(make_state(5))
    assert checkpoints.steps() == [1, 2]


def test_a_damaged_checkpoint_neither_counts_as_kept_nor_stays(tmp_path):
    save_steps(tmp_path, [1, 3])
    flip_a_bit(biggest_file(tmp_path / "checkpoints/3"))
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.restore(abstract(make_state()))
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_if_all_are_damaged_the_error_says_what_to_do_and_nothing_is_removed(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in "12":
        flip_a_bit(biggest_file(tmp_path / "checkpoints" / step))
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):  # a second attempt must not find a work directory that looks new
        with pytest.raises(ConfigError, match="every checkpoint .* is damaged: 2 .*, 1 .*backup") as error:
            checkpoints.restore(abstract(make_state()))
        assert "\n" not in str(error.value)
    assert checkpoints.steps() == [1, 2]


def test_leftovers_of_a_killed_run_are_removed_and_never_restored(tmp_path):
    save_steps(tmp_path, [1, 2])
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "2", root / "7.1.partial")
    (root / "7.1.partial/manifest.json").unlink()
    shutil.copytree(root / "1", root / "0.trash")
    checkpoints = Checkpoints(tmp_path)
    assert sorted(os.listdir(root)) == ["1", "2"]
    assert checkpoints.restore(abstract(make_state()))[1] == {"position": 20}


def test_what_a_failed_save_went_on_writing_does_not_stop_the_next(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "checkpoints/1.1.partial/state").mkdir(parents=True)
    checkpoints.save(1, make_state(1), {})
    assert bits(checkpoints.restore(abstract(make_state()))[0]) == bits(make_state(1))
    checkpoints.close()


def test_a_run_killed_between_seal_and_rename_loses_nothing(tmp_path):
    save_steps(tmp_path, [1])
    root = tmp_path / "checkpoints"
    (root / "1").rename(root / "1.1.partial")
    assert Checkpoints(tmp_path).steps() == [1]


def test_a_config_of_other_shapes_names_the_first_leaf_that_differs(tmp_path):
    save_steps(tmp_path, [1])
    with pytest.raises(ConfigError, match=r"ema/embed/table is float32\[16, 6\] there and float32\[16, 8\] here"):
        Checkpoints(tmp_path).restore(abstract(make_state(1, width=8)))


@pytest.mark.parametrize("change, says", [
    (lambda s: s | {"extra": s["step"]}, r"extra is absent there and int32\[\] here"),
    (lambda s: {k: v for k, v in s.items() if k != "router"}, r"router/bias is float32\[2, 4\] there and absent here"),
    (lambda s: s | {"step": jnp.float32(0)}, r"step is int32\[\] there and float32\[\] here"),
])
def test_a_config_of_another_structure_is_refused(two_checkpoints, change, says):
    with pytest.raises(ConfigError, match=says):
        Checkpoints(two_checkpoints).restore(abstract(change(make_state())))


def test_any_flipped_bit_of_an_array_is_noticed_as_it_is_read(two_checkpoints, tmp_path):
    path = shutil.copytree(two_checkpoints / "checkpoints/2", tmp_path / "checkpoints/2")
    for file in [p for p in path.glob("state-*/**/*") if p.is_file()]:
        flip_a_bit(file)
        assert manifest.incomplete(path) is None
        with pytest.raises(ConfigError, match=f"every checkpoint .* is damaged: 2 .{file.relative_to(path)} fails its"):
            Checkpoints(tmp_path).restore(abstract(make_state()))
        flip_a_bit(file)
    assert bits(Checkpoints(tmp_path).restore(abstract(make_state()))[0]) == bits(make_state(2))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("name", ["manifest.json", "meta.json", "zarr.json", "c.0.0"])
def test_what_a_disk_refuses_for_now_is_no_damage(two_checkpoints, tmp_path, monkeypatch, number, name):
    workdir, read_bytes, open_file = shutil.copytree(two_checkpoints, tmp_path / "run"), *READERS

    def refusing(read):
        def refuse(path):
            if os.path.basename(path) == name and f"{os.sep}2{os.sep}" in str(path):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return read(path)

        return refuse

    checkpoints = Checkpoints(workdir, keep=1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(number)) as error:
        patch.setattr(storage, "read_bytes", refusing(read_bytes))
        patch.setattr(storage, "open_file", refusing(open_file))
        checkpoints.restore(abstract(make_state()))
    assert error.value.errno == number and error.value.filename.endswith(name)
    assert checkpoints.restore(abstract(make_state()))[1] == {"position": 20}


def test_a_folder_that_cannot_be_listed_is_not_one_without_checkpoints(two_checkpoints, monkeypatch):
    def stale(folder):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), os.fspath(folder))

    monkeypatch.setattr(os, "listdir", stale)
    with pytest.raises(OSError, match="Stale"):
        manifest.steps(two_checkpoints / "checkpoints")


def test_only_what_is_read_is_checked(two_checkpoints, tmp_path):
    workdir = shutil.copytree(two_checkpoints, tmp_path / "copy")
    moment = next((workdir / "checkpoints/2").glob("state-*/opt_state*mu*table/c*"))
    flip_a_bit(moment)
    items, step, _ = restore_items(workdir, ("params",))
    assert step == 2 and bits(items["params"]) == bits(make_state(2)["params"])
    assert restore_items(workdir, ("params", "opt_state"))[1] == 1
    with pytest.raises(ConfigError, match="2 is damaged: .*table.* fails its checksum; take another step"):
        restore_items(workdir, ("opt_state",), step=2)


def test_a_run_reads_each_byte_of_its_checkpoint_once(two_checkpoints, monkeypatch):
    read, read_bytes = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda path: (read.append(os.fspath(path)), read_bytes(path))[1])
    Checkpoints(two_checkpoints).restore(abstract(make_state()))
    files = manifest.files_of(path := two_checkpoints / "checkpoints/2")
    assert sorted(read) == sorted(str(path / name) for name in files)


def test_the_files_of_an_orbax_checkpoint_are_checked_before_it_is_read(tmp_path):
    workdir = shutil.copytree(GOLDEN, tmp_path / "run")
    before = restore_items(workdir)[0]
    values = max((workdir / "checkpoints/2/state").glob("*/d/*"), key=lambda p: p.stat().st_size)
    flip_a_bit(values)
    with pytest.raises(ConfigError, match=f"every checkpoint .*is damaged: 2 .*{values.name} fails its checksum"):
        restore_items(workdir)
    flip_a_bit(values)
    assert bits(restore_items(workdir)[0]) == bits(before)


def test_an_orbax_checkpoint_that_another_process_finds_damaged_is_not_read(monkeypatch):
    monkeypatch.setattr(agreement, "said_by_any", lambda words: ["state/d/1 fails its checksum"])
    monkeypatch.setattr(ocp, "Checkpointer", None)  # this process would wait for the other in it
    with pytest.raises(manifest.DamagedError, match="state/d/1 fails its checksum"):
        restore_items(GOLDEN, step=2)


def test_one_of_a_newer_version_is_refused_in_one_line(two_checkpoints, tmp_path):
    workdir = shutil.copytree(two_checkpoints, tmp_path / "copy")
    path = workdir / "checkpoints/2"
    io.write_json(path / "meta.json", io.read_json(path / "meta.json") | {"format": FORMAT + 1})
    files, meta = manifest.files_of(path), (path / "meta.json").read_bytes()
    io.write_json(path / "manifest.json", {"files": files | {"meta.json": [len(meta), zlib.crc32(meta)]}})
    with pytest.raises(ConfigError, match=f"2 has format {FORMAT + 1}, and this .* up to {FORMAT}; update it.$"):
        Checkpoints(workdir).restore(abstract(make_state()))


def test_parameters_are_read_without_knowing_the_optimizer(two_checkpoints):
    items, step, meta = restore_items(two_checkpoints, ("params", "router", "absent"))
    expected = make_state(2)
    assert bits(items) == bits({"params": expected["params"], "router": expected["router"], "absent": {}})
    assert (step, meta) == (2, {"position": 20})


def test_parameters_are_read_into_a_given_structure_or_refused(two_checkpoints):
    state = make_state(2)
    items, *_ = restore_items(two_checkpoints, ("params",), {"params": abstract(state["params"])})
    assert bits(items["params"]) == bits(state["params"])
    with pytest.raises(ConfigError, match="params/embed/table"):
        restore_items(two_checkpoints, ("params",), {"params": abstract(make_state(2, width=8)["params"])})


def test_a_checkpoint_is_read_by_its_step(two_checkpoints):
    items, step, _ = restore_items(two_checkpoints, ("params",), step=1)
    assert step == 1 and bits(items) == bits({"params": make_state(1)["params"]})
    with pytest.raises(ConfigError, match="holds no checkpoint of step 7; there are: 1, 2."):
        restore_items(two_checkpoints, step=7)
    (two_checkpoints / "checkpoints" / "1" / "meta.json").write_text("{}")
    with pytest.raises(ConfigError, match="1 is damaged: meta.json has 2 of .*; take another step"):
        restore_items(two_checkpoints, step=1)


def test_reading_where_nothing_was_trained_is_a_one_line_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        restore_items(tmp_path / "nowhere")


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("owner, name", [(io, "write_json"), (manifest, "_fingerprint"),
                                         (arrays.Writer, "_file"), (io, "sync_file")])
def test_a_full_disk_anywhere_in_a_save_is_one_line_and_leaves_the_older(tmp_path, monkeypatch, owner, name):
    save_steps(tmp_path, [1])
    checkpoints = Checkpoints(tmp_path, keep=1)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="no space left") as error:
        patch.setattr(owner, name, no_space)
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait()
    assert "\n" not in str(error.value) and "step 1 is untouched" in str(error.value)
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    assert bits(checkpoints.restore(abstract(make_state()))[0]) == bits(make_state(1))
    checkpoints.save(3, make_state(3), {})  # once there is space again, it continues
    checkpoints.close()
    assert checkpoints.steps() == [3]


def test_a_quota_that_is_used_up_is_a_full_disk(tmp_path, monkeypatch):
    def used_up(*_args, **_kwargs):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(arrays.Writer, "_file", used_up)
    with pytest.raises(CheckpointError, match="no space left on the disk; free some"):
        save_steps(tmp_path, [1])


FILL_A_DISK = """
    import sys, jax.numpy as jnp, numpy as np
    from deepseek_jax import runtime
    from deepseek_jax.checkpoint.manager import CheckpointError, Checkpoints
    runtime.quiet_logs()  # as commands do: Orbax says of a failure more than is raised
    checkpoints = Checkpoints(sys.argv[1])
    noise = np.random.default_rng(0).standard_normal
    small, large = ({name: jnp.asarray(noise((n, 128))) for name in "abcd"} for n in (100, 8000))
    checkpoints.save(1, small, {})
    for _ in range(4):  # what else the libraries would say differs from time to time
        checkpoints.save(2, large, {})
        try:
            checkpoints.wait()
        except CheckpointError as error:
            print(error)
    print(checkpoints.restore(small)[0]["a"].shape)
    checkpoints.save(3, small, {})
    checkpoints.close()
    print(checkpoints.steps())
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a tiny disk")
def test_a_disk_that_is_really_full_costs_one_checkpoint_and_one_line(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(FILL_A_DISK), tmp_path], capture_output=True,
                              text=True, timeout=120)
        left = os.listdir(tmp_path / "checkpoints")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    *errors, shape, steps = done.stdout.strip().split("\n")
    assert len(errors) == 4
    assert all(e.startswith("checkpoint 2 was not written") and "no space left" in e for e in errors)
    assert (shape, steps) == ("(100, 128)", "[1, 3]") and sorted(left) == ["1", "3"]
    assert done.stderr == ""


SAVE_FOREVER = """
    import sys, jax.numpy as jnp
    from deepseek_jax.checkpoint.manager import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    restored = checkpoints.restore({"x": jnp.zeros((64, 1024)), "step": jnp.int32(0)})
    step = int(restored[0]["step"]) if restored else 0
    while True:
        step += 1
        checkpoints.save(step, {"x": jnp.full((64, 1024), step, jnp.float32), "step": jnp.int32(step)}, {"step": step})
        print(step, flush=True)
"""


def test_kill_9_at_any_moment_of_a_save_leaves_a_checkpoint_to_resume_from(tmp_path):
    rng, reached = np.random.default_rng(), 0
    target = {"x": jax.ShapeDtypeStruct((64, 1024), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    for _ in range(4):
        run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), tmp_path], text=True,
                               stdout=subprocess.PIPE)
        lines = [run.stdout.readline() for _ in range(3)]  # the first two of these are committed now
        time.sleep(rng.uniform(0, 0.2))
        run.send_signal(signal.SIGKILL)
        lines += run.communicate()[0].splitlines()
        assert int(lines[0]) == reached + 1  # it resumed at the step that the killed one had reached
        items, step, meta = restore_items(tmp_path, ("x", "step"))
        restored, _ = Checkpoints(tmp_path).restore(target)
        assert step >= int(lines[1]) and meta == {"step": step}
        assert bits(restored) == bits({"x": jnp.full((64, 1024), reached := int(restored["step"]), jnp.float32),
                                       "step": jnp.int32(reached)})
        assert reached >= step


def test_a_checkpoint_holds_no_pickle(two_checkpoints):
    saved = json.loads((two_checkpoints / "checkpoints/2/meta.json").read_text())
    where = f"{saved['leaves']['params/head']['zarr'].split('/')[0]}/params.head"
    assert saved["leaves"]["params/head"] == {"shape": [6, 3], "dtype": "bfloat16", "zarr": where, "exact": True}
    assert not [p for p in two_checkpoints.rglob("*") if p.is_file() and p.read_bytes()[:1] == b"\x80"]
