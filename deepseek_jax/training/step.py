"""One optimizer step: gradients accumulated over micro-batches, AdamW, then the routing biases.

The biases are moved last and once, on the loads of the whole batch: weight decay, clipping, averaging, remat and
accumulation never touch them (report section 2.1.2).
"""

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.model.router import update_bias
from deepseek_jax.parallel.mesh import masters, working_copy
from deepseek_jax.pipeline.model import gradients_of
from deepseek_jax.training.losses import objective, shifted_targets, token_losses
from deepseek_jax.training.optimizer import learning_rate, make_optimizer


@flax.struct.dataclass
class TrainState:
    """Everything that a run is, besides its config. The data position is a function of `step`."""

    step: jax.Array  # int32: optimizer steps done
    params: dict
    opt_state: tuple
    router: dict  # routing biases
    ema: dict  # moving average of params; empty without one
    rng: jax.Array


def init_state(config: Config) -> TrainState:
    """A fresh state, a function of config.train.seed alone."""
    rng, key = jax.random.split(jax.random.key(config.train.seed))
    variables = DeepSeekV3(config.model).init(key, jnp.zeros((1, 8), jnp.int32), logits=False)
    return start_state(config, variables["params"], variables.get("router", {}), rng)


def start_state(config: Config, params, router, rng) -> TrainState:
    """Step 0 around given parameters and biases."""
    opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
    ema = jax.tree.map(jnp.copy, params) if config.train.ema_decay else {}
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, router, ema, rng)


def split_batch(config: Config, tokens, weights, segment_ids):
    """[b, T + 1] rows -> inputs and next-token targets. Without document masks the segments are None."""
    masked = config.data.mask_documents
    targets_weight = weights[:, 1:].astype(jnp.float32)
    if masked:  # the first token of the next document is not predicted from this one
        targets_weight = targets_weight * (segment_ids[:, 1:] == segment_ids[:, :-1])
    return {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "weights_BT": targets_weight,
            "segment_ids_BT": segment_ids[:, :-1] if masked else None,
            "positions_BT": _positions(segment_ids[:, :-1]) if masked else None}


def _positions(segment_ids_BT):
    """Positions that start again at 0 with every segment."""
    index_T = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    starts = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index_T - jax.lax.cummax(jnp.where(starts, index_T, 0), axis=1)


def forward(config: Config, params, router, batch):
    """Model and losses of one micro-batch: (Output, main nats, weight, mtp nats [D], mtp weights [D])."""
    output = DeepSeekV3(config.model, config.mesh).apply(
        {"params": params, "router": router}, batch["tokens_BT"], positions=batch["positions_BT"],
        segment_ids=batch["segment_ids_BT"], logits=False)
    return output, *token_losses(output, params["head"], batch, config.train.loss_chunk)


def _target_weights(config: Config, micro):
    """Summed weights of one micro-batch: main, and per MTP depth."""
    batch = split_batch(config, **micro)
    depths = [shifted_targets(batch["targets_BT"], batch["weights_BT"], batch["segment_ids_BT"], k + 1)[1].sum()
              for k in range(config.model.mtp_depth)]
    return batch["weights_BT"].sum(), jnp.stack(depths) if depths else jnp.zeros((0,))


def mtp_weight(config: Config, step):
    """lambda of the MTP loss at `step`."""
    at, value = step / config.train.steps, 0.0
    for start, level in config.train.mtp_weights:
        value = jnp.where(at >= start, level, value)
    return value


def accumulate(config: Config, params, router, batch, step):
    """Gradients and sums over the active micro-batches; equal to those of one large batch.

    Except for the auxiliary loss, whose two factors are means over a micro-batch, as in the frameworks that use it.

    Args:
      batch: tokens int32, weights float32, segment_ids int32, each [M, b, T + 1], and `active` int32, how many of
        the M micro-batches count.
    Returns:
      (gradients, {"nats", "weight", "mtp_nats", "mtp_weight", "counts", "traffic"}), sums over the batch.
    """
    counted_M = jnp.arange(config.train.micro_batches) < batch["active"]
    parts = {name: batch[name] for name in ("tokens", "weights", "segment_ids")}
    parts["weights"] = jnp.where(counted_M[:, None, None], parts["weights"], 0)
    weight, mtp_weights = (w.sum(axis=0) for w in jax.vmap(lambda micro: _target_weights(config, micro))(parts))
    weight, mtp_weights = jnp.maximum(weight, 1), jnp.maximum(mtp_weights, 1)
    share = 1 / batch["active"]

    def micro_loss(params, micro):
        output, nats, count, mtp_nats, mtp_count = forward(config, params, router, split_batch(config, **micro))
        loss = objective(output, nats, mtp_nats, weight, mtp_weights, mtp_weight(config, step), config.balance, share)
        return loss, {"nats": nats, "weight": count, "mtp_nats": mtp_nats, "mtp_weight": mtp_count,
                      "counts": output.counts, "traffic": output.traffic}

    if config.mesh.pipe > 1:
        weights = {"normalizer": weight, "mtp_normalizer": mtp_weights, "mtp_weight": mtp_weight(config, step),
                   "share": share}
        pipeline = gradients_of(config, params, router)
        gradients = lambda micro: pipeline(split_batch(config, **micro), weights)
    else:
        working = working_copy(params)

        def gradients(micro):
            (_, sums), grads = jax.value_and_grad(micro_loss, has_aux=True)(working, micro)
            return grads, sums

    def one(m):
        grads, sums = gradients(jax.tree.map(lambda x: x[m], parts))
        return masters(grads), sums

    if config.train.micro_batches == 1:
        return one(0)
    return jax.lax.fori_loop(1, batch["active"], lambda m, total: jax.tree.map(jnp.add, total, one(m)), one(0))


def train_step(config: Config, state: TrainState, batch):
    """Takes one step. Pure; jit it with `config` closed over and the state donated.

    Returns:
      (state, metrics): float32 scalars loss and mtp_loss (nats per token), lr, grad_norm; counts int32 per layer;
      traffic, the counters of `parallel.dispatch`.
    """
    grads, sums = accumulate(config, state.params, state.router, batch, state.step)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    ema = state.ema
    if config.train.ema_decay:
        decay = config.train.ema_decay
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
    metrics = {"loss": sums["nats"] / jnp.maximum(sums["weight"], 1),
               "mtp_loss": (sums["mtp_nats"] / jnp.maximum(sums["mtp_weight"], 1)).mean() if config.model.mtp_depth
               else jnp.zeros(()),
               "lr": learning_rate(config.optimizer, config.train.steps)(state.step),
               "grad_norm": _norm(grads), "counts": sums["counts"], "traffic": sums["traffic"]}
    router = _update_router(config, state.router, sums["counts"], state.step)
    return TrainState(state.step + 1, params, opt_state, router, ema, state.rng), metrics


def _norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _update_router(config: Config, router, counts, step):
    balance = config.balance
    speed = jnp.where(step < balance.bias_until * config.train.steps, balance.bias_speed, 0.0)
    return {name: update_bias(bias, counts[name], speed.astype(bias.dtype), balance.bias_rule)
            for name, bias in router.items()}


def eval_step(config: Config, params, router, micro):
    """Sums of one validation batch: main nats and weight, counts per layer."""
    output, nats, weight, _, _ = forward(config, working_copy(params), router, split_batch(config, **micro))
    return {"nats": nats, "weight": weight, "counts": output.counts}
