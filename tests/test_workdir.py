"""A work directory: only one process trains in it, and its config matches its checkpoints."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from deepseek_jax import io, storage, workdir, working_files
from deepseek_jax.config import Config, ConfigError, as_dict, load_config, model_config
from deepseek_jax.training.loop import check_start
from deepseek_jax.workdir import (
    alone_in,
    check_workdir,
    claim_workdir,
    load_workdir_config,
    most_positions,
    on_one_device,
)
from tests.buckets import SCHEMES, stores


@pytest.fixture
def two():
    return load_config("tiny"), load_config("tiny", ["--config.train.seed=7"])


def test_two_processes_never_train_in_one_work_directory(tmp_path):
    with alone_in(str(tmp_path)):
        who = rf"is being trained by another process \(process {os.getpid()} of {socket.gethostname()}, since 20"
        with pytest.raises(ConfigError, match=who), alone_in(str(tmp_path)):
            pass
        with alone_in(str(tmp_path / "another")):
            pass
    with alone_in(str(tmp_path)):
        pass
    assert not (tmp_path / ".holder").exists()


def test_a_lock_whose_holder_was_killed_holds_nobody(tmp_path):
    code = (f"import os; from deepseek_jax.workdir import alone_in\n"
            f"with alone_in({str(tmp_path)!r}): os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / ".holder").exists()
    with alone_in(str(tmp_path)):
        pass


def test_a_run_with_local_states_alone_has_begun(two, tmp_path):
    first, other = two
    claim_workdir(first, str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    io.write_json(tmp_path / "checkpoints/local.json", {"run": "0" * 12})
    with pytest.raises(ConfigError, match="train.seed"):
        check_workdir(other, str(tmp_path))
    claim_workdir(other, str(tmp_path))
    assert load_workdir_config(str(tmp_path)) == first


def test_local_states_of_a_run_in_a_bucket_are_refused_before_it_is_asked():
    config = load_config("tiny", ["--config.train.checkpoint_local=/dev/shm/run"])
    with pytest.raises(ConfigError, match="checkpoint_local is for a --workdir on a disk, and gs://none/run is in a"):
        check_workdir(config, "gs://none/run")


@pytest.fixture(params=SCHEMES)
def address(request):
    return stores()[request.param].address()


def test_two_processes_never_train_in_one_work_directory_in_a_bucket(address):
    with alone_in(address):
        who = rf"is being trained by another process \(process {os.getpid()} of {socket.gethostname()}, since 20"
        with pytest.raises(ConfigError, match=who), alone_in(address):
            pass
        with alone_in(f"{address}-another"):
            pass
    with alone_in(address):
        pass
    assert storage.entries(address) == {}


def test_of_two_at_once_the_store_takes_one(monkeypatch):
    """Both processes find it free; the emulator of GCS ignores the condition."""
    address = stores()["s3"].address()
    monkeypatch.setattr(workdir._Lease, "_await", lambda self: None)
    with alone_in(address), pytest.raises(ConfigError, match="is being trained by another process"), alone_in(address):
        pass
    assert storage.entries(address) == {}


def test_a_bucket_s_lock_whose_holder_was_killed_here_holds_nobody(address, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    monkeypatch.setattr(workdir._Lease, "SETTLE", 0)
    here = {"host": socket.gethostname(), "since": "2020", "id": "theirs", "machine": working_files.machine()}
    for pid, started in (gone.pid, "1"), (os.getpid(), "1"):  # its process id may have been reused since
        io.write_json(f"{address}/.holder", here | {"pid": pid, "started": started})
        with alone_in(address):
            assert io.read_json(f"{address}/.holder")["id"] != "theirs"


def test_a_bucket_s_lock_from_elsewhere_is_free_when_it_is_silent_and_held_while_it_beats(address, monkeypatch, capsys):
    monkeypatch.setattr(workdir._Lease, "EXPIRY", 0.3)
    monkeypatch.setattr(workdir._Lease, "SETTLE", 0)
    theirs = {"host": "another", "pid": 1, "since": "2020", "id": "theirs", "beats": 0}
    io.write_json(f"{address}/.holder", theirs)
    with alone_in(address):
        pass
    assert "is free: process 1 of another, which held it, has been silent for 0.3 seconds" in capsys.readouterr().out
    io.write_json(f"{address}/.holder", theirs)
    monkeypatch.setattr(workdir._Lease, "EXPIRY", 60)
    monkeypatch.setattr(workdir.time, "sleep", lambda _: io.write_json(f"{address}/.holder", theirs | {"beats": 1}))
    with pytest.raises(ConfigError, match=r"process 1 of another, since 2020\)"), alone_in(address):
        pass
    assert io.read_json(f"{address}/.holder") == theirs | {"beats": 1}


def test_a_bucket_s_lock_that_no_run_wrote_is_free_when_it_is_silent(address, monkeypatch, capsys):
    monkeypatch.setattr(workdir._Lease, "EXPIRY", 0.3)
    monkeypatch.setattr(workdir._Lease, "SETTLE", 0)
    for content in b"", b"[1]", b"\xff{":
        storage.put(f"{address}/.holder", content)
        with alone_in(address):
            assert io.read_json(f"{address}/.holder")["pid"] == os.getpid()
        assert "is free: whoever, which held it, has been silent" in capsys.readouterr().out


def test_of_two_that_take_a_silent_lock_of_a_bucket_the_last_has_it(address, monkeypatch):
    monkeypatch.setattr(workdir._Lease, "EXPIRY", 0.1)
    theirs = {"host": "another", "pid": 1, "since": "2020", "id": "theirs"}
    sleep, settle = time.sleep, workdir._Lease.SETTLE
    late = lambda seconds: io.write_json(f"{address}/.holder", theirs) if seconds == settle else sleep(seconds)
    monkeypatch.setattr(workdir.time, "sleep", late)
    io.write_json(f"{address}/.holder", {"id": "a dead one"})
    with pytest.raises(ConfigError, match=r"process 1 of another, since 2020\)"), alone_in(address):
        pass
    assert io.read_json(f"{address}/.holder") == theirs


def test_a_silent_lock_of_a_bucket_that_another_has_just_taken_is_not_removed(address, monkeypatch):
    theirs = {"host": "another", "pid": 1, "since": "2020", "id": "theirs"}
    io.write_json(f"{address}/.holder", theirs)
    with pytest.raises(ConfigError, match=r"process 1 of another, since 2020\)"):
        workdir._Lease(address)._take_from({"id": "a dead one"})
    assert io.read_json(f"{address}/.holder") == theirs


@pytest.mark.parametrize("gone", [False, True], ids=["another's", "none"])
def test_who_holds_a_bucket_s_lock_says_so_again_and_ends_when_another_has_it(address, gone):
    code = ("import sys, time; from deepseek_jax import workdir; workdir._Lease.BEAT = 0.1\n"
            "with workdir.alone_in(sys.argv[1]): print('held', flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", code, address], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            while io.read_json(f"{address}/.holder")["beats"] < 2:
                assert process.poll() is None
            end = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < end:  # again: the holder may write between two checks
                if gone:  # as if another process had taken it over and released it since
                    storage.remove(f"{address}/.holder")
                else:
                    io.write_json(f"{address}/.holder", {"host": "another", "pid": 1, "since": "2020", "id": "theirs"})
                time.sleep(0.3)
            assert process.poll() == 2
            said = process.stderr.read()
            assert "This one was cut off from the store." in said and ("since 2020" in said) != gone
        finally:
            process.kill()
    assert gone or io.read_json(f"{address}/.holder")["id"] == "theirs"


@pytest.mark.parametrize("name, says", [("file", "cannot be a folder: .*file is none; take another name"),
                                        ("file/run", "run cannot be a folder: .*file is none"),
                                        ("long" * 75, "longlong cannot be a folder: File name too long; take another"),
                                        ("new/" + "long" * 75, "longlong cannot be a folder: File name too long"),
                                        ("nul\0/run", r"nul\\x00/run cannot be a folder: embedded null .*; take"),
                                        ("link", "cannot be a folder: .*link is none"),
                                        ("/proc/none/run", "run cannot be written: No such .* in /proc; take")])
def test_a_disk_that_cannot_be_written_is_refused_before_anything_runs(two, tmp_path, name, says):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(storage.StorageError, match=says):
        check_workdir(two[0], str(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_of_dots_behind_a_link_the_folder_is_asked_that_a_run_has(tmp_path):
    (tmp_path / "elsewhere/there").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/there")
    (tmp_path / "elsewhere/run").touch()
    storage.check_writable(tmp_path / "link/../new")
    with pytest.raises(storage.StorageError, match="link/../run cannot be a folder"):  # it is elsewhere/run
        storage.check_writable(tmp_path / "link/../run")


def test_a_disk_is_asked_without_a_trace(two, tmp_path):
    check_workdir(two[0], str(tmp_path / "new/run"))
    assert os.listdir(tmp_path) == []


def test_a_bucket_that_cannot_be_written_is_refused_before_anything_runs(two, address, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Forbidden: it may only be read\nand a second line")

    monkeypatch.setattr(storage._client(address)[0], "pipe_file", refuse)
    with pytest.raises(storage.StorageError, match=rf"{address}/.probe-\w+: Forbidden: it may only be read\.$"):
        check_workdir(two[0], address)


def test_a_run_of_a_pipeline_is_read_on_one_device_in_its_micro_batches():
    alone = on_one_device(load_config("v3_671b_h100_2048"))
    assert alone.mesh.devices == 1 and alone.train.accumulation_steps == 120 and alone.ramp_levels[0] == 32
    assert on_one_device(load_config("v2_lite_16b_h100_8")).train.accumulation_steps == 64


def test_a_start_that_failed_before_its_first_checkpoint_binds_nobody(two, tmp_path):
    claim_workdir(two[0], str(tmp_path))
    check_workdir(two[1], str(tmp_path))
    claim_workdir(two[1], str(tmp_path))
    assert load_workdir_config(str(tmp_path)) == two[1]

    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="train.seed is 7 there, 0 here"):
        check_workdir(two[0], str(tmp_path))
    claim_workdir(two[0], str(tmp_path))
    assert load_workdir_config(str(tmp_path)).train.seed == 7


def test_a_checkpoint_of_hugging_face_is_no_start(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    with pytest.raises(ConfigError, match="convert from-hf"):
        check_start(load_config("tiny", [f"--config.init.from={tmp_path}"]))
    check_start(load_config("tiny"))


def test_a_name_that_is_not_utf8_is_refused_in_one_line(two, tmp_path):
    workdir = os.path.join(tmp_path, os.fsdecode(b"caf\xe9"))
    os.mkdir(workdir)
    claim_workdir(two[0], workdir)
    for use in (lambda: check_workdir(two[0], workdir), lambda: load_workdir_config(workdir)):
        with pytest.raises(ConfigError, match=r"caf\\udce9 is not UTF-8"):
            use()


@pytest.mark.parametrize(("files", "positions"), [
    ({}, None), ({"config.json": {"model_type": "deepseek_v3", "max_position_embeddings": 8192}}, 8192),
    ({"config.json": {"model_type": "deepseek_v3", "max_position_embeddings": "many"}}, None),
    ({"config.json": as_dict(Config(model=model_config("tiny")))}, None),
    ({"config.json": as_dict(Config(model=model_config("tiny"))),
      "hf_layout.json": {"config": {"max_position_embeddings": 2048}}}, 2048),
    ({"config.json": {"model_type": "kimi_k25", "text_config": {"max_position_embeddings": 4096}}}, 4096),
    ({"config.json": as_dict(Config(model=model_config(
        "tiny", yarn={"factor": 4.0, "original_length": 64})))}, 256)],
    ids=["none", "hugging face", "no number", "a run", "converted", "with vision", "yarn"])
def test_a_model_has_as_many_positions_as_its_checkpoint_or_its_yarn_says(tmp_path, files, positions):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert most_positions(str(tmp_path)) == positions
