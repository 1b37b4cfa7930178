"""The experts that a model chooses for each token of a text.

    model = deepseek_jax.load("run")
    routing = deepseek_jax.routing_of(model, "def f(x):")
    for token, experts in zip(routing.tokens, routing.chosen_LTK[-1]):
        print(repr(token), experts)
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.workdir import LoadedModel


class Routing(NamedTuple):
    """The routing of one text of T tokens, in the L MoE layers. MTP modules are left out.

    tokens: the text of each token, the first one is BOS. ids_T: int32.
    scores_LTE: float32, the affinity of each token to each expert. chosen_LTK: int32, its chosen experts.
    """

    tokens: list[str]
    ids_T: np.ndarray
    scores_LTE: np.ndarray
    chosen_LTK: np.ndarray

    def loads(self) -> np.ndarray:
        """int [L, E]: how many tokens chose each expert."""
        E = self.scores_LTE.shape[-1]
        return np.stack([np.bincount(chosen_TK.ravel(), minlength=E) for chosen_TK in self.chosen_LTK])


def routing_of(loaded: LoadedModel, text: str) -> Routing:
    """Reads a text, after BOS, and returns the routing of its tokens.

    Raises:
      ConfigError: the model has no experts.
    """
    cfg, variables, tokenizer = loaded
    if not cfg.num_moe_layers:
        raise ConfigError("this model has no experts (all its layers are dense), so there is nothing to route.")
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    captured = _captured(cfg)(variables, jnp.array([ids], jnp.int32))
    scores_LTE, chosen_LTK = (np.asarray(captured[name])[:, 0] for name in ("scores", "chosen"))
    return Routing([tokenizer.decode([i], specials=True) for i in ids], np.array(ids, np.int32),
                   scores_LTE.astype(np.float32), chosen_LTK)


@functools.cache
def _captured(cfg):
    """The compiled forward pass; one for each length of text."""
    def forward(variables, tokens):
        output: Any = DeepSeekV3(cfg).apply(variables, tokens, logits=False, capture=("scores", "chosen"))
        return output.captured

    return jax.jit(forward)
