"""Training steps in bfloat16 and FP8: `small`, and a slim V2-Lite with the head sizes that the kernels are written for.

Every row names the implementation of the experts' products: with `lax.ragged_dot`, XLA for GPUs multiplies all rows by
each expert, so comparing FP8 with bfloat16 says little about FP8. The steps are compiled while earlier stages run, and
are loaded from jax's cache; the `compile_seconds` of a step include only this loading.
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
    """Models with few layers: each layer is compiled separately, which takes minutes of the available time."""
    if rehearse:
        return {"tiny": model_config("tiny", num_layers=2, mtp_depth=0, num_experts=8, num_groups=2, groups_kept=1)}
    return {"small, 3 layers": model_config("small", num_layers=3, mtp_depth=0),
            "V2-Lite, 4 layers, 16 experts": model_config("v2_lite_16b", num_layers=4, num_experts=16)}


def cases(rehearse: bool) -> Cases:
    for name, model in models(rehearse).items():
        for kind in ("bfloat16", "fp8"):
            yield f"{name}, {kind}", functools.partial(measure, model, kind == "fp8", rehearse)


def compilations(rehearse: bool) -> Cases:
    """The programs of `cases`, compiled into jax's cache: mostly on the CPU, but XLA also times algorithms."""
    for name, model in models(rehearse).items():
        for kind in ("bfloat16", "fp8"):
            yield f"{name}, {kind}", functools.partial(compile_step, model, kind == "fp8", rehearse)


def compile_step(model: ModelConfig, fp8: bool, rehearse: bool) -> dict[str, Any]:
    """Compiles a step. Returns the seconds."""
    start = time.perf_counter()
    _programs(model, fp8, rehearse)
    return {"compile_seconds": time.perf_counter() - start}


def _programs(model, fp8, rehearse):
    """(function that makes a state, training step, batch), compiled, or from jax's cache if it has them."""
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
    """Tokens per second of the training step, on random tokens and with even routing."""
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
