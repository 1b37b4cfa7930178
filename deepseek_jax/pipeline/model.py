"""The model on a pipeline (report section 3.2.1): its layers cut into stages, its two ends shared by all ranks.

    enter: embedding, dense layers        stage: MoE layers        leave: norm, head, losses, MTP modules

One SPMD program makes every rank wait for the slowest, so stages hold MoE layers alone, equally many; slots that are
left over repeat a layer and throw its result away. What only one end needs all ranks of `pipe` compute together, each
a part of the vocabulary, of the heads, of the dense feed-forward network, and of the tokens that go to MTP's experts.

Masters, moments and checkpoints know nothing of this: a step takes the parameters as they are, layer after layer, and
gives their gradients back in the same form.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.model import Output
from deepseek_jax.model import router as routing
from deepseek_jax.model.attention import MLA
from deepseek_jax.model.experts import MoE
from deepseek_jax.model.layers import FFN, RMSNorm, wide
from deepseek_jax.model.mtp import ahead, join
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.transformer import Block, rematerialized
from deepseek_jax.parallel.mesh import DATA, on_the_way, paths, place
from deepseek_jax.pipeline import Schedule, make_schedule
from deepseek_jax.pipeline.execute import Arguments, Model, pipelined, rows
from deepseek_jax.training.losses import objective, token_losses

PIPE = "pipe"


def check(config: Config):
    """Raises ConfigError where schedule, model or batch do not fit the pipeline of the mesh."""
    cfg, mesh, micro = config.model, config.mesh, config.pipeline.microbatches
    if mesh.pipe == 1:
        return
    schedule_of(config)
    for wrong, complaint in (
            (mesh.tensor > 1, f"mesh.tensor={mesh.tensor} has no place in a pipeline; take mesh.tensor=1"),
            (not cfg.num_moe_layers, "the stages of a pipeline are made of MoE layers, and the model has none; take "
                                     "mesh.pipe=1"),
            (config.balance.aux_loss_weight, "balance.aux_loss_weight is a loss of whole batches, which no stage "
                                             "sees; set it to 0, or take mesh.pipe=1")):
        if wrong:
            raise ConfigError(f"mesh.pipe={mesh.pipe}: {complaint}.")
    sequences, parts = config.train.batch_size // config.train.micro_batches, mesh.data_shards * micro
    if sequences % parts:
        raise ConfigError(
            f"pipeline.microbatches={micro} on mesh.replica * mesh.node * mesh.local={mesh.data_shards} cut a batch "
            f"into {parts} parts, and it has {sequences} sequences (train.batch_size / train.micro_batches); make them "
            f"a multiple of {parts}.")
    heads = bool(cfg.num_dense_layers or cfg.mtp_depth)
    split = {"model.vocab_size": cfg.vocab_size, "model.num_heads": cfg.num_heads if heads else 0,
             "model.dense_ffn_dim": cfg.dense_ffn_dim if cfg.num_dense_layers else 0,
             "train.sequence_length * sequences of a micro-batch":
                 config.train.sequence_length * (sequences // parts) if cfg.mtp_depth else 0}
    if uneven := [f"{name}={size}" for name, size in split.items() if size % mesh.pipe]:
        raise ConfigError(f"mesh.pipe={mesh.pipe} does not divide {' and '.join(uneven)}, which its ranks share; take "
                          f"a divisor of {math.gcd(*split.values())}.")


def schedule_of(config: Config) -> Schedule:
    pipeline = config.pipeline
    return make_schedule(pipeline.schedule, config.mesh.pipe, pipeline.microbatches, pipeline.deferred)


def slots(layers, schedule: Schedule):
    """Which MoE layer lies where: (int [stages, slots], bool [stages, slots]), rows as `pipe` shards them.

    False: there was nothing left for that slot, and it repeats a layer whose result is thrown away. A copy, not zeros:
    its router spreads tokens over the experts as the layer's does.
    """
    stages = schedule.stages
    start_S = np.arange(stages + 1) * layers // stages
    layer_SL = start_S[:-1, None] + np.arange(-(-layers // stages))[None]
    order = rows(schedule)
    return np.minimum(layer_SL, layers - 1)[order], (layer_SL < start_S[1:, None])[order]


def describe(config: Config) -> str:
    """What the run's pipeline is, in one line, with what it wastes."""
    schedule = schedule_of(config)
    _, real_SL = slots(config.model.num_moe_layers, schedule)
    return (f"Pipeline: {schedule.name} over {schedule.ranks} ranks, {schedule.microbatches} micro-batches in "
            f"{len(schedule.table)} ticks, {real_SL.shape[1]} MoE layers a stage; {(~real_SL).sum()} of the "
            f"{real_SL.size} layers computed are padding.")


# The three functions of one device.


def stage(config: Config, layers, fixed, x_BTD, inputs):
    """The MoE layers of one stage. -> (x_BTD, balance loss, {"counts" [slots, E], "traffic" [slots] each})"""
    cfg = config.model
    block = rematerialized(Block, cfg, scanned=False)(cfg, moe=True, mesh=_inside(config))
    rope, segments = _positions(cfg, inputs)
    balance, counted = jnp.zeros((), wide(cfg.dtype)), []
    for i in range(fixed["real"].shape[0]):  # a loop in Python: `split` sorts its equations
        layer, at = jax.tree.map(lambda a, i=i: a[i], (layers, fixed))
        y_BTD, stats = block.apply({"params": layer}, x_BTD, at.get("bias"), rope, segments)
        x_BTD = jnp.where(at["real"], y_BTD, x_BTD)
        balance = balance + jnp.where(at["real"], stats["sequence_loss"], 0)
        counted.append({name: stats[name] for name in ("counts", "traffic")})
    balance = balance * (config.balance.sequence_loss_weight * inputs["share"] / _balanced_layers(cfg))
    return x_BTD, balance, jax.tree.map(lambda *slots: jnp.stack(slots), *counted)


def enter(config: Config, shared, inputs):
    """Embedding and dense layers, by all ranks together."""
    cfg = config.model
    x_BTD = _embed(cfg, shared["embedding"], inputs["batch"]["tokens_BT"])
    rope, segments = _positions(cfg, inputs)
    for i in range(cfg.num_dense_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], shared["dense_layers"])
        x_BTD = _attention(cfg, layer, x_BTD, rope, segments)
        h_BTD = _norm(cfg, layer["ffn_norm"], x_BTD)
        part = FFN(cfg, cfg.dense_ffn_dim // lax.axis_size(PIPE)).apply({"params": layer["ffn"]}, h_BTD)
        x_BTD = x_BTD + lax.psum(part, PIPE)
    return x_BTD


def leave(config: Config, shared, x_BTD, inputs):
    """Norm, MTP modules, head and losses, by all ranks together. -> (this rank's part of the objective, sums)"""
    cfg, batch = config.model, inputs["batch"]
    rope, segments = _positions(cfg, inputs)
    h_BTD = hidden_BTD = _norm(cfg, shared["norm"], x_BTD)
    mtp_hidden, mtp_stats = [], []
    for k in range(1, cfg.mtp_depth + 1):
        ahead_BTD = _embed(cfg, shared["embedding"], ahead(batch["tokens_BT"], k))
        bias_E = shared["mtp_bias"][k - 1] if cfg.has_router_bias else None
        h_BTD, stats = _mtp_module(config, shared[f"mtp_{k}"], h_BTD, ahead_BTD, bias_E, rope, segments)
        mtp_hidden.append(h_BTD)
        mtp_stats.append(stats)
    balance = sum((stats["sequence_loss"] for stats in mtp_stats), jnp.zeros((), wide(cfg.dtype)))
    traffic = [stats["traffic"] for stats in mtp_stats]
    output = Output(
        None, hidden_BTD, (), tuple(mtp_hidden), auxiliary_loss=jnp.zeros(()), captured={},
        counts={"mtp_bias": jnp.stack([stats["counts"] for stats in mtp_stats])} if mtp_stats else {},
        traffic=jax.tree.map(lambda *n: sum(n), *traffic) if traffic else {},
        sequence_loss=balance / _balanced_layers(cfg))
    nats, weight, mtp_nats, mtp_weight = token_losses(output, shared["head"], batch, config.train.loss_chunk, PIPE)
    loss = objective(output, nats, mtp_nats, inputs["normalizer"], inputs["mtp_normalizer"], inputs["mtp_weight"],
                     config.balance, inputs["share"])
    first = lax.axis_index(PIPE) == 0  # every rank has counted the same tokens
    return loss, {"nats": nats, "weight": weight * first, "mtp_nats": mtp_nats, "mtp_weight": mtp_weight * first,
                  "counts": output.counts, "traffic": output.traffic}


def _inside(config):
    """The mesh as the layers of one stage see it."""
    return dataclasses.replace(config.mesh, pipe=1)


def _balanced_layers(cfg):
    return cfg.num_moe_layers + cfg.mtp_depth


def _positions(cfg, inputs):
    """-> (rope table, segments or None)"""
    batch = inputs["batch"]
    positions_BT = batch["positions_BT"]
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(batch["tokens_BT"].shape[1]), batch["tokens_BT"].shape)
    return rope_table(cfg, positions_BT, wide(cfg.dtype)), batch["segment_ids_BT"]


def _norm(cfg, params, x_BTD):
    return RMSNorm(cfg).apply({"params": params}, x_BTD)


def _embed(cfg, embedding_VD, tokens_BT):
    """Embeddings of tokens, by the ranks that hold their rows."""
    rows = embedding_VD.shape[0]
    row_BT = tokens_BT - lax.axis_index(PIPE) * rows
    mine_BT = (row_BT >= 0) & (row_BT < rows)
    x_BTD = embedding_VD[jnp.clip(row_BT, 0, rows - 1)].astype(cfg.dtype)
    return lax.psum(jnp.where(mine_BT[:, :, None], x_BTD, 0), PIPE)


def _attention(cfg, block, x_BTD, rope, segments):
    """x + attention(norm(x)), each rank with its part of the heads."""
    few = dataclasses.replace(cfg, num_heads=cfg.num_heads // lax.axis_size(PIPE))
    part = MLA(few).apply({"params": block["attention"]}, _norm(cfg, block["attention_norm"], x_BTD), rope, segments)
    return x_BTD + lax.psum(part, PIPE)


def _mtp_module(config, module, hidden_BTD, ahead_BTD, bias_E, rope, segments):
    """`model.mtp.MTPModule`, by all ranks together. -> (h_BTD, stats of this rank's tokens; its part of the loss)"""
    cfg, block, ranks = config.model, module["block"], lax.axis_size(PIPE)
    x_BTD = join(_norm(cfg, module["embedding_norm"], ahead_BTD), _norm(cfg, module["hidden_norm"], hidden_BTD),
                 module["projection"], cfg.fp8)
    x_BTD = _attention(cfg, block, x_BTD, rope, segments)
    h_ND = _norm(cfg, block["ffn_norm"], x_BTD).reshape(-1, cfg.d_model)
    tokens = h_ND.shape[0] // ranks
    mine_1ND = lax.dynamic_slice_in_dim(h_ND, lax.axis_index(PIPE) * tokens, tokens)[None]
    y_1ND, stats = MoE(cfg, _inside(config), capture=("scores",)).apply({"params": block["ffn"]}, mine_1ND, bias_E)
    y_ND, scores_NE = (lax.all_gather(a[0], PIPE, tiled=True) for a in (y_1ND, stats["captured"]["scores"]))
    loss = routing.sequence_loss(cfg, scores_NE.reshape(*x_BTD.shape[:2], -1)) / ranks
    return _norm(cfg, module["norm"], x_BTD + y_ND.reshape(x_BTD.shape)), stats | {"sequence_loss": loss}


# The step.


def gradients_of(config: Config, params, router):
    """Brings the parameters to their ranks, and makes the function that a step calls once a round.

    Args:
      params, router: of the whole model, as a TrainState holds them. Inside jax.set_mesh.
    Returns:
      (batch, weights) -> (gradients like params, sums as `step.accumulate` has them). batch: what `split_batch` gives
      of [rows, T], which are cut into pipeline.microbatches. weights: {"normalizer", "mtp_normalizer" [depth],
      "mtp_weight", "share"}: as `losses.objective` takes them.
    """
    schedule, mesh = schedule_of(config), jax.sharding.get_abstract_mesh()
    params = _on_the_way(params, mesh)
    layer_SL, real_SL = slots(config.model.num_moe_layers, schedule)
    layers = jax.tree.map(lambda a: a[layer_SL], params["layers"])
    fixed = {"real": jnp.asarray(real_SL)} | ({"bias": router["bias"][layer_SL]} if "bias" in router else {})
    shared = {name: tree for name, tree in params.items() if name != "layers"}
    shared |= {"mtp_bias": router["mtp_bias"]} if "mtp_bias" in router else {}
    specs = Arguments(params=_stage_specs(params["layers"], mesh), fixed=P(PIPE), shared=_end_specs(shared, mesh),
                      inputs={"batch": P(None, DATA), "normalizer": P(), "mtp_normalizer": P(), "mtp_weight": P(),
                              "share": P()})
    model = Model(*(functools.partial(f, config) for f in (enter, stage, leave)))
    step = pipelined(schedule, model, mesh, specs)
    # Where each layer's gradient and counts are found among the slots; what padding gives is left.
    found_L = np.flatnonzero(real_SL)[np.argsort(layer_SL[real_SL])]
    in_order = lambda a: a.reshape(-1, *a.shape[2:])[found_L]

    def gradients(batch, weights):
        micro = schedule.microbatches
        weights = weights | {"share": weights["share"] / (micro * config.mesh.data_shards)}
        inputs = {"batch": jax.tree.map(lambda a: a.reshape(micro, -1, *a.shape[1:]), batch)}
        inputs |= jax.tree.map(lambda a: jnp.broadcast_to(a, (micro, *jnp.shape(a))), weights)
        result = step(Arguments(layers, fixed, shared, inputs))
        grads = _on_the_way({name: tree for name, tree in result.shared.items() if name != "mtp_bias"}, mesh)
        grads["layers"] = jax.tree.map(in_order, _on_the_way({"layers": result.params}, mesh, stacked=True)["layers"])
        sums, of_layers = result.sums, jax.tree.map(in_order, result.stage_sums)
        counts = {"bias": of_layers["counts"]} | sums["counts"]
        traffic = jax.tree.map(lambda n_L: n_L.sum(), of_layers["traffic"])
        traffic = jax.tree.map(jnp.add, traffic, sums["traffic"]) if sums["traffic"] else traffic
        return grads, sums | {"counts": counts, "traffic": traffic}

    return gradients


def _on_the_way(tree, mesh, stacked=False):
    """Parameters or gradients as they lie between masters and stages. stacked: [stages, slots, ...] of layers."""
    def constrained(path, a):
        if not stacked:
            return lax.with_sharding_constraint(a, on_the_way(path, a.shape, mesh))
        return lax.with_sharding_constraint(a, P(None, *on_the_way(path, a.shape[1:], mesh)))

    return jax.tree.map(constrained, paths(tree), tree)


def _stage_specs(layers, mesh):
    """[stages, slots, ...]: stages over `pipe`, the rest as without a pipeline."""
    where = lambda path, a: P(PIPE, *place(f"layers/{path}", a.shape, mesh).compute)
    return jax.tree.map(where, paths(layers), layers)


def _end_specs(shared, mesh):
    """What `tensor` splits elsewhere `pipe` splits here, but for MTP's experts, whose tokens it splits."""
    def where(path, a):
        if path == "mtp_bias":
            return P()
        compute = place(path, a.shape, mesh).compute
        return compute if "/block/ffn/" in path else P(*(PIPE if entry == "tensor" else entry for entry in compute))

    return jax.tree.map(where, paths(shared), shared)
