"""Options of XLA's compilers: set where XLA knows them, and never overriding the user's."""

import pytest

from deepseek_jax.parallel.compiler import GPU, MEMORY, compiler_options


def test_gpus_get_all_of_them_and_cpus_tpus_and_old_versions_none(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)

    assert compiler_options("gpu", (0, 12, 0)) == compiler_options("cuda", (0, 11, 2)) == GPU
    for platform, version in (("cpu", (0, 12, 0)), ("tpu", (0, 12, 0)), ("gpu", (0, 11, 1))):
        assert compiler_options(platform, version) == {}


@pytest.mark.parametrize("flag", ["--xla_gpu_enable_latency_hiding_scheduler=false",
                                  "--xla_gpu_enable_latency_hiding_scheduler"])
def test_what_the_user_says_wins(monkeypatch, flag):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_enable_fast_min_max=true {flag}")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)

    left = compiler_options("gpu", (0, 12, 0))
    assert left == {name: value for name, value in GPU.items() if "latency_hiding" not in name} and len(left) == 2


def test_flags_in_a_file_win_too(monkeypatch, tmp_path):
    file = tmp_path / "flags"
    file.write_text("--xla_gpu_enable_latency_hiding_scheduler=false\n'--xla_dump_to=/tmp/x'\n")
    monkeypatch.setenv("XLA_FLAGS", str(file))

    assert "xla_gpu_enable_latency_hiding_scheduler" not in compiler_options("gpu", (0, 12, 0))
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "missing"))
    assert compiler_options("gpu", (0, 12, 0)) == GPU


def test_the_scheduler_may_use_the_memory_that_jax_has(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert MEMORY not in compiler_options("gpu", (0, 12, 0))  # XLA's own limit is jax's three quarters
    assert compiler_options("gpu", (0, 12, 0), memory=0.95)[MEMORY] == 119
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert compiler_options("gpu", (0, 12, 0))[MEMORY] == 112
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    assert MEMORY not in compiler_options("gpu", (0, 12, 0))
