"""The use of experts by kind of text: loads by kind, and their distance from the loads of all kinds together."""

import functools
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.loader import Loader
from deepseek_jax.model import DeepSeekV3

ROWS = 24  # of held-out text per kind


@functools.lru_cache(maxsize=2)
def _counts(cfg):
    return jax.jit(lambda params, router, tokens_BT: DeepSeekV3(cfg).apply(
        {"params": params, "router": router}, tokens_BT, logits=False).counts["bias"])  # pyright: ignore[reportAttributeAccessIssue] (apply)


def rows_by_kind(loader: Loader) -> list[np.ndarray]:
    """Held-out tokens [ROWS, T] of each kind of text (fewer for a short text), in the order of the sources."""
    validation, kinds = loader.validation, []
    for start, end in zip(validation.starts, validation.starts[1:]):
        first, last = (-(-int(x) // validation.length) for x in (start, end))  # rows that begin within this kind
        kinds.append(np.stack([validation.row(r)[0][:-1] for r in range(first, min(last - 1, first + ROWS))]))
    return kinds


def specialisation(config: Config, params: dict[str, Any], router: dict[str, Any], loader: Loader,
                   final: bool) -> dict[str, Any]:
    """Half of sum_e |share of a kind's choices - share of all|, mean of kinds and layers: 0 none, 1 nothing shared.

    The array `load_by_kind` is [kind, layer, expert], in multiples of an even load; kinds in the order of the sources.
    """
    shares = []
    for tokens_BT in rows_by_kind(loader):
        counts_LE = np.asarray(_counts(config.model)(params, router, tokens_BT))
        shares.append(counts_LE / counts_LE.sum(axis=-1, keepdims=True))
    share_KLE = np.stack(shares)
    apart = np.abs(share_KLE - share_KLE.mean(axis=0)).sum(axis=-1) / 2
    return {"specialisation": float(apart.mean()), "load_by_kind": (share_KLE * share_KLE.shape[-1]).tolist()}
