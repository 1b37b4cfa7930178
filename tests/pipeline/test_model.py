"""The real model on a pipeline: losses, gradients and loads are those of the step without one."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, FP8Config, MeshConfig
from deepseek_jax.config.mesh import PipelineConfig
from deepseek_jax.model.router import update_bias
from deepseek_jax.pipeline import make_schedule
from deepseek_jax.pipeline.model import check, describe, slots, taken
from deepseek_jax.training.step import accumulate, eval_step
from tests import runs
from tests.model import naive
from tests.parallel.meshes import QUICKLY, T, batch_of, config_of, on, place_batch
from tests.precision import float64

ROWS = 16
V2 = dict(score="softmax", router_bias="none", normalize_gates=False, q_rank=None, num_dense_layers=0, mtp_depth=0)
FP8 = dict(fp8=FP8Config(enabled=True), num_dense_layers=0, mtp_depth=0)


@pytest.mark.parametrize("index", [[0], [0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 2, 4, 5], [5, 0, 0, 1]])
def test_rows_are_taken_by_slices_and_never_by_a_gather(index):
    a = np.arange(18.0).reshape(6, 3)
    take = functools.partial(taken, index_N=np.array(index))

    np.testing.assert_array_equal(take(jnp.asarray(a)), a[index])
    assert "gather" not in str(jax.make_jaxpr(take)(a))


def config(schedule="dualpipe", mesh=(4, 1, 1), microbatches=8, rounds=1, masked=False, **model):
    made = config_of(accumulation_steps=rounds, rows=ROWS, **(dict(num_layers=4, num_heads=4) | model))
    pipe, node, local = mesh
    return dataclasses.replace(made, mesh=MeshConfig(pipe=pipe, node=node, local=local),
                               pipeline=PipelineConfig(schedule, microbatches),
                               data=dataclasses.replace(made.data, mask_documents=masked))


@functools.cache
def variables(model):
    """Weights large enough for routing to matter, with biases that are not zero."""
    return naive.variables_of(model)


def batch(config):
    made = batch_of(config, 0)
    if config.data.mask_documents:  # a second document begins somewhere in each row
        starts = np.random.default_rng(3).integers(1, T, (*made["tokens"].shape[:2], 1))
        made["segment_ids"] = (np.arange(T + 1) >= starts).astype(np.int32) + 1
    return made


def compiled(config, options=QUICKLY):
    """-> (the compiled accumulation of a step, its arguments)"""
    model = dataclasses.replace(config.model, remat="none")
    arguments = variables(model)["params"], variables(model).get("router", {}), place_batch(config, batch(config))
    with on(config.mesh):
        run = jax.jit(lambda params, router, batch: accumulate(config, params, router, batch, jnp.int32(0)),
                      compiler_options=options)
        return run.lower(*arguments).compile(), arguments


@functools.cache
def accumulated(config):
    """-> (gradients, sums) on the host."""
    run, arguments = compiled(config)
    shardings = jax.tree.map(lambda x: x, run.input_shardings[0])
    return jax.device_get(run(*jax.device_put(arguments, shardings)))


def alone(config):
    """The same step on one device."""
    model = dataclasses.replace(config.model, remat="none")
    return accumulated(dataclasses.replace(config, model=model, mesh=MeshConfig(), pipeline=PipelineConfig()))


def distance(a, b):
    """1 - cos of two arrays; 0 if both are zero."""
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return 0 if not a.any() and not b.any() else 1 - 2 * (a @ b) / (a @ a + b @ b)


def assert_same_step(config, rtol, expected=None):
    (grads, sums), (same, expected) = accumulated(config), expected or alone(config)
    for name, found, right in zip(sums.losses._fields, sums.losses, expected.losses):
        np.testing.assert_allclose(found, right, rtol=rtol, err_msg=name)
    far = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (distance(a, b), jax.tree_util.keystr(path)), grads, same)
    worst = max(jax.tree.leaves(far, is_leaf=lambda x: isinstance(x, tuple)))
    assert worst[0] < rtol, worst
    jax.tree.map(np.testing.assert_array_equal, sums.counts, expected.counts)
    model = dataclasses.replace(config.model, remat="none")
    router = variables(model).get("router", {})
    for name, bias_LE in router.items():
        np.testing.assert_array_equal(*(update_bias(bias_LE, counts[name], config.balance.bias_speed)
                                        for counts in (sums.counts, expected.counts)))
    return sums


# Pairs, not all combinations. Three, five and seven MoE layers on four ranks leave slots empty.
QUICK = {
    "dualpipe": config("dualpipe", (2, 1, 1), 4),
    "1f1b": config("1f1b", (4, 1, 2), 4, remat="report"),
}
SLOW = {
    "dualpipe on four ranks": config(),
    "gpipe": config("gpipe", (2, 2, 1), 4, remat="full"),
    "gpipe of V2": config("gpipe", (4, 1, 1), 4, num_layers=7, **V2),
    "1f1b of five layers": config("1f1b", (2, 2, 1), 4, num_layers=6, masked=True),
    "zb1p of five layers": config("zb1p", (4, 1, 2), 4, num_layers=6, remat="full"),
    "zb1p": config("zb1p", (2, 1, 1), 8, num_layers=4, mtp_depth=2),
    "dualpipe of seven layers": config("dualpipe", (4, 2, 1), 8, num_layers=8, remat="report"),
    "dualpipe in two rounds": config("dualpipe", (2, 1, 2), 4, rounds=2),
    "dualpipev of five layers": config("dualpipev", (4, 1, 1), 8, num_layers=6, remat="full"),
    "dualpipev": config("dualpipev", (2, 1, 2), 4, num_layers=6),
    "replicas": dataclasses.replace(config("1f1b", (2, 1, 1), 4), mesh=MeshConfig(pipe=2, replica=2, local=2)),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_in_float64_losses_gradients_and_loads_are_those_without_a_pipeline(name):
    case = (QUICK | SLOW)[name]
    with float64():
        sums = assert_same_step(case, 1e-12)

    layers = case.model.num_moe_layers + case.model.mtp_depth
    for count in ("computed", "choices"):
        if case.mesh.data_shards > 1:
            assert getattr(sums.traffic, count) == layers * ROWS * T * case.model.experts_per_token


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_in_float32_they_agree_to_rounding(name):
    case = QUICK[name]
    assert_same_step(dataclasses.replace(case, model=dataclasses.replace(case.model, dtype="float32")), 1e-6)


@pytest.mark.slow
def test_experts_and_attention_compute_in_fp8_as_without_a_pipeline():
    """Every product has the same tokens: a device's micro-batches are those of the accumulation."""
    case = config("dualpipe", (2, 1, 1), 4, **FP8)
    with float64():
        parts = dataclasses.replace(case, train=dataclasses.replace(case.train, accumulation_steps=4))
        assert_same_step(case, 1e-12, alone(parts))


def test_validation_losses_are_those_of_one_device():
    """A batch passes through the stages without gradients, in the micro-batches of a step."""
    def scored(config):
        run = jax.jit(functools.partial(eval_step, config), compiler_options=QUICKLY)
        made = {name: x[0] for name, x in batch(config).items() if np.ndim(x)}
        held = variables(config.model)
        with on(config.mesh):
            return jax.device_get(run(held["params"], held["router"], place_batch(config, made)))

    case = config("dualpipe", (2, 1, 2), 4, num_layers=3, masked=True)
    with float64():
        found, expected = scored(case), scored(dataclasses.replace(case, mesh=MeshConfig()))

    for name in ("nats", "weight"):
        np.testing.assert_allclose(getattr(found.losses, name), getattr(expected.losses, name), rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, found.counts, expected.counts)


@pytest.mark.parametrize(("schedule", "active"), [("dualpipe", 8), pytest.param("zb1p", 2, marks=pytest.mark.slow),
                                                  pytest.param("dualpipe", 4, marks=pytest.mark.slow)])
def test_a_step_of_the_batch_ramp_is_one_of_its_first_micro_batches(schedule, active):
    """One program runs schedules of 2, 4, ... 12 micro-batches, whatever the other rows are. The test uses powers of
    two, by which float32 divides exactly."""
    case = config(schedule, (2, 1, 2), 12, num_layers=4)
    first = 4 if schedule == "dualpipe" else 2
    case = dataclasses.replace(case, train=dataclasses.replace(case.train, batch_size=24, ramp_from=2 * first))
    check(case)
    assert case.ramp_levels == tuple(range(first, 13, 2))
    rows = 2 * active
    small = dataclasses.replace(case, mesh=MeshConfig(), pipeline=PipelineConfig(), train=dataclasses.replace(
        case.train, batch_size=rows, ramp_from=None))
    made = batch(case)
    with float64():
        run, (params, router, _) = compiled(case)
        arguments = params, router, made | {"active": np.int32(active)}
        grads, sums = jax.device_get(run(*jax.device_put(arguments, jax.tree.map(lambda x: x, run.input_shardings[0]))))
        of_rows = {name: x[:, :rows] if np.ndim(x) else x for name, x in made.items()}
        same, expected = jax.device_get(compiled(small)[0](params, router, of_rows))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), grads, same)
    for name in ("nats", "weight", "mtp_nats_D", "mtp_weight_D"):
        np.testing.assert_allclose(getattr(sums.losses, name), getattr(expected.losses, name), rtol=1e-12)
    np.testing.assert_allclose(sums.sequence_loss, expected.sequence_loss, rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, sums.counts, expected.counts)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "dualpipe"])
def test_the_program_knows_the_number_of_micro_batches_only_by_what_the_schedule_keeps(schedule):
    lines, memory, kept = [], [], []
    for microbatches in (4, 12):
        case = config(schedule, (2, 1, 1), microbatches, num_layers=3, dtype="float32")
        case = dataclasses.replace(case, train=dataclasses.replace(case.train, batch_size=2 * microbatches))
        run, _ = compiled(case, {})
        lines.append(run.as_text().count("\n"))
        memory.append(run.memory_analysis().temp_size_in_bytes)
        kept.append(make_schedule(schedule, 2, microbatches).slots.activations)

    assert abs(lines[1] / lines[0] - 1) < 0.02
    if kept[0] == kept[1]:
        assert memory[1] < 1.05 * memory[0], memory
    else:
        assert memory[1] > 1.2 * memory[0], memory


# Complete runs.

RUN = ["--config.train.steps=6", "--config.train.batch_size=16", "--config.train.accumulation_steps=1",
       "--config.train.ramp_from=None", "--config.train.sample_tokens=2", "--config.model.num_layers=3",
       "--config.mesh.replica=2"]
PIPE = ["--config.mesh.pipe=2", "--config.mesh.local=2", "--config.pipeline.schedule=dualpipe",
        "--config.pipeline.microbatches=4"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(PIPE, ["--config.mesh.node=2", "--config.mesh.local=2"]),
                                             (["--config.mesh.local=4"], PIPE)], ids=["first", "then"])
def test_a_run_goes_on_with_a_pipeline_or_without(tmp_path, first, then):
    path = runs.write_config(tmp_path)
    train = lambda workdir, mesh: runs.run("train", "--config", path, "--workdir", tmp_path / workdir, *RUN, *mesh)
    assert (whole := train("whole", ["--config.mesh.local=4"])).code == 0, whole
    assert (begun := train("run", first)).code == 0, begun
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")

    resumed = train("run", then)

    assert resumed.code == 0 and "Resuming from step 3 of 6" in resumed.out, resumed
    assert ("Pipeline: dualpipe over 2 ranks" in resumed.out) == (then == PIPE)
    for row, expected in zip(runs.rows(tmp_path / "run"), runs.rows(tmp_path / "whole"), strict=True):
        for name in ("loss", "mtp_loss", "grad_norm", "max_vio", "eval_loss"):
            if name in expected:
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, err_msg=f"{name} of {row['step']}")


# The placement of layers.


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("layers", [1, 3, 5, 7, 8, 61])
def test_every_layer_has_one_slot_and_stages_differ_by_one_layer(name, layers):
    schedule = make_schedule(name, 4, 8)
    layer_SL, real_SL = slots(layers, schedule)

    assert sorted(layer_SL[real_SL]) == list(range(layers))
    assert layer_SL.shape == real_SL.shape == (schedule.stages, -(-layers // schedule.stages))
    assert np.ptp(real_SL.sum(axis=1)) <= 1 and layer_SL.max() == layers - 1


def test_layers_follow_each_other_along_the_pipeline():
    assert slots(4, make_schedule("dualpipe", 4, 8))[0].tolist() == [[0], [1], [2], [3]]
    assert slots(8, make_schedule("dualpipev", 4, 8))[0].tolist() == [[0], [7], [1], [6], [2], [5], [3], [4]]


def test_what_padding_wastes_is_said():
    made = dataclasses.replace(config("1f1b", (16, 1, 1), 16), model=naive.tiny(num_layers=61, num_dense_layers=3))

    assert "4 MoE layers a stage; 6 of the 64 layers computed are padding" in describe(made)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(schedule="dualpipe", mesh=(3, 1, 1)), "ranks=3 must be even; take 4, or dualpipev"),
        (dict(microbatches=4), "dualpipe over 4 ranks needs at least 8 micro-batches to fill the pipeline, not 4"),
        (dict(microbatches=9), "microbatches=9 must be even; take 10"),
        (dict(schedule="pipedream"), "schedule 'pipedream' is unknown; take one of gpipe, 1f1b"),
        (dict(schedule="1f1b", microbatches=6), "pipeline.microbatches=6 .* into 6 parts, and it has 16 sequences .* a "
                                                "multiple of 6"),
        (dict(microbatches=8, ramp_from=8), "train.ramp_from=8 is 4 micro-batches: dualpipe over 4 ranks needs"),
        (dict(microbatches=32, ramp_from=1), "into 32 parts, and it has 16 sequences .* a multiple of 32"),
        (dict(num_heads=2), "mesh.pipe=4 does not divide model.num_heads=2, .* take a divisor of 2"),
        (dict(num_layers=1), "made of MoE layers, and the model has none; take mesh.pipe=1"),
    ])
def test_what_does_not_fit_the_pipeline_is_refused_with_what_would(changes, complaint):
    ramp_from = changes.get("ramp_from")
    made = config(**{name: value for name, value in changes.items() if name != "ramp_from"})
    with pytest.raises(ConfigError, match=complaint) as error:
        check(dataclasses.replace(made, train=dataclasses.replace(made.train, ramp_from=ramp_from)))
    assert "\n" not in str(error.value)


def test_losses_and_axes_that_a_pipeline_does_not_have_are_refused():
    made = config()
    for change, complaint in (
            (dict(mesh=MeshConfig(pipe=4, tensor=2)), "mesh.tensor=2 has no place in a pipeline"),
            (dict(balance=dataclasses.replace(made.balance, aux_loss_weight=0.1)), "aux_loss_weight is a loss")):
        with pytest.raises(ConfigError, match=complaint):
            check(dataclasses.replace(made, **change))
