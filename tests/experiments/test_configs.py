"""Every config file is a run that can at least be traced: its whole optimizer step, at full size, without memory."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import deepseek_jax.configs
from deepseek_jax.config import PRESETS, as_dict, load_config
from deepseek_jax.training.base import frozen_shapes
from deepseek_jax.training.step import init_state, train_step

FILES = sorted((pathlib.Path(__file__).resolve().parents[2] / "experiments" / "configs").glob("*.py"))

TRACED = ("tiny", "v2_lite_16b", "v3_671b", "v3_2_671b", "lora")  # one of each kind of step; the others are slow


def test_every_config_of_the_package_has_a_file_here_and_every_preset_is_one():
    inside = pathlib.Path(deepseek_jax.configs.__file__).parent.glob("*.py")
    assert {path.stem for path in FILES} == {path.stem for path in inside} - {"__init__"} > set(PRESETS)


@pytest.mark.parametrize("path", [path if path.stem in TRACED else pytest.param(path, marks=pytest.mark.slow)
                                  for path in FILES], ids=lambda path: path.stem)
def test_a_step_keeps_the_shape_of_its_state(path, tmp_path):
    overrides = []
    if path.stem not in PRESETS:  # it takes the model of a run
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
    after, metrics = jax.eval_shape(functools.partial(train_step, config), state, batch, base)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics.loss.shape == ()
