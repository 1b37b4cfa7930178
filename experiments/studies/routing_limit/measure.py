"""The number of nodes that a token is sent to if every group of experts is on a separate node."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.loader import Loader
from deepseek_jax.model import DeepSeekV3

BATCHES = 4


@functools.lru_cache(maxsize=2)
def _nodes(cfg):
    def run(params, router, tokens_BT):
        output = DeepSeekV3(cfg).apply({"params": params, "router": router}, tokens_BT, logits=False,
                                       capture=("chosen",))
        group_LBTK = output.captured["chosen"] // (cfg.num_experts // cfg.num_groups)  # pyright: ignore[reportAttributeAccessIssue] (apply)
        visited_LBTKG = group_LBTK[..., None] == jnp.arange(cfg.num_groups)[None, None, None, None]
        return visited_LBTKG.any(axis=-2).sum(axis=-1).mean()

    return jax.jit(run)


def copies(config: Config, params: dict[str, Any], router: dict[str, Any], loader: Loader,
           final: bool) -> dict[str, float]:
    """Distinct groups among a token's experts, averaged over layers and held-out text."""
    found = [_nodes(config.model)(params, router, batch["tokens"][:, :-1])
             for batch in loader.validation_batches(config.train.batch_size, BATCHES)]
    return {"nodes_per_token": float(np.mean(found))}
