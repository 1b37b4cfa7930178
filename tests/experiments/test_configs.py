"""Every config file is a run that can at least be traced: its whole optimizer step, at full size, without memory."""

import contextlib
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import deepseek_jax.configs
from deepseek_jax.config import PRESETS, as_dict, load_config
from deepseek_jax.pipeline.model import check
from deepseek_jax.scale.compile import targets
from deepseek_jax.scale.compile.aot import config_of
from deepseek_jax.scale.compile.aot_forward import PROGRAMS
from deepseek_jax.training.base import frozen_shapes
from deepseek_jax.training.sample import continue_prompt
from deepseek_jax.training.step import eval_step, init_state, train_step
from experiments.scale import agreement
from tests.parallel import meshes

FILES = sorted((pathlib.Path(__file__).resolve().parents[2] / "experiments" / "configs").glob("*.py"))

# Configs of a machine -> the reports of their programs, in experiments/scale.
COMPILED = {"v3_671b_h100_2048": "v3_671b_h100_2048_report", "v3_671b_v5p_2048": "v3_671b_v5p_8x16x16_bf16",
            "v2_lite_16b_h100_8": "v2_lite_16b_h100_8"}

# One of each kind of step; the others are slow.
TRACED = ("tiny", "v2_lite_16b", "v2_lite_16b_h100_8", "v3_671b", "v3_671b_h100_2048", "v3_2_671b", "lora")


def test_every_config_of_the_package_has_a_file_here_and_every_preset_is_one():
    inside = pathlib.Path(deepseek_jax.configs.__file__).parent.glob("*.py")
    assert {path.stem for path in FILES} == {path.stem for path in inside} - {"__init__"} > set(PRESETS)


@pytest.mark.parametrize("path", [path if path.stem in TRACED else pytest.param(path, marks=pytest.mark.slow)
                                  for path in FILES], ids=lambda path: path.stem)
def test_a_step_keeps_the_shape_of_its_state(path, tmp_path):
    overrides = []
    if not path.stem.startswith((*PRESETS, "problems")):  # it takes the model of a run
        (tmp_path / "config.json").write_text(json.dumps(as_dict(load_config("tiny"))))
        named = {"distill": ("distill",), "distill_on_policy": ("init", "distill")}.get(path.stem, ("init",))
        overrides = [f"--config.{section}.from={tmp_path}" for section in named]
    config = load_config(str(path), overrides)
    shape = (config.train.accumulation_steps, config.train.batch_size // config.train.accumulation_steps,
             config.train.sequence_length + 1)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
             "segment_ids": jax.ShapeDtypeStruct(shape, jnp.int32), "active": jax.ShapeDtypeStruct((), jnp.int32)}
    state = jax.eval_shape(functools.partial(init_state, config))
    base = frozen_shapes(config)["params"] if config.lora.rank is not None else None
    check(config)
    with meshes.without_devices(config.mesh) if config.mesh.devices > 1 else contextlib.nullcontext():
        after, metrics = jax.eval_shape(functools.partial(train_step, config), state, batch, base)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics.loss.shape == ()


@pytest.mark.parametrize("name", ["v2_lite_16b_h100_8", "v3_671b_h100_2048",
                                  pytest.param("v3_671b_v5p_2048", marks=pytest.mark.slow)])
def test_evaluation_and_the_sample_of_a_machine_keep_nothing_but_sums_and_tokens(name):
    config = load_config(name)
    state, train = jax.eval_shape(functools.partial(init_state, config)), config.train
    rows = train.batch_size // train.accumulation_steps, train.sequence_length + 1
    micro = {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in (
        ("tokens", jnp.int32), ("weights", jnp.float32), ("segment_ids", jnp.int32))}
    prompt, scalar = jax.ShapeDtypeStruct((128,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with meshes.without_devices(config.mesh):
        sums = jax.eval_shape(functools.partial(eval_step, config), state.params, state.router, micro)
        made_T = jax.eval_shape(functools.partial(continue_prompt, config), state.params, state.router, prompt, scalar,
                                scalar)

    assert sums.counts["bias"].shape == (config.model.num_moe_layers, config.model.num_experts)
    assert sums.losses.nats.shape == () and made_T == prompt


def program_of(config):
    """All of a config that the program of its steps is made of, but constants such as a learning rate, and the
    tables of a pipeline's ramp, which were not compiled."""
    train, balance = config.train, config.balance
    return {"model": config.model, "mesh": config.mesh, "pipeline": config.pipeline, "lora": config.lora,
            "batch": (train.batch_size, train.accumulation_steps, train.sequence_length, config.data.mask_documents),
            "averages": train.ema_decay > 0, "moments": config.optimizer.moment_dtype, "chunk": train.loss_chunk,
            "losses": (balance.sequence_loss_weight > 0, balance.aux_loss_weight > 0, balance.bias_rule)}


@pytest.mark.parametrize(("name", "report"), COMPILED.items())
def test_a_config_of_a_machine_is_the_program_that_was_compiled_for_it(name, report):
    report = agreement.reports()[report]
    config, compiled = load_config(name), config_of(*agreement.described(report))

    assert program_of(config) == program_of(compiled)
    assert report["fits"] and report["devices"] == config.mesh.devices == targets.count(report["target"])
    assert report["planned"]["moments"] == report["planned"]["masters"]  # two of two bytes each


@pytest.mark.parametrize("program", PROGRAMS)
def test_evaluation_and_the_sample_of_the_report_s_run_were_compiled_for_it_and_fit(program):
    report = json.loads((pathlib.Path(agreement.HERE) / f"v3_671b_h100_2048_{program}.json").read_text())

    assert program_of(config_of(*agreement.described(report))) == program_of(load_config("v3_671b_h100_2048"))
    assert report["program"] == program and report["fits"] and report["bytes_per_device"] < 80e9
    assert report["bytes"]["moments"] > 1e9


def test_the_ramp_of_the_report_s_run_goes_up_in_pairs_of_micro_batches():
    config = load_config("v3_671b_h100_2048")
    ramp = [config.microbatches_at(step) for step in range(0, 12_600, 10)]

    assert ramp[0] == 32 and ramp[-1] == 120 and set(ramp) == set(range(32, 121, 2)) and ramp == sorted(ramp)
    assert config.sequences_at(0) == 4096 and config.sequences_at(12_480) == 15_360
    assert config.sequences_before(12_480) * 4096 == pytest.approx(469e9, rel=0.1)
