"""The sample at the end of a run on a mesh, drawn from the model as it was trained: split over the devices, not
gathered.

There is no cache: each new token takes a forward pass over all tokens so far, with the same shards, pipeline and
dispatch as training. At 671B, by estimate, a hundred passes over a few hundred tokens take less time than one training
step; for a small model they take more. Every device along the data axes reads the same row. Random draws equal those of
the engine.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model.layers import head_logits
from deepseek_jax.parallel.context import in_parts
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.parallel.sharding import constrain, constrain_to_compute
from deepseek_jax.pipeline.model import logits_of_one
from deepseek_jax.serving.sampling import TOKEN, Sampling, draw, keys, likeliest, probabilities
from deepseek_jax.training.step import complete, run_model
from deepseek_jax.training.types import Batch

TEMPERATURE = 0.8
PROMPT_WORDS = 4


def room(config: Config, tokens: int) -> int:
    """The row length for a prompt and its continuation, `tokens` in total."""
    tile = config.mesh.parts * math.lcm(128, config.mesh.tensor)  # what `check_mesh` requires of a sequence
    return -(-tokens // tile) * tile


def continue_prompt(config: Config, params: dict[str, Any], router: dict[str, jax.Array], prompt_T: jax.Array,
                    known: jax.Array, eos: jax.Array, temperature: float = TEMPERATURE,
                    base: dict[str, Any] | None = None) -> jax.Array:
    """Continues a prompt by at most config.train.sample_tokens tokens, until one is `eos`. For jit, on a mesh.

    Args:
      params, router: as a TrainState holds them. base: as in `training.step.accumulate`.
      prompt_T: int32, of which the first `known` tokens are the prompt; its length is given by `room`.
      eos: int32; -1: none.
    Returns:
      int32 [T], the prompt and its continuation; eos, and everything after the last token, is -1.
    """
    # Nothing is dropped: all rows are the same, so the loads of the experts are far from even.
    mesh = dataclasses.replace(config.mesh, capacity=None)
    config = dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, mtp_depth=0))
    if mesh.pipe == 1:
        params = complete(config, constrain_to_compute(params), base)
    scalar = lambda x, dtype: jnp.full((1,), x, dtype)
    sampling = Sampling(scalar(temperature, jnp.float32), scalar(0, jnp.int32), scalar(1, jnp.float32),
                        scalar(config.train.seed, jnp.uint32), scalar(0, jnp.uint32))

    def unfinished(carry):
        at, tokens_T, last = carry
        return (at < known + config.train.sample_tokens) & (at < len(prompt_T)) & (last != eos)

    def step(carry):
        at, tokens_T, _ = carry
        logits_11W = logits_at(config, params, router, tokens_T, at - 1)[None, None]
        if temperature > 0:
            index_11 = jnp.full((1, 1), at)
            token = draw(keys(sampling, index_11, TOKEN), probabilities(sampling, logits_11W))[0, 0]
        else:
            token = likeliest(logits_11W)[0, 0]
        return at + 1, tokens_T.at[at].set(jnp.where(token == eos, -1, token)), token

    end, tokens_T, _ = jax.lax.while_loop(unfinished, step, (known, prompt_T, jnp.int32(-2)))
    return jnp.where(jnp.arange(len(prompt_T)) < end, tokens_T, -1)


def logits_at(config: Config, params: dict[str, Any], router: dict[str, jax.Array], tokens_T: jax.Array,
              at: jax.Array) -> jax.Array:
    """The logits [W], float32, of the token after the one at position `at`. Later tokens of tokens_T are not seen."""
    rows, length = config.mesh.data_shards, len(tokens_T)
    spread = lambda x_T: constrain(jnp.broadcast_to(x_T, (rows, length)), ("sequences", None))
    tokens_BT = spread(jnp.maximum(tokens_T, 0))
    one_BT = spread(jnp.arange(length) == at) & (jnp.arange(rows) == 0)[:, None]
    batch = Batch(tokens_BT, tokens_BT, one_BT.astype(jnp.float32), None, None)
    if config.mesh.pipe > 1:
        return logits_of_one(config, params, router, batch)
    hidden_BTD = run_model(config, params, router, batch).hidden_BTD
    h_D = jnp.where(in_parts(one_BT)[:, :, None], hidden_BTD, 0).sum(axis=(0, 1))
    return head_logits(h_D[None], params["head"])[0]


def sample_prompt(config: Config, tokenizer: Tokenizer, held_out: str) -> list[int]:
    """The prompt of the sample: config.train.sample_prompt, or the first words of `held_out`."""
    words = re.findall(r"\s*\S+", held_out)[:PROMPT_WORDS]
    return [tokenizer.bos, *tokenizer.encode(config.train.sample_prompt or "".join(words))]


def sample_on_mesh(config: Config, runner: Runner, variables: tuple[Any, Any, Any], prompt: Sequence[int],
                   eos: int | None, temperature: float = TEMPERATURE) -> list[int]:
    """The new tokens of a sample, without `eos`; all processes call this and get the same result.

    Args:
      variables: (params, router, the base of adapters or None), on the mesh of the runner.
    """
    prompt_T = np.zeros(room(config, len(prompt) + config.train.sample_tokens), np.int32)
    prompt_T[:len(prompt)] = prompt
    def run(params, router, base, known, eos):
        return continue_prompt(config, params, router, jnp.asarray(prompt_T), known, eos, temperature, base)

    made_T = np.asarray(runner.jit(run)(*variables, np.int32(len(prompt)), np.int32(-1 if eos is None else eos)))
    return [int(token) for token in made_T[len(prompt):] if token >= 0]
