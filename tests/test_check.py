"""`check` reads a complete checkpoint, and names the damaged files."""

import shutil
import sys

import pytest

from deepseek_jax import check, storage
from deepseek_jax.checkpoint import manifest
from tests import runs
from tests.buckets import stores
from tests.checkpoint.test_manager import GOLDEN, flip_a_bit, save_steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_steps(folder, (1, 2))
    return folder


def test_whole_ones_are_said_to_be_whole(saved):
    done = runs.run("check", saved)
    lines = done.out.splitlines()
    assert done.code == 0 and [line.split(":")[0] for line in lines] == [f"{saved}/checkpoints/{i}" for i in (1, 2)]
    assert all(" whole, " in line and line.endswith(" GB") for line in lines)


def test_damaged_files_are_named_each_and_the_code_is_3(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    head, = copy.glob("checkpoints/2/state-*/ema.head/c*")
    flip_a_bit(head)
    bias, = copy.glob("checkpoints/2/state-*/router.bias/c*")
    bias.unlink()
    done = runs.run("check", copy)
    whole, damaged, *lines = done.out.splitlines()
    assert done.code == 3 and "1: whole" in whole and damaged == f"{copy}/checkpoints/2: damaged, 2 of its files"
    path = copy / "checkpoints/2"
    assert lines == [f"  {head.relative_to(path)} fails its checksum", f"  {bias.relative_to(path)} is missing"]
    one = runs.run("check", path)
    assert (one.code, one.out.splitlines()) == (3, [damaged, *lines])
    assert runs.run("check", copy / "checkpoints/1").code == 0


def test_one_that_its_run_removes_while_it_is_read_is_no_damage(saved, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(saved, tmp_path / "copy")
    files_of = manifest.files_of

    def retired(path):
        files = files_of(path)
        if path.name == "1":
            manifest.discard(path)
        return files

    monkeypatch.setattr(manifest, "files_of", retired)
    monkeypatch.setattr(sys, "argv", ["check", str(copy)])
    assert check.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{copy}/checkpoints/1: removed by its run" and "2: whole" in said[1] and len(said) == 2


def test_one_without_a_manifest_is_damaged(saved, tmp_path):
    copy = shutil.copytree(saved / "checkpoints/1", tmp_path / "1")
    (copy / "manifest.json").unlink()
    done = runs.run("check", copy)
    assert (done.code, done.out) == (3, f"{copy}: damaged, 1 of its files\n  manifest.json is unreadable\n")


def test_those_of_earlier_versions_are_checked(tmp_path):
    copy = shutil.copytree(GOLDEN, tmp_path / "run")
    assert runs.run("check", copy).code == 0
    flip_a_bit(max((p for p in copy.glob("checkpoints/2/state/*/d/*")), key=lambda p: p.stat().st_size))
    assert runs.run("check", copy).code == 3


def test_objects_in_a_bucket_are_read_all_the_same():
    address = stores()["s3"].address()
    save_steps(address, (1,))
    assert runs.run("check", address).code == 0
    name = next(name for name in storage.entries(f"{address}/checkpoints/1") if name.endswith("params.head/c.0.0"))
    storage.put(f"{address}/checkpoints/1/{name}", bytes(36))
    done = runs.run("check", f"{address}/checkpoints/1")
    assert done.code == 3 and done.out.splitlines()[1] == f"  {name} fails its checksum"


def test_where_there_is_none_it_is_a_mistake(tmp_path):
    runs.run("check", tmp_path).assert_error("holds no checkpoint; give a work directory, or a folder in its")
