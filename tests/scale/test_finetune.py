"""Memory and time of fine-tuning on one device: against the trainer's own state, and for consistency."""

import dataclasses
import math

import jax
import pytest

from deepseek_jax.config import Config, ConfigError, ModelConfig, OptimizerConfig, model_config
from deepseek_jax.scale import finetune, memory
from deepseek_jax.scale.finetune import Step
from deepseek_jax.scale.hardware import hardware
from deepseek_jax.training.step import init_state

LITE, H100 = model_config("v2_lite_16b"), hardware("h100")


def size(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["tiny", "v2_lite_16b"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_masters_and_moments_are_those_of_the_trainer(name, moments):
    c = model_config(name)
    state = jax.eval_shape(lambda: init_state(Config(model=c, optimizer=OptimizerConfig(moment_dtype=moments))))

    found = memory.state(c, finetune.layout(c, Step(moments=moments)))

    assert found["masters"] == size(state.params)
    assert found["moments"] == size(state.opt_state) - 2 * 4  # Adam and the schedule count steps
    assert not found["averages"] and not state.ema


def test_by_default_the_plan_has_the_trainer_s_moments():
    assert Step().moments == OptimizerConfig().moment_dtype


def test_lite_needs_16_bytes_a_parameter_before_any_token():
    """Masters, two moments and gradients, all float32: 251.3 GB of the published 15,706,484,224 parameters."""
    row = finetune.finetune(LITE, H100, Step())[-1]

    assert sum(row.bytes[name] for name in finetune.STATE) == 16 * 15_706_484_224
    assert not row.fits and row.longest == row.most_sequences == 0


@pytest.fixture(scope="module")
def small() -> tuple[ModelConfig, list[finetune.Finetuned]]:
    c = model_config("small")
    return c, finetune.finetune(c, hardware("t4"), Step(8, 8, 2048))


def test_a_policy_that_keeps_less_fits_more(small):
    none, report, full = small[1]

    assert [row.remat for row in small[1]] == ["none", "report", "full"]
    assert none.total > report.total > full.total
    assert none.longest < report.longest < full.longest and none.most_sequences <= full.most_sequences


def test_what_is_said_to_fit_fits_and_the_next_does_not(small):
    c, rows = small
    for row in rows:
        model = dataclasses.replace(c, remat=row.remat)
        needed = lambda step, model=model: memory.bytes_per_device(model, finetune.layout(model, step), kernels=None)
        total = lambda step, needed=needed: sum(needed(step).values())
        assert total(Step(8, 8, row.longest)) <= row.usable < total(Step(8, 8, row.longest + finetune.UNIT))
        n = row.most_sequences
        assert total(Step(n, n, 2048)) <= row.usable < total(Step(n + 1, n + 1, 2048))


def test_accumulated_micro_batches_keep_the_activations_of_one(small):
    c, rows = small
    fewer = finetune.finetune(c, hardware("t4"), Step(8, 2, 2048))

    assert [4 * row.bytes["kept"] for row in fewer] == [row.bytes["kept"] for row in rows]
    assert fewer[0].bytes["gradients"] == 2 * rows[0].bytes["gradients"]  # of one micro-batch, and their sum


def test_what_does_not_fit_says_by_how_much_and_what_would():
    rows = finetune.finetune(LITE, H100, Step())
    line = finetune.instead(LITE, H100, Step(), rows)

    assert f"lacks {(rows[-1].total - 72e9) / 1e9:,.1f} GB with remat full" in line and "\n" not in line
    assert "251.3 GB" in line and "4 devices" in line and "LoRA" not in line


def test_a_step_that_is_too_large_says_what_of_it_would_fit():
    c, step = model_config("small"), Step(64, 64, 4096)
    rows = finetune.finetune(c, hardware("t4"), step)
    line = finetune.instead(c, hardware("t4"), step, rows)

    assert f"a context of {rows[-1].longest:,} tokens" in line and f"--rows {rows[-1].most_sequences}" in line


def test_sequences_that_do_not_fill_micro_batches_are_refused():
    with pytest.raises(ConfigError, match="take a multiple of 3"):
        finetune.finetune(model_config("small"), H100, Step(8, 3))
