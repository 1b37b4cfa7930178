"""Distillation by logits (arXiv 1503.02531): a student learns the distribution of a teacher at every token.

    loss = (1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student)        both softened by temperature T

The teacher is a run with the same tokenizer, of any shape; it is frozen, and runs in the same program on the same
batch. Logits of both exist for `train.loss_chunk` tokens at a time. MTP modules are trained on the next tokens, as
usual.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.checkpoint.adapters import Base
from deepseek_jax.config import Config, ConfigError, DistillConfig
from deepseek_jax.model.layers import matmul, transpose, wide
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.parallel.sharding import data_shards
from deepseek_jax.training.base import check_tokenizer, load_reference, main_model, read_as
from deepseek_jax.training.loop import Run, TrainResult, train
from deepseek_jax.training.losses import in_chunks, less_targets, mtp_losses, objective, with_indexer
from deepseek_jax.training.step import Inputs, of_rows, run_model, sums_of
from deepseek_jax.training.types import Sums, TokenLosses
from deepseek_jax.workdir import check_speaks, load_workdir_config

TEACHER = "the teacher distill.from"
OTHER_TOKENS = "the student; distillation by text takes any (docs/posttraining.md)"


class Teacher(NamedTuple):
    """A teacher's predictions for N tokens: its hidden states, and its head. Frozen: no gradient flows to it."""

    hidden_NE: jax.Array
    head_EW: jax.Array


class Distances(NamedTuple):
    """Weighted sums over tokens in nats, float32. loss: differentiated. kl: KL(teacher || student) at the temperature.
    cross_entropy: of the tokens themselves. The latter two are only logged: no gradient flows from them."""

    loss: jax.Array
    kl: jax.Array
    cross_entropy: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def distances(hidden_ND: jax.Array, head_DW: jax.Array, teacher: Teacher, targets_N: jax.Array, weights_N: jax.Array,
              cfg: DistillConfig, chunk: int) -> Distances:
    """The distance of a student from its teacher; arguments as in `training.losses.cross_entropy`."""
    return _forward(hidden_ND, head_DW, teacher, targets_N, weights_N, cfg, chunk)[0]


def _forward(hidden_ND, head_DW, teacher, targets_N, weights_N, cfg, chunk):
    """Computes the gradients of a chunk together with its logits, as in `training.losses`."""
    w_DW, theirs_EW = head_DW.astype(hidden_ND.dtype), teacher.head_EW.astype(teacher.hidden_NE.dtype)
    w_WD = transpose(w_DW)

    def step(dhead_DW, part):
        sums, dlogits_MW = _chunk(cfg, w_DW, theirs_EW, part)
        dhead_DW = dhead_DW + matmul(transpose(part[0]), dlogits_MW, dhead_DW.dtype)
        return dhead_DW, (sums, matmul(dlogits_MW, w_WD))

    dhead_DW, (sums, dhidden) = lax.scan(step, jnp.zeros(head_DW.shape, head_DW.dtype),
                                         in_chunks(chunk, hidden_ND, teacher.hidden_NE, targets_N, weights_N))
    dhidden_ND = dhidden.reshape(-1, hidden_ND.shape[1])[:hidden_ND.shape[0]]
    return Distances(*(x.sum() for x in sums)), (dhidden_ND, dhead_DW)


def _chunk(cfg, head_DW, theirs_EW, part):
    """Distances of one chunk, and the gradient of its loss by the logits, [M, W] in hidden's dtype."""
    hidden_MD, theirs_ME, targets_M, weights_M = part
    logits_MW = matmul(hidden_MD, head_DW, wide(hidden_MD.dtype))
    theirs_MW = matmul(theirs_ME, theirs_EW, wide(theirs_ME.dtype)).astype(logits_MW.dtype)
    hit, T, share = (jnp.arange(len(targets_M)), targets_M), cfg.temperature, cfg.weight
    hard_MW, soft_MW, wanted_MW = (jax.nn.log_softmax(x) for x in (logits_MW, logits_MW / T, theirs_MW / T))
    kl_M = (jnp.exp(wanted_MW) * (wanted_MW - soft_MW)).sum(axis=-1)
    ce_M = -hard_MW[hit]
    by_ce_MW = less_targets(jnp.exp(hard_MW), targets_M, jnp.ones_like(ce_M))
    by_kl_MW = T * (jnp.exp(soft_MW) - jnp.exp(wanted_MW))
    dlogits_MW = weights_M[:, None] * ((1 - share) * by_ce_MW + share * by_kl_MW)
    each = Distances((1 - share) * ce_M + share * T**2 * kl_M, kl_M, ce_M)
    return Distances(*((x_M * weights_M).sum() for x_M in each)), dlogits_MW.astype(hidden_MD.dtype)


def _backward(cfg, chunk, gradients, by):
    dhidden_ND, dhead_DW = gradients
    return (dhidden_ND * by.loss).astype(dhidden_ND.dtype), dhead_DW * by.loss, None, None, None


distances.defvjp(_forward, _backward)


def distill_loss(teacher: Config, config: Config, params: dict[str, Any], inputs: Inputs) -> tuple[jax.Array, Sums]:
    """The loss of a micro-batch, with MTP and balance losses as in pre-training; with the teacher's config a
    `training.step.Loss`. inputs.reference: the teacher's variables."""
    batch, theirs = of_rows(config, inputs.micro), inputs.reference
    assert theirs is not None
    output = run_model(config, params, inputs.router, batch, step=inputs.step)
    hidden_BTE = run_model(main_model(teacher), theirs["params"], theirs["router"], batch).hidden_BTD

    def one(hidden_ND, theirs_NE, targets_N, weights_N):
        return distances(hidden_ND, params["head"], Teacher(theirs_NE, theirs["params"]["head"]), targets_N, weights_N,
                         config.distill, config.train.loss_chunk)

    # Each device processes its own tokens, as in `training.losses.token_losses`.
    parts = [x.reshape(data_shards(), -1, *x.shape[2:])
             for x in (output.hidden_BTD, hidden_BTE, batch.targets_BT, batch.weights_BT)]
    sums = jax.tree.map(jnp.sum, jax.vmap(one)(*parts)) if data_shards() > 1 else one(*(x[0] for x in parts))
    losses = TokenLosses(sums.loss, batch.weights_BT.sum(),
                         *mtp_losses(output, params["head"], batch, config.train.loss_chunk))
    loss = objective(output, losses, inputs.normalizers, config.balance)
    loss, own = with_indexer(config, loss, output, losses, inputs.normalizers)
    return loss, sums_of(output, losses, own | {"kl": sums.kl, "cross_entropy": sums.cross_entropy})


def teacher_of(config: Config) -> Config:
    """The config for running the model of distill.from here: its own model, without FP8.

    Raises ConfigError if it cannot be the teacher of this run.
    """
    folder = str(config.distill.from_)
    if config.mesh.pipe > 1:
        raise ConfigError(f"mesh.pipe={config.mesh.pipe}: pipelines train next tokens alone; take mesh.pipe=1, or "
                          "distill.from=None.")
    if config.mesh.parts > 1:
        raise ConfigError(f"{config.mesh.parts_key}={config.mesh.parts}: next tokens alone are trained on parts of "
                          f"sequences; take {config.mesh.parts_key}=1, or distill.from=None.")
    if config.model.index_warmup:
        raise ConfigError("model.index_warmup=True trains the indexer alone; take distill.from=None.")
    teacher = read_as(config, folder, TEACHER, "the student")
    check_speaks(load_workdir_config(folder), folder)
    return teacher


def load_teacher(teacher: Config, runner: Runner, known: Base | None) -> tuple[dict[str, Any], Base]:
    """The weights of the teacher, {"params", "router"}, and their identity; arguments as in `load_reference`."""
    return load_reference(teacher, runner, str(teacher.distill.from_), known, "the teacher, distill.from")


class DistillRun(Run):
    """A run with a teacher."""

    name = "distill"

    def __init__(self, config: Config, workdir: str, loader: Any, runner: Any):
        self.teacher, folder = teacher_of(config), str(config.distill.from_)
        check_tokenizer(folder, loader.tokenizer, TEACHER, OTHER_TOKENS)
        self.loss = functools.partial(distill_loss, self.teacher)
        super().__init__(config, workdir, loader, runner)

    def find_reference(self, known: Base | None) -> tuple[dict[str, Any] | None, Base | None]:
        """The teacher."""
        return load_teacher(self.teacher, self.runner, known)


def distill(config: Config, workdir: str) -> TrainResult:
    """Trains as `training.loop.train` does, with the teacher of distill.from."""
    teacher_of(config)  # before a corpus is read
    return train(config, workdir, DistillRun)
