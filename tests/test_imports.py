"""The cost and effect of an import: few packages are loaded, and the state of the process is unchanged."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("deepseek_jax", "kernels_pallas", "experiments", "benchmarks", "examples", "notebooks")


def loaded(statement):
    """The modules that are loaded after a statement in a new interpreter."""
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_loads_no_jax():
    modules = loaded("import deepseek_jax; deepseek_jax.ModelConfig")
    assert "deepseek_jax.config" in modules
    assert not modules & {"jax", "flax", "ml_collections", "matplotlib"}


def test_only_a_config_file_needs_ml_collections():
    code = ("import sys; sys.modules['ml_collections'] = None; from deepseek_jax.config import Config, model_config; "
            "import deepseek_jax.training.step, deepseek_jax.serving.engine, deepseek_jax.train; "
            "import deepseek_jax.generate, deepseek_jax.serve, benchmarks.train_step; "
            "print(Config(model=model_config('small')).train.steps)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "1000", done.stderr


def test_generating_loads_neither_training_nor_what_draws_and_logs_it():
    modules = loaded("import deepseek_jax.generate, deepseek_jax.serving.generation, deepseek_jax.workdir")
    assert "deepseek_jax.serving.engine" in modules
    assert not {m for m in modules if m.startswith(("deepseek_jax.training", "matplotlib", "tensorboardX"))}


def test_the_public_names_are_there():
    code = "import deepseek_jax as d; [getattr(d, name) for name in d.__all__]; print(d.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# Third-party packages are imported first: their effects on the process do not count.
WATCH = """
import importlib.util, json, logging, os, pathlib, signal, sys, threading, warnings
import absl.logging, chex, flax.linen, grain, httpx, jax, jax.numpy, matplotlib.figure, ml_collections, numpy, optax
import scipy.stats
import orbax.checkpoint, safetensors.numpy, starlette.applications, tensorboardX, tensorstore, tokenizers, tqdm, uvicorn
import jax.experimental.pallas.mosaic_gpu, jax.experimental.pallas.tpu, matplotlib.backends.backend_agg
import jax.experimental.multihost_utils, jax.experimental.layout, jax.experimental.topologies
if importlib.util.find_spec("lm_eval"):
    import lm_eval.api.model, lm_eval.tasks


def state():
    loggers = {name: logging.getLogger(name) for name in (None, "absl", "asyncio", "jax", "orbax")}
    return {
        "environment": dict(os.environ),
        "hooks": [sys.unraisablehook, sys.excepthook, sys.displayhook, threading.excepthook],
        "logging": {name: (log.level, log.handlers[:], log.filters[:]) for name, log in loggers.items()},
        "jax.config": dict(jax.config.values),
        "warnings": warnings.filters[:],
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "matplotlib": dict.__getitem__(matplotlib.rcParams, "backend"),
        "path": sys.path[:],
    }


for module in sys.argv[1:]:
    before = state()
    try:
        importlib.import_module(module)
        changed = [name for name, now in state().items() if now != before[name]]
    except ModuleNotFoundError as error:
        changed = [] if error.name in ("torch", "transformers", "libtpu", "nbformat", "lm_eval") else [repr(error)]
    except BaseException as error:
        changed = [repr(error)]
    print(json.dumps([module, changed]), flush=True)
"""


def changes(modules, folder=ROOT):
    """{module: what was changed by importing it and our modules that it needs}, for modules that changed something."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WATCH, *modules], capture_output=True, text=True,
                          cwd=folder)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found.keys() == set(modules), done.stderr[-2000:]
    return {module: changed for module, changed in found.items() if changed}


def test_importing_a_module_changes_nothing():
    files = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")) if p.name != "__main__.py"]
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files]
    assert len(modules) > 150
    assert changes(modules) == {}


def test_a_module_that_changes_something_is_found(tmp_path):
    sources = {"environment": "import os; os.environ['X_FLAG'] = '1'",
               "hooks": "import sys; sys.unraisablehook = print",
               "logging": "import logging; logging.getLogger('absl').addFilter(lambda record: True)",
               "jax.config": "import jax; jax.config.update('jax_enable_x64', not jax.config.jax_enable_x64)",
               "matplotlib": "import matplotlib; matplotlib.use('svg')"}
    for i, source in enumerate(sources.values()):
        (tmp_path / f"made_up_{i}.py").write_text(source)
    assert changes([f"made_up_{i}" for i in range(len(sources))], tmp_path) == {
        f"made_up_{i}": [name] for i, name in enumerate(sources)}
