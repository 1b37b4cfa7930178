"""Sequences split over devices: a step, its gradients and its scores equal those of one device."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config import ConfigError, FP8Config, LoraConfig, MeshConfig, Yarn, load_config
from deepseek_jax.config.mesh import PipelineConfig
from deepseek_jax.parallel.context import in_parts, mean_over_parts
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.parallel.sharding import spec
from deepseek_jax.training.step import eval_step, init_state, train_step
from tests import runs
from tests.parallel.meshes import QUICKLY, config_of, mesh_of, on, place_batch
from tests.pipeline.test_model import accumulated, alone, assert_same_step, batch, distance, variables
from tests.precision import float64


def config(mesh, masked=True, pipeline=None, rows=8, whole_batches=0.0, **model):
    made = config_of(rows=rows, **({"attention_block": 2, "num_layers": 3 if pipeline else 2} | model))
    return dataclasses.replace(made, mesh=mesh, data=dataclasses.replace(made.data, mask_documents=masked),
                               balance=dataclasses.replace(made.balance, aux_loss_weight=whole_batches),
                               pipeline=pipeline or PipelineConfig())


YARN = Yarn(factor=4.0, original_length=8)
CASES = {
    "context=2": config(MeshConfig(context=2), mtp_depth=2, remat="report", yarn=YARN),
    "context=4": config(MeshConfig(context=4, local=2), masked=False),
    "context_node=4": config(MeshConfig(context_node=4, local=2), mtp_depth=2, remat="report", yarn=YARN),
}
SLOW = {
    "context=4 in segments": config(MeshConfig(context=4), mtp_depth=2, yarn=YARN, remat="full"),
    "context=8": config(MeshConfig(context=8), remat="report"),
    "three replicas": config(MeshConfig(context=2, replica=3), rows=6, attention_block=3),
    "experts, heads and parts": config(MeshConfig(context=2, node=2, tensor=2), remat="report"),
    "nodes": config(MeshConfig(context=2, node=2, local=2), remat="latents,attention", whole_batches=0.3),
    "1f1b": config(MeshConfig(pipe=2, context=2), pipeline=PipelineConfig("1f1b", 4)),
    "dualpipe": config(MeshConfig(pipe=2, context=2, local=2), rows=16, pipeline=PipelineConfig("dualpipe", 4),
                       remat="report"),
    "both": config(MeshConfig(context=2, context_node=2, node=2), mtp_depth=2, remat="full", whole_batches=0.3),
    "both in another order": config(MeshConfig(replica=2, context=2, context_node=2, dispatch="flat"), masked=False),
    "1f1b on nodes": config(MeshConfig(pipe=2, context_node=2, local=2), pipeline=PipelineConfig("1f1b", 4)),
    "dualpipe on nodes": config(MeshConfig(pipe=2, context=2, context_node=2), mtp_depth=2, remat="full",
                                pipeline=PipelineConfig("dualpipe", 4)),
    "dualpipe on four parts": config(MeshConfig(pipe=2, context=4), masked=False,
                                     pipeline=PipelineConfig("dualpipe", 4)),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_in_float64_losses_gradients_and_loads_are_those_of_complete_sequences(name):
    with float64():
        assert_same_step((CASES | SLOW)[name], 1e-12)


@pytest.mark.slow
def test_in_fp8_the_forward_pass_is_the_same_and_gradients_differ_by_roundings():
    """Tiles of tokens have other boundaries, and each device's contribution to a latent's gradient is rounded
    separately.
    """
    case = config(MeshConfig(context=2), fp8=FP8Config(enabled=True))
    with float64():
        (grads, sums), (same, expected) = accumulated(case), alone(case)
        exact, _ = alone(config(MeshConfig(context=2)))

    for found, right in zip(sums.losses, expected.losses):
        np.testing.assert_allclose(found, right, rtol=1e-9)
    jax.tree.map(np.testing.assert_array_equal, sums.counts, expected.counts)
    of_context, of_fp8 = (max(jax.tree.leaves(jax.tree.map(distance, grads, other))) for other in (same, exact))
    assert of_context < of_fp8 / 2


def test_validation_scores_are_those_of_one_device():
    def scored(config):
        run = jax.jit(functools.partial(eval_step, config), compiler_options=QUICKLY)
        made = {name: x[0] for name, x in batch(config).items() if np.ndim(x)}
        with on(config.mesh):
            return jax.device_get(run(variables(config.model)["params"], variables(config.model)["router"],
                                      place_batch(config, made)))

    with float64():
        found, expected = scored(CASES["context=4"]), scored(dataclasses.replace(CASES["context=4"], mesh=MeshConfig()))

    for a, b in zip(found.losses, expected.losses):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, found.counts, expected.counts)


# Which device has which tokens.


def test_a_part_is_an_early_block_and_the_late_one_that_balances_it():
    rows_BT = jnp.arange(2 * 16).reshape(2, 16)
    with jax.set_mesh(mesh_of(MeshConfig(context=4, local=2))):
        parts = jax.jit(in_parts)(rows_BT)

    assert parts.tolist() == [[16 * row + t for t in (2 * n, 2 * n + 1, 14 - 2 * n, 15 - 2 * n)]
                              for row in range(2) for n in range(4)]
    assert {device.id: shard[0].start or 0 for device, shard in parts.sharding.devices_indices_map((8, 4)).items()} == {
        2 * n + row: 4 * row + n for row in range(2) for n in range(4)}


def test_parts_go_over_copies_of_the_experts_and_over_nodes_that_share_them():
    rows_BT = jnp.arange(2 * 16).reshape(2, 16)
    with jax.set_mesh(mesh_of(MeshConfig(context=2, context_node=2, local=2))):
        parts = jax.jit(in_parts)(rows_BT)

    found = {shard.device.id: np.asarray(shard.data).tolist() for shard in parts.addressable_shards}
    assert found == {2 * n + row: [[16 * row + t for t in (2 * n, 2 * n + 1, 14 - 2 * n, 15 - 2 * n)]]
                     for n in range(4) for row in range(2)}


def test_a_mean_over_parts_is_that_of_the_sequence():
    x_B = jnp.arange(8.0)
    with jax.set_mesh(mesh_of(MeshConfig(context=4, local=2))):
        means, dx_B = jax.jit(jax.value_and_grad(lambda x_B: (mean_over_parts(x_B) * jnp.arange(8)).sum()))(x_B)
        of_parts = jax.jit(mean_over_parts)(x_B)

    assert of_parts.tolist() == [1.5] * 4 + [5.5] * 4
    assert means == 1.5 * 6 + 5.5 * 22 and dx_B.tolist() == of_parts.tolist()


def test_without_a_mesh_there_is_one_part():
    x_BT = jnp.arange(8).reshape(2, 4)

    assert in_parts(x_BT) is x_BT and mean_over_parts(x_BT) is x_BT


# Memory.


@pytest.mark.slow
def test_eight_times_the_length_on_eight_devices_takes_the_memory_of_one():
    def temporaries(parts):
        made = load_config("tiny", [f"--config.train.sequence_length={512 * parts}", "--config.train.batch_size=8",
                                    f"--config.mesh.context={parts}"])
        runner = Runner(made)
        where = None if runner.mesh is None else NamedSharding(runner.mesh, spec(None, "sequences", None))
        rows = lambda dtype: jax.ShapeDtypeStruct((1, 8, 512 * parts + 1), dtype, sharding=where)
        of_batch = {"tokens": rows(jnp.int32), "weights": rows(jnp.float32), "segment_ids": rows(jnp.int32),
                    "active": jax.ShapeDtypeStruct((), jnp.int32)}
        state = runner.with_shardings(jax.eval_shape(functools.partial(init_state, made)))
        with on(made.mesh):
            run = jax.jit(functools.partial(train_step, made), donate_argnums=0).lower(state, of_batch).compile()
        return run.memory_analysis().temp_size_in_bytes

    assert (eight := temporaries(8)) < 1.15 * (one := temporaries(1)), (eight, one)


# Complete runs.

RUN = ["--config.train.steps=6", "--config.train.accumulation_steps=1", "--config.train.ramp_from=None",
       "--config.train.sample_tokens=2", "--config.data.mask_documents=True"]
CONTEXT = ["--config.mesh.context=4", "--config.mesh.local=2"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(CONTEXT, []), ([], CONTEXT)], ids=["to one device", "from one device"])
def test_a_run_goes_on_with_split_sequences_or_without(tmp_path, first, then):
    """`one device`: each device has complete sequences; eight devices share the rows."""
    path, whole = runs.write_config(tmp_path), ["--config.mesh.replica=4", "--config.mesh.local=2"]
    train = lambda workdir, mesh: runs.run("train", "--config", path, "--workdir", tmp_path / workdir, *RUN,
                                           "--config.train.batch_size=8", *(mesh or whole))
    assert (straight := train("whole", [])).code == 0, straight
    assert (begun := train("run", first)).code == 0, begun
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")

    resumed = train("run", then)

    assert resumed.code == 0 and "Resuming from step 3 of 6" in resumed.out, resumed
    for row, expected in zip(runs.rows(tmp_path / "run"), runs.rows(tmp_path / "whole"), strict=True):
        for name in ("loss", "mtp_loss", "grad_norm", "max_vio", "eval_loss"):
            if name in expected:
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, err_msg=f"{name} of {row['step']}")


# Mistakes.


@pytest.mark.parametrize(
    ("mesh", "options", "complaint"),
    [(dict(context=3), {}, "context=3: train.sequence_length=16 is no multiple of the 6 blocks .*take 18"),
     (dict(context=2), dict(index_topk=4, index_heads=2, index_head_dim=8), "model.index_topk=4 chooses among all"),
     (dict(context=2), dict(attention="my.own:Attention"), "model.attention='my.own:Attention' would see parts"),
     (dict(context=2), dict(lora=LoraConfig(rank=2)), "context=2: sequences are split where all parameters are"),
     (dict(context=2, tensor=2), dict(num_heads=3), "mesh.tensor=2 does not divide model.num_heads=3"),
     (dict(context_node=3), {}, r"mesh.context_node=3 does not divide model.num_groups=4, .* take one of \[1, 2, 4\]"),
     (dict(context=2, context_node=2), dict(index_topk=4, index_heads=2, index_head_dim=8),
      r"mesh.context \* mesh.context_node=4: model.index_topk=4 .*; take mesh.context \* mesh.context_node=1"),
     (dict(context_node=2), dict(lora=LoraConfig(rank=2)), "context_node=2: sequences are split where all parameters"),
     (dict(context=0), {}, "mesh.context=0 must be positive")])
def test_what_cannot_be_split_is_refused_with_what_would(mesh, options, complaint):
    with pytest.raises(ConfigError, match=complaint) as error:
        config_of(MeshConfig(**mesh), **options)
    assert "\n" not in str(error.value)


def test_a_pipeline_takes_an_even_number_of_parts():
    made = config_of()
    with pytest.raises(ConfigError, match=r"mesh.context=3: mesh.pipe=2 takes an even number of parts; take .*=4"):
        dataclasses.replace(made, train=dataclasses.replace(made.train, sequence_length=48),
                            mesh=MeshConfig(pipe=2, context=3))


@pytest.mark.parametrize(("length", "take"), [(65528, 65536), (8072, 8192)])
def test_blocks_that_divide_into_crumbs_alone_are_refused_with_the_next_length_that_does(length, take):
    """Attention would process them one pair of tokens at a time."""
    with pytest.raises(ConfigError, match=f"nothing larger than 1 for attention; take {take}"):
        load_config("tiny", [f"--config.train.sequence_length={length}", "--config.mesh.context=4"])
    load_config("tiny", [f"--config.train.sequence_length={take}", "--config.mesh.context=4"])
