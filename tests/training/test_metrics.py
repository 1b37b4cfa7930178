"""Metrics: a run that was killed and resumed writes the same files as one that was never stopped."""

import json
import os
import threading
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from deepseek_jax import storage, working_files
from deepseek_jax.training import metrics, trackers
from deepseek_jax.training.metrics import MetricsWriter, balance_metrics, max_vio, read_expert_loads, read_metrics
from tests.buckets import stores


def counts_of(step):
    return np.random.default_rng(step).integers(0, 100, (3, 8))


def run(workdir, resume_step, until):
    writer = MetricsWriter(workdir, resume_step)
    for step in range((resume_step or 0) + 1, until + 1):
        writer.write(step, tokens=step * 64, loss=10.0 / step, lr=jnp.float32(0.5), max_vio=max_vio(counts_of(step)))
        writer.write_expert_load(step, counts_of(step))
        if step % 2 == 0:
            writer.write(step, eval_loss=5.0 / step, eval_bits_per_byte=1.0, max_vio_global=0.1)
    writer.close()


def files(workdir):
    return {str(p.relative_to(workdir)): p.read_bytes() for p in sorted(workdir.rglob("*"))
            if p.is_file() and "tensorboard" not in p.parts}


@pytest.mark.parametrize("resumed_from", [2, 3, 4])
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, resumed_from):
    run(tmp_path / "whole", None, 8)
    run(tmp_path / "killed", None, 5)
    run(tmp_path / "killed", resumed_from, 8)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) == 3


def test_what_a_kill_left_half_written_is_dropped(tmp_path):
    run(tmp_path / "whole", None, 8)
    run(tmp_path / "killed", None, 4)
    with open(tmp_path / "killed/metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    with open(tmp_path / "killed/expert_load/counts.int32", "ab") as f:
        f.write(np.int32([5, 1, 2]).tobytes() + b"\x01")
    assert len(read_metrics(tmp_path / "killed")) == 6  # and readers do not see it in the meantime
    assert list(read_expert_loads(tmp_path / "killed")[0]) == [1, 2, 3, 4]
    run(tmp_path / "killed", 4, 8)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_run_from_the_start_keeps_nothing_of_the_one_before(tmp_path):
    run(tmp_path, None, 5)
    MetricsWriter(tmp_path, None).close()
    assert read_metrics(tmp_path) == []
    assert len(read_expert_loads(tmp_path)[0]) == 0
    writer = MetricsWriter(tmp_path, None)
    writer.write_expert_load(1, np.ones((2, 5)))  # the shape of another model
    writer.close()
    assert read_expert_loads(tmp_path)[1].shape == (1, 2, 5)


def test_a_step_has_one_row_of_a_kind_even_if_it_is_evaluated_again_after_resuming(tmp_path):
    run(tmp_path, None, 4)
    writer = MetricsWriter(tmp_path, 4)
    writer.write(4, eval_loss=9.0)
    writer.write(4, loss=9.0)
    writer.write_expert_load(4, counts_of(4))
    writer.close()
    assert [(r["step"], "eval_loss" in r) for r in read_metrics(tmp_path)] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    assert list(read_expert_loads(tmp_path)[0]) == [1, 2, 3, 4]


@pytest.mark.parametrize("resume", [1, 33, 50])
def test_a_resumed_run_does_not_read_the_loads_of_all_steps(tmp_path, monkeypatch, resume):
    run(tmp_path, None, 50)
    with monkeypatch.context() as patch:
        read_bytes = storage.read_bytes
        patch.setattr(storage, "read_bytes", lambda path: read_bytes(path) if path.name != "counts.int32" else 1 / 0)
        MetricsWriter(tmp_path, resume)
    assert list(read_expert_loads(tmp_path)[0]) == list(range(1, resume + 1))


def test_rows_are_on_the_disk_once_they_are_flushed(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, loss=2.5)
    writer.write_expert_load(1, counts_of(1))
    writer.flush()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}]
    steps, counts_SLE = read_expert_loads(tmp_path)
    assert list(steps) == [1] and np.array_equal(counts_SLE[0], counts_of(1))
    writer.close()


def test_what_the_thread_cannot_write_is_raised_with_its_file(tmp_path):
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_drop_rows", lambda *_: [])
        writer = MetricsWriter(tmp_path, None)
    writer.write(1, loss=2.5)
    with pytest.raises(OSError, match="No space left on device") as error:
        writer.flush()
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="No space left"):
        writer.write(2, loss=2.5)
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_others_get_each_row_once_and_are_closed(tmp_path):
    class Listening:
        def __init__(self):
            self.heard = []

        def log(self, step, values):
            self.heard.append((step, values))

        def flush(self):
            self.heard.append("flush")

        def close(self, failed):
            self.heard.append("close")

    tracker = Listening()
    writer = MetricsWriter(tmp_path, None, [tracker])
    for _ in range(2):
        writer.write(1, loss=2.5, device_bytes_peak=None)
    writer.write(1, eval_loss=3.0)
    writer.flush()
    writer.track(1, {"experts/layer_01/load_high": 2.0})
    writer.close()
    assert tracker.heard == [(1, {"train/loss": 2.5}), (1, {"eval/loss": 3.0}), "flush",
                             (1, {"experts/layer_01/load_high": 2.0}), "close"]


class Faulty:
    """A tracker that fails in the methods named in `broken`."""

    def __init__(self, broken):
        self.broken, self.heard = broken, []

    def log(self, step, values):
        self._do("log", step)

    def flush(self):
        self._do("flush")

    def close(self, failed):
        self._do("close", failed)

    def _do(self, what, *about):
        if what == self.broken:
            raise ConnectionError("the server is gone")
        self.heard.append((what, *about))


@pytest.mark.parametrize("broken", ["log", "flush", "close"])
def test_a_tracker_that_fails_stops_neither_the_run_nor_the_others_and_is_said_once(tmp_path, capsys, broken):
    both = Faulty(broken), Faulty(None)
    writer = MetricsWriter(tmp_path, None, both)
    for step in range(1, 6):
        writer.write(step, loss=1.0)
        writer.flush()
    writer.close(failed=True)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert both[1].heard == [("log", 1), ("flush",), ("log", 2), ("flush",), ("log", 3), ("flush",), ("log", 4),
                                 ("flush",), ("log", 5), ("flush",), ("close", True)]
    assert capsys.readouterr().err == "note: the run continues without Faulty: the server is gone.\n"


def test_a_tracker_that_hangs_blocks_no_row_and_no_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "FINISH", 0.05)
    monkeypatch.setattr(trackers.Apart, "MOST", 3)
    goes_on = threading.Event()
    hanging = types.SimpleNamespace(log=lambda *_: goes_on.wait(60), flush=goes_on.wait, close=lambda failed: None)
    writer = MetricsWriter(tmp_path, None, [hanging])
    for step in range(1, 20):
        writer.write(step, loss=1.0)
        writer.flush()
    writer.close()
    said = capsys.readouterr().err
    goes_on.set()
    assert len(read_metrics(tmp_path)) == 19
    assert said.count("is too slow and does not get all rows") == 1 and "has not ended within 0.05 seconds" in said


@pytest.mark.parametrize("value", [float("nan"), jnp.float32("inf"), np.float64("-inf")])
def test_a_loss_that_is_no_number_is_null_and_every_line_is_json(tmp_path, value):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, loss=value, tokens=np.int64(7))
    writer.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "tokens": 7}


def events(workdir):
    """(step, tag, value) of all event files in the order of writing, and the steps from which a restart purges."""
    scalars, purges = [], []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12:12 + length])
            data = data[16 + length:]
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            purges += [event.step] if event.HasField("session_log") else []
    return scalars, purges


def test_tensorboard_gets_the_same_scalars_and_is_told_what_a_resumed_run_replaces(tmp_path):
    run(tmp_path, None, 2)
    run(tmp_path, 1, 2)
    scalars, purges = events(tmp_path)
    assert (2, "train/loss", 5.0) in scalars and (2, "eval/bits_per_byte", 1.0) in scalars
    assert len([s for s in scalars if s[1] == "train/loss"]) == 3
    assert purges[-1] == 2


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_max_vio_is_the_busiest_expert_over_the_mean_averaged_over_layers(array):
    assert max_vio(array([[4, 4, 4, 4], [16, 0, 0, 0]])) == pytest.approx((0 + 3) / 2)
    assert max_vio(array([[0, 0]])) == 0
    assert isinstance(max_vio(array([[1, 2]])), float)


def test_the_balance_of_a_step_has_its_spread_and_its_idle_experts():
    even, alone, half = np.array([[5, 5, 5, 5]]), np.array([[7, 0, 0, 0]]), np.array([[3, 3, 0, 0]])

    assert balance_metrics(even) == {"max_vio": 0, "load_entropy": pytest.approx(1), "idle_experts": 0}
    assert balance_metrics(alone) == {"max_vio": 3, "load_entropy": 0, "idle_experts": 0.75}
    both = balance_metrics(np.concatenate([even, half]))
    assert both == {"max_vio": 0.5, "load_entropy": pytest.approx(0.75), "idle_experts": 0.25}
    assert balance_metrics(np.zeros((1, 4))) == {"max_vio": 0, "load_entropy": 0, "idle_experts": 1}
    assert balance_metrics(np.zeros((0, 0))) == {}


def test_a_model_without_experts_has_no_loads_and_no_violation(tmp_path):
    assert max_vio(np.zeros((0, 0))) == 0
    steps, counts_SLE = read_expert_loads(tmp_path)
    assert len(steps) == 0 and counts_SLE.shape == (0, 0, 0)
    assert read_metrics(tmp_path) == []


def test_a_source_whose_name_is_no_utf8_has_its_loss_in_both_files(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, **{"eval_loss/caf\udce9": 2.0})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "eval_loss/caf\udce9": 2.0}]
    assert (1, r"eval/loss/caf\udce9", 2.0) in events(tmp_path)[0]


def test_a_writer_that_cannot_begin_leaves_no_thread_and_no_files(monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(metrics, "_drop_rows", fail)
    address = stores()["s3"].address()
    before = set(threading.enumerate()), os.listdir(working_files.scratch())
    with pytest.raises(OSError, match="no space left"):
        MetricsWriter(address, None)
    mine = {thread for thread in threading.enumerate() if "_keep" in thread.name}
    assert mine <= before[0] and os.listdir(working_files.scratch()) == before[1]
