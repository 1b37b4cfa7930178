"""Your own routing rule: hash routing (Roller et al., arXiv 2106.04426). Only a token's id determines its experts.

    PYTHONPATH=. python -m deepseek_jax.train --config examples/own_router.py --workdir run_hash
    PYTHONPATH=. python -m deepseek_jax.serve --workdir run_hash
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from deepseek_jax.config import ModelConfig
from deepseek_jax.configs import tiny
from deepseek_jax.model.router import affinities
from deepseek_jax.model.types import Routing, RoutingContext


def hash_route(cfg: ModelConfig, x_ND: jax.Array, weights: dict, bias_E: jax.Array | None,
               context: RoutingContext) -> Routing:
    """K different experts for each token id, all with the same gate."""
    E, K = cfg.num_experts, cfg.experts_per_token
    first_N = jnp.asarray(context.tokens_N, jnp.uint32) * jnp.uint32(2654435761) % E  # Knuth's multiplicative hash
    chosen_NK = (first_N[:, None] + jnp.arange(K, dtype=jnp.uint32)[None] * (E // K)) % E
    scores_NE = affinities(cfg, x_ND.astype(jnp.float32) @ weights["weight"])  # for the balance losses and for studies
    gates_NK = jnp.full(chosen_NK.shape, cfg.route_scale / K, jnp.float32)
    return Routing(scores_NE, chosen_NK.astype(jnp.int32), gates_NK)


def get_config() -> ConfigDict:
    config: Any = tiny.get_config()
    config.model.router = "examples.own_router:hash_route"
    config.model.router_bias = "none"
    return config
