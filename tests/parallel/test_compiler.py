"""Options of XLA's compilers: set where they are known, and never against the user."""

import pytest

from deepseek_jax.parallel.compiler import GPU, compiler_options


def test_gpus_get_all_of_them_and_cpus_tpus_and_old_versions_none(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    assert compiler_options("gpu", (0, 12, 0)) == compiler_options("cuda", (0, 11, 2)) == GPU
    for platform, version in (("cpu", (0, 12, 0)), ("tpu", (0, 12, 0)), ("gpu", (0, 11, 1))):
        assert compiler_options(platform, version) == {}


@pytest.mark.parametrize("flag", ["--xla_gpu_enable_latency_hiding_scheduler=false",
                                  "--xla_gpu_enable_latency_hiding_scheduler"])
def test_what_the_user_says_wins(monkeypatch, flag):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_enable_fast_min_max=true {flag}")

    left = compiler_options("gpu", (0, 12, 0))
    assert left == {name: value for name, value in GPU.items() if "latency_hiding" not in name} and len(left) == 3
