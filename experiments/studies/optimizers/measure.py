"""The largest attention logit of a model, on held-out text."""

import functools
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.loader import Loader
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.model.attention import LOGITS
from deepseek_jax.training.qk_clip import largest

BATCHES = 4


@functools.lru_cache(maxsize=2)
def _measured(cfg):
    def run(params, router, tokens_BT):
        made: Any = DeepSeekV3(cfg).apply({"params": params, "router": router}, tokens_BT, logits=False,
                                          mutable=[LOGITS])
        return largest(made[1][LOGITS])

    return jax.jit(run)


def max_logit(config: Config, params: dict[str, Any], router: dict[str, Any], loader: Loader,
              final: bool) -> dict[str, float]:
    """The largest attention logit of all heads and layers, over some held-out text."""
    found = [_measured(config.model)(params, router, batch["tokens"][:, :-1])
             for batch in loader.validation_batches(config.train.batch_size, BATCHES)]
    return {"max_logit": float(np.max(found))}
