"""Training steps in bfloat16 and FP8: `small`, and a slim V2-Lite whose heads are those that the kernels are made for.

Every row names what multiplied the experts: where that is `lax.ragged_dot`, XLA for GPUs multiplies all rows by each
expert, and FP8 next to bfloat16 says little about FP8. The steps are compiled while earlier stages run, and come from
jax's cache; `compile_seconds` of a step that runs is what that took.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

from benchmarks.gpu.stages import Cases
from deepseek_jax.config import BalanceConfig, Config, ModelConfig, TrainConfig, model_config

STEPS = 10


def models(rehearse: bool) -> dict[str, ModelConfig]:
    """Few layers: each is compiled by itself, in minutes of the time that there is."""
    if rehearse:
        return {"tiny": model_config("tiny", num_layers=2, mtp_depth=0, num_experts=8, num_groups=2, groups_kept=1)}
    return {"small, 3 layers": model_config("small", num_layers=3, mtp_depth=0),
            "V2-Lite, 4 layers, 16 experts": model_config("v2_lite_16b", num_layers=4, num_experts=16)}


def cases(rehearse: bool) -> Cases:
    for name, model in models(rehearse).items():
        for kind in ("bfloat16", "fp8"):
            yield f"{name}, {kind}", functools.partial(measure, model, kind == "fp8", rehearse)


def compilations(rehearse: bool) -> Cases:
    """The programs of `cases`, compiled into jax's cache: mostly work of the CPU, but XLA also tries algorithms out."""
    for name, model in models(rehearse).items():
        for kind in ("bfloat16", "fp8"):
            yield f"{name}, {kind}", functools.partial(compile_step, model, kind == "fp8", rehearse)


def compile_step(model: ModelConfig, fp8: bool, rehearse: bool) -> dict[str, Any]:
    """Seconds that compiling takes."""
    start = time.perf_counter()
    _programs(model, fp8, rehearse)
    return {"compile_seconds": time.perf_counter() - start}


def _programs(model, fp8, rehearse):
    """(what makes a state, the step of training, a batch), compiled, or from jax's cache if it has them."""
    import jax
    import numpy as np

    from deepseek_jax import runtime
    from deepseek_jax.training.step import init_state, train_step

    runtime.prepare()
    model = dataclasses.replace(model, fp8=dataclasses.replace(model.fp8, enabled=fp8))
    rows, length = (2, 128) if rehearse else (8, 2048)
    config = Config(model=model, train=TrainConfig(batch_size=rows, sequence_length=length),
                    balance=BalanceConfig(force_balanced=True))
    shape = (1, rows, length + 1)
    batch = {"tokens": np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32),
             "weights": np.ones(shape, np.float32), "segment_ids": np.ones(shape, np.int32), "active": np.int32(1)}
    make = functools.partial(init_state, config)
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    return jax.jit(make).lower().compile(), step.lower(jax.eval_shape(make), batch).compile(), batch


def measure(model: ModelConfig, fp8: bool, rehearse: bool) -> dict[str, Any]:
    """Tokens a second of the step that training runs, on random tokens and with even routing."""
    import jax
    import numpy as np

    start = time.perf_counter()
    make, step, batch = _programs(model, fp8, rehearse)
    compiling, seconds, loss, state = time.perf_counter() - start, [], float("nan"), make()
    for _ in range(2 if rehearse else STEPS + 2):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        loss = float(metrics.loss)
        seconds.append(time.perf_counter() - start)
    took, tokens = statistics.median(seconds[0 if rehearse else 2:]), batch["tokens"][..., 1:].size
    return {"right": bool(np.isfinite(loss)), "tokens_per_second": tokens / took, "seconds": took,
            "all_seconds": seconds, "compile_seconds": compiling, "loss": loss, "force_balanced": True,
            "experts": _experts(dataclasses.replace(model, fp8=dataclasses.replace(model.fp8, enabled=fp8))),
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)), "tokens": tokens,
            "memory": _memory(step)}


def _experts(model):
    from deepseek_jax.model.grouped_matmul import implementation_here
    from kernels_pallas import api

    if model.fp8.enabled:
        return f"fp8_grouped_matmul, {api.chosen_here('fp8_grouped_matmul')}"
    name = implementation_here(model.implementation)
    if name == "xla" or (name == "ragged" and api.chosen_here("grouped_matmul") == "reference"):
        return "lax.ragged_dot"
    return f"grouped_matmul, {api.chosen_here('grouped_matmul')}" if name == "ragged" else name


def _memory(step):
    found = step.memory_analysis()
    return None if found is None else {"arguments": found.argument_size_in_bytes,
                                       "temporaries": found.temp_size_in_bytes}
