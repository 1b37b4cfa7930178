"""Traces the user's own parts in a config (routing rule, attention, bias rule) abstractly, before any data is read."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp

from deepseek_jax.config import BalanceConfig, ConfigError, ModelConfig
from deepseek_jax.model.router import bias_rule, routing_rule
from deepseek_jax.model.transformer import DeepSeekV3, block_parts


def check_parts(cfg: ModelConfig, balance: BalanceConfig | None = None) -> None:
    """Traces a model, and a step of the biases, with the user's own parts.

    Raises:
      ConfigError: a part that does not exist, fails, or returns the wrong result.
    """
    routing_rule(cfg)
    block_parts(cfg)
    own = [f"{key}={name!r}" for key, name in (("model.router", cfg.router), ("model.attention", cfg.attention))
           if ":" in name]
    if own:
        with _blamed(", ".join(own)):
            jax.eval_shape(lambda: DeepSeekV3(cfg).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    if balance is not None and ":" in balance.bias_rule:
        _check_bias_rule(cfg, balance)


def _check_bias_rule(cfg: ModelConfig, balance: BalanceConfig):
    rule, key = bias_rule(balance), f"balance.bias_rule={balance.bias_rule!r}"
    bias_LE = jax.ShapeDtypeStruct((2, cfg.num_experts), jnp.float32)
    counts_LE, speed = jax.ShapeDtypeStruct(bias_LE.shape, jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    with _blamed(key):
        state = jax.eval_shape(rule.init, bias_LE)
        found = jax.eval_shape(rule.update, bias_LE, counts_LE, speed, state)
    shape_of = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    if not isinstance(found, tuple) or len(found) != 2 or shape_of(found) != shape_of((bias_LE, state)):
        raise ConfigError(f"{key}: update must return (biases, state) with the shapes and dtypes of those that it was "
                          f"given; it returned {found!r}.")


@contextlib.contextmanager
def _blamed(part: str):
    """Turns any exception of the part into one line that names it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{part} fails when a model is built with it: {type(error).__name__}: {error}") from error
