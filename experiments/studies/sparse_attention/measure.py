"""The effect of sparse attention on a model that uses distant context: loss by position, needles, and recall.

Text, needles and positions are those of the study long_context.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config, ModelConfig, model_config
from deepseek_jax.data.loader import Loader
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.scale.costs import latent_core_products
from deepseek_jax.scale.memory import cache_read
from experiments.studies.long_context.measure import ENDS, documents, loss_by_position, needles

LENGTHS = (512, 2048)  # lengths of the texts with needles
CONTEXTS = tuple(1024 * 2**n for n in range(8))  # context lengths whose decoding cost is counted


def kept(config: Config, params: dict[str, Any], router: dict[str, Any], loader: Loader, final: bool) -> dict[str, Any]:
    """Loss by position and needles found, with the tokens chosen also after a warm-up; and the indexer's recall.

    Nothing of pre-training, which comes before YaRN.
    """
    if config.model.yarn is None:
        return {}
    cfg, variables = dataclasses.replace(config.model, index_warmup=False), {"params": params, "router": router}
    by_position, found = loss_by_position(cfg, variables, loader), needles(cfg, variables, loader, LENGTHS)
    code = lambda low, high: float(np.mean(by_position[low:high]))
    seen = {"loss_0_512": code(0, 512), "loss_512_2048": code(512, LENGTHS[-1]),
            **{f"needle_{length}": float(found_D.mean()) for length, found_D in zip(LENGTHS, found)},
            "by_position": [code(low, high) for low, high in itertools.pairwise(ENDS)], "needles": found.tolist()}
    return seen if cfg.index_topk is None else {**seen, "recall": recall(cfg, variables, loader)}


def recall(cfg: ModelConfig, variables: dict[str, Any], loader: Loader) -> float:
    """The share of dense attention that falls on the chosen tokens, mean over layers and four held-out documents."""
    watch = jax.jit(lambda tokens_BT: DeepSeekV3(cfg).apply(variables, tokens_BT).indexer.recall)  # pyright: ignore[reportAttributeAccessIssue] (apply)
    return float(np.mean([jnp.mean(watch(row[None, :-1])) for row in documents(loader)[:4]]))


def costs() -> dict[str, list[float]]:
    """For one decoded token of V3.2 and V3, by CONTEXTS: MB read from an FP8 cache, and GFLOP of attention, all
    layers."""
    found = {}
    for name, preset in (("V3", "v3_671b"), ("V3.2", "v3_2_671b")):
        cfg = model_config(preset)
        found[f"{name}, MB"] = [cache_read(cfg, "fp8", context) / 1e6 for context in CONTEXTS]
        found[f"{name}, GFLOP"] = [2 * cfg.num_layers * latent_core_products(cfg, context) / 1e9
                                   for context in CONTEXTS]
    return found
