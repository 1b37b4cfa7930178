"""The environment of every test: a CPU as eight virtual devices, strict numerics, a cache of compiled programs.

It is set in environment variables before jax is imported, so that commands started by a test use the same settings.
Variables that are already set are kept, except for the XLA flags that the suite needs.
"""

import asyncio
import importlib.metadata
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

assert "jax" not in sys.modules, "jax is imported before tests/conftest.py could set its flags"

_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    # Eight devices on two cores wait long for each other; by default XLA treats that as a deadlock and aborts.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "600",
    # Tests compile far more than they compute: with LLVM's first level a training step compiles in 0.7 of the time, and
    # with 128-bit vectors instead of the commands' 512, in 0.7 of that.
    "--xla_backend_optimization_level": "1",
    "--xla_cpu_prefer_vector_width": "128",
}
if int(importlib.metadata.version("jaxlib").split(".")[1]) < 8:  # jax 0.7 aborts on unknown flags
    del _FLAGS["--xla_cpu_collective_call_terminate_timeout_seconds"]
_kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag.split("=")[0] not in _FLAGS]
os.environ["XLA_FLAGS"] = " ".join(_kept + [f"{name}={value}" for name, value in _FLAGS.items()])

_DEFAULTS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "0",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    # A bounded cache locks its files, an unbounded one does not: two workers may write the same entry.
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(4 * 2**30),
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    # Workers share the cores; otherwise each would start one thread per core, in XLA (NPROC) and in BLAS.
    _threads = str(max(1, (os.cpu_count() or 1) // _workers))
    _DEFAULTS |= {"NPROC": _threads, "OMP_NUM_THREADS": _threads, "OPENBLAS_NUM_THREADS": _threads}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
# Commands started by tests run from the checkout whatever their working directory is.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
sys.path.insert(0, str(ROOT))

from deepseek_jax import runtime  # noqa: E402

runtime.tune_xla()  # commands that a test starts and those it runs itself compute the same bits


def pytest_configure(config):
    """Property tests derive their examples only from the test's name, so that a failure is reproducible."""
    try:
        import hypothesis
    except ImportError:
        return
    hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=False)
    hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Clears compiled programs: each takes a dozen memory mappings, and beyond Linux's limit of 65,530 per process
    jaxlib ends with a segmentation fault."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def impatient(monkeypatch):
    """Clients of buckets (`tests.buckets`) retry without delay, and as often as by default."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *rest: sleep(0, *rest))
