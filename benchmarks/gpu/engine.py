"""Decoding through the engine, with mla_decode and without, by batch size and context length.

The slim V2-Lite of training.py with random weights; prompts differ, so that no pages are shared. Without the kernel,
model.implementation=xla, attention is plain products of XLA, and nothing else differs.
"""

import dataclasses
import functools
import time
from typing import Any

from benchmarks.gpu.stages import Cases
from deepseek_jax.config import ModelConfig, model_config

KINDS = {"mla_decode": "auto", "plain products": "xla"}  # model.implementation
SIZES = ((1, 1024), (16, 1024), (128, 1024), (1, 8192), (16, 8192), (1, 32768))  # sequences, tokens of context
NEW, PAGE = 128, 64


def model(rehearse: bool) -> ModelConfig:
    if rehearse:
        return model_config("tiny", num_layers=2, mtp_depth=0)
    return model_config("v2_lite_16b", num_layers=4, num_experts=16)


def cases(rehearse: bool) -> Cases:
    for batch, context in ((2, 64),) if rehearse else SIZES:
        for kind, implementation in KINDS.items():
            cfg = dataclasses.replace(model(rehearse), implementation=implementation)
            new = 8 if rehearse else NEW
            yield f"{batch} x {context}, {kind}", functools.partial(measure, cfg, batch, context, new)


@functools.cache
def _variables(cfg):
    import jax
    import numpy as np

    from deepseek_jax.model import DeepSeekV3

    return jax.jit(lambda: DeepSeekV3(cfg).init(jax.random.key(0), np.zeros((1, 4), np.int32)))()


def measure(cfg: ModelConfig, batch: int, context: int, new: int) -> dict[str, Any]:
    """Seconds of a step of the full batch after `context` tokens, and of prefill; a first round compiles.

    `right`: all sequences were completed, and steps of all were timed. Prompts are read one chunk a step, while
    those before decode: all get enough additional tokens that `new` are left when the last one is read.
    """
    from deepseek_jax import runtime

    runtime.prepare()
    from deepseek_jax.serving.engine import Engine, EngineConfig
    from deepseek_jax.serving.sequence import Request

    chunk, most_steps = min(context, 2048), new // 4
    more = new + batch * -(-context // chunk)
    options = EngineConfig(batch, context + more + new, page_size=PAGE, chunk=chunk, most_steps=most_steps)
    engine = Engine(cfg, _variables(dataclasses.replace(cfg, implementation="auto")), options)
    row: dict[str, Any] = {}
    for turn in range(2):
        prompts = [[1 + (i * (b + 3) + turn) % (cfg.vocab_size - 1) for i in range(context)] for b in range(batch)]
        made = [engine.submit(Request(tuple(prompt), more)) for prompt in prompts]
        start = time.perf_counter()
        while engine.busy and any(not s.made for s in made):
            engine.step()
        reading = time.perf_counter()
        before = sum(len(s.made) for s in made)
        while engine.busy and all(len(s.made) < more - most_steps for s in made):
            engine.step()
        took, tokens = time.perf_counter() - reading, sum(len(s.made) for s in made) - before
        engine.run()
        right = tokens > 0 and all(s.finish == "length" for s in made)
        row = {"right": right, "implementation": cfg.implementation, "tokens": tokens,
               "seconds_per_step": took * batch / max(tokens, 1), "tokens_per_second": tokens / took}
        if batch == 1:  # with more, decoding runs in between
            row["prompt_tokens_per_second"] = context / (reading - start)
    return row
