"""The decode step that `serving.engine` calls, compiled for hardware you don't have.

Each device serves its own sequences with a complete copy of the model, as the engine does without a mesh; so all
devices run the same program, and nothing is communicated.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import ConfigError, FP8Config, MeshConfig, ModelConfig
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.scale.compile import targets
from deepseek_jax.scale.compile.aot import bytes_of, compiled_program
from deepseek_jax.serving import latent_cache
from deepseek_jax.serving.decode import Batch, decode
from deepseek_jax.serving.decode_attention import CacheGeometry
from deepseek_jax.serving.engine import widths
from deepseek_jax.serving.sampling import Sampling
from deepseek_jax.serving.speculative import no_drafts
from deepseek_jax.serving.weights import prepare

PAGE = 32
STEPS = 8  # decoding steps per call, as in the engine


def _of(dtype: Any, *shape: int) -> Any:
    """An abstract array, for tuples of arrays."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _shapes(cfg: ModelConfig, geometry: CacheGeometry, sequences: int, depth: int) -> dict[str, Any]:
    """The arguments of `decode`, as shapes."""
    modules = min(depth, cfg.mtp_depth)
    variables = jax.eval_shape(lambda: DeepSeekV3(cfg).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    pages = geometry.widths[-1] * sequences + 1
    sampling = Sampling(_of(jnp.float32, sequences), _of(jnp.int32, sequences), _of(jnp.float32, sequences),
                        _of(jnp.uint32, sequences), _of(jnp.uint32, sequences))
    batch = Batch(
        slot_B=_of(jnp.int32, sequences), token_B=_of(jnp.int32, sequences), position_B=_of(jnp.int32, sequences),
        limit_B=_of(jnp.int32, sequences), fresh_B=_of(jnp.bool, sequences),
        table_BP=_of(jnp.int32, sequences, geometry.widths[-1]), sampling=sampling, steps=_of(jnp.int32),
        logprobs=_of(jnp.bool))
    return {"weights": jax.eval_shape(lambda v: prepare(cfg, v, modules), variables),
            "cache": jax.eval_shape(lambda: latent_cache.make(cfg, geometry.kind, pages, PAGE, modules)),
            "drafts": jax.eval_shape(lambda: no_drafts(cfg, sequences + 1, depth)),
            "batch": batch}


def measure_decode(model: ModelConfig, target: str, sequences: int, length: int, depth: int = 0,
           kind: str | None = None) -> dict[str, Any]:
    """Compiles the step and returns its report as JSON data.

    Args:
      sequences: on one device. length: tokens of cache that each may fill.
      depth: tokens drafted in a step; 0: none. kind: of cache; None: the model's dtype.
    Raises:
      ConfigError: there is nothing to draft with.
    """
    if depth and not model.mtp_depth:
        raise ConfigError(f"--drafts {depth}: this model has no MTP module to draft with; omit it.")
    cfg = dataclasses.replace(model, fp8=FP8Config())  # the recipe is for training; see serving.engine
    device = targets.devices_of(target)[0]
    pages = -(-length // PAGE)
    geometry = CacheGeometry(kind or cfg.dtype, PAGE, widths(pages, PAGE))
    groups = _shapes(cfg, geometry, sequences, depth)
    mesh = make_mesh(MeshConfig(), [device])  # active while tracing, so that the device's kernels are used
    here = NamedSharding(mesh, PartitionSpec())
    on_device = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree)
    arguments = [on_device(groups[name]) for name in ("weights", "cache", "drafts", "batch")]
    with jax.set_mesh(mesh):
        compiled, made = compiled_program(lambda: decode.lower(cfg, geometry, STEPS, *arguments), device.platform)
    found, capacity = bytes_of(compiled), targets.memory_of(target)
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    return {"target": target, "program": "decode", "devices": targets.count(target), "sequences": sequences,
            "length": length, "cache": geometry.kind, "drafts": depth, "jax": jax.__version__, "bytes": found,
            "given": {name: size(tree) for name, tree in groups.items()}, "bytes_per_device": sum(found.values()),
            "memory": capacity, "fits": sum(found.values()) <= capacity, **made}
