"""One optimizer step: gradients accumulated over micro-batches, AdamW or Muon, then the routing biases.

The biases are moved last and once, on the loads of the complete batch: weight decay, clipping, averaging, remat and
accumulation never touch them (report section 2.1.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.model import DeepSeekV3, Output, lora
from deepseek_jax.model.attention import LOGITS
from deepseek_jax.model.router import bias_rule
from deepseek_jax.parallel.sharding import constrain_to_compute, constrain_to_storage
from deepseek_jax.pipeline.model import gradients_of, score
from deepseek_jax.training import qk_clip
from deepseek_jax.training.losses import objective, shifted_targets, token_losses, with_indexer
from deepseek_jax.training.optimizer import learning_rate, make_optimizer, only_indexer
from deepseek_jax.training.types import Batch, Metrics, Normalizers, Sums, TokenLosses


@flax.struct.dataclass
class TrainState:
    """All of a run's state except its config. The data position is a function of `step`."""

    step: jax.Array  # int32: optimizer steps done
    params: dict[str, Any]  # the trained parameters: the model's, or adapters (`model.lora`) of a base
    opt_state: Any
    router: dict[str, jax.Array]  # routing biases
    ema: dict[str, Any]  # moving average of params; empty if none is kept
    rng: jax.Array
    balancer: dict[str, Any] = flax.struct.field(default_factory=dict)  # state of the bias rule, by name of the biases


def init_state(config: Config) -> TrainState:
    """A fresh state, which depends only on config.train.seed."""
    rng, key = jax.random.split(jax.random.key(config.train.seed))
    variables: Any = DeepSeekV3(config.model).init(key, jnp.zeros((1, 8), jnp.int32), logits=False)
    params = variables["params"]
    if config.preference.objective == "reward":  # 0: all answers are equally good
        params = params | {"reward_head": jnp.zeros(config.model.d_model, params["head"].dtype)}
    if config.lora.rank is not None:
        params = fresh_adapters(config, params)
    return start_state(config, params, variables.get("router", {}), rng)


@functools.lru_cache(maxsize=1)
def fresh_state(config: Config) -> Callable[[], TrainState]:
    """`init_state` of a config, as the same function object each time, so that jax traces it once for shapes and
    values."""
    return functools.partial(init_state, config)


def fresh_adapters(config: Config, params: dict[str, Any]) -> dict[str, Any]:
    """Adapters for parameters, or for their shapes; they depend only on config.train.seed."""
    return lora.fresh(config.lora, jax.random.split(jax.random.key(config.train.seed))[1], params)


def start_state(config: Config, params: dict[str, Any], router: dict[str, jax.Array], rng: jax.Array) -> TrainState:
    """The state at step 0 with given parameters and biases.

    Args:
      router: biases float32 [L, E] by name. rng: a typed key, which the state carries.
    """
    opt_state = make_optimizer(config.optimizer, config.schedule_steps).init(params)
    ema = jax.tree.map(jnp.copy, params) if config.train.ema_decay else {}
    rule = bias_rule(config.balance)
    balancer = {name: rule.init(bias_LE) for name, bias_LE in router.items()}
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, router, ema, rng, balancer)


def split_batch(config: Config, tokens: jax.Array, weights: jax.Array, segment_ids: jax.Array) -> Batch:
    """[b, T + 1] rows -> inputs and next-token targets [b, T]. Without document masks the segments are None."""
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


def run_model(config: Config, params: dict[str, Any], router: dict[str, jax.Array], batch: Batch,
              **options: Any) -> Output:
    """The model on one micro-batch, without logits; `options` as in `DeepSeekV3.__call__`."""
    output: Any = DeepSeekV3(config.model, config.mesh).apply(
        {"params": params, "router": router}, batch.tokens_BT, positions=batch.positions_BT,
        segment_ids=batch.segment_ids_BT, logits=False, **options)
    return output


def forward(config: Config, params: dict[str, Any], router: dict[str, jax.Array], batch: Batch,
            step: jax.Array | None = None) -> tuple[Output, TokenLosses]:
    """Model and losses, summed in nats, of one micro-batch. step: int32 scalar, for routers that read it."""
    output = run_model(config, params, router, batch, step=step)
    return output, token_losses(output, params["head"], batch, config.train.loss_chunk)


class Inputs(NamedTuple):
    """The inputs of a loss, apart from the parameters.

    micro: arrays of one micro-batch, whose last two axes are sequences and tokens: those of `split_batch`, and others
    that the loss reads. normalizers: of the complete batch. step: int32 scalar. reference: variables of the frozen
    model that the loss compares with, {"params", "router"}; None: it compares with none.
    """

    router: dict[str, jax.Array]
    micro: dict[str, jax.Array]
    normalizers: Normalizers
    step: jax.Array
    reference: dict[str, Any] | None = None


# (config, params, inputs) -> the scalar to differentiate, and the sums of one micro-batch.
# (config, params, inputs) -> the objective of one micro-batch, a scalar that is differentiated, and its sums.
Loss = Callable[[Config, dict[str, Any], Inputs], tuple[jax.Array, Sums]]


def of_rows(config: Config, micro: dict[str, jax.Array]) -> Batch:
    """`split_batch` of one micro-batch, [b, T + 1] each, which may hold further arrays."""
    return split_batch(config, micro["tokens"], micro["weights"], micro["segment_ids"])


def next_token_loss(config: Config, params: dict[str, Any], inputs: Inputs) -> tuple[jax.Array, Sums]:
    """The report's objective, a scalar: next tokens, MTP, balance; and the indexer's loss, if there is one."""
    router, micro, normalizers, step, _ = inputs
    batch = of_rows(config, micro)
    output, logits = _with_logits(config, params, router, batch, step)
    losses = token_losses(output, params["head"], batch, config.train.loss_chunk)
    loss = objective(output, losses, normalizers, config.balance)
    loss, own = with_indexer(config, loss, output, losses, normalizers)
    return loss, sums_of(output, losses, own)._replace(logits=logits)


def _with_logits(config, params, router, batch, step) -> tuple[Output, dict[str, Any]]:
    """The model's output, and the largest logits of each attention; {} if they are not needed."""
    if config.optimizer.qk_clip is None:
        return run_model(config, params, router, batch, step=step), {}
    made: Any = run_model(config, params, router, batch, step=step, mutable=[LOGITS])
    return made[0], made[1][LOGITS]


def complete(config: Config, params: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """The model's parameters: the trained ones, or their base combined with them as adapters."""
    return params if base is None else lora.attach(config.lora, base, params)


def _target_weights(config: Config, micro):
    """Summed weights of one micro-batch: main, and per MTP depth."""
    batch = of_rows(config, micro)
    depths = [shifted_targets(batch.targets_BT, batch.weights_BT, batch.segment_ids_BT, k + 1)[1].sum()
              for k in range(config.model.mtp_depth)]
    return batch.weights_BT.sum(), jnp.stack(depths) if depths else jnp.zeros((0,))


def mtp_weight(config: Config, step: jax.Array | int) -> jax.Array | float:
    """lambda of the MTP loss at `step` (report section 4.2): a float32 scalar."""
    at, value = step / config.schedule_steps, 0.0
    for start, level in config.train.mtp_weights:
        value = jnp.where(at >= start, level, value)
    return value


def accumulate(config: Config, params: dict[str, Any], router: dict[str, jax.Array], batch: dict[str, Any],
               step: jax.Array, loss: Loss = next_token_loss, base: dict[str, Any] | None = None,
               reference: dict[str, Any] | None = None) -> tuple[dict[str, Any], Sums]:
    """Gradients and sums over the active micro-batches; equal to those of one large batch.

    Except for the auxiliary loss, whose two factors are means over a micro-batch, as in the frameworks that use it.

    Args:
      batch: tokens int32, weights float32, segment_ids int32, each [M, b, T + 1], and `active` int32, how many of
        the M micro-batches count, or of those that a pipeline cuts a single one into (see `data.loader`). Others
        that `loss` reads: as Inputs says, after an axis M.
      loss: of one micro-batch; a pipeline computes `next_token_loss` alone.
      base: frozen parameters that `params` are adapters of; None: there are none.
      reference: as Inputs has it.
    """
    rounds = _rounds(config, batch)
    counted_M = jnp.arange(config.train.accumulation_steps) < rounds
    parts = {name: x for name, x in batch.items() if name != "active"}
    parts["weights"] = jnp.where(counted_M[:, None, None], parts["weights"], 0)
    if config.ramps_pipeline:  # in a single pass of the pipeline only the first rows count
        size = config.train.batch_size // config.microbatches
        counted_B = jnp.arange(config.train.batch_size) < size * batch["active"]
        parts["weights"] = jnp.where(counted_B[:, None], parts["weights"], 0)
    weight, mtp_weight_D = (w.sum(axis=0) for w in jax.vmap(lambda micro: _target_weights(config, micro))(parts))
    normalizers = Normalizers(jnp.maximum(weight, 1), jnp.maximum(mtp_weight_D, 1), mtp_weight(config, step),
                              1 / rounds)
    gradients = _gradients(config, params, router, normalizers, step, batch["active"],
                           lambda config, params, inputs: loss(config, complete(config, params, base),
                                                               inputs._replace(reference=reference)))

    def one(m):
        grads, sums = gradients(jax.tree.map(lambda x: x[m], parts))
        return constrain_to_storage(grads), sums

    if config.train.accumulation_steps == 1:
        return one(0)

    def add(m, total):
        grads, sums = one(m)
        return jax.tree.map(jnp.add, total[0], grads), total[1].added(sums)

    return jax.lax.fori_loop(1, rounds, add, one(0))


def _rounds(config, batch):
    """The number of accumulation steps that count."""
    return jnp.int32(1) if config.ramps_pipeline else batch["active"]


def _gradients(config, params, router, normalizers, step, active,
               loss: Loss) -> Callable[[dict[str, jax.Array]], tuple[dict[str, Any], Sums]]:
    """The function of one micro-batch, with or without a pipeline."""
    if config.mesh.pipe > 1:
        pipeline = gradients_of(config, params, router, step, active)
        return lambda micro: pipeline(of_rows(config, micro), normalizers)
    working = constrain_to_compute(params)

    def gradients(micro):
        inputs = Inputs(router, micro, normalizers, step)
        (_, sums), grads = jax.value_and_grad(functools.partial(loss, config), has_aux=True)(working, inputs)
        return grads, sums

    return gradients


def train_step(config: Config, state: TrainState, batch: dict[str, Any], base: dict[str, Any] | None = None,
               loss: Loss = next_token_loss, reference: dict[str, Any] | None = None) -> tuple[TrainState, Metrics]:
    """Takes one step (report section 4.2). Pure; jit it with `config` closed over and the state donated.

    batch, base, loss, reference: as in `accumulate`. Metrics are of the complete batch.
    """
    grads, sums = accumulate(config, state.params, state.router, batch, state.step, loss, base, reference)
    optimizer = make_optimizer(config.optimizer, config.schedule_steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    if config.model.index_warmup:  # weight decay would change the others
        updates = only_indexer(updates)
    params = jax.tree.map(jnp.add, state.params, updates)
    if config.optimizer.qk_clip is not None:
        if not sums.logits:
            raise ConfigError("optimizer.qk_clip is for pre-training and fine-tuning, and this objective measures no "
                              "logits; take --config.optimizer.qk_clip=None.")
        params = qk_clip.clip(config.model, params, sums.logits, config.optimizer.qk_clip)
    ema = state.ema
    if config.train.ema_decay:
        decay = config.train.ema_decay
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
    router, balancer = _move_biases(config, state, sums.counts)
    metrics = _metrics(config, state.step, grads, sums, _rounds(config, batch), router)
    return TrainState(state.step + 1, params, opt_state, router, ema, state.rng, balancer), metrics


def _metrics(config, step, grads, sums: Sums, rounds, router: dict[str, jax.Array]) -> Metrics:
    losses, none, biases = sums.losses, jnp.zeros(()), jax.tree.leaves(router)
    own = {name: total / jnp.maximum(losses.weight, 1) for name, total in sums.own.items()}
    if sums.logits:
        own["max_logit"] = qk_clip.largest(sums.logits)
    mtp_loss_D = losses.mtp_nats_D / jnp.maximum(losses.mtp_weight_D, 1)
    return Metrics(
        loss=losses.nats / jnp.maximum(losses.weight, 1),
        mtp_loss=mtp_loss_D.mean() if config.model.mtp_depth else none,
        lr=learning_rate(config.optimizer, config.schedule_steps)(step), grad_norm=_norm(grads),
        sequence_loss=sums.sequence_loss / rounds, auxiliary_loss=sums.auxiliary_loss / rounds,
        bias_low=jnp.stack([b.min() for b in biases]).min() if biases else none,
        bias_high=jnp.stack([b.max() for b in biases]).max() if biases else none,
        counts=sums.counts, traffic=sums.traffic,
        own=own, biases=router)


def _norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _move_biases(config: Config, state: TrainState, counts) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    if config.model.index_warmup:
        return state.router, state.balancer
    balance, rule = config.balance, bias_rule(config.balance)
    speed = jnp.where(state.step < balance.bias_until * config.schedule_steps, balance.bias_speed, 0.0)
    router, balancer = {}, {}
    for name, bias_LE in state.router.items():
        router[name], balancer[name] = rule.update(bias_LE, counts[name], speed.astype(bias_LE.dtype),
                                                   state.balancer[name])
    return router, balancer


def eval_step(config: Config, params: dict[str, Any], router: dict[str, jax.Array], micro: dict[str, Any],
              base: dict[str, Any] | None = None) -> Sums:
    """Sums of one validation batch [b, T + 1]; a pipeline splits it as in training. base: as in `accumulate`."""
    if config.mesh.pipe > 1:
        return score(config, params, router, of_rows(config, micro))
    params = complete(config, constrain_to_compute(params), base)
    output, losses = forward(config, params, router, of_rows(config, micro))
    return sums_of(output, losses)


def sums_of(output: Output, losses: TokenLosses, own: dict[str, jax.Array] | None = None) -> Sums:
    """The sums of one micro-batch. own: as Sums has it."""
    return Sums(losses, output.counts, output.traffic, output.sequence_loss, output.auxiliary_loss, own or {})
