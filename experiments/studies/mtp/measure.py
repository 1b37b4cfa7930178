"""The share of the MTP module's drafts that the main model accepts: on held-out text during training, in decoding at
the end.

On held-out text, position i + 1 of the main model and position i of the module predict the same token i + 2 from the
same text, so acceptance needs no decoding: agreement of their first choices when decoding greedily,
sum_w min(p, q) when sampling (arXiv 2211.17192).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.loader import Loader
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.serving import generate

BATCHES = 4  # of held-out text
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 16, 16, 48


@functools.lru_cache(maxsize=2)
def _agreement(cfg):
    def run(params, router, tokens_BT):
        output = DeepSeekV3(cfg).apply({"params": params, "router": router}, tokens_BT)
        main_BTW, draft_BTW = output.logits_BTW[:, 1:-1], output.mtp_logits[0][:, :-2]  # pyright: ignore[reportAttributeAccessIssue] (apply)
        p_BTW, q_BTW = (jax.nn.softmax(x, axis=-1) for x in (main_BTW, draft_BTW))
        best_BT = main_BTW.argmax(-1)
        return best_BT, draft_BTW.argmax(-1) == best_BT, jnp.minimum(p_BTW, q_BTW).sum(-1)

    return jax.jit(run)


@functools.lru_cache(maxsize=1)
def _bigrams(loader):
    """The most frequent successor of each token in some training text: a free draft."""
    size = loader.tokenizer.vocab_size
    table_WW = np.zeros((size, size), np.int32)
    for step in range(min(200, loader.train.steps)):
        tokens_BT = loader.batch(step)["tokens"].reshape(-1, loader.train.sequence_length + 1)
        np.add.at(table_WW, (tokens_BT[:, :-1], tokens_BT[:, 1:]), 1)
    return table_WW.argmax(axis=1)


def acceptance(config: Config, params: dict[str, Any], router: dict[str, Any], loader: Loader,
               final: bool) -> dict[str, float]:
    """Shares of drafts that are accepted; empty for a model without a module."""
    if not config.model.mtp_depth:
        return {}
    greedy, sampled, bigram = [], [], []
    for batch in loader.validation_batches(config.train.batch_size, BATCHES):
        tokens_BT = batch["tokens"][:, :-1]
        best_BT, agrees_BT, overlap_BT = _agreement(config.model)(params, router, tokens_BT)
        greedy.append(np.mean(agrees_BT))
        sampled.append(np.mean(overlap_BT))
        bigram.append(np.mean(_bigrams(loader)[tokens_BT[:, 1:-1]] == np.asarray(best_BT)))
    found = {"acceptance_greedy": float(np.mean(greedy)), "acceptance_sampled": float(np.mean(sampled)),
             "acceptance_bigrams": float(np.mean(bigram))}
    if final:
        found["acceptance_over_bigrams"] = found["acceptance_greedy"] - found["acceptance_bigrams"]
        found |= decoding(config, params, router, loader)
    return found


def decoding(config: Config, params: dict[str, Any], router: dict[str, Any], loader: Loader) -> dict[str, float]:
    """Drafts accepted and tokens per pass in greedy continuations of held-out text."""
    batch = next(iter(loader.validation_batches(PROMPTS, 1)))
    prompts = [list(map(int, row[:PROMPT_LENGTH])) for row in batch["tokens"]]
    made = generate(config.model, {"params": params, "router": router}, prompts, NEW_TOKENS, speculative=True)
    accepted = made.accepted / made.drafted
    return {"acceptance_decoding": accepted, "tokens_per_pass": 1 + accepted}
