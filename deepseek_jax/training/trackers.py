"""Where rows go besides metrics.jsonl: TensorBoard always; Weights & Biases or MLflow; a file for Prometheus.

All have three methods and get the same scalars: those of the rows, and every EXPERTS_EVERY steps how each layer uses
its experts and where its biases are. They are called in one thread, in order.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import socket
import struct
import time
from typing import Any, Protocol

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]: protobuf
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]: protobuf
from tensorboardX.record_writer import masked_crc32c

from deepseek_jax import io, storage
from deepseek_jax.config import Config, ConfigError, as_dict

EXPERTS_EVERY = 10  # steps; the counts of each one are in expert_load/


class Tracker(Protocol):
    """Takes the scalars of a run."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """values: finite, by names such as train/loss, eval/loss and experts/layer_03/load_high."""

    def flush(self) -> None:
        """Returns when what was logged is kept, as far as that can be said."""

    def close(self) -> None:
        """Ends; nothing is logged after it."""


def experts_of_layers(loads: dict[str, Any], biases: dict[str, Any], first: int) -> dict[str, float]:
    """Scalars of each layer: experts/layer_03/..., and experts/mtp_00/... of MTP modules.

    load_high, load_low: of the busiest and the idlest expert, over the mean load. load_entropy: 1 is even. bias_high,
    bias_low: of the routing bias.

    Args:
      loads, biases: [L, E] by the names of the `router` collection. first: the number of the first layer with experts.
    """
    found = {}
    for name, loads_LE in loads.items():
        kind, begin = ("mtp", 0) if "mtp" in name else ("layer", first)
        loads_LE = np.asarray(loads_LE)
        share_LE = loads_LE / np.maximum(loads_LE.sum(-1, keepdims=True), 1)
        experts = loads_LE.shape[1]
        entropy_L = -(share_LE * np.log(np.where(share_LE, share_LE, 1))).sum(-1) / np.log(max(2, experts))
        of_layers = {"load_high": share_LE.max(-1) * experts, "load_low": share_LE.min(-1) * experts,
                     "load_entropy": entropy_L}
        if name in biases:
            bias_LE = np.asarray(biases[name])
            of_layers |= {"bias_high": bias_LE.max(-1), "bias_low": bias_LE.min(-1)}
        for what, values_L in of_layers.items():
            found |= {f"experts/{kind}_{begin + i:02}/{what}": x for i, x in enumerate(values_L.tolist())}
    return found


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: pathlib.Path, first: int):
        """first: the step that follows; what older files have from there on is hidden."""
        folder.mkdir(exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._file = io.Appended(path)
        self._events: dict[tuple[str, ...], Any] = {}
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends an event at once. That of the same names is used again: making one takes a tenth of a millisecond."""
        names = tuple(values)
        if names not in self._events:
            # Sources may have names that are no UTF-8.
            tags = [name.encode(errors="backslashreplace").decode() for name in names]
            self._events[names] = Event(summary=Summary(value=[Summary.Value(tag=tag) for tag in tags]))
        event = self._events[names]
        event.step, event.wall_time = step, time.time()
        for value, number in zip(event.summary.value, values.values()):
            value.simple_value = number
        self._add(event)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, event):
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + struct.pack("<I", masked_crc32c(length)) + data
                         + struct.pack("<I", masked_crc32c(data)))


class WeightsAndBiases:
    """A run of wandb, the same one at each start of a work directory. WANDB_MODE=offline needs no account."""

    def __init__(self, config: Config, workdir: str):
        wandb = _package("wandb")
        address = storage.absolute(workdir)
        local = storage.scratch() if storage.is_remote(workdir) else workdir
        self.run = wandb.init(project="deepseek-jax", name=os.path.basename(address.rstrip("/")), dir=local,
                              id=hashlib.sha256(address.encode()).hexdigest()[:16], resume="allow",
                              config=as_dict(config))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Steps that an earlier start has logged stay as they are there."""
        self.run.log(values, step=step)

    def flush(self) -> None:
        """Nothing is waited for: wandb sends in a process of its own."""

    def close(self) -> None:
        """Waits until wandb has everything."""
        self.run.finish()


class MLflow:
    """A run of MLflow, the same one at each start: at MLFLOW_TRACKING_URI, or in WORKDIR/mlflow.db."""

    def __init__(self, config: Config, workdir: str):
        _package("mlflow")
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        if storage.is_remote(workdir) and "MLFLOW_TRACKING_URI" not in os.environ:
            raise ConfigError("train.tracker='mlflow' with a work directory in a bucket needs a server; set "
                              "MLFLOW_TRACKING_URI.")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.absolute(workdir)}/mlflow.db"
        self.client, self.metric = MlflowClient(uri), Metric
        name = storage.absolute(workdir)
        experiment = self.client.get_experiment_by_name("deepseek-jax")
        experiment = experiment.experiment_id if experiment else self.client.create_experiment("deepseek-jax")
        old = self.client.search_runs([experiment], f"tags.workdir = '{name}'", max_results=1)
        run = old[0] if old else self.client.create_run(experiment, tags={"workdir": name},
                                                        run_name=os.path.basename(name.rstrip("/")))
        self.run_id = run.info.run_id
        self.seen = max((m.step for m in self.client.get_metric_history(self.run_id, "train/loss")), default=-1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Steps that an earlier start has logged stay as they are there."""
        if step <= self.seen:
            return
        now, named = int(1000 * time.time()), [(re.sub(r"[^\w\-. :/]", "_", name), x) for name, x in values.items()]
        for i in range(0, len(named), 1000):  # which MLflow takes at once
            self.client.log_batch(self.run_id, [self.metric(name, x, now, step) for name, x in named[i:i + 1000]])

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Says that the run is not going any more."""
        self.client.set_terminated(self.run_id)


class Prometheus:
    """The newest scalars in a text file, for the textfile collector of Prometheus' node exporter."""

    EVERY = 1.0  # seconds between two files

    def __init__(self, path: str, workdir: str):
        self.path, self.label = path, storage.absolute(workdir).replace("\\", "\\\\").replace('"', '\\"')
        self.values: dict[str, float] = {}
        self.written = 0.0

    def log(self, step: int, values: dict[str, float]) -> None:
        """Those of layers are left to the others."""
        self.values |= {"step": step, **{k: v for k, v in values.items() if not k.startswith("experts/")}}
        if time.monotonic() - self.written > self.EVERY:
            self.flush()

    def flush(self) -> None:
        """Replaces the file."""
        lines = {}
        for name, value in self.values.items():
            metric, _, source = name.partition("loss/")
            metric = "deepseek_jax_" + re.sub(r"\W", "_", metric + "loss" * bool(source))
            label = f'workdir="{self.label}"' + (f',source="{source}"' if source else "")
            lines.setdefault(metric, []).append(f"{metric}{{{label}}} {value!r}\n")
        io.write_text(self.path, "".join(f"# TYPE {metric} gauge\n" + "".join(of) for metric, of in lines.items()))
        self.written = time.monotonic()

    def close(self) -> None:
        """The last file stays."""
        self.flush()


def make_trackers(config: Config, workdir: str) -> list[Tracker]:
    """What the config asks for. Raises ConfigError for a package that is missing."""
    made: list[Tracker] = []
    if config.train.tracker is not None:
        made.append({"wandb": WeightsAndBiases, "mlflow": MLflow}[config.train.tracker](config, workdir))
    if config.train.prometheus is not None:
        made.append(Prometheus(config.train.prometheus, workdir))
    return made


def check_tracker(config: Config) -> None:
    """Raises ConfigError for a tracker whose package is missing."""
    if config.train.tracker is not None:
        _package(config.train.tracker)


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(f"train.tracker={name!r} needs the Python package {name}; pip install -e '.[{name}]', or "
                          "take None.") from None
