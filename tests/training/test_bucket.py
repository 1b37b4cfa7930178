"""A run whose work directory and corpus are in a bucket: the same bits as on a disk, also after faults and kills."""

import pathlib
import signal
import time

import pytest

from deepseek_jax import storage
from tests import runs
from tests.buckets import SCHEMES, stores

STEPS = 8
SMALL = [*runs.DENSE, f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=2",
         "--config.train.eval_every=4", "--config.train.final_eval_batches=1", "--config.train.sample_tokens=0"]


@pytest.fixture(params=SCHEMES)
def store(request):
    return stores()[request.param]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """(config file, work directory) of the run on a disk."""
    folder = tmp_path_factory.mktemp("disk")
    config = runs.write_config(folder)
    assert runs.run("train", "--config", config, "--workdir", folder / "run", *SMALL).code == 0
    return config, folder / "run"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Lists the files that a process has left in its current folder and among the temporary files."""
    for name in ("cwd", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return lambda: [p.name for name in ("cwd", "tmp") for p in (tmp_path / name).iterdir()
                    if not p.name.startswith("mosaic-gpu-")]  # jax makes it when it is imported


def in_bucket(store, config):
    """-> (address of a run, overrides: its corpus is in the bucket)."""
    address = store.address()
    storage.upload_folder(pathlib.Path(config).parent / "corpus", f"{address}/corpus")
    return f"{address}/run", [*SMALL, f"--config.data.sources=(('{address}/corpus', 1.0),)"]


def until(process, is_so):
    """Returns once is_so() is true; it is an error if the process ends before."""
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def finish(config, address, overrides, code=0):
    with runs.start_training(config, address, *overrides) as process:
        said = process.communicate()[0]
    assert process.returncode == code, said
    return said


def test_killed_and_resumed_it_ends_bit_identical_and_leaves_nothing_elsewhere(store, on_disk, elsewhere):
    config, whole = on_disk
    address, overrides = in_bucket(store, config)
    with runs.start_training(config, address, *overrides) as process:
        until(process, lambda: runs.checkpoints(address))
        process.send_signal(signal.SIGKILL)
    begun = runs.checkpoints(address)[-1]
    assert begun < STEPS and elsewhere()  # it was killed midway
    assert f"Resuming from step {begun}" in finish(config, address, overrides)
    runs.assert_same_run(address, whole, leaves=10)
    assert set(storage.names(address)) == {"config.json", "tokenizer.json", "corpus.json", "metrics.jsonl",
                                           "expert_load", "tensorboard", "checkpoints", "cache", "loss.png",
                                           "goodput.json"}
    assert elsewhere() == []


@pytest.mark.slow
def test_other_commands_read_a_run_in_a_bucket_as_one_on_a_disk(store, on_disk, elsewhere):
    config, whole = on_disk
    address = store.address()
    assert runs.run("train", "--config", config, "--workdir", address, *SMALL).code == 0
    runs.assert_same_run(address, whole, leaves=10)
    texts = pathlib.Path(config).parent / "corpus"
    storage.upload_folder(texts, f"{address}-texts")
    for name, *arguments in (("evaluate",), ("evaluate", "--data", "TEXTS"),
                             ("generate", "--prompt", "def ", "--max-new-tokens", "4")):
        there, here = (runs.run(name, *(str(corpus) if a == "TEXTS" else a for a in arguments), "--workdir", run)
                       for run, corpus in ((address, f"{address}-texts"), (whole, texts)))
        assert (there.code, there.out) == (0, here.out), there
    assert runs.run("evaluate", "--workdir", address, "--json", f"{address}-score.json").code == 0
    assert storage.is_file(f"{address}-score.json")
    more = [*SMALL, "--config.train.steps=2", f"--config.init.from={address}"]
    assert runs.run("train", "--config", config, "--workdir", f"{address}-tuned", *more).code == 0
    assert not [name for name in elsewhere() if not name.startswith("deepseek_jax-")]  # this process's own


@pytest.mark.slow
def test_a_store_that_refuses_one_request_in_ten_changes_no_bit(store, on_disk, impatient):
    config, whole = on_disk
    address = store.address()
    with store.refusing(10):
        assert runs.run("train", "--config", config, "--workdir", address, *SMALL).code == 0
        assert store.faults > 10
    runs.assert_same_run(address, whole, leaves=10)


def test_a_store_that_dies_in_a_save_ends_the_run_in_one_line_and_the_next_continues(store, on_disk, impatient):
    config, whole = on_disk
    address = store.address()
    train = lambda: runs.run("train", "--config", config, "--workdir", address, *SMALL)
    with store.dying_after(None, at="checkpoints/4/state"):
        train().assert_error(f"checkpoint 4 was not written to {address}/checkpoints: ", "Those before it are")
    assert runs.checkpoints(address) == [2]
    storage.remove(f"{address}/.holder")  # it names this process, which still exists
    assert "Resuming from step 2" in train().out
    runs.assert_same_run(address, whole, leaves=10)
