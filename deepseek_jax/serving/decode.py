"""Generation by whole forward passes: plain, exact, without a cache.

Prompts are padded on the right to one bucketed length, so causality keeps the padding out of sight and one compiled
program serves every length of a bucket.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.model.layers import head_logits

BUCKET = 64  # lengths are rounded up to a multiple: one compilation each


class Generation(NamedTuple):
    tokens: list[list[int]]  # the NEW ids of each prompt, without eos_id
    drafted: int
    accepted: int


@functools.partial(jax.jit, static_argnums=0)
def _next_logits(cfg, variables, tokens_BT, last_B):
    """Main logits [B, W] after position `last`. MTP modules are left out of the program: nothing uses their output."""
    output = DeepSeekV3(cfg).apply(variables, tokens_BT, logits=False)
    hidden_BD = jnp.take_along_axis(output.hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    return head_logits(hidden_BD, variables["params"]["head"])


def generate(cfg: ModelConfig, variables, prompts, max_new_tokens, speculative=False, temperature=0.0, seed=0,
             eos_id=None) -> Generation:
    """Continues each prompt.

    Args:
      prompts: lists of token ids, each at least one long.
      max_new_tokens: new tokens per prompt.
      speculative: draft with the MTP modules.
      temperature: 0 is greedy.
      eos_id: ends a sequence; None never stops early.
    Raises:
      ConfigError: an empty prompt, an id outside the vocabulary, or speculative decoding, which needs the cache.
    """
    if speculative:
        raise ConfigError("speculative decoding needs the latent cache, which this version does not have; "
                          "leave --speculative away.")
    if max_new_tokens < 0 or not 0 <= temperature < float("inf"):
        raise ConfigError(f"max_new_tokens={max_new_tokens}, temperature={temperature}: neither can be negative, or "
                          "infinite.")
    if not prompts:
        return Generation([], 0, 0)
    for prompt in prompts:
        if not prompt or not all(0 <= t < cfg.vocab_size for t in prompt):
            raise ConfigError(f"a prompt must hold at least one token id, each in [0, {cfg.vocab_size}).")
    lengths = np.array([len(p) for p in prompts])
    done, key = np.zeros(len(prompts), bool), jax.random.key(seed)
    room = -(-(lengths.max() + max_new_tokens) // BUCKET) * BUCKET
    tokens = np.zeros((len(prompts), room), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[:len(prompt)] = prompt
    new = [[] for _ in prompts]
    for n in range(max_new_tokens):
        width = -(-(lengths.max()) // BUCKET) * BUCKET
        logits_BW = _next_logits(cfg, variables, jnp.asarray(tokens[:, :width]), jnp.asarray(lengths - 1))
        if temperature > 0:
            chosen = jax.random.categorical(jax.random.fold_in(key, n), logits_BW / temperature)
        else:
            chosen = logits_BW.argmax(axis=-1)
        for b, token in enumerate(np.asarray(chosen).tolist()):
            done[b] = done[b] or token == eos_id
            if not done[b]:
                new[b].append(token)
                tokens[b, lengths[b]] = token
                lengths[b] += 1
        if done.all():
            break
    return Generation(new, 0, 0)
