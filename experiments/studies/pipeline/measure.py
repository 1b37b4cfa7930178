"""The executor measured on this machine: programs, steps, and the operations of a schedule.

    python -m experiments.studies.pipeline.measure programs     compile time and memory at two numbers of micro-batches
    python -m experiments.studies.pipeline.measure costs        seconds of F, B, Bi, W and F&B, and the result at 4
                                                                and 8 ranks
    python -m experiments.studies.pipeline.measure steps        seconds of a step on 2 devices, schedules in turn

Each part writes its own entry of measured.json. Compile times are those with an empty cache. Run the last two on an
idle machine, after `--rounds 0`, which only compiles into the cache of JAX_COMPILATION_CACHE_DIR.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from deepseek_jax import cli, io
from deepseek_jax.config import Config
from deepseek_jax.pipeline.schedule import NAMES
from deepseek_jax.pipeline.split import Split
from experiments.studies.framework.results import provenance

FILE = pathlib.Path(__file__).parent / "measured.json"
ROWS = 2  # sequences of a micro-batch


def config_of(schedule: str | None, microbatches: int, ranks: int = 2, **model: Any) -> Config:
    """The preset `tiny` with one dense layer and no MTP. schedule None: the devices share every micro-batch instead."""
    from deepseek_jax.config import default_config, freeze

    made = default_config("tiny")
    made.train.batch_size = ROWS * microbatches
    made.train.sequence_length, made.train.accumulation_steps, made.train.ramp_from = 256, 1, None
    for name, value in (dict(num_layers=3, num_dense_layers=1, mtp_depth=0, dtype="float32", remat="none",
                             vocab_size=2048) | model).items():
        setattr(made.model, name, value)
    if schedule is None:
        made.mesh.local, made.train.accumulation_steps = ranks, microbatches
    else:
        made.mesh.pipe, made.pipeline.schedule, made.pipeline.microbatches = ranks, schedule, microbatches
    return freeze(made)


def lowered_step(config: Config) -> tuple[Any, Callable[[], Any], dict[str, Any]]:
    """Returns the lowered step, a function that makes its state, and the shapes and shardings of its batch."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from deepseek_jax.parallel.runner import Runner
    from deepseek_jax.parallel.sharding import spec
    from deepseek_jax.training.step import init_state, train_step

    devices, train = Runner(config), config.train
    assert devices.mesh is not None  # two devices
    initial = functools.partial(init_state, config)
    abstract = jax.eval_shape(initial)
    where, whole = devices.shardings(abstract), NamedSharding(devices.mesh, PartitionSpec())
    shape = train.accumulation_steps, train.batch_size // train.accumulation_steps, train.sequence_length + 1
    rows = NamedSharding(devices.mesh, spec(None, "sequences", None))
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in
             (("tokens", jnp.int32), ("weights", jnp.float32), ("segment_ids", jnp.int32))}
    batch["active"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    with jax.set_mesh(devices.mesh):
        step = jax.jit(functools.partial(train_step, config), out_shardings=(where, whole), donate_argnums=0)
        return step.lower(devices.with_shardings(abstract), batch), jax.jit(initial, out_shardings=where), batch


def programs(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Compile time, size and memory of the step at 8 and 64 micro-batches, and the slots of the schedule."""
    from deepseek_jax.pipeline.model import schedule_of

    found = {}
    for name in args.schedules:
        found[name] = []
        for microbatches in (8, 64):
            config = config_of(name, microbatches)
            start = time.perf_counter()
            lowered = lowered_step(config)[0]
            middle, cpu = time.perf_counter(), time.process_time()
            compiled = lowered.compile()
            found[name].append({
                "ranks": 2, "microbatches": microbatches, "lines": lowered.as_text().count("\n"),
                "lowering_seconds": middle - start, "compile_seconds": time.perf_counter() - middle,
                "compile_cpu_seconds": time.process_time() - cpu,
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "slots": schedule_of(config).slots._asdict(), "kept_bytes": parts(config).residual_bytes})
            print(name, found[name][-1], flush=True)
    return found


def parts(config: Config) -> Split:
    """F, B, Bi and W of one stage on one device (`pipeline.split`)."""
    return _parts(config)[0]


def _parts(config):
    import jax
    import jax.numpy as jnp

    from deepseek_jax.model import DeepSeekV3
    from deepseek_jax.pipeline.model import Inputs, schedule_of, slots, stage
    from deepseek_jax.pipeline.split import split
    from deepseek_jax.training.types import Batch, Normalizers

    c, held = config.model, slots(config.model.num_moe_layers, schedule_of(config))[1].shape[1]
    variables = jax.eval_shape(lambda: DeepSeekV3(c).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32),
                                                          logits=False))
    shape = ROWS, config.train.sequence_length
    def array(shape, dtype) -> Any:  # a shape, where the annotations have jax.Array
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens, scalar = array(shape, jnp.int32), array((), jnp.float32)
    batch = Batch(tokens, tokens, array(shape, jnp.float32), None, None)
    normalizers = Normalizers(scalar, array((c.mtp_depth,), jnp.float32), scalar, scalar)
    inputs = Inputs(batch, normalizers, array((), jnp.int32))
    arguments = (jax.tree.map(lambda a: jax.ShapeDtypeStruct((held, *a.shape[1:]), a.dtype),
                              variables["params"]["layers"]),
                 jax.ShapeDtypeStruct((*shape, c.d_model), c.dtype),
                 ({"real": jax.ShapeDtypeStruct((held,), bool),
                   "bias": jax.ShapeDtypeStruct((held, c.num_experts), jnp.float32)},
                  inputs))
    run = lambda params, x, context: stage(config, params, context[0], x, context[1])
    return split(run, *arguments), arguments


def operations(config: Config) -> dict[str, Callable[[], Any]]:
    """{"F", "B", "Bi", "W", "F&B"} -> a compiled call without arguments, on one device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    s, shapes = _parts(config)
    rng = np.random.default_rng(0)
    fill = lambda a: (jnp.ones(a.shape, a.dtype) if a.dtype == bool else jnp.zeros(a.shape, a.dtype)
                      if jnp.issubdtype(a.dtype, jnp.integer) else jnp.asarray(rng.normal(size=a.shape) / 16, a.dtype))
    params, x, context = jax.tree.map(fill, shapes)
    prepared, dloss = jax.jit(s.prepare)(params), jnp.ones(())
    residuals = jax.jit(s.forward)(prepared, x, context)[1]
    pending = jax.jit(s.backward_input)(prepared, context, residuals, x, dloss)[1]

    def both(prepared, x, context, residuals, dloss):
        return s.forward(prepared, x, context), s.backward(prepared, context, residuals, x, dloss)

    calls = {"F": (s.forward, prepared, x, context), "B": (s.backward, prepared, context, residuals, x, dloss),
             "Bi": (s.backward_input, prepared, context, residuals, x, dloss),
             "W": (s.backward_weights, prepared, context, pending),
             "F&B": (both, prepared, x, context, residuals, dloss)}
    return {name: functools.partial(jax.jit(f).lower(*given).compile(), *given) for name, (f, *given) in calls.items()}


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """{name: seconds of each round}, without the first one, which warms up."""
    import jax

    seconds = {name: [] for name in calls}
    for turn in range(rounds + 1 if rounds else 0):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name] += [time.perf_counter() - start] if turn else []
    return seconds


def costs(args: argparse.Namespace) -> dict[str, Any] | None:
    """Seconds of each operation on one core, and the resulting times of the schedules with 2, 4 and 8 ranks."""
    from deepseek_jax.pipeline.validate import compare

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seconds = in_turn(operations(config_of("1f1b", 8)), args.rounds)
    if not args.rounds:
        return None
    median = {name: statistics.median(times) for name, times in seconds.items()}
    given = {"f": median["F"], "b": median["B"], "w": median["W"], "fb": median["F&B"]}
    # The validator uses B - W for Bi; the rest of a measured Bi is the cost of splitting.
    predicted = [row for ranks in (2, 4, 8) for row in compare([ranks], [4 * ranks], given)]
    return {"layers_a_stage": 1, "seconds": seconds, "median": median, "predicted": predicted}


def steps(args: argparse.Namespace) -> dict[str, Any] | None:
    """Seconds of complete steps with 2 ranks on 2 devices, and on the same devices without a pipeline."""
    import jax
    import numpy as np

    calls, losses = {}, {}
    for name in (*args.schedules, None):
        config = config_of(name, 8)
        lowered, initial, shapes = lowered_step(config)
        compiled = lowered.compile()
        if not args.rounds:
            continue
        values = {n: np.ones(a.shape, a.dtype) for n, a in shapes.items()} | {
            "tokens": np.random.default_rng(0).integers(0, 2000, shapes["tokens"].shape, np.int32),
            "active": np.int32(config.train.accumulation_steps)}
        batch = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), values, shapes)
        state = [initial()]

        def call(compiled=compiled, state=state, batch=batch, name=name):
            state[0], metrics = compiled(state[0], batch)
            losses[name or "no pipeline"] = float(metrics.loss)
            return state[0].step

        calls[name or "no pipeline"] = call
    seconds = in_turn(calls, args.rounds)
    return args.rounds and {"ranks": 2, "microbatches": 8, "moe_layers": 2, "seconds": seconds, "losses": losses,
                            "median": {name: statistics.median(times) for name, times in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.pipeline.measure", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("programs", "costs", "steps"))
    parser.add_argument("--rounds", type=int, default=9, help="0: only compile")
    parser.add_argument("--schedules", nargs="+", default=("gpipe", "1f1b", "dualpipe"), choices=NAMES)
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 " + os.environ.get("XLA_FLAGS", "")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if result := {"programs": programs, "costs": costs, "steps": steps}[args.part](args):
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        found = known.get(args.part, {}).get("found", {}) | result  # schedules may be measured one by one
        known[args.part] = {"command": f"python -m experiments.studies.pipeline.measure {args.part}", "found": found,
                            **provenance()}
        io.write_json(FILE, known)


if __name__ == "__main__":
    cli.run(main)
