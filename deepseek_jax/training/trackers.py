"""Destinations of rows in addition to metrics.jsonl: TensorBoard always; Weights & Biases or MLflow; a Prometheus file.

All have three methods and get the same scalars: those of the rows, and every EXPERTS_EVERY steps the load and the
biases of each layer's experts. TensorBoard's files are written in the thread that writes the rows; each of the others
has its own thread (`Apart`), and if one fails or hangs later, the run continues.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pathlib
import queue
import re
import socket
import struct
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]: protobuf
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]: protobuf
from tensorboardX.record_writer import masked_crc32c

from deepseek_jax import io, storage, working_files
from deepseek_jax.config import Config, ConfigError, as_dict

EXPERTS_EVERY = 10  # steps; the counts of every step are in expert_load/
ANSWER, FINISH = 60.0, 60.0  # seconds that a start waits for a server's answer, and that an end waits for pending rows


class Tracker(Protocol):
    """Takes the scalars of a run."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """values: finite, by names such as train/loss, eval/loss and experts/layer_03/load_high."""

    def flush(self) -> None:
        """Returns when the logged values are stored, as far as that can be known."""

    def close(self, failed: bool = False) -> None:
        """Ends; nothing is logged afterwards. failed: whether the run ends with an error."""


class Apart:
    """A tracker in a separate thread, which training waits for only at the end, for `FINISH` seconds. An exception is
    reported once and ends the logging; rows for which it is too slow are dropped."""

    MOST = 1024  # queued calls

    def __init__(self, tracker: Tracker):
        self._tracker, self._name = tracker, type(tracker).__name__
        self._calls: queue.Queue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.Queue(self.MOST)
        self._failed, self._dropped = False, False
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Queues the values."""
        self._put(self._tracker.log, step, values)

    def flush(self) -> None:
        """Requests a flush without waiting."""
        self._put(self._tracker.flush)

    def close(self, failed: bool = False) -> None:
        """Returns when the tracker has ended, or the time is over."""
        end = time.monotonic() + FINISH
        try:
            self._calls.put((self._tracker.close, (failed,)), timeout=FINISH)
            self._thread.join(max(0.0, end - time.monotonic()))
        except queue.Full:
            pass
        if self._thread.is_alive():
            _say(f"{self._name} has not ended within {FINISH:g} seconds; what it did not get is in metrics.jsonl")

    def _put(self, call, *arguments):
        if self._failed:
            return
        try:
            self._calls.put_nowait((call, arguments))
        except queue.Full:
            if not self._dropped:
                self._dropped = True
                _say(f"{self._name} is too slow and does not get all rows; metrics.jsonl has them")

    def _work(self):
        call = None
        while call != self._tracker.close:
            call, arguments = self._calls.get()
            if self._failed:
                continue
            try:
                call(*arguments)
            except BaseException as error:
                self._failed = True
                _say(f"the run continues without {self._name}: {_line(error)}")


def experts_of_layers(loads: dict[str, Any], biases: dict[str, Any], first: int) -> dict[str, float]:
    """Scalars of each layer: experts/layer_03/..., and experts/mtp_00/... for MTP modules.

    load_high, load_low: load of the busiest and the least busy expert, divided by the mean. load_entropy: 1 is even.
    bias_high, bias_low: range of the routing bias.

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
        """first: the next step; later entries of older files are hidden."""
        folder.mkdir(exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._file = io.Appended(path)
        self._events: dict[tuple[str, ...], Any] = {}
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends an event at once. The event object of the same names is reused: creating one takes a tenth of a
        millisecond."""
        names = tuple(values)
        if names not in self._events:
            # Names of sources need not be UTF-8.
            tags = [_printable(name) for name in names]
            self._events[names] = Event(summary=Summary(value=[Summary.Value(tag=tag) for tag in tags]))
        event = self._events[names]
        event.step, event.wall_time = step, time.time()
        for value, number in zip(event.summary.value, values.values()):
            value.simple_value = number
        self._add(event)

    def flush(self) -> None:
        """Does nothing: nothing is queued."""

    def close(self, failed: bool = False) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, event):
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + struct.pack("<I", masked_crc32c(length)) + data
                         + struct.pack("<I", masked_crc32c(data)))


class WeightsAndBiases:
    """A run of wandb, the same one at each start of a work directory. WANDB_MODE=offline needs no account."""

    def __init__(self, config: Config, workdir: str, identity: str):
        wandb = _package("wandb")
        local = working_files.scratch() if storage.is_remote(workdir) else workdir
        self.run = wandb.init(project="deepseek-jax", name=_name(workdir), dir=local, id=identity, resume="allow",
                              config=as_dict(config), settings=wandb.Settings(finish_timeout=FINISH))

    @staticmethod
    def check() -> None:
        """Raises wandb's exception if it cannot log in."""
        wandb = _package("wandb")
        online = wandb.setup().settings.mode not in ("offline", "dryrun", "disabled")
        if online and not wandb.login(prompt=False, verify=True):
            raise ConfigError("train.tracker='wandb' has no account; wandb login, set WANDB_API_KEY, or take "
                              "WANDB_MODE=offline.")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Steps that an earlier start has logged are not changed."""
        self.run.log({_printable(name): x for name, x in values.items()}, step=step)

    def flush(self) -> None:
        """Does nothing: wandb sends in a separate process."""

    def close(self, failed: bool = False) -> None:
        """Waits until wandb has everything, for FINISH seconds."""
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, the same one at each start: at MLFLOW_TRACKING_URI, or in WORKDIR/mlflow.db."""

    def __init__(self, config: Config, workdir: str, identity: str):
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.absolute(workdir)}/mlflow.db"
        self.client, self.metric = MlflowClient(uri), Metric
        experiment = self.client.get_experiment_by_name("deepseek-jax")
        experiment = experiment.experiment_id if experiment else self.client.create_experiment("deepseek-jax")
        old = self.client.search_runs([experiment], f"tags.identity = '{identity}'", max_results=1)
        tags = {"identity": identity, "workdir": _printable(storage.absolute(workdir))}
        run = old[0] if old else self.client.create_run(experiment, tags=tags, run_name=_name(workdir))
        self.run_id, self.seen = run.info.run_id, {}
        if old:
            self.client.update_run(self.run_id, status="RUNNING")
        for name in sorted(run.data.metrics):
            kind = name.partition("/")[0]
            if kind not in self.seen or name == f"{kind}/loss":  # all of a kind have the same steps, except for nulls
                self.seen[kind] = max(m.step for m in self.client.get_metric_history(self.run_id, name))

    @staticmethod
    def check(workdir: str) -> None:
        """Raises ConfigError, or MLflow's exception if its server does not answer."""
        _package("mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and storage.is_remote(workdir):
            raise ConfigError("train.tracker='mlflow' with a work directory in a bucket needs a server; set "
                              "MLFLOW_TRACKING_URI.")
        if uri is None or uri.startswith("sqlite"):
            for package in ("sqlalchemy", "alembic"):  # not all builds of MLflow include them
                if importlib.util.find_spec(package) is None:
                    raise ConfigError(f"train.tracker='mlflow' needs the Python package {package} to write a file; "
                                      "pip install -e '.[mlflow]', or set MLFLOW_TRACKING_URI.")
        else:
            from mlflow.tracking import MlflowClient

            MlflowClient(uri).search_experiments(max_results=1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Steps that an earlier start has logged are not changed."""
        kind = next(iter(values), "").partition("/")[0]
        if step <= self.seen.get(kind, -1):
            return
        now, named = int(1000 * time.time()), [(re.sub(r"[^\w\-. :/]", "_", name), x) for name, x in values.items()]
        for i in range(0, len(named), 1000):  # MLflow's limit per call
            self.client.log_batch(self.run_id, [self.metric(name, x, now, step) for name, x in named[i:i + 1000]])

    def flush(self) -> None:
        """Does nothing: nothing is queued."""

    def close(self, failed: bool = False) -> None:
        """Marks the run as ended."""
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class Prometheus:
    """The latest scalars in a text file, for the textfile collector of Prometheus' node exporter."""

    EVERY = 1.0  # seconds between two files

    def __init__(self, path: str, workdir: str):
        self.path, self.label = path, _label(storage.absolute(workdir))
        self.values: dict[str, float] = {}
        self.written, self.refused = 0.0, False

    @staticmethod
    def check(path: str, workdir: str) -> None:
        """Raises OSError if the file cannot be created."""
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.isdir(path):
            raise IsADirectoryError("it is a folder")
        if os.path.isdir(folder) or folder != os.path.abspath(workdir):  # the run creates the folder
            tempfile.TemporaryFile(dir=folder).close()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars of layers are skipped."""
        self.values |= {"step": step, **{k: v for k, v in values.items() if not k.startswith("experts/")}}
        if time.monotonic() - self.written > self.EVERY:
            self.flush()

    def flush(self) -> None:
        """Replaces the file. A disk error is reported once: a later write may succeed."""
        lines = {}
        for name, value in self.values.items():
            metric, _, source = name.partition("loss/")
            metric = "deepseek_jax_" + re.sub(r"\W", "_", metric + "loss" * bool(source), flags=re.ASCII)
            label = f'workdir="{self.label}"' + (f',source="{_label(source)}"' if source else "")
            lines.setdefault(metric, []).append(f"{metric}{{{label}}} {value!r}\n")
        self.written = time.monotonic()
        try:
            io.write_text(self.path, "".join(f"# TYPE {metric} gauge\n" + "".join(of) for metric, of in lines.items()))
        except OSError as error:
            if not self.refused:
                self.refused = True
                _say(f"train.prometheus={self.path!r} is not written: {_line(error)}")

    def close(self, failed: bool = False) -> None:
        """Leaves the last file in place."""
        self.flush()


def make_trackers(config: Config, workdir: str, resumes: bool = False) -> list[Tracker]:
    """The trackers that the config asks for. resumes: the run continues, and stays the same one in a tracker.

    Raises ConfigError for a tracker that cannot start.
    """
    made: list[Tracker] = []
    if config.train.tracker is not None:
        kind = {"wandb": WeightsAndBiases, "mlflow": MLflow}[config.train.tracker]
        with _one_line(config.train.tracker):
            made.append(kind(config, workdir, _identity(workdir, resumes)))
    if config.train.prometheus is not None:
        made.append(Prometheus(config.train.prometheus, workdir))
    return made


def check_trackers(config: Config, workdir: str) -> None:
    """Raises ConfigError for a tracker that is not installed, refuses the login, or cannot be written to."""
    if config.train.tracker is not None:
        check = WeightsAndBiases.check if config.train.tracker == "wandb" else lambda: MLflow.check(workdir)
        with _one_line(config.train.tracker):
            _within(check)
    if config.train.prometheus is not None:
        try:
            Prometheus.check(config.train.prometheus, workdir)
        except OSError as error:
            raise ConfigError(f"train.prometheus={config.train.prometheus!r} cannot be written "
                              f"({error.strerror or error}); take a file in a folder that is there, or "
                              "None.") from error


@contextlib.contextmanager
def _one_line(name):
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # packages may raise anything
        raise ConfigError(f"train.tracker={name!r} cannot be used: {_line(error)}; mend that, or take None.") from error


def _within(call):
    """Calls it, with a limit of `ANSWER` seconds: packages retry for minutes."""
    found = []

    def work():
        try:
            call()
        except BaseException as error:
            found.append(error)
        else:
            found.append(None)

    thread = threading.Thread(target=work, name="tracker", daemon=True)
    thread.start()
    thread.join(ANSWER)
    if not found:
        raise TimeoutError(f"no answer within {ANSWER:g} seconds")
    if found[0] is not None:
        raise found[0]


def _identity(workdir, resumes) -> str:
    """The id of a run in its tracker, which stays when the work directory is moved; a new run gets a new id."""
    path = os.path.join(workdir, "tracker.json")
    if resumes and storage.is_file(path):
        with contextlib.suppress(ValueError):
            found = io.read_json(path)
            if isinstance(found, dict) and re.fullmatch("[0-9a-f]{16}", str(found.get("run"))):
                return found["run"]
    drawn = uuid.uuid4().hex[:16]
    io.write_json(path, {"run": drawn})
    return drawn


def _name(workdir):
    return _printable(os.path.basename(storage.absolute(workdir).rstrip("/")))


def _printable(name):
    """Paths need not be UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def _label(value):
    return _printable(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _line(error):
    return " ".join(str(error).split())[:300].removesuffix(".") or type(error).__name__


def _say(words):
    print(f"note: {words}.", file=sys.stderr, flush=True)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(f"train.tracker={name!r} needs the Python package {name}; pip install -e '.[{name}]', or "
                          "take None.") from None
