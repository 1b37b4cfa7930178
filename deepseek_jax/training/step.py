"""One optimizer step: gradients accumulated over micro-batches, AdamW, then the routing biases.

The biases are moved last and once, on the loads of the complete batch: weight decay, clipping, averaging, remat and
accumulation never touch them (report section 2.1.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model import DeepSeekV3, Output
from deepseek_jax.model.router import bias_rule
from deepseek_jax.parallel.sharding import constrain_to_compute, constrain_to_storage
from deepseek_jax.pipeline.model import gradients_of
from deepseek_jax.training.losses import objective, shifted_targets, token_losses
from deepseek_jax.training.optimizer import learning_rate, make_optimizer
from deepseek_jax.training.types import Batch, Metrics, Normalizers, Sums, TokenLosses


@flax.struct.dataclass
class TrainState:
    """All of a run's state except its config. The data position is a function of `step`."""

    step: jax.Array  # int32: optimizer steps done
    params: dict[str, Any]
    opt_state: Any
    router: dict[str, jax.Array]  # routing biases
    ema: dict[str, Any]  # moving average of params; empty without one
    rng: jax.Array
    balancer: dict[str, Any] = flax.struct.field(default_factory=dict)  # state of the bias rule, by name of the biases


def init_state(config: Config) -> TrainState:
    """A fresh state, a function of config.train.seed alone."""
    rng, key = jax.random.split(jax.random.key(config.train.seed))
    variables: Any = DeepSeekV3(config.model).init(key, jnp.zeros((1, 8), jnp.int32), logits=False)
    return start_state(config, variables["params"], variables.get("router", {}), rng)


def start_state(config: Config, params: dict[str, Any], router: dict[str, jax.Array], rng: jax.Array) -> TrainState:
    """Step 0 around given parameters and biases."""
    opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
    ema = jax.tree.map(jnp.copy, params) if config.train.ema_decay else {}
    rule = bias_rule(config.balance)
    balancer = {name: rule.init(bias_LE) for name, bias_LE in router.items()}
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, router, ema, rng, balancer)


def split_batch(config: Config, tokens: jax.Array, weights: jax.Array, segment_ids: jax.Array) -> Batch:
    """[b, T + 1] rows -> inputs and next-token targets. Without document masks the segments are None."""
    masked = config.data.mask_documents
    targets_weight = weights[:, 1:].astype(jnp.float32)
    if masked:  # the first token of the next document is not predicted from this one
        targets_weight = targets_weight * (segment_ids[:, 1:] == segment_ids[:, :-1])
    return Batch(tokens[:, :-1], tokens[:, 1:], targets_weight, segment_ids[:, :-1] if masked else None,
                 _positions(segment_ids[:, :-1]) if masked else None)


def _positions(segment_ids_BT):
    """Positions that start again at 0 with every segment."""
    index_T = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    starts = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index_T - jax.lax.cummax(jnp.where(starts, index_T, 0), axis=1)


def forward(config: Config, params: dict[str, Any], router: dict[str, jax.Array], batch: Batch,
            step: jax.Array | None = None) -> tuple[Output, TokenLosses]:
    """Model and losses of one micro-batch."""
    output: Any = DeepSeekV3(config.model, config.mesh).apply(
        {"params": params, "router": router}, batch.tokens_BT, positions=batch.positions_BT,
        segment_ids=batch.segment_ids_BT, logits=False, step=step)
    return output, token_losses(output, params["head"], batch, config.train.loss_chunk)


def _target_weights(config: Config, micro):
    """Summed weights of one micro-batch: main, and per MTP depth."""
    batch = split_batch(config, **micro)
    depths = [shifted_targets(batch.targets_BT, batch.weights_BT, batch.segment_ids_BT, k + 1)[1].sum()
              for k in range(config.model.mtp_depth)]
    return batch.weights_BT.sum(), jnp.stack(depths) if depths else jnp.zeros((0,))


def mtp_weight(config: Config, step: jax.Array | int) -> jax.Array | float:
    """lambda of the MTP loss at `step`."""
    at, value = step / config.train.steps, 0.0
    for start, level in config.train.mtp_weights:
        value = jnp.where(at >= start, level, value)
    return value


def accumulate(config: Config, params: dict[str, Any], router: dict[str, jax.Array], batch: dict[str, Any],
               step: jax.Array) -> tuple[dict[str, Any], Sums]:
    """Gradients and sums over the active micro-batches; equal to those of one large batch.

    Except for the auxiliary loss, whose two factors are means over a micro-batch, as in the frameworks that use it.

    Args:
      batch: tokens int32, weights float32, segment_ids int32, each [M, b, T + 1], and `active` int32, how many of
        the M micro-batches count (see `data.loader`).
    """
    counted_M = jnp.arange(config.train.accumulation_steps) < batch["active"]
    parts = {name: batch[name] for name in ("tokens", "weights", "segment_ids")}
    parts["weights"] = jnp.where(counted_M[:, None, None], parts["weights"], 0)
    weight, mtp_weight_D = (w.sum(axis=0) for w in jax.vmap(lambda micro: _target_weights(config, micro))(parts))
    normalizers = Normalizers(jnp.maximum(weight, 1), jnp.maximum(mtp_weight_D, 1), mtp_weight(config, step),
                              1 / batch["active"])
    gradients = _gradients(config, params, router, normalizers, step)

    def one(m):
        grads, sums = gradients(split_batch(config, **jax.tree.map(lambda x: x[m], parts)))
        return constrain_to_storage(grads), sums

    if config.train.accumulation_steps == 1:
        return one(0)
    return jax.lax.fori_loop(1, batch["active"], lambda m, total: jax.tree.map(jnp.add, total, one(m)), one(0))


def _gradients(config, params, router, normalizers, step) -> Callable[[Batch], tuple[dict[str, Any], Sums]]:
    """The function of one micro-batch, with or without a pipeline."""
    if config.mesh.pipe > 1:
        pipeline = gradients_of(config, params, router, step)
        return lambda batch: pipeline(batch, normalizers)

    def loss(params, batch):
        output, losses = forward(config, params, router, batch, step)
        sums = _sums(output, losses)
        return objective(output, losses, normalizers, config.balance), sums

    working = constrain_to_compute(params)

    def gradients(batch):
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(working, batch)
        return grads, sums

    return gradients


def train_step(config: Config, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Metrics]:
    """Takes one step. Pure; jit it with `config` closed over and the state donated."""
    grads, sums = accumulate(config, state.params, state.router, batch, state.step)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    ema = state.ema
    if config.train.ema_decay:
        decay = config.train.ema_decay
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
    router, balancer = _move_biases(config, state, sums.counts)
    metrics = _metrics(config, state.step, grads, sums, batch["active"], jax.tree.leaves(router))
    return TrainState(state.step + 1, params, opt_state, router, ema, state.rng, balancer), metrics


def _metrics(config, step, grads, sums: Sums, active, biases: list[jax.Array]) -> Metrics:
    losses, none = sums.losses, jnp.zeros(())
    mtp_loss_D = losses.mtp_nats_D / jnp.maximum(losses.mtp_weight_D, 1)
    return Metrics(
        loss=losses.nats / jnp.maximum(losses.weight, 1),
        mtp_loss=mtp_loss_D.mean() if config.model.mtp_depth else none,
        lr=learning_rate(config.optimizer, config.train.steps)(step), grad_norm=_norm(grads),
        sequence_loss=sums.sequence_loss / active, auxiliary_loss=sums.auxiliary_loss / active,
        bias_low=jnp.stack([b.min() for b in biases]).min() if biases else none,
        bias_high=jnp.stack([b.max() for b in biases]).max() if biases else none,
        counts=sums.counts, traffic=sums.traffic)


def _norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _move_biases(config: Config, state: TrainState, counts) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    balance, rule = config.balance, bias_rule(config.balance)
    speed = jnp.where(state.step < balance.bias_until * config.train.steps, balance.bias_speed, 0.0)
    router, balancer = {}, {}
    for name, bias_LE in state.router.items():
        router[name], balancer[name] = rule.update(bias_LE, counts[name], speed.astype(bias_LE.dtype),
                                                   state.balancer[name])
    return router, balancer


def eval_step(config: Config, params: dict[str, Any], router: dict[str, jax.Array], micro: dict[str, Any]) -> Sums:
    """Sums of one validation batch [b, T + 1]."""
    output, losses = forward(config, constrain_to_compute(params), router, split_batch(config, **micro))
    return _sums(output, losses)


def _sums(output: Output, losses: TokenLosses) -> Sums:
    return Sums(losses, output.counts, output.traffic, output.sequence_loss, output.auxiliary_loss)
