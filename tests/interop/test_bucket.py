"""Conversion from and to buckets: the same bytes as on a disk, and a partial result never counts as complete."""

import filecmp
import os

import pytest

from deepseek_jax import storage
from deepseek_jax.config import ConfigError
from deepseek_jax.interop import convert
from deepseek_jax.interop.convert import from_hf, to_hf
from deepseek_jax.workdir import load, load_run
from tests.buckets import SCHEMES, stores
from tests.interop import checkpoints
from tests.interop.test_conversion import assert_same_trees


@pytest.fixture(params=SCHEMES)
def store(request):
    return stores()[request.param]


def assert_same_folders(a, b):
    assert sorted(os.listdir(a)) == sorted(name for name in os.listdir(b) if name != "expected.npz")
    for name in os.listdir(a):
        same = filecmp.cmp(f"{a}/{name}", f"{b}/{name}", shallow=False)
        assert same or (name == "config.json" and checkpoints.config(a) == checkpoints.config(b)), name


def test_there_and_back_gives_every_byte_and_the_weights_of_a_disk(store, impatient, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    source, address = checkpoints.golden("mtp"), store.address()
    storage.upload_folder(source, f"{address}/hf")
    with store.refusing(10):
        from_hf(f"{address}/hf", f"{address}/run")
        to_hf(f"{address}/run", f"{address}/back")
        assert store.faults
    from_hf(source, str(tmp_path / "run"))
    assert_same_trees(load_run(f"{address}/run").variables, load_run(str(tmp_path / "run")).variables)
    storage.download_folder(f"{address}/back", tmp_path / "back")
    assert_same_folders(tmp_path / "back", source)
    if "tokenizer.json" in os.listdir(source):
        assert_same_trees(load(f"{address}/hf").variables, load(source).variables)
    assert sorted(os.listdir(tmp_path)) == ["back", "run"]


def test_config_json_makes_a_checkpoint_of_an_export_and_is_written_last(store, tmp_path, monkeypatch):
    address, order, put, upload = store.address(), [], storage.put, storage.upload
    from_hf(checkpoints.golden("mtp"), str(tmp_path / "run"))
    (tmp_path / "run/generation_config.json").write_text("{}")
    monkeypatch.setattr(storage, "put", lambda to, data: (order.append(str(to)), put(to, data)))
    monkeypatch.setattr(storage, "upload", lambda file, to: (order.append(str(to)), upload(file, to)))
    to_hf(str(tmp_path / "run"), f"{address}/back")
    assert len(order) > 3 and order[-1] == f"{address}/back/config.json"


def test_a_store_that_dies_leaves_no_run_and_no_checkpoint(store, impatient):
    address = store.address()
    with store.dying_after(6), pytest.raises(storage.StorageError):
        from_hf(checkpoints.golden("mtp"), f"{address}/run")
    assert not storage.is_file(f"{address}/run/config.json")
    with pytest.raises(ConfigError, match="holds no config.json"):
        load_run(f"{address}/run")


def test_after_an_error_nothing_is_left_and_what_is_there_is_kept(store, monkeypatch):
    address = store.address()
    monkeypatch.setattr(convert, "_write_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        from_hf(checkpoints.golden("mtp"), f"{address}/run")
    assert storage.entries(address) == {}
    storage.put(f"{address}/run/mine.txt", b"mine")
    with pytest.raises(ConfigError, match=f"{address}/run exists already"):
        from_hf(checkpoints.golden("mtp"), f"{address}/run")
    assert list(storage.entries(address)) == ["run/mine.txt"]
