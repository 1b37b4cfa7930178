"""A run whose work directory and corpus are in a bucket: the same bits as on a disk, whatever happens on the way."""

import pathlib
import signal
import time

import pytest

from deepseek_jax import storage
from tests import runs
from tests.buckets import SCHEMES, stores


@pytest.fixture(params=SCHEMES)
def store(request):
    return stores()[request.param]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Folders for what a process might leave: its current one, and the one of temporary files."""
    places = [tmp_path / "cwd", tmp_path / "tmp"]
    for place in places:
        place.mkdir()
    monkeypatch.setenv("TMPDIR", str(places[1]))
    return places


def until(process, is_so):
    """Returns once is_so(); a process that ends before is an error."""
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def in_bucket(store, config):
    """-> (address of a run, overrides that take its corpus from the bucket)."""
    address = store.address()
    storage.upload_folder(pathlib.Path(config).parent / "corpus", f"{address}/corpus")
    return f"{address}/run", [f"--config.data.sources=(('{address}/corpus', 1.0),)"]


def killed_at(config, address, overrides, step, cwd):
    process = runs.start_training(config, address, *overrides, cwd=cwd)
    with process:
        until(process, lambda: (runs.checkpoints(address) or [0])[-1] >= step)
        process.send_signal(signal.SIGKILL)


def finish(config, address, overrides, cwd, code=0):
    with runs.start_training(config, address, *overrides, cwd=cwd) as process:
        said = process.communicate()[0]
        assert process.returncode == code, said
    return said


def test_killed_and_resumed_it_ends_bit_identical_and_leaves_nothing_elsewhere(store, elsewhere):
    config, whole, _ = runs.finished_run()
    address, overrides = in_bucket(store, config)
    killed_at(config, address, overrides, 6, elsewhere[0])
    begun = runs.checkpoints(address)[-1]
    said = finish(config, address, overrides, elsewhere[0])
    assert f"Resuming from step {begun}" in said
    runs.assert_same_run(address, whole)
    names = set(storage.names(address))
    assert names == {"config.json", "tokenizer.json", "corpus.json", "metrics.jsonl", "expert_load", "tensorboard",
                     "checkpoints", "cache", "loss.png", "expert_load.png"}
    assert [list(p.iterdir()) for p in elsewhere] == [[], []]
    assert not pathlib.Path(elsewhere[0].root, "gs:").exists()
