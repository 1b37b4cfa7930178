"""Trackers: each of them gets the loss, and the expert load and the bias of every layer."""

import pathlib
import struct
import sys
import threading
import types

import numpy as np
import pytest

from deepseek_jax.config import Config, ConfigError, TrainConfig
from deepseek_jax.training import loop, trackers
from deepseek_jax.training.metrics import MetricsWriter
from deepseek_jax.training.types import Metrics
from tests.model import naive
from tests.training.test_loop_order import Bar, run_of
from tests.training.test_metrics import events

LOADS = {"bias": np.array([[1, 2, 3, 2], [4, 0, 0, 4]], np.int32), "mtp_bias": np.full((1, 4), 5, np.int32)}
BIASES = {"bias": np.array([[0.1, -0.2, 0, 0], [0, 0, 0, 0.5]], np.float32),
          "mtp_bias": np.full((1, 4), -0.25, np.float32)}
LAYERS = ("layer_01", "layer_02", "mtp_00")
SCALARS = ("load_high", "load_low", "load_entropy", "bias_high", "bias_low")


def trained(monkeypatch, workdir, steps=20, resume=None, **train):
    """A loop over steps that are not computed, with all trackers."""
    run, _ = run_of(monkeypatch, [3.0 - 0.1 * i for i in range(steps)], eval_every=100, checkpoint_every=100, **train)
    run.config = Config(model=naive.tiny(), train=run.config.train)
    metrics = lambda loss: Metrics(loss, 0.0, 1e-3, 1.0, 0.0, 0.0, 0.0, 0.0, LOADS, None, {}, BIASES)
    run.step_fn = lambda state, batch, base, reference: (state + 1, metrics(3.0 - 0.1 * state))
    run.state = run.step = resume or 0
    run.loader = types.SimpleNamespace(iterate=lambda start: ((i, {"active": 1}) for i in range(start, steps)))
    monkeypatch.setattr(loop.Run, "_evaluate", lambda self, bar: self.writer.write(self.step, eval_loss=1.5))
    run.writer = MetricsWriter(workdir, resume, trackers.make_trackers(run.config, str(workdir), resume is not None))
    run._steps(Bar())
    run.writer.close()


def check(found, steps=(10, 20)):
    """found: {(name, step): value}."""
    assert found["train/loss", 1] == 3.0 and found["train/loss", 20] == pytest.approx(1.1)
    assert found["eval/loss", 20] == 1.5
    for step in steps:
        assert {name for name, at in found if name.startswith("experts/") and at == step} == {
            f"experts/{layer}/{scalar}" for layer in LAYERS for scalar in SCALARS}
        assert found["experts/layer_01/load_high", step] == 1.5 and found["experts/layer_02/load_low", step] == 0
        assert found["experts/mtp_00/load_entropy", step] == pytest.approx(1)
        assert found["experts/layer_01/bias_low", step] == pytest.approx(-0.2)
        assert found["experts/layer_02/bias_high", step] == 0.5 and found["experts/mtp_00/bias_high", step] == -0.25
    assert not [at for name, at in found if name.startswith("experts/") and at not in steps]


def test_tensorboard_has_every_layer(monkeypatch, tmp_path):
    trained(monkeypatch, tmp_path)
    check({(tag, step): value for step, tag, value in events(tmp_path)[0]})


def records(data):
    """The records of a .wandb file: after 7 bytes, a LevelDB log in blocks of 32 KiB; parts have 7 bytes of header."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            yield whole
            whole = b""


def test_wandb_has_every_layer_offline(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trained(monkeypatch, tmp_path, tracker="wandb")
    wandb.teardown()

    path, = pathlib.Path(tmp_path, "wandb").glob("offline-run-*/*.wandb")
    found = {}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        row = {"/".join(item.nested_key) or item.key: float(item.value_json) for item in record.history.item}
        found |= {(name, int(row["_step"])): value for name, value in row.items()}
    check(found)


@pytest.mark.filterwarnings("ignore")  # a warning of SQLAlchemy about its use by MLflow
def test_mlflow_has_every_layer_in_a_local_file_and_a_second_start_adds_to_it(monkeypatch, tmp_path):
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trained(monkeypatch, tmp_path, steps=15, tracker="mlflow")
    trained(monkeypatch, tmp_path, steps=20, resume=12, tracker="mlflow")

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run, = client.search_runs([client.get_experiment_by_name("deepseek-jax").experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    assert sorted(metric.step for metric in history["train/loss"]) == list(range(1, 21))  # each once
    check({(name, metric.step): metric.value for name, metrics in history.items() for metric in metrics},
          steps=(10, 15, 20))


def test_prometheus_finds_the_newest_scalars_in_a_file(monkeypatch, tmp_path):
    trained(monkeypatch, tmp_path / "run", prometheus=str(tmp_path / "run.prom"))
    lines = (tmp_path / "run.prom").read_text().splitlines()
    assert "# TYPE deepseek_jax_train_loss gauge" in lines
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    label = f'{{workdir="{tmp_path}/run"}}'
    assert float(values[f"deepseek_jax_train_loss{label}"]) == pytest.approx(1.1)
    assert values[f"deepseek_jax_step{label}"] == "20" and values[f"deepseek_jax_eval_loss{label}"] == "1.5"
    assert len(values) == len([line for line in lines if line.startswith("#")])


def test_losses_of_sources_are_one_metric_with_labels(tmp_path):
    prometheus = trackers.Prometheus(str(tmp_path / "x.prom"), "/run")
    prometheus.log(3, {"eval/loss/a b.txt": 1.0, "eval/loss/c": 2.0})
    text = (tmp_path / "x.prom").read_text()
    assert 'deepseek_jax_eval_loss{workdir="/run",source="a b.txt"} 1.0\n' in text
    assert text.count("# TYPE deepseek_jax_eval_loss gauge") == 1 and text.endswith("\n")


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"needs the Python package wandb; pip install -e '\.\[wandb\]'"):
        checked(tracker="wandb")


def checked(**train):
    trackers.check_trackers(Config(model=naive.tiny(), train=TrainConfig(**train)), "/run")


def test_a_tracker_that_does_not_let_a_run_in_or_does_not_answer_is_one_line(monkeypatch):
    settings = types.SimpleNamespace(mode="online")
    wandb = types.SimpleNamespace(setup=lambda: types.SimpleNamespace(settings=settings), login=lambda **_: False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ConfigError, match="has no account; wandb login"):
        checked(tracker="wandb")
    settings.mode = "offline"
    checked(tracker="wandb")

    def refuse(**_):
        raise RuntimeError("API key is\ninvalid.")

    settings.mode, wandb.login = "online", refuse
    with pytest.raises(ConfigError, match="tracker='wandb' cannot be used: API key is invalid; mend that"):
        checked(tracker="wandb")
    monkeypatch.setattr(trackers, "ANSWER", 0.05)
    goes_on = threading.Event()
    wandb.login = lambda **_: goes_on.wait(60)
    with pytest.raises(ConfigError, match=r"no answer within 0\.05 seconds"):
        checked(tracker="wandb")
    goes_on.set()


def test_a_file_for_prometheus_that_cannot_be_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "x.prom"):
        with pytest.raises(ConfigError, match=r"train\.prometheus='.*' cannot be written"):
            checked(prometheus=str(path))
    checked(prometheus=str(tmp_path / "x.prom"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_disk_refuses_prometheus_is_said_once_and_tried_again(tmp_path, capsys):
    prometheus = trackers.Prometheus(str(tmp_path / "folder" / "x.prom"), "/run")
    for step in range(3):
        prometheus.log(step, {"train/loss": 1.0})
        prometheus.flush()
    assert capsys.readouterr().err.count("is not written") == 1
    (tmp_path / "folder").mkdir()
    prometheus.close()
    assert "deepseek_jax_train_loss" in (tmp_path / "folder" / "x.prom").read_text()


def test_labels_for_prometheus_are_escaped(tmp_path):
    prometheus = trackers.Prometheus(str(tmp_path / "x.prom"), '/a"b\\c')
    prometheus.log(3, {'eval/loss/x"\n\udce9': 1.0, "train/größe": 2.0})
    text = (tmp_path / "x.prom").read_text()
    assert 'deepseek_jax_eval_loss{workdir="/a\\"b\\\\c",source="x\\"\\n\\\\udce9"} 1.0\n' in text
    assert "deepseek_jax_train_gr__e{" in text


def test_a_run_is_the_same_one_to_a_tracker_until_it_begins_anew(tmp_path):
    first = trackers._identity(str(tmp_path), resumes=False)
    assert trackers._identity(str(tmp_path), resumes=True) == first
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert trackers._identity(str(moved), resumes=True) == first
    assert trackers._identity(str(moved), resumes=False) != first
    (moved / "tracker.json").write_text("")
    assert trackers._identity(str(moved), resumes=True) != first


def mlflow_of(monkeypatch, history):
    """An MLflow tracker with a client that has a run with this history, and the lists of what it logs and prints."""
    said, metrics = [], dict.fromkeys(history, 1.0)
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"), data=types.SimpleNamespace(metrics=metrics))
    client = types.SimpleNamespace(
        get_experiment_by_name=lambda _: types.SimpleNamespace(experiment_id="e"),
        search_runs=lambda *found, **_: said.append(found[1]) or [run],
        update_run=lambda *state, **named: said.append(named),
        get_metric_history=lambda _, name: [types.SimpleNamespace(step=step) for step in history[name]],
        log_batch=lambda _, batch: said.extend(batch), set_terminated=lambda _, status: said.append(status))
    modules = {"mlflow.entities": types.SimpleNamespace(Metric=lambda name, x, now, step: (name, step)),
               "mlflow.tracking": types.SimpleNamespace(MlflowClient=lambda _: client)}
    for name, module in ({"mlflow": types.ModuleType("mlflow")} | modules).items():
        monkeypatch.setitem(sys.modules, name, module)
    return trackers.MLflow(Config(model=naive.tiny()), "/it's a run", "0123456789abcdef"), said


def test_what_an_earlier_start_has_logged_is_known_for_each_kind_of_row(monkeypatch):
    mlflow, said = mlflow_of(monkeypatch, {"eval/loss": [2], "train/loss": [1, 2, 3], "train/lr": [1, 2, 3]})
    assert said == ["tags.identity = '0123456789abcdef'", {"status": "RUNNING"}]
    said.clear()
    for step in (2, 3, 4):
        mlflow.log(step, {"train/loss": 1.0})
        mlflow.log(step, {"eval/loss": 1.0})
    assert said == [("eval/loss", 3), ("train/loss", 4), ("eval/loss", 4)]
    mlflow.close(failed=True)
    mlflow.close()
    assert said[-2:] == ["FAILED", "FINISHED"]
