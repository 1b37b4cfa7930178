"""The model on a pipeline (report section 3.2.1): its layers are cut into stages, its two ends are shared by all ranks.

    enter: embedding, dense layers        stage: MoE layers        leave: norm, head, losses, MTP modules

In one SPMD program every rank waits for the slowest, so stages hold only MoE layers, the same number each; unused slots
repeat a layer and discard its result. Embedding, head and MTP are sharded over all `pipe` ranks, although only the
first or last stage needs their result: each rank has a part of the vocabulary, of the heads, of the dense feed-forward
network, and of the tokens that are sent to MTP's experts.

Masters, moments and checkpoints are not affected: a step takes the parameters layer after layer, and returns their
gradients in the same form.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.model.block import mtp_block, residual_block
from deepseek_jax.model.layers import RMSNorm, head_logits, linear, wide
from deepseek_jax.model.mtp import ahead
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.router import check_routes_alone, sequence_loss
from deepseek_jax.model.transformer import Block, block_parts, rematerialized
from deepseek_jax.model.types import Output, RoutingStats, TokenContext
from deepseek_jax.parallel.context import in_parts
from deepseek_jax.parallel.sharding import DATA, constrain_to_stage, leaf_sharding, paths
from deepseek_jax.pipeline import Schedule, make_schedule
from deepseek_jax.pipeline.execute import Arguments, Model, pipelined, rows
from deepseek_jax.pipeline.forward import forwarded
from deepseek_jax.training.losses import objective, token_losses
from deepseek_jax.training.types import Batch, Normalizers, Sums

PIPE = "pipe"


class Inputs(NamedTuple):
    """Inputs of one micro-batch, or stacked along a leading axis for all; the step is an int32 scalar."""

    batch: Batch
    normalizers: Normalizers
    step: jax.Array


class StageSums(NamedTuple):
    """Sums of the slots of one stage: counts int32 [slots, E]; traffic [slots] each; sequence_loss [slots],
    unweighted."""

    counts: jax.Array
    traffic: Any
    sequence_loss: jax.Array


def check(config: Config) -> None:
    """Raises ConfigError if schedule, model or batch do not fit the pipeline of the mesh."""
    cfg, mesh, micro = config.model, config.mesh, config.pipeline.microbatches
    if mesh.pipe == 1:
        return
    schedule_of(config)
    check_routes_alone(cfg, f"mesh.pipe={mesh.pipe}")
    for wrong, complaint in (
            (mesh.tensor > 1, f"mesh.tensor={mesh.tensor} has no place in a pipeline; take mesh.tensor=1"),
            (cfg.index_topk is not None, f"model.index_topk={cfg.index_topk} brings a loss of the indexer, which "
                                         "stages do not hand on; take mesh.pipe=1"),
            (not cfg.num_moe_layers, "the stages of a pipeline are made of MoE layers, and the model has none; take "
                                     "mesh.pipe=1"),
            (config.balance.aux_loss_weight, "balance.aux_loss_weight is a loss of whole batches, which no stage "
                                             "sees; set it to 0, or take mesh.pipe=1")):
        if wrong:
            raise ConfigError(f"mesh.pipe={mesh.pipe}: {complaint}.")
    sequences, parts = config.train.batch_size // config.train.accumulation_steps, mesh.data_shards * micro
    if sequences % parts:
        raise ConfigError(
            f"pipeline.microbatches={micro} on mesh.replica * mesh.node * mesh.local={mesh.data_shards} cut a batch "
            f"into {parts} parts, and it has {sequences} sequences (train.batch_size / train.accumulation_steps); make "
            f"them a multiple of {parts}.")
    heads = bool(cfg.num_dense_layers or cfg.mtp_depth)
    split = {"model.vocab_size": cfg.vocab_size, "model.num_heads": cfg.num_heads if heads else 0,
             "model.dense_ffn_dim": cfg.dense_ffn_dim if cfg.num_dense_layers else 0,
             "train.sequence_length * sequences of a micro-batch":
                 config.train.sequence_length // mesh.parts * (sequences // parts) if cfg.mtp_depth else 0}
    if uneven := [f"{name}={size}" for name, size in split.items() if size % mesh.pipe]:
        raise ConfigError(f"mesh.pipe={mesh.pipe} does not divide {' and '.join(uneven)}, which its ranks share; take "
                          f"a divisor of {math.gcd(*split.values())}.")
    if config.ramps_pipeline:
        try:
            _schedule(config, config.ramp_levels[0])
        except ConfigError as error:
            raise ConfigError(f"train.ramp_from={config.train.ramp_from} is {config.ramp_levels[0]} micro-batches: "
                              f"{error}") from error


def schedule_of(config: Config) -> Schedule:
    """The schedule that the config asks for. Raises ConfigError."""
    return _schedule(config, config.pipeline.microbatches)


def _schedule(config, microbatches):
    return make_schedule(config.pipeline.schedule, config.mesh.pipe, microbatches, config.pipeline.deferred)


def slots(layers: int, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """The MoE layer in each slot: (int [stages, slots], bool [stages, slots]), with rows in the order in which `pipe`
    shards them.

    False: the slot is unused and repeats a layer whose result is discarded. It is a copy, not zeros, so that its router
    spreads tokens over the experts like the layer's.
    """
    stages = schedule.stages
    start_S = np.arange(stages + 1) * layers // stages
    layer_SL = start_S[:-1, None] + np.arange(-(-layers // stages))[None]
    order = rows(schedule)
    return np.minimum(layer_SL, layers - 1)[order], (layer_SL < start_S[1:, None])[order]


def describe(config: Config) -> str:
    """The run's pipeline in one line, including its padding."""
    schedule = schedule_of(config)
    _, real_SL = slots(config.model.num_moe_layers, schedule)
    return (f"Pipeline: {schedule.name} over {schedule.ranks} ranks, {schedule.microbatches} micro-batches in "
            f"{len(schedule.table)} ticks, {real_SL.shape[1]} MoE layers a stage; {(~real_SL).sum()} of the "
            f"{real_SL.size} layers computed are padding.")


# The three functions of one device.


def stage(config: Config, layers: list[Any], fixed: dict[str, jax.Array], x_BTD: jax.Array,
          inputs: Inputs) -> tuple[jax.Array, jax.Array, StageSums]:
    """The MoE layers of one stage. Returns x_BTD, the balance loss, and counts."""
    cfg = config.model
    block = rematerialized(Block, cfg, scanned=False)(cfg, moe=True, mesh=_inside(config))
    context = _context(cfg, inputs)
    balance, counted = jnp.zeros((), wide(cfg.dtype)), []
    for i, layer in enumerate(layers):  # a loop in Python: `split` sorts its equations
        at = jax.tree.map(lambda a, i=i: a[i], fixed)
        y_BTD, (stats, _) = block.apply({"params": layer}, x_BTD, at.get("bias"), context)
        x_BTD = jnp.where(at["real"], y_BTD, x_BTD)
        balance = balance + jnp.where(at["real"], stats.sequence_loss, 0)
        counted.append(StageSums(stats.counts_E, stats.traffic, stats.sequence_loss))
    balance = balance * (config.balance.sequence_loss_weight * inputs.normalizers.share / _balanced_layers(cfg))
    return x_BTD, balance, jax.tree.map(lambda *slots: jnp.stack(slots), *counted)


def listed(layers: Any) -> list[Any]:
    """[slots, ...] -> a tree for each slot, so that a layer's gradient is added to its sum as soon as it is
    computed."""
    return [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(len(jax.tree.leaves(layers)[0]))]


def stacked_again(layers: list[Any]) -> Any:
    """The inverse of `listed`."""
    return jax.tree.map(lambda *of_slots: jnp.stack(of_slots), *layers)


def enter(config: Config, shared: dict[str, Any], inputs: Inputs) -> jax.Array:
    """Embedding and dense layers, by all ranks together: [B, T, D], the first stage's input."""
    cfg = config.model
    context = _context(cfg, inputs)
    x_BTD = _embed(cfg, shared["embedding"], context.tokens_BT)
    for i in range(cfg.num_dense_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], shared["dense_layers"])
        x_BTD, _, _ = _block(config, layer, x_BTD, context, functools.partial(_dense_ffn, config, layer["ffn"]))
    return x_BTD


def leave(config: Config, shared: dict[str, Any], x_BTD: jax.Array, inputs: Inputs) -> tuple[jax.Array, Sums]:
    """Norm, MTP modules, head and losses, by all ranks together.

    Returns this rank's part of the objective, a float32 scalar, and of the sums.
    """
    cfg, batch = config.model, inputs.batch
    context = _context(cfg, inputs)
    h_BTD = hidden_BTD = _norm(cfg, shared["norm"])(x_BTD)
    mtp_hidden, mtp_stats = [], []
    for k in range(1, cfg.mtp_depth + 1):
        read_BT = in_parts(ahead(batch.tokens_BT, k))
        ahead_BTD = _embed(cfg, shared["embedding"], read_BT)
        bias_E = shared["mtp_bias"][k - 1] if cfg.has_router_bias else None
        h_BTD, stats = _mtp_module(config, shared[f"mtp_{k}"], h_BTD, ahead_BTD, bias_E,
                                   context._replace(tokens_BT=read_BT))
        mtp_hidden.append(h_BTD)
        mtp_stats.append(stats)
    balance = sum((stats.sequence_loss for stats in mtp_stats), jnp.zeros((), wide(cfg.dtype)))
    traffic = [stats.traffic for stats in mtp_stats]
    output = Output(
        None, hidden_BTD, (), tuple(mtp_hidden), auxiliary_loss=jnp.zeros(()), captured={},
        counts={"mtp_bias": jnp.stack([stats.counts_E for stats in mtp_stats])} if mtp_stats else {},
        traffic=jax.tree.map(lambda *n: sum(n), *traffic) if traffic else None,
        sequence_loss=balance / _balanced_layers(cfg))
    losses = token_losses(output, shared["head"], batch, config.train.loss_chunk, PIPE)
    loss = objective(output, losses, inputs.normalizers, config.balance)
    first = lax.axis_index(PIPE) == 0  # every rank has counted the same tokens
    losses = losses._replace(weight=losses.weight * first, mtp_weight_D=losses.mtp_weight_D * first)
    return loss, Sums(losses, output.counts, output.traffic, output.sequence_loss, output.auxiliary_loss)


def _inside(config):
    """The mesh for the layers of one stage."""
    return dataclasses.replace(config.mesh, pipe=1)


def _balanced_layers(cfg):
    return cfg.num_moe_layers + cfg.mtp_depth


def _context(cfg, inputs: Inputs) -> TokenContext:
    batch = inputs.batch
    positions_BT = batch.positions_BT
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(batch.tokens_BT.shape[1]), batch.tokens_BT.shape)
    positions_BT, tokens_BT, segment_ids_BT = jax.tree.map(in_parts, (positions_BT, batch.tokens_BT,
                                                                      batch.segment_ids_BT))
    rope = rope_table(cfg, positions_BT, wide(cfg.dtype))
    return TokenContext(rope, segment_ids_BT, tokens_BT, positions_BT, inputs.step)


def _norm(cfg, params) -> Callable[[jax.Array], Any]:
    return lambda x_BTD: RMSNorm(cfg).apply({"params": params}, x_BTD)


def _embed(cfg, embedding_VD, tokens_BT):
    """Embeddings of tokens, by the ranks that hold their rows."""
    rows = embedding_VD.shape[0]
    row_BT = tokens_BT - lax.axis_index(PIPE) * rows
    mine_BT = (row_BT >= 0) & (row_BT < rows)
    x_BTD = embedding_VD[jnp.clip(row_BT, 0, rows - 1)].astype(cfg.dtype)
    return lax.psum(jnp.where(mine_BT[:, :, None], x_BTD, 0), PIPE)


def _block(config, params, x_BTD, context: TokenContext, ffn):
    """One block, each rank with its part of the heads; `ffn` sums its own parts."""
    cfg = config.model
    few = dataclasses.replace(cfg, num_heads=cfg.num_heads // lax.axis_size(PIPE))
    attention = block_parts(cfg).attention(few)

    def attend(h_BTD):
        part = attention.apply({"params": params["attention"]}, h_BTD, context.rope, context.segment_ids_BT)
        return lax.psum(part, PIPE), None

    return residual_block(x_BTD, _norm(cfg, params["attention_norm"]), attend, _norm(cfg, params["ffn_norm"]), ffn)


def _dense_ffn(config, params, h_BTD):
    ffn = block_parts(config.model).dense_ffn(config.model, config.model.dense_ffn_dim // lax.axis_size(PIPE))
    return lax.psum(ffn.apply({"params": params}, h_BTD), PIPE), None


def _mtp_module(config, module, hidden_BTD, ahead_BTD, bias_E, context: TokenContext):
    """`model.mtp.MTPModule`, by all ranks together. Returns h_BTD, and stats of this rank's tokens with its loss."""
    cfg, params = config.model, module["block"]

    def block(x_BTD):
        x_BTD, _, stats = _block(config, params, x_BTD, context,
                                 functools.partial(_shared_moe, config, params["ffn"], bias_E, context))
        return x_BTD, stats

    return mtp_block(hidden_BTD, ahead_BTD, _norm(cfg, module["hidden_norm"]), _norm(cfg, module["embedding_norm"]),
                     lambda x_BTX: linear(x_BTX, module["projection"], cfg.fp8), block, _norm(cfg, module["norm"]))


def _shared_moe(config, params, bias_E, context: TokenContext, h_BTD) -> tuple[jax.Array, RoutingStats]:
    """A MoE layer in which each rank computes its part of the tokens."""
    cfg, ranks = config.model, lax.axis_size(PIPE)
    assert context.tokens_BT is not None and context.positions_BT is not None  # `_context` has both
    h_ND = h_BTD.reshape(-1, cfg.d_model)
    tokens = h_ND.shape[0] // ranks
    mine = lambda x_N: lax.dynamic_slice_in_dim(x_N, lax.axis_index(PIPE) * tokens, tokens)[None]
    of_mine = context._replace(tokens_BT=mine(context.tokens_BT.reshape(-1)),
                               positions_BT=mine(context.positions_BT.reshape(-1)))
    moe = block_parts(cfg).moe(cfg, _inside(config), capture=("scores",))
    y_1ND, stats = moe.apply({"params": params}, mine(h_ND), bias_E, of_mine)
    y_ND, scores_NE = (lax.all_gather(a[0], PIPE, tiled=True) for a in (y_1ND, stats.captured["scores"]))
    loss = sequence_loss(cfg, scores_NE.reshape(*h_BTD.shape[:2], -1)) / ranks
    return y_ND.reshape(h_BTD.shape), stats.replace(sequence_loss=loss)


# The step.


class _Staged(NamedTuple):
    """The arguments of a step without its inputs, and their specs. in_order: [stages, slots, ...] -> [layers, ...]."""

    layers: Any
    fixed: dict[str, jax.Array]
    shared: dict[str, Any]
    specs: Arguments
    in_order: Callable[[jax.Array], jax.Array]


def _staged(config: Config, schedule: Schedule, params, router, mesh) -> _Staged:
    """The parameters of the complete model, moved to the ranks of a schedule."""
    params = constrain_to_stage(params, mesh)
    layer_SL, real_SL = slots(config.model.num_moe_layers, schedule)
    layers = jax.tree.map(lambda a: taken(a, layer_SL.ravel()).reshape(*layer_SL.shape, *a.shape[1:]),
                          params["layers"])
    fixed = {"real": jnp.asarray(real_SL)} | ({"bias": router["bias"][layer_SL]} if "bias" in router else {})
    shared = {name: tree for name, tree in params.items() if name != "layers"}
    shared |= {"mtp_bias": router["mtp_bias"]} if "mtp_bias" in router else {}
    specs = Arguments(params=_stage_specs(params["layers"], mesh), fixed=P(PIPE), shared=_end_specs(shared, mesh),
                      inputs=Inputs(P(None, DATA), P(), P()))  # pyright: ignore[reportArgumentType]: a prefix tree
    # The slot of each layer's gradient and counts; the results of padding are dropped.
    found_L = np.flatnonzero(real_SL)[np.argsort(layer_SL[real_SL])]
    return _Staged(layers, fixed, shared, specs, lambda a: taken(a.reshape(-1, *a.shape[2:]), found_L))


def taken(a: jax.Array, index_N: np.ndarray) -> jax.Array:
    """a[index_N], by slices: for a gather of rows from an array whose columns are split, the partitioner may copy all
    of it to every device (TPU 7x), or look up which device has which rows (others)."""
    ends = [*(np.flatnonzero(np.diff(index_N) != 1) + 1), len(index_N)]
    return jnp.concatenate([a[index_N[first]:index_N[end - 1] + 1] for first, end in zip([0, *ends], ends)])


def _of_micro(batch: Batch, normalizers: Normalizers, step, micro: int) -> Inputs:
    """The inputs of `micro` micro-batches, stacked."""
    parts = jax.tree.map(lambda a: a.reshape(micro, -1, *a.shape[1:]), batch)
    return Inputs(parts, *jax.tree.map(lambda a: jnp.broadcast_to(a, (micro, *jnp.shape(a))), (normalizers, step)))


def gradients_of(config: Config, params: dict[str, Any], router: dict[str, jax.Array], step: jax.Array,
                 active: jax.Array) -> Callable[[Batch, Normalizers], tuple[dict[str, Any], Sums]]:
    """Moves the parameters to their ranks, and makes the function that a step calls once per micro-batch.

    Args:
      params, router: of the complete model, as a TrainState holds them. Inside jax.set_mesh.
      active: int32, the micro-batches of this step if config.ramps_pipeline; the first ones count.
    Returns:
      (batch [rows, T], which is cut into pipeline.microbatches, and its normalizers) -> gradients like params, sums.
    """
    schedule, mesh = schedule_of(config), jax.sharding.get_abstract_mesh()
    layers, fixed, shared, specs, in_order = _staged(config, schedule, params, router, mesh)
    model = Model(*(functools.partial(f, config) for f in (enter, stage, leave)), parts=listed, whole=stacked_again)
    levels = config.ramp_levels if config.ramps_pipeline else (schedule.microbatches,)
    shorter = tuple(_schedule(config, micro) for micro in levels[:-1])
    run = pipelined(schedule, model, mesh, specs, shorter=shorter)
    micro, which = (active, jnp.searchsorted(jnp.array(levels), active)) if shorter else (schedule.microbatches, 0)

    def gradients(batch: Batch, normalizers: Normalizers) -> tuple[dict[str, Any], Sums]:
        normalizers = normalizers._replace(share=normalizers.share / (micro * config.mesh.token_shards))
        inputs = _of_micro(batch, normalizers, jnp.asarray(step), schedule.microbatches)
        result = run(Arguments(layers, fixed, shared, inputs), which)
        grads = constrain_to_stage({name: tree for name, tree in result.shared.items() if name != "mtp_bias"}, mesh)
        stacked = constrain_to_stage({"layers": result.params}, mesh, stacked=True)
        grads["layers"] = jax.tree.map(in_order, stacked["layers"])
        return grads, _joined(config, jax.tree.map(in_order, result.stage_sums), result.sums, micro)

    return gradients


def _joined(config, of_layers: StageSums, sums: Sums, micro: int | jax.Array) -> Sums:
    """The sums of a batch, from those of its layers and those of the last stage's end."""
    traffic = jax.tree.map(lambda n_L: n_L.sum(), of_layers.traffic)
    if sums.traffic is not None:
        traffic = jax.tree.map(jnp.add, traffic, sums.traffic)
    balance = of_layers.sequence_loss.sum() / _balanced_layers(config.model) + sums.sequence_loss
    return sums._replace(counts={"bias": of_layers.counts} | sums.counts, traffic=traffic,
                         sequence_loss=balance / (micro * config.mesh.token_shards))


# Without gradients.


def score(config: Config, params: dict[str, Any], router: dict[str, jax.Array], batch: Batch) -> Sums:
    """The sums of a batch [rows, T], which is cut into pipeline.microbatches. Inside jax.set_mesh.

    params, router: as in `gradients_of`.
    """
    micro, none_D = config.pipeline.microbatches, jnp.ones(config.model.mtp_depth)
    stage_sums, sums = _forward(config, params, router, leave, _of_micro(
        batch, Normalizers(jnp.ones(()), none_D, 0.0, 1 / (micro * config.mesh.token_shards)), None, micro))
    return _joined(config, stage_sums, sums, micro)


def logits_of_one(config: Config, params: dict[str, Any], router: dict[str, jax.Array], batch: Batch) -> jax.Array:
    """The logits [W] of the only token whose weight is 1 in a micro-batch (all others have 0); as in `score`, for a
    config without MTP."""
    inputs = _of_micro(batch, Normalizers(jnp.ones(()), jnp.ones(0), 0.0, 1.0), None, 1)
    own = {name: tree for name, tree in params.items() if not name.startswith("mtp_")}
    return _forward(config, own, {name: bias for name, bias in router.items() if name == "bias"}, _leave_logits,
                    inputs)[1]


def _leave_logits(config, shared, x_BTD, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """`leave`, with this device's part of the logits of the token that has the weight."""
    weights_BT = in_parts(inputs.batch.weights_BT)
    h_D = jnp.where(weights_BT[:, :, None] > 0, _norm(config.model, shared["norm"])(x_BTD), 0).sum(axis=(0, 1))
    part_W = head_logits(h_D[None], shared["head"])[0]
    logits_W = jnp.zeros(config.model.vocab_size, part_W.dtype)
    at = lax.axis_index(PIPE) * len(part_W)
    return jnp.zeros(()), lax.dynamic_update_slice_in_dim(logits_W, part_W, at, 0)


def _forward(config, params, router, leave, inputs: Inputs) -> tuple[StageSums, Any]:
    """(sums of each MoE layer, sums of `leave`)."""
    mesh, ranks = jax.sharding.get_abstract_mesh(), config.mesh.pipe
    layers, fixed, shared, specs, in_order = _staged(config, make_schedule("gpipe", ranks, 1), params, router, mesh)
    model = Model(*(functools.partial(f, config) for f in (enter, stage, leave)), parts=listed)
    stage_sums, sums = forwarded(ranks, model, mesh, specs)(Arguments(layers, fixed, shared, inputs))
    return jax.tree.map(in_order, stage_sums), sums


def _stage_specs(layers, mesh):
    """[stages, slots, ...]: stages over `pipe`, the rest as without a pipeline."""
    where = lambda path, a: P(PIPE, *leaf_sharding(f"layers/{path}", a.shape, mesh).compute)
    return jax.tree.map(where, paths(layers), layers)


def _end_specs(shared, mesh):
    """`pipe` splits here what `tensor` splits elsewhere, except for MTP's experts, whose tokens it splits."""
    def where(path, a):
        if path == "mtp_bias":
            return P()
        compute = leaf_sharding(path, a.shape, mesh).compute
        return compute if "/block/ffn/" in path else P(*(PIPE if entry == "tensor" else entry for entry in compute))

    return jax.tree.map(where, paths(shared), shared)
