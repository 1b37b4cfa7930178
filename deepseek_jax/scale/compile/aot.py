"""The real training step, compiled for machines that you don't have, and its memory according to XLA.

The program is the one that training runs, traced on a mesh of described devices (`targets`); the chip's own compiler
schedules it, assigns its buffers and, for GPUs, generates its kernels. Nothing runs.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import Config, LoraConfig, ModelConfig, OptimizerConfig, PipelineConfig, TrainConfig
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import compute_shardings, spec, storage_shardings
from deepseek_jax.pipeline.model import check
from deepseek_jax.scale import memory
from deepseek_jax.scale.compile import clock, hlo, targets
from deepseek_jax.scale.costs import training_flops_per_token
from deepseek_jax.scale.layout import Layout
from deepseek_jax.training.base import frozen_shapes
from deepseek_jax.training.step import init_state, train_step
from kernels_pallas.tools import compile_report

MEMORY = 0.95  # the share of a GPU that a program may take, as with XLA_PYTHON_CLIENT_MEM_FRACTION=.95
EVERYTHING = LoraConfig()  # everything is trained, and there are no adapters


def config_of(model: ModelConfig, layout: Layout, lora: LoraConfig = EVERYTHING) -> Config:
    """The config that trains `model`, or adapters of it, on `layout`.

    Raises:
      ConfigError: that is impossible.
    """
    rounds = 1 if layout.mesh.pipe > 1 else layout.microbatches
    config = Config(
        model=model, mesh=layout.mesh, lora=lora,
        train=TrainConfig(batch_size=layout.microbatches * layout.rows * layout.mesh.data_shards,
                          accumulation_steps=rounds, sequence_length=layout.sequence_length,
                          ema_decay=0.999 if layout.ema else 0.0),
        optimizer=OptimizerConfig(moment_dtype=layout.moment_dtype),
        pipeline=PipelineConfig(layout.schedule, layout.microbatches if rounds == 1 else 8, layout.deferred))
    check(config)
    return config


def _arguments(config: Config, mesh):
    """Shapes of a state, a batch and the base of adapters, their shardings, and the sharding of an unsharded array."""
    state = jax.eval_shape(functools.partial(init_state, config))
    train = config.train
    shape = train.accumulation_steps, train.batch_size // train.accumulation_steps, train.sequence_length + 1
    dtypes = {"tokens": jnp.int32, "weights": jnp.float32, "segment_ids": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, spec(None, "sequences", None))
    base = None if config.lora.rank is None else frozen_shapes(config)["params"]
    frozen = None if base is None else compute_shardings(base, mesh)
    where = storage_shardings(state, mesh), dict.fromkeys(batch, rows) | {"active": whole}, frozen
    return (state, batch | {"active": jax.ShapeDtypeStruct((), jnp.int32)}, base), where, whole


@contextlib.contextmanager
def _environment(**values: str):
    """A context with these environment variables."""
    before = {name: os.environ.pop(name) for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


def _peak_gigabytes() -> float:
    """Peak memory of this process; NaN if the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def compiled_program(lower: Callable[[], jax.stages.Lowered], platform: str) -> tuple[Any, dict[str, Any]]:
    """Lowers and compiles.

    Args:
      lower: returns a lowered program.
    Returns:
      jax's compiled program; {"seconds": {"lowering", "compiling", "cpu"}, "compiler_gigabytes", "kernels": a row for
      each Mosaic kernel, with its registers and spills according to ptxas}. cpu: of this process only.
    """
    with tempfile.TemporaryDirectory() as folder, _environment(
            MOSAIC_GPU_DUMP_TO=folder, MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_PTXAS="1"):
        start = time.time()
        lowered = lower()
        middle = time.time()
        compiled = lowered.compile(compiler_options=compiler_options(platform, jax.__version_info__, MEMORY))
        seconds = {"lowering": middle - start, "compiling": time.time() - middle, "cpu": time.process_time()}
        kernels = kernels_in(pathlib.Path(folder))
    return compiled, {"seconds": seconds, "kernels": kernels,
                      "compiler_gigabytes": _peak_gigabytes()}


def kernels_in(folder: pathlib.Path) -> list[dict]:
    """The Mosaic kernels in a dump: name, count, and the maximum of each figure over those with the same name."""
    rows: dict[str, dict] = {}
    for name, found in compile_report.dumped(list(folder.iterdir())):
        found = {field: n for field, n in found.items() if n is not None}
        row = rows.setdefault(name, {"kernel": name, "count": 0} | dict.fromkeys(found, 0))
        row |= {field: max(row[field], value) for field, value in found.items()}
        row["count"] += 1
    return list(rows.values())


def compile_step(config: Config, target: str) -> tuple[Any, dict[str, Any]]:
    """Compiles one optimizer step for `target`. Returns the same as `compiled_program`."""
    devices = targets.devices_of(target)
    mesh = make_mesh(config.mesh, devices)
    arguments, where, whole = _arguments(config, mesh)
    step = jax.jit(functools.partial(train_step, config), in_shardings=where, out_shardings=(where[0], whole),
                   donate_argnums=0)
    with jax.set_mesh(mesh):
        return compiled_program(lambda: step.lower(*arguments), devices[0].platform)


def bytes_of(compiled: Any) -> dict[str, int]:
    """Bytes per device by XLA's own analysis; donated arguments count once."""
    found = compiled.memory_analysis()
    return {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes,
            "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
            "code": found.generated_code_size_in_bytes}


def measure_step(model: ModelConfig, layout: Layout, target: str, lora: LoraConfig = EVERYTHING) -> dict[str, Any]:
    """Compiles the step; returns its report as JSON data, with the planner's prediction if all weights are trained."""
    config = config_of(model, layout, lora)
    compiled, made = compile_step(config, target)
    planned = {}
    if lora.rank is None:
        planned = memory.bytes_per_device(model, layout, targets.kernels_of(target), config.train.loss_chunk)
    text = compiled.as_text() or ""
    found = described(model, layout, target, text, bytes_of(compiled))
    cost, total = compiled.cost_analysis() or {}, sum(planned.values())
    return {**found, **({"planned": planned, "planned_bytes_per_device": total,
                         "planned_over_compiled": total / found["bytes_per_device"]} if planned else
                        {"lora": lora.rank, "base_fp8": lora.fp8}),
            "waits": _waits(model, layout, text, target),
            "products": _products(model, layout, text, target, lora.rank is not None), "flops_once": cost.get("flops"),
            "bytes_accessed_once": cost.get("bytes accessed"), **made}


def described(model: ModelConfig, layout: Layout, target: str, text: str, found: dict[str, int]) -> dict[str, Any]:
    """The part of the report common to all compiled programs of a layout; found: its bytes per device by kind."""
    total, capacity = sum(found.values()), targets.memory_of(target)
    try:
        collectives = hlo.collectives(text, layout.mesh.sizes)
    except ValueError as error:  # the result of minutes of compiling is not lost because of it
        print(f"Its collectives could not be read, and are left out: {error}", file=sys.stderr)
        collectives = None
    return {"target": target, "devices": layout.mesh.devices, "layout": layout.name,
            "mesh": dataclasses.asdict(layout.mesh), "schedule": layout.schedule if layout.mesh.pipe > 1 else None,
            "micro_batches": layout.microbatches, "rows": layout.rows, "deferred": layout.deferred,
            "sequence_length": layout.sequence_length, "fp8": model.fp8.enabled, "remat": model.remat,
            "jax": jax.__version__, "bytes": found, "bytes_per_device": total, "memory": capacity,
            "fits": total <= capacity,
            "collectives": hlo.table(collectives or []),
            "exposed": None if collectives is None else sum(not one.products for one in collectives)}


def _products(model, layout, text, target, frozen):
    """FLOPs of a device's products in a step, for its kernels and in total, and the useful FLOPs of its share of the
    tokens, if all weights or, with `frozen`, only adapters are trained and loads are even; {} for a pipeline, whose
    branches do not all run, and for TPUs, whose kernels are not known."""
    if layout.pipeline is not None or target.partition(":")[0] not in targets.GPUS:
        return {}
    tokens = layout.tokens // layout.mesh.tensor  # of a micro-batch
    found = hlo.work(text, tokens * model.experts_per_token)
    # The first micro-batch is a copy of its own, and the others are a loop, whose body is counted once.
    rounds = layout.microbatches / min(2, layout.microbatches)
    others = found.flops - found.attention - found.experts - found.fp8
    useful = training_flops_per_token(model, layout.sequence_length, frozen=frozen) * tokens * layout.microbatches
    return {**{name: rounds * flops for name, flops in (("attention", found.attention), ("experts", found.experts),
                                                        ("fp8", found.fp8), ("others", others))}, "useful": useful}


def _waits(model, layout, text, target):
    """{machine: `clock.waits`} of a step whose cells overlap, on the machines that have the target's chip."""
    overlaps = layout.pipeline is not None and layout.schedule.startswith("dualpipe")
    if target.partition(":")[0] not in targets.GPUS or not overlaps or layout.mesh.nodes * layout.mesh.local == 1:
        return {}
    try:
        steps = clock.cell_steps(text, layout)["F&B"]
    except (KeyError, ValueError) as error:  # the result of minutes of compiling is not lost because of it
        print(f"Its exchanges could not be clocked: {error}", file=sys.stderr)
        return {}
    return {machine: clock.waits(model, layout, steps, machine) for machine in targets.GPUS}
