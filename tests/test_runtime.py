"""Settings of a process: a per-user cache of compiled programs, and machines that lack features of Linux."""

import ctypes
import os
import pathlib
import subprocess
import sys

import pytest

from deepseek_jax import runtime

NAMES = ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """An environment without cache settings, and with a separate cache folder."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return monkeypatch


def test_compiled_programs_are_kept_and_it_is_said_once(environment, tmp_path, capsys):
    for _ in range(2):
        runtime.keep_compiled_programs()
        assert os.environ[NAMES[0]] == str(tmp_path / "deepseek-jax" / "compiled")
        del os.environ[NAMES[0]]
    said = capsys.readouterr().err
    assert said.count("Compiled programs are kept in") == 1 and "up to 4 GB" in said
    assert int(os.environ[NAMES[1]]) == 4 * 2**30


def test_a_cache_of_the_user_s_wins(environment, tmp_path):
    environment.setenv(NAMES[0], "elsewhere")
    runtime.keep_compiled_programs()
    assert os.environ[NAMES[0]] == "elsewhere" and not list(tmp_path.iterdir())


def test_without_a_home_nothing_is_kept(environment, tmp_path):
    (tmp_path / "file").write_text("")
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    runtime.keep_compiled_programs()
    assert NAMES[0] not in os.environ


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    code = ("from deepseek_jax import runtime; runtime.prepare(); import jax; "
            "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0); "
            "jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64)))")
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    found = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=environment | {"XDG_CACHE_HOME": str(tmp_path)})
        found.append({p.name for p in pathlib.Path(tmp_path, "deepseek-jax", "compiled").glob("*-cache")})
    assert found[0] == found[1] and found[0]


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])  # macOS, no library, Windows
def test_without_glibc_the_allocator_stays_as_it_is(monkeypatch, error):
    def no_library(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    runtime.reuse_memory()


def test_a_missing_package_is_one_line_with_its_remedy():
    code = ("import sys; sys.modules['jax'] = None; sys.argv = ['evaluate', '--workdir', 'x']\n"
            "from deepseek_jax import cli, evaluate; cli.run(evaluate.main)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the Python package jax is missing in ")
    assert "pip install -e ." in done.stderr


def test_names_that_are_no_utf8_are_printed():
    code = "from deepseek_jax import cli; cli.run(lambda: print('caf\\udce9 \u2603'))"
    for encoding, printed in (("utf-8", "caf\\udce9 \u2603\n"), ("latin-1", "caf\\udce9 \\u2603\n")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": encoding})
        assert (done.returncode, done.stdout.decode(encoding)) == (0, printed)


def test_too_little_memory_is_one_line():
    code = "import numpy; from deepseek_jax import cli; cli.run(lambda: numpy.ones(2**57))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the memory of this machine is too small (Unable to")
    assert done.stderr.count("\n") == 1


def test_a_file_of_xla_flags_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    runtime.tune_xla()
    assert os.environ["XLA_FLAGS"] == "flags.txt"
