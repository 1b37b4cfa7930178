"""Helpers of the tests in this folder: a mesh, its sizes, a tiny model and its batches."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import (
    BalanceConfig,
    Config,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from deepseek_jax.parallel.mesh import DATA, abstract_mesh, make_mesh
from deepseek_jax.parallel.sharding import compute_shardings, storage_shardings
from deepseek_jax.training.step import init_state, train_step
from tests.model import adapted

ALL = LoraConfig()  # parameters are trained
QUICKLY = {"xla_backend_optimization_level": 0}
T, VOCAB = 16, 64
MODEL = dict(vocab_size=VOCAB, d_model=32, num_layers=2, num_dense_layers=1, num_heads=2, q_rank=12, kv_rank=16,
             nope_head_dim=8, rope_head_dim=4, v_head_dim=6, dense_ffn_dim=24, expert_ffn_dim=10, num_experts=16,
             experts_per_token=3, num_groups=4, groups_kept=2, mtp_depth=1, attention_block=8, remat="none",
             dtype="float64")


@functools.cache
def mesh_of(cfg: MeshConfig):
    return make_mesh(cfg, jax.devices()[:cfg.devices])


def on(cfg: MeshConfig):
    """The context that a step of this mesh runs in."""
    return contextlib.nullcontext() if cfg.devices == 1 else jax.set_mesh(mesh_of(cfg))


def config_of(mesh=None, accumulation_steps=1, steps=20, rows=32, lora=ALL, optimizer=None, **model):
    """Losses with weights so large that omitting one would show; rates that move biases and weights far."""
    return Config(
        model=ModelConfig(**(MODEL | model)), mesh=mesh or MeshConfig(), lora=lora,
        train=TrainConfig(batch_size=rows, accumulation_steps=accumulation_steps, sequence_length=T, steps=steps,
                          loss_chunk=12),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0, moment_dtype=model.get("dtype", "float64"),
                                  **(optimizer or {})),
        balance=BalanceConfig(sequence_loss_weight=0.5, bias_speed=0.01))


def batch_of(config, step):
    """Rows with a pattern to learn; some tokens have weight 0, and the micro-batches differ in their sums of weights.
    """
    rng = np.random.default_rng(step)
    rows = config.train.batch_size
    tokens = (rng.integers(0, VOCAB, (rows, 1)) + 3 * np.arange(T + 1)[None]) % VOCAB
    weights = rng.random((rows, T + 1)) < np.linspace(0.4, 1, rows)[:, None]
    made = {"tokens": tokens.astype(np.int32), "weights": weights.astype(np.float32),
            "segment_ids": np.ones_like(tokens, np.int32)}
    made = {name: x.reshape(config.train.accumulation_steps, -1, T + 1) for name, x in made.items()}
    return made | {"active": np.int32(config.train.accumulation_steps)}


def place_batch(config, batch):
    if config.mesh.devices == 1:
        return batch
    mesh = mesh_of(config.mesh)
    split = {name: PartitionSpec(*[None] * (x.ndim > 2), DATA) if x.ndim else PartitionSpec()
             for name, x in batch.items()}
    return {name: jax.device_put(x, NamedSharding(mesh, split[name])) for name, x in batch.items()}


@functools.cache
def fresh_state(model, lora=ALL, kind="adamw"):
    """The initial state on one device, as host arrays; made once per model."""
    config = Config(model=model, lora=lora, optimizer=OptimizerConfig(kind=kind, moment_dtype=model.dtype))
    return jax.device_get(jax.jit(functools.partial(init_state, config), compiler_options=QUICKLY)())


def start(config):
    """The same initial state on any mesh, with any remat. -> (state, its shardings or None)"""
    state = fresh_state(dataclasses.replace(config.model, remat="none"), config.lora, config.optimizer.kind)
    if config.mesh.devices == 1:
        return jax.tree.map(jnp.asarray, state), None
    shardings = storage_shardings(state, mesh_of(config.mesh))
    return jax.device_put(state, shardings), shardings


def base_of(config):
    """The frozen parameters of a config that trains adapters, sharded as in a step; None for other configs."""
    if config.lora.rank is None:
        return None
    params = fresh_state(dataclasses.replace(config.model, remat="none")).params
    if config.lora.fp8:
        params = adapted.in_blocks(params)
    if config.mesh.devices == 1:
        return jax.tree.map(jnp.asarray, params)
    return jax.device_put(params, compute_shardings(params, mesh_of(config.mesh)))


def compiled_step(config):
    """(state, batch, base) -> (state, metrics), compiled for the mesh of the config."""
    state, shardings = start(config)
    out = {}
    if shardings is not None:
        out = dict(out_shardings=(shardings, NamedSharding(mesh_of(config.mesh), PartitionSpec())))
    with on(config.mesh):
        return jax.jit(functools.partial(train_step, config), compiler_options=QUICKLY, **out).lower(
            state, place_batch(config, batch_of(config, 0)), base_of(config)).compile()


def train(config, steps):
    """-> (losses, router biases, metrics of the last step)."""
    run, (state, _), base, losses = compiled_step(config), start(config), base_of(config), []
    for step in range(steps):
        state, metrics = run(state, place_batch(config, batch_of(config, step)), base)
        losses.append(float(metrics.loss))
    return np.array(losses), jax.device_get(state.router), jax.device_get(metrics)


def without_devices(cfg: MeshConfig) -> contextlib.AbstractContextManager[None]:
    """A mesh without devices, for tracing. Skips the test if jax cannot split arrays over one (0.7)."""
    if jax.__version_info__ < (0, 8):
        pytest.skip("jax 0.7 splits arrays over devices only")
    return jax.sharding.use_abstract_mesh(abstract_mesh(cfg))
