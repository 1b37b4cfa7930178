"""Cross-entropy in chunks of tokens, and the complete objective of the report.

The logits of a chunk are computed once: its loss and its gradients are computed together in the forward pass, so that
neither [tokens, vocabulary] in float32 nor a second product is needed.

    loss = main + lambda / D * sum_k mtp_k + alpha * sequence-wise balance loss (+ loss of the indexer, in V3.2)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import BalanceConfig, Config
from deepseek_jax.model.layers import matmul, transpose, wide
from deepseek_jax.model.mtp import ahead
from deepseek_jax.model.types import Output
from deepseek_jax.parallel.context import in_parts
from deepseek_jax.parallel.sharding import data_shards
from deepseek_jax.training.types import Batch, Normalizers, TokenLosses


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(hidden_ND: jax.Array, head_DW: jax.Array, targets_N: jax.Array, weights_N: jax.Array, chunk: int,
                  axis: str | None = None) -> jax.Array:
    """Sum over tokens of weight * -log softmax(hidden @ head)[target], in nats, float32.

    Args:
      hidden_ND: any dtype; the product runs in it.
      head_DW: float32 master.
      targets_N: int32. weights_N: float32, 0 leaves a token out; no gradient flows to it.
      chunk: tokens whose logits exist at once.
      axis: inside a shard_map, the mesh axis over which the vocabulary is split. The loss is then the sum of its
        devices' results, and so is the gradient by `hidden_ND`.
    """
    w_DW = head_DW.astype(hidden_ND.dtype)
    losses = lax.map(lambda part: _chunk(w_DW, part, axis)[0].sum(), in_chunks(chunk, hidden_ND, targets_N, weights_N))
    return losses.sum()


def in_chunks(chunk: int, hidden_ND: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Pads to full chunks (weight 0) and splits: [N, ...] -> [N / chunk, chunk, ...] of each."""
    chunk = min(chunk, hidden_ND.shape[0])
    pad = -hidden_ND.shape[0] % chunk

    def split(x):
        x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape((-1, chunk) + x.shape[1:])

    return tuple(map(split, (hidden_ND, *others)))


def _chunk(head_DW, part, axis):
    """Weighted losses [M] and the gradient of their sum by the logits, [M, W] in hidden's dtype."""
    hidden_MD, targets_M, weights_M = part
    logits_MW = matmul(hidden_MD, head_DW, wide(hidden_MD.dtype))
    lse_M = jax.nn.logsumexp(logits_MW, axis=-1)
    hit = jnp.arange(len(targets_M)), targets_M
    if axis is None:
        losses_M, weights_hit_M = (lse_M - logits_MW[hit]) * weights_M, weights_M
    else:
        lse_M = jax.nn.logsumexp(lax.all_gather(lse_M, axis), axis=0)
        column_M = targets_M - lax.axis_index(axis) * logits_MW.shape[1]
        mine_M = (column_M >= 0) & (column_M < logits_MW.shape[1])
        hit = hit[0], jnp.where(mine_M, column_M, 0)
        weights_hit_M = jnp.where(mine_M, weights_M, 0)
        once_M = jnp.where(lax.axis_index(axis) == 0, weights_M, 0)
        losses_M = lse_M * once_M - logits_MW[hit] * weights_hit_M
    p_MW = jnp.exp(logits_MW - lse_M[:, None]) * weights_M[:, None]
    return losses_M, less_targets(p_MW, hit[1], weights_hit_M).astype(hidden_MD.dtype)


def less_targets(p_MW: jax.Array, targets_M: jax.Array, weights_M: jax.Array) -> jax.Array:
    """`p_MW`, of any float dtype, less the weight [M] of each row at its target, int32 [M]."""
    return lax.platform_dependent(p_MW, targets_M, weights_M, cpu=_scattered, default=_compared)


def _scattered(p_MW, targets_M, weights_M):
    # On a CPU a comparison over [M, W] would cost as much as the softmax.
    return p_MW.at[jnp.arange(len(targets_M)), targets_M].add(-weights_M, unique_indices=True)


def _compared(p_MW, targets_M, weights_M):
    # On a GPU or a TPU the comparison is fused with the softmax, and a scatter would move all of p in float32.
    there_MW = jnp.arange(p_MW.shape[1])[None] == targets_M[:, None]
    return p_MW - jnp.where(there_MW, weights_M[:, None], 0).astype(p_MW.dtype)


def _cross_entropy_fwd(hidden_ND, head_DW, targets_N, weights_N, chunk, axis):
    w_DW = head_DW.astype(hidden_ND.dtype)
    w_WD = transpose(w_DW)

    def step(dhead_DW, part):
        losses_M, dlogits_MW = _chunk(w_DW, part, axis)
        dhead_DW = dhead_DW + matmul(transpose(part[0]), dlogits_MW, dhead_DW.dtype)
        return dhead_DW, (losses_M.sum(), matmul(dlogits_MW, w_WD))

    dhead_DW, (losses, dhidden) = lax.scan(step, jnp.zeros(head_DW.shape, head_DW.dtype),
                                           in_chunks(chunk, hidden_ND, targets_N, weights_N))
    dhidden_ND = dhidden.reshape(-1, hidden_ND.shape[1])[:hidden_ND.shape[0]]
    return losses.sum(), (dhidden_ND, dhead_DW)


def _cross_entropy_bwd(chunk, axis, gradients, dloss):
    dhidden_ND, dhead_DW = gradients
    return (dhidden_ND * dloss).astype(dhidden_ND.dtype), dhead_DW * dloss, None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def token_logprobs(hidden_BTD: jax.Array, head_DW: jax.Array, targets_BT: jax.Array, chunk: int) -> jax.Array:
    """log softmax(hidden @ head)[target] of each token, float32 [B, T] (float64 where hidden is).

    Both passes make the logits of `chunk` tokens at a time; arguments as in `cross_entropy`.
    """
    @jax.checkpoint  # otherwise the logits of all chunks would be saved for the backward pass
    def of_chunk(part):
        hidden_MD, targets_M = part
        logits_MW = matmul(hidden_MD, head_DW.astype(hidden_MD.dtype), wide(hidden_MD.dtype))
        return logits_MW[jnp.arange(len(targets_M)), targets_M] - jax.nn.logsumexp(logits_MW, axis=-1)

    def one(hidden_ND, targets_N):
        return lax.map(of_chunk, in_chunks(chunk, hidden_ND, targets_N)).reshape(-1)[:len(targets_N)]

    # Each device processes its own tokens, as in `token_losses`.
    parts = [x.reshape(data_shards(), -1, *x.shape[2:]) for x in (hidden_BTD, targets_BT)]
    each = jax.vmap(one)(*parts) if data_shards() > 1 else one(*(x[0] for x in parts))
    return each.reshape(targets_BT.shape)


def shifted_targets(targets_BT: jax.Array, weights_BT: jax.Array, segment_ids_BT: jax.Array | None,
                    k: int) -> tuple[jax.Array, jax.Array]:
    """Targets and weights of MTP depth k: position i predicts targets[i + k], if that exists and is the same segment.

    `segment_ids_BT` (None: one segment) are those of the input tokens.
    """
    T = targets_BT.shape[1]
    valid = (jnp.arange(T) < T - k)[None]
    if segment_ids_BT is not None:
        valid = valid & (ahead(segment_ids_BT, k) == segment_ids_BT)
    return ahead(targets_BT, k), ahead(weights_BT, k) * valid


def token_losses(output: Output, head_DW: jax.Array, batch: Batch, chunk: int, axis: str | None = None) -> TokenLosses:
    """Main and MTP losses of one micro-batch; `chunk` and `axis` as in `cross_entropy`."""
    targets_BT, weights_BT = in_parts(batch.targets_BT), in_parts(batch.weights_BT)
    main = _summed(output.hidden_BTD, head_DW, targets_BT, weights_BT, chunk, axis)
    return TokenLosses(main, weights_BT.sum(), *mtp_losses(output, head_DW, batch, chunk, axis))


def mtp_losses(output: Output, head_DW: jax.Array, batch: Batch, chunk: int,
               axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    """(nats, weights) of each MTP depth, [D]; arguments as in `token_losses`."""
    shifted = [shifted_targets(batch.targets_BT, batch.weights_BT, batch.segment_ids_BT, k + 1)
               for k in range(len(output.mtp_hidden))]
    shifted = [(in_parts(targets_BT), in_parts(weights_BT)) for targets_BT, weights_BT in shifted]
    if not shifted:
        none_D = jnp.zeros((0,), wide(output.hidden_BTD.dtype))
        return none_D, none_D
    nats = [_summed(h_BTD, head_DW, *of, chunk, axis) for h_BTD, of in zip(output.mtp_hidden, shifted, strict=True)]
    return jnp.stack(nats), jnp.stack([weights_BT.sum() for _, weights_BT in shifted])


def _summed(hidden_BTD, head_DW, targets_BT, weights_BT, chunk, axis):
    """`cross_entropy` of a micro-batch."""
    # Each device processes its own tokens; [shards, tokens, ...] keeps them, and their part of dhead, separate.
    tokens = [x.reshape(data_shards(), -1, *x.shape[2:]) for x in (hidden_BTD, targets_BT, weights_BT)]
    each = lambda h_ND, targets_N, weights_N: cross_entropy(h_ND, head_DW, targets_N, weights_N, chunk, axis)
    return jax.vmap(each)(*tokens).sum() if data_shards() > 1 else each(*(x[0] for x in tokens))


def objective(output: Output, losses: TokenLosses, normalizers: Normalizers, balance: BalanceConfig) -> jax.Array:
    """The scalar to differentiate for one micro-batch; summed over micro-batches it is the loss of one large batch."""
    loss = losses.nats / normalizers.weight
    if losses.mtp_nats_D.shape[0]:
        loss = loss + normalizers.mtp_lambda * (losses.mtp_nats_D / normalizers.mtp_weight_D).mean()
    if balance.sequence_loss_weight:
        loss = loss + balance.sequence_loss_weight * normalizers.share * output.sequence_loss
    if balance.aux_loss_weight:
        loss = loss + balance.aux_loss_weight * normalizers.share * output.auxiliary_loss
    return loss


def with_indexer(config: Config, loss: jax.Array, output: Output, losses: TokenLosses,
                 normalizers: Normalizers) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective with the loss of the indexer, or in its warm-up that loss alone: a scalar; and its entries in
    `Sums.own`.

    Since its gradient reaches only the indexer, its weight matters only for clipping by the global norm.
    """
    if output.indexer is None:
        return loss, {}
    of_indexer = config.train.indexer_loss_weight * normalizers.share * output.indexer.loss
    watched = {"indexer_loss": output.indexer.loss, "indexer_recall": output.indexer.recall}
    return (of_indexer if config.model.index_warmup else loss + of_indexer,
            {name: x * losses.weight for name, x in watched.items()})
