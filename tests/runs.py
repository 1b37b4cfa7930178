"""Small runs of the commands on a made-up corpus, for tests of the files that a run leaves and of how it ends.

They run in this process if possible (importing JAX and its dependencies takes seconds), otherwise in a separate process
that can be killed.
"""

import atexit
import contextlib
import functools
import io
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np

from deepseek_jax import check, cli, compare, convert, evaluate, generate, prepare, runtime, storage, train
from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.manager import restore_items
from deepseek_jax.training.metrics import read_metrics

STEPS, EVERY = 30, 3  # of the config file below, and of its checkpoints
CONFIG = f"""
from deepseek_jax.config import default_config

def get_config():
    config = default_config("tiny")
    config.model.update(dict(
        vocab_size=288, d_model=32, num_layers=2, num_heads=2, q_rank=16, kv_rank=16, nope_head_dim=8, rope_head_dim=8,
        v_head_dim=8, dense_ffn_dim=32, expert_ffn_dim=16, num_experts=8, experts_per_token=2, num_groups=2,
        groups_kept=1, dtype="float32", attention_block=32))
    config.data.sources = (("CORPUS", 1.0),)
    config.data.validation_fraction = 0.2
    config.train.update(dict(steps={STEPS}, batch_size=4, accumulation_steps=2, ramp_from=2, ramp_until=0.2,
                             sequence_length=32, eval_every=10, eval_batches=1, checkpoint_every={EVERY}, ema_decay=0.9,
                             loss_chunk=64, sample_tokens=4,
                             sample_prompt="def "))
    config.optimizer.update(dict(learning_rate=1e-2, warmup=0.1))
    return config
"""
# The smallest model that trains: no experts, no MTP, one layer.
DENSE = ["--config.model.num_layers=1", "--config.model.mtp_depth=0", "--config.train.accumulation_steps=1",
         "--config.train.ramp_from=None", "--config.train.ema_decay=0"]
TIMINGS = ("tokens_per_second", "mfu", "seconds_data", "seconds_step", "seconds_write", "device_bytes_peak")
COMMANDS = {"train": train, "evaluate": evaluate, "compare": compare, "generate": generate,
            "prepare": prepare, "convert": convert, "check": check}


def write_corpus(folder: pathlib.Path, files=10):
    rng = np.random.default_rng(0)
    words = ["def", "return", "import", "class", "self", "value", "other", "print", "range", "while", "None", "lambda"]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = (f"{'    ' * rng.integers(3)}{rng.choice(words)}_{rng.choice(words)}({rng.integers(2000)}):\n"
                 for _ in range(20 + i))
        (folder / f"{i}.py").write_text("".join(lines))


def write_config(folder: pathlib.Path) -> str:
    """Writes the config file, and its corpus next to it."""
    write_corpus(folder / "corpus")
    (folder / "config.py").write_text(CONFIG.replace("CORPUS", str(folder / "corpus")))
    return str(folder / "config.py")


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def assert_error(self, *parts):
        """Checks for exit code 2 and a last line on stderr that begins with "error: " and contains these parts."""
        lines = self.err.strip().splitlines() or [""]
        assert self.code == 2 and lines[-1].startswith("error: "), self
        assert "Traceback" not in self.err + self.out, self
        assert sum(line.startswith("error: ") for line in lines) == 1, self
        for part in parts:
            assert part in lines[-1], self


def run(name: str, *arguments) -> Result:
    """`python -m deepseek_jax.NAME ARGUMENTS`, in this process."""
    root, out, err = logging.getLogger(), io.StringIO(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # pytest's handlers; the command installs its own
    try:
        with (mock.patch.object(sys, "argv", [name, *map(str, arguments)]), contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(err), mock.patch.object(runtime, "reuse_memory")):
            cli.run(COMMANDS[name].main)
    except SystemExit as end:
        return Result(end.code, out.getvalue(), err.getvalue())
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def start_training(config, workdir, *overrides, cwd=None) -> subprocess.Popen:
    """The same in a separate process."""
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "deepseek_jax.train", "--config", config, "--workdir", str(workdir),
                             *overrides], text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            cwd=cwd)


@functools.cache
def finished_run() -> tuple[str, pathlib.Path, Result]:
    """(config file, work directory, output) of one complete run; made once, must not be changed."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="finished-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = write_config(folder)
    return config, folder / "run", run("train", "--config", config, "--workdir", folder / "run")


def rows(workdir):
    """Every row of the metrics, without timings."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(workdir)]


def checkpoints(workdir):
    return manifest.steps(storage.as_path(workdir) / "checkpoints")


def final_bits(workdir):
    """All bits of the last state, and the loads of all steps."""
    items, step, _ = restore_items(workdir, ("step", "params", "opt_state", "router", "ema", "rng"))
    leaf = lambda x: np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    named = jax.tree_util.tree_leaves_with_path(items)
    loads = storage.as_path(workdir) / "expert_load" / "counts.int32"
    loads = storage.read_bytes(loads) if storage.is_file(loads) else b""  # of a dense model
    return step, loads, {jax.tree_util.keystr(path): leaf(x).tobytes() for path, x in named}


def assert_same_run(workdir, expected, leaves=30):
    assert rows(workdir) == rows(expected)
    (step, loads, bits), (step2, loads2, bits2) = final_bits(workdir), final_bits(expected)
    assert (step, bits.keys()) == (step2, bits2.keys()) and len(bits) > leaves
    assert [name for name in bits if bits[name] != bits2[name]] == []
    assert loads == loads2


def write_questions(path: pathlib.Path):
    path.write_text("\n".join(json.dumps({"prompt": f"value_{i} = ", "answer": f"return {i % 7}"}) for i in range(200)))
