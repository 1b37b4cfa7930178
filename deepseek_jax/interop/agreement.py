"""The difference between a model's outputs and a reference's, with its own routes and with the reference's.

A low-precision router sometimes chooses another expert than the reference, which changes the logits of that token
strongly without any error in the arithmetic. If the model is made to use the reference's experts (router replay), the
remaining difference is due to arithmetic.

    KL(reference || model) = sum over words of p (log p - log q)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import DeepSeekV3


class Agreement(NamedTuple):
    """Figures over all tokens. free, pinned: mean KL in nats, with the model's own routes and with the reference's.
    flipped: the share of routing decisions (per layer and token) with another set of experts than the reference's."""

    free: float
    pinned: float
    flipped: float


def divergence(reference_BTW: np.ndarray, other_BTW: Any) -> np.ndarray:
    """KL(reference || other) of each token, in nats: float64 [B, T]. Both are logits."""
    ours, theirs = (_log_softmax(np.asarray(logits, np.float64)) for logits in (other_BTW, reference_BTW))
    return (np.exp(theirs) * (theirs - ours)).sum(axis=-1)


def _log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def agreement(cfg: ModelConfig, variables: dict[str, Any], tokens_BT: np.ndarray, logits_BTW: np.ndarray,
              chosen_LBTK: np.ndarray) -> Agreement:
    """Compares a model, in the precision of `cfg`, with a reference's logits and experts for the same tokens.

    Args:
      tokens_BT: int32. logits_BTW: of the reference. chosen_LBTK: int32, its experts in the MoE layers, in any order.
    """
    def forward(variables, tokens_BT, chosen_LBTK):
        output: Any = DeepSeekV3(cfg).apply(variables, tokens_BT, capture=("chosen",), chosen=chosen_LBTK)
        return output.logits_BTW, output.captured["chosen"]

    run = jax.jit(forward)
    free_BTW, own_LBTK = run(variables, tokens_BT, np.full_like(chosen_LBTK, -1))  # negative: the router decides
    pinned_BTW, _ = run(variables, tokens_BT, chosen_LBTK)
    flipped = (np.sort(own_LBTK, axis=-1) != np.sort(chosen_LBTK, axis=-1)).any(axis=-1)
    return Agreement(float(divergence(logits_BTW, free_BTW).mean()), float(divergence(logits_BTW, pinned_BTW).mean()),
                     float(flipped.mean()))
