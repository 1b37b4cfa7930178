"""The sample of a run on a mesh is that of one device: greedy tokens, draws, and where it ends."""

import dataclasses
import functools
import types

import jax
import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.config.mesh import PipelineConfig
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.serving import generate
from deepseek_jax.training.sample import room, sample_on_mesh
from tests.model import naive
from tests.parallel.meshes import config_of

PROMPT, NEW = [3, 41, 7, 19, 22], 6
MESHES = {
    "pipeline": MeshConfig(pipe=2, node=2, local=2),
    "two nodes": MeshConfig(replica=2, node=2, local=2, capacity=0.01),
    "context": MeshConfig(context=2, node=2, local=2),
    "pipeline and context": MeshConfig(pipe=2, context=2, local=2),
    "tensor": MeshConfig(node=2, local=2, tensor=2),
}


def config(mesh):
    made = config_of(num_layers=4, num_heads=4, attention_block=64, dtype="float32")
    return dataclasses.replace(made, mesh=mesh, pipeline=PipelineConfig("dualpipe", 4),
                               train=dataclasses.replace(made.train, sample_tokens=NEW, seed=3))


@functools.cache
def alone(temperature):
    """The tokens by the engine, and the variables."""
    one = config(MeshConfig())
    variables = naive.variables_of(one.model)
    made = generate(one.model, variables, [PROMPT], NEW, temperature=temperature, seed=one.train.seed)
    return made.tokens[0], variables


@pytest.mark.parametrize("name", ["pipeline", "two nodes",
                                  *(pytest.param(name, marks=pytest.mark.slow) for name in (*MESHES,)[2:])])
def test_tokens_are_those_of_the_engine_on_one_device(name):
    run = config(MESHES[name])
    runner = Runner(run)
    sampled = functools.partial(sample_on_mesh, run, runner)
    for temperature in (0.0, 0.8):
        expected, variables = alone(temperature)
        held = {"params": variables["params"], "router": variables["router"]}
        held = (*jax.device_put(held, runner.shardings(held)).values(), None)

        assert len(expected) == NEW and sampled(held, PROMPT, None, temperature) == expected
        if temperature:
            stop = expected[-2]
            assert sampled(held, PROMPT, stop, temperature) == expected[:expected.index(stop)]


def test_rows_hold_what_is_asked_for_in_whole_tiles_of_each_part():
    assert [room(config(MESHES["context"]), n) for n in (1, 256, 257)] == [256, 256, 512]
    assert room(config(MESHES["pipeline"]), 129) == 256


@pytest.mark.parametrize("sizes", [dict(context_node=2), dict(context_node=3), dict(context=2, context_node=3),
                                   dict(tensor=3), dict(context_node=3, tensor=6), dict(context=5, tensor=4)])
def test_rows_are_cut_evenly_into_the_parts_of_any_mesh_and_those_over_tensor(sizes):
    mesh = MeshConfig(**sizes)
    for tokens in (1, 128, 300):
        length = room(types.SimpleNamespace(mesh=mesh), tokens)  # pyright: ignore[reportArgumentType]
        assert length >= tokens and length % (2 * mesh.parts * 64) == 0 and length // mesh.parts % mesh.tensor == 0
