"""Meshes: the sharding of arrays, none omitted or split twice, and errors that name what would work."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.config import ConfigError, MeshConfig, freeze, load_config, model_config
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.parallel import capacity, sharding
from deepseek_jax.parallel.capacity import parameter_bytes
from deepseek_jax.parallel.mesh import abstract_mesh, make_mesh
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.parallel.sharding import leaf_sharding, spec
from deepseek_jax.training.step import init_state
from tests.parallel.meshes import config_of, fresh_state, mesh_of, without_devices

REPORT = MeshConfig(pipe=16, replica=2, node=8, local=8)  # the report's 2048 GPUs
EXPERTS = ("context_node", "node", "local")


@pytest.mark.parametrize(
    ("path", "shape", "compute", "master"),
    [("params/layers/ffn/gate", (58, 256, 7168, 2048), P(None, EXPERTS, None, None),
      P(None, EXPERTS, ("pipe", "replica"), None)),
     ("opt_state/1/mu/layers/attention/q_b", (58, 1536, 128, 192), P(None, None, "tensor", None),
      P(None, ("pipe", "replica", "node"), ("tensor", "local"), None)),
     ("ema/embedding", (129280, 7168), P("tensor", None),
      P(("tensor", "pipe", "replica", "node"), "local")),
     ("params/mtp_1/block/ffn/shared/down", (2048, 7168), P("tensor", None),
      P(("tensor", "pipe", "replica", "node", "local"), None)),
     ("params/layers/ffn/gate/a", (58, 256, 7168, 16), P(None, EXPERTS, None, None),
      P(None, EXPERTS, ("pipe", "replica"), None)),
     ("params/layers/attention/o/a", (58, 128, 128, 16), P(None, "tensor", None, None),
      P(None, ("tensor", "pipe", "replica"), ("node", "local"), None)),
     ("params/layers/attention/q_b/b", (58, 16, 128, 192), P(None, None, "tensor", None),
      P(None, "pipe", ("tensor", "replica", "node", "local"), None)),
     ("params/layers/ffn/gate/scales", (58, 256, 56, 16), P(None, EXPERTS, None, None),
      P(None, (*EXPERTS, "replica"), None, "pipe")),
     ("params/layers/attention/o/values", (58, 128, 128, 7168), P(None, "tensor", None, None),
      P(None, ("tensor", "pipe", "replica"), ("node", "local"), None)),
     ("params/layers/attention/indexer/wq_b/scales", (58, 12, 64), P(None, None, None), P(None, "replica", "pipe")),
     ("router/bias", (58, 256), P(None, None), P(None, None)),
     ("opt_state/1/count", (), P(), P()), ("rng", (), P(), P())])
def test_a_leaf_lies_where_its_dimensions_say(path, shape, compute, master):
    assert leaf_sharding(path, shape, abstract_mesh(REPORT)) == (compute, master)


def test_a_leaf_without_a_rule_is_an_error_that_names_it():
    for path, shape in (("params/layers/ffn/gates", (2, 8, 4)), ("opt_state/1/mu/layers/attention/q_c", (3, 3)),
                        ("params/head", (4,))):
        with pytest.raises(ValueError, match=path):
            leaf_sharding(path, shape, abstract_mesh(REPORT))


def test_two_dimensions_cannot_be_split_over_one_axis():
    with pytest.raises(ValueError, match=r"split twice over \['context_node', 'local', 'node'\]"):
        spec("batch", "experts")
    with pytest.raises(ValueError, match="dimension 'hedas' has no mesh axes"):
        spec("hedas")


@pytest.mark.parametrize("name", ["tiny", "v2_lite_16b", "v3_671b"])
def test_every_leaf_of_a_training_state_has_a_rule(name):
    config = freeze({"model": model_config(name), "train": {"ema_decay": 0.9}})
    state = jax.eval_shape(functools.partial(init_state, config))

    assert len(jax.tree.leaves(sharding.storage_shardings(state, abstract_mesh(REPORT)))) == len(jax.tree.leaves(state))


@pytest.mark.parametrize("cfg", [REPORT, MeshConfig(replica=32, node=8, local=8)], ids=["pipe=16", "pipe=1"])
def test_on_2048_devices_nothing_that_should_be_split_is_whole(cfg):
    config = load_config("experiments/configs/v3_671b.py")
    state = jax.eval_shape(functools.partial(init_state, config))
    mesh, whole = abstract_mesh(cfg), []
    leaves = zip(jax.tree.leaves(sharding.paths(state)), jax.tree.leaves(state))
    for path, leaf in leaves:
        parts = math.prod(mesh.shape[axis] for entry in leaf_sharding(path, leaf.shape, mesh).storage
                          for axis in sharding.axes_of(entry))
        if leaf.size > 1_000_000:
            assert parts == cfg.devices, path  # experts by their axes, everything else by ZeRO-1
        elif parts == 1:
            whole += [path]
    assert {path.rsplit("/", 1)[-1] for path in whole} <= {"bias", "mtp_bias", "step", "rng", "count"}
    expert = [leaf_sharding(path, leaf.shape, mesh).compute for path, leaf in zip(
        jax.tree.leaves(sharding.paths(state.params)), jax.tree.leaves(state.params)) if leaf.size > 10**10]
    assert len(expert) == 3 and all(entry[1] == EXPERTS for entry in expert)


def test_the_table_of_bytes_adds_up_to_the_state():
    config = load_config("experiments/configs/v3_671b.py")
    state = jax.eval_shape(functools.partial(init_state, config))
    table = parameter_bytes(state.params, abstract_mesh(REPORT))

    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    assert set(table) == {name for name, _ in capacity.GROUPS}
    assert total / 2048 <= sum(row["storage"] for row in table.values()) < 1.001 * total / 2048
    assert table["experts"]["compute"] == 4 * 3 * 4 * 7168 * 2048 * 4  # four experts in each of a stage's four layers


@functools.cache
def traced(mesh):
    """The forward pass of v3_671b, traced on an abstract mesh."""
    cfg = model_config("v3_671b")
    shapes = jax.eval_shape(lambda: DeepSeekV3(cfg).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    with without_devices(mesh):
        return jax.eval_shape(lambda variables, tokens: DeepSeekV3(cfg, mesh).apply(variables, tokens, logits=False),
                              shapes, jax.ShapeDtypeStruct((mesh.data_shards, 4096), jnp.int32))


def test_the_full_model_traces_on_the_mesh_of_the_report():
    output = traced(MeshConfig(replica=32, node=8, local=8))

    assert output.hidden_BTD.shape == (2048, 4096, 7168) and output.traffic.computed.shape == ()


# Elastic: a checkpoint of one mesh can be read on another.


@pytest.mark.parametrize(("saved", "read"), [(MeshConfig(node=2, local=4), MeshConfig(replica=2, local=2, tensor=2)),
                                             (MeshConfig(replica=2, local=2), MeshConfig()),
                                             (MeshConfig(context=4), MeshConfig()),
                                             (MeshConfig(node=4, local=2), MeshConfig(context=4, tensor=2)),
                                             (MeshConfig(), MeshConfig(node=4, local=2))])
def test_a_checkpoint_of_one_mesh_is_read_on_another_to_the_bit(tmp_path, saved, read):
    state = fresh_state(config_of(dtype="float32").model)
    on = lambda cfg: sharding.storage_shardings(state, mesh_of(cfg))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, jax.device_put(state, on(saved)) if saved.devices > 1 else state, {})
    checkpoints.wait()
    abstract = jax.eval_shape(lambda: state)
    if read.devices > 1:
        abstract = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, on(read))

    restored, _ = checkpoints.restore(abstract)
    checkpoints.close()

    bits = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), restored, state)
    if read.devices > 1:
        assert jax.tree.map(lambda x: x.sharding, restored) == on(read)


# Mistakes.


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [(dict(local=4), "is for 4 devices, and 8 are here; take mesh.local=8, or start 4"),
     (dict(node=3, local=2), "take sizes whose product is 8"),
     (dict(node=2, local=8), "is for 16 devices, and 8 are here; take mesh.local=4")])
def test_a_mesh_that_does_not_multiply_to_the_devices_says_what_would(mesh, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make_mesh(MeshConfig(**mesh))


@pytest.mark.parametrize(
    ("mesh", "model", "complaint"),
    [(dict(node=3), {}, r"mesh.node=3 does not divide model.num_groups=4, .* take one of \[1, 2, 4\]"),
     (dict(node=8), {}, r"mesh.node=8 does not divide model.num_groups=4"),
     (dict(node=3), dict(num_groups=1, groups_kept=1), r"model.num_experts=16, .* take one of \[1, 2, 4, 8, 16\]"),
     (dict(context_node=2, node=4), {}, r"mesh.context_node \* mesh.node=8 does not divide model.num_groups=4"),
     (dict(node=4, local=8), {}, r"mesh.local=8 does not divide the 4 experts of a node .* \[1, 2, 4\]"),
     (dict(tensor=3), {}, r"mesh.tensor=3 does not divide model.num_heads=2 and model.vocab_size=64 .* of \[1, 2\]"),
     (dict(replica=3), {}, r"mesh.local=3 does not divide the 32 sequences .* product of \[1, 2, 4, 8, 16, 32\]"),
     (dict(local=0), {}, "mesh.local=0 must be positive"),
     (dict(capacity=-1.0), {}, "mesh.capacity=-1.0 must be positive, or None"),
     (dict(dispatch="three_hop"), {}, "mesh.dispatch='three_hop' is unknown; take one of 'two_hop', 'flat'")])
def test_sizes_that_do_not_divide_say_which_would(mesh, model, complaint):
    with pytest.raises(ConfigError, match=complaint) as error:
        config_of(MeshConfig(**mesh), **model)
    assert "\n" not in str(error.value)


def test_ragged_buffers_on_a_cpu_say_what_to_take():
    with pytest.raises(ConfigError, match="mesh.buffers='ragged' is not for a CPU, .* take 'static'"):
        Runner(config_of(MeshConfig(local=8, buffers="ragged")))
