"""The check at the start of a run on an accelerator: a kernel that differs from its twin ends the run in one line."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.config import ConfigError, FP8Config, MeshConfig, freeze
from deepseek_jax.fp8 import products
from deepseek_jax.model import grouped_matmul
from deepseek_jax.training import selfcheck
from tests.model import naive
from tests.parallel.meshes import on
from tests.parallel.test_dispatch import ragged_all_to_all

FP8 = {"model": naive.TINY, "fp8": {"enabled": True}}


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(selfcheck.jax, "default_backend", lambda: "gpu")


def test_on_a_cpu_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(selfcheck, "grouped_difference", lambda: pytest.fail("a CPU was checked"))
    selfcheck.check_device(freeze(FP8), None)


def test_products_that_are_their_twins_pass(accelerator):
    selfcheck.check_device(freeze(FP8), None)
    assert selfcheck.grouped_difference("ragged") < selfcheck.LARGEST


@pytest.mark.parametrize("spoil", [lambda y: y * 1.1, lambda y: y.at[0, 0].set(jnp.nan)])
def test_a_product_that_is_not_its_twin_ends_the_run_in_one_line(accelerator, monkeypatch, spoil):
    right = grouped_matmul.IMPLEMENTATIONS["cpu"]
    monkeypatch.setitem(grouped_matmul.IMPLEMENTATIONS, "cpu", lambda *args: spoil(right(*args)))
    named = r"^the experts' grouped product \(model.implementation='auto'\) is not its twin on"
    with pytest.raises(ConfigError, match=named) as e:
        selfcheck.check_device(freeze(FP8), None)
    said = str(e.value)
    assert len(said.splitlines()) == 1 and said.endswith("take another version of jax or of the driver.")


@pytest.mark.parametrize("asked", ["auto", "xla"])
def test_a_kernel_that_is_not_its_twin_names_xlas_own_program_which_is_checked_then(accelerator, monkeypatch, asked):
    monkeypatch.setattr(selfcheck.api, "chosen_here", lambda operation: "hopper")
    checked = []
    monkeypatch.setattr(selfcheck, "grouped_difference", lambda name: checked.append(name) or 0.5 * (name == "auto"))
    config = freeze({"model": naive.TINY | {"implementation": asked}})
    if asked == "auto":
        with pytest.raises(ConfigError, match=r"take --config.model.implementation=xla\.$"):
            selfcheck.check_device(config, None)
    else:
        selfcheck.check_device(config, None)
    assert checked == [asked]


def test_an_fp8_product_that_is_not_its_twin_names_the_reference(accelerator, monkeypatch):
    monkeypatch.setattr(selfcheck, "fp8_grouped_difference", lambda name: 0.5)
    with pytest.raises(ConfigError, match="take --config.fp8.implementation=reference"):
        selfcheck.check_device(freeze(FP8), None)


def test_the_checked_fp8_product_is_one_in_pairs_with_more_slices_than_are_on_the_way_at_once(monkeypatch):
    from tests.kernels import interpreter  # noqa: F401, I001 (skips where jax has no kernels)
    from kernels_pallas.hopper.fp8_matmul import TuningConfig

    seen, right = [], selfcheck.api.fp8_grouped_matmul
    monkeypatch.setattr(selfcheck.api, "fp8_grouped_matmul", lambda a, b, *args, **options: (
        seen.append(b[0].shape), right(a, b, *args, **options))[1])
    assert selfcheck.fp8_grouped_difference("reference") == 0
    (_, N, K), *_ = seen
    config = TuningConfig.of_groups(N)
    assert config.pair and K // 128 > config.stages_for(jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["hopper", "tpu"])
def test_fp8_kernels_that_a_cpu_does_not_have_are_refused_in_one_line(name):
    with pytest.raises(ConfigError) as e:
        selfcheck.check_device(freeze({"model": naive.TINY, "fp8": {"enabled": True, "implementation": name}}), None)
    said = str(e.value)
    assert said.startswith(f"fp8.implementation={name!r} needs ") and len(said.splitlines()) == 1
    assert said.endswith("fp8.implementation='reference' computes the same in plain jnp.")
    selfcheck.check_device(freeze({"model": naive.TINY, "fp8": {"enabled": False, "implementation": name}}), None)


def test_where_only_products_are_kernels_quantizers_are_chosen_by_the_device():
    recipe = FP8Config(enabled=True, implementation="tpu")
    assert products.quantize_activation(jnp.ones((1, 128), jnp.bfloat16), recipe).values.shape == (1, 128)
    assert products.of_quantizers(FP8Config(implementation="hopper")) == "hopper"


@pytest.mark.parametrize("wrong", [False, True])
def test_a_dispatch_whose_gradients_are_corrupt_names_the_flag_of_xla(accelerator, monkeypatch, wrong):
    calls = []

    def carry(*args, **options):
        calls.append(None)
        moved = ragged_all_to_all(*args, **options)
        if not wrong or len(calls) <= 2:  # to the experts and back; then the gradients, only in float32
            return moved
        return jax.lax.bitcast_convert_type(1.5 * jax.lax.bitcast_convert_type(moved, jnp.float32), moved.dtype)

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", carry)
    cfg = MeshConfig(local=4, buffers="ragged")
    with on(cfg):
        found = selfcheck.dispatch_difference(cfg)
    assert (found > selfcheck.LARGEST) == wrong
    config = freeze({"model": naive.TINY, "mesh": {"local": 4, "buffers": "ragged"}, "train": {"batch_size": 8}})
    monkeypatch.setattr(selfcheck, "dispatch_difference", lambda cfg: found)
    if wrong:
        with pytest.raises(ConfigError, match="xla_gpu_enable_latency_hiding_scheduler=false to XLA_FLAGS, or take"):
            selfcheck.check_device(config, jax.make_mesh((1,), ("x",)))
    else:
        selfcheck.check_device(config, jax.make_mesh((1,), ("x",)))
