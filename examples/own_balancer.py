"""Your own bias rule, with state: the load error is averaged over steps before it moves the bias (momentum).

    PYTHONPATH=. python -m deepseek_jax.train --config examples/own_balancer.py --workdir run_momentum
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from deepseek_jax.configs import tiny
from deepseek_jax.model.router import BiasRule, load_error

DECAY = 0.9


def update(bias_LE: jax.Array, counts_LE: jax.Array, speed: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """Moves each bias against its averaged load error, as a fraction of the mean load."""
    mean_L1 = jnp.maximum(counts_LE.mean(axis=-1, keepdims=True), 1)
    average_LE = DECAY * state + (1 - DECAY) * load_error(counts_LE, bias_LE.dtype) / mean_L1
    return bias_LE + speed * jnp.sign(average_LE), average_LE


MOMENTUM = BiasRule(init=jnp.zeros_like, update=update)


def get_config() -> ConfigDict:
    config: Any = tiny.get_config()
    config.balance.bias_rule = "examples.own_balancer:MOMENTUM"
    return config
