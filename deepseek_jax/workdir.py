"""A run's folder: who owns it, what it was configured as, and the model that it holds.

    config.json  tokenizer.json  corpus.json  metrics.jsonl  expert_load/  tensorboard/  checkpoints/  cache/  *.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock

from deepseek_jax import io
from deepseek_jax.config import (
    Config,
    ConfigError,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    PipelineConfig,
    as_dict,
    freeze,
)

if TYPE_CHECKING:
    from deepseek_jax.data.tokenizer import Tokenizer


@contextlib.contextmanager
def alone_in(workdir: str) -> Iterator[None]:
    """Inside, no other process trains in this work directory. Raises ConfigError where one does already.

    The kernel, or the server of a shared disk, lets go of the lock when its holder ends, however it ends.
    """
    os.makedirs(workdir, exist_ok=True)
    holder = pathlib.Path(workdir) / ".holder"
    try:
        lock = filelock.FileLock(os.path.join(workdir, ".lock"), timeout=0).acquire()
    except filelock.Timeout:
        raise ConfigError(f"{workdir} is being trained by another process{_holder(holder)}; wait for it, stop it, or "
                          "take another --workdir.") from None
    except NotImplementedError:  # a file system without locks
        lock = contextlib.nullcontext()
    with lock:
        io.write_json(holder, {"host": socket.gethostname(), "pid": os.getpid(),
                               "since": time.strftime("%Y-%m-%d %H:%M:%S %z")})
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def _holder(path):
    """" (process 7 of host a, since ...)", where the holder of the lock has said so."""
    said = _object(str(path))
    return f" (process {said['pid']} of {said['host']}, since {said['since']})" if len(said) == 3 else ""


def claim_workdir(config: Config, workdir: str) -> None:
    """Writes the config into a work directory that has none, or no checkpoint yet."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists() or not _has_checkpoint(workdir):
        path.parent.mkdir(parents=True, exist_ok=True)
        io.write_json(path, as_dict(config))


def _check_name(workdir):
    from deepseek_jax.checkpoint.manifest import check_name

    check_name(workdir)


def _has_checkpoint(workdir):
    from deepseek_jax.checkpoint.manifest import steps

    return bool(steps(pathlib.Path(workdir) / "checkpoints"))


def check_workdir(config: Config, workdir: str) -> None:
    """Raises ConfigError for a name that cannot hold checkpoints, and when one there is of another config; the message
    lists the differences."""
    _check_name(workdir)
    if not os.path.lexists(os.path.join(workdir, "config.json")) or not _has_checkpoint(workdir):
        return
    ours, theirs = (as_dict(_what_a_run_depends_on(c)) for c in (config, load_workdir_config(workdir)))
    differences = _differences(ours, theirs)
    if differences:
        raise ConfigError(f"{workdir} holds a run with another config: {'; '.join(differences)}; take that config "
                          f"or another --workdir, where --config.init.from={workdir} starts with this run's weights.")


def _what_a_run_depends_on(config: Config) -> Config:
    """A run may continue on another mesh, and end with another sample."""
    train = dataclasses.replace(config.train, sample_prompt="", sample_tokens=0)
    return dataclasses.replace(config, mesh=MeshConfig(), pipeline=PipelineConfig(), train=train)


def load_workdir_config(workdir: str) -> Config:
    """The config of a run. Raises ConfigError when the directory holds none."""
    path = pathlib.Path(workdir) / "config.json"
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not the config of a run; take another --workdir.")
    if not path.is_file():
        raise ConfigError(f"{workdir} holds no config.json; give the --workdir of a run.")
    _check_name(workdir)
    try:
        saved = io.read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it, or take another --workdir.") from error
    if isinstance(saved, dict) and "model_type" in saved:
        raise ConfigError(f"{workdir} is a Hugging Face checkpoint; take --hf {workdir}, or make a work directory of "
                          f"it with python -m deepseek_jax.convert from-hf {workdir} RUN.")
    return freeze(saved)


def _differences(ours, theirs, prefix=""):
    out = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} is {b!r} there, {a!r} here")
    return out


def check_speaks(config: Config, folder: str) -> None:
    """Raises ConfigError for the config of a reward model, whose weights no longer write text."""
    if config.preference.objective == "reward":
        raise ConfigError(f"{folder} is a reward model, which scores answers and writes none: "
                          f"--config.rollout.reward=model:{folder} is what it is for; take the run that it began "
                          f"from, {config.init.from_}.")


class LoadedRun(NamedTuple):
    """A checkpoint of a run. variables: collections params and router."""

    config: Config
    variables: dict[str, Any]
    step: int


def load_run(workdir: str, ema: bool = False, step: int | None = None) -> LoadedRun:
    """A run's config (on one device here) and variables; with `ema` the moving average of its weights. Adapters are
    merged into their base.

    Args:
      step: of the checkpoint; None: the newest undamaged one.
    Raises:
      ConfigError: no run or no such checkpoint there, no moving average in it, or a reward model.
    """
    from deepseek_jax.checkpoint.adapters import restore_weights  # jax and Orbax: for those who read arrays

    config = dataclasses.replace(load_workdir_config(workdir), mesh=MeshConfig())
    check_speaks(config, workdir)
    variables, step = restore_weights(workdir, ema=ema, step=step)
    if not variables["params"]:
        raise ConfigError(f"the run in {workdir} keeps no moving average; train with --config.train.ema_decay=0.999.")
    return LoadedRun(dataclasses.replace(config, lora=LoraConfig()), variables, step)


class LoadedModel(NamedTuple):
    """A model to generate with. variables: collections params and router."""

    cfg: ModelConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer


def load(folder: str, ema: bool = False, step: int | None = None, hf: bool | None = None,
         on_host: bool = False) -> LoadedModel:
    """The model of a run's folder, or of a Hugging Face checkpoint's. ema, step: of a run, as in `load_run`.

    Args:
      hf: whether it is a Hugging Face checkpoint; None: its config.json shows.
      on_host: leave the variables in the host's memory, as NumPy arrays, for an engine to move a layer at a time.
    Raises:
      ConfigError: nothing usable there, or a tokenizer that does not fit.
    """
    from deepseek_jax.data.tokenizer import Tokenizer

    folder = os.path.expanduser(folder)
    vocabulary = os.path.join(folder, "tokenizer.json")
    hf = is_hf_checkpoint(folder) if hf is None else hf
    if hf:
        if ema or step is not None:
            raise ConfigError(f"{folder} is a Hugging Face checkpoint, which holds no moving average and no steps; "
                              "ask for neither.")
        Tokenizer.load(vocabulary)  # before gigabytes are read
    from deepseek_jax.checkpoint.arrays import as_numpy

    read = as_numpy(_read) if on_host else _read
    cfg, variables = read(folder, hf, ema, step)
    return LoadedModel(cfg, variables, Tokenizer.load(vocabulary, cfg.vocab_size))


def _read(folder, hf, ema, step):
    if hf:
        from deepseek_jax.interop import load_hf

        return load_hf(folder)
    run = load_run(folder, ema, step)
    return run.config.model, run.variables


def is_hf_checkpoint(folder: str) -> bool:
    """Whether the config.json there is one of Hugging Face's: it names its architecture."""
    return bool({"model_type", "architectures"} & _object(os.path.join(folder, "config.json")).keys())


def most_positions(folder: str) -> int | None:
    """How many tokens, of prompt and answer together, the model in a folder was made for; None: nothing there says.

    That is max_position_embeddings of a Hugging Face checkpoint, or of the one that a work directory was converted
    from; of any other run what its YaRN extends the context to.
    """
    from deepseek_jax.interop.convert import LAYOUT

    own = _object(os.path.join(folder, "config.json"))
    source = _object(os.path.join(folder, LAYOUT)).get("config", own)
    within = source.get("text_config")  # of a model that has a vision model too
    stated = (within if isinstance(within, dict) else source).get("max_position_embeddings")
    if type(stated) is int and stated > 0:
        return stated
    yarn = freeze(own).model.yarn if "model" in own else None
    return None if yarn is None else int(yarn.factor * yarn.original_length)


def _object(path: str) -> dict[str, Any]:
    """A file's JSON object; {} where there is none."""
    try:
        found = io.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
