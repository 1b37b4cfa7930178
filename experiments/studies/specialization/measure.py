"""What the experts of a model read, how sure the router is, and how far its biases are.

Information is of the joint counts of (expert chosen, kind), in bits: 0, a kind says nothing about the expert. Of 9,216
independent tokens chance alone gives about 0.001 bits with 3 kinds (of text) and 0.002 with 5 (of tokens).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.loader import Loader
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.model.router import BiasRule, load_error
from experiments.studies.balance_scope.measure import rows_by_kind

TOKEN_KINDS = ("word", "number", "space", "punctuation", "mixed")
# The speed is FAST times as high in the first FAST_STEPS steps.
FAST, FAST_STEPS = 20, 30
COMPARED = 4  # rows of each kind of text whose choices are kept, to be compared between seeds


def _fast_update(bias_LE: jax.Array, counts_LE: jax.Array, speed: jax.Array,
                 step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The report's rule at a higher speed at first; the state counts steps."""
    speed = speed * jnp.where(step < FAST_STEPS, FAST, 1)
    return bias_LE + speed * jnp.sign(load_error(counts_LE, bias_LE.dtype)), step + 1


FAST_START = BiasRule(init=lambda bias_LE: jnp.zeros((), jnp.int32), update=_fast_update)


@functools.lru_cache(maxsize=2)
def _routed(cfg):
    def run(params, router, tokens_BT):
        output: Any = DeepSeekV3(cfg).apply({"params": params, "router": router}, tokens_BT, logits=False,
                                            capture=("scores", "chosen"))
        return output.captured["scores"], output.captured["chosen"]

    return jax.jit(run)


def experts(config: Config, params: dict[str, Any], router: dict[str, Any], loader: Loader,
            final: bool) -> dict[str, Any]:
    """All but "chosen" are means over the MoE layers.

    routing_entropy: of a token's scores as shares, over that of equal scores: 1, all experts are alike to it.
    text_bits, token_bits: information of the expert about the kind of text, and about that of the token.
    bias_largest: size of the largest bias. bias_offset: their mean, which changes no choice. bias_spread: the largest
      less the smallest. chosen: at the end, experts of the compared tokens as hexadecimal digits [L, N, K].
    """
    kinds = rows_by_kind(loader)
    routed = [_routed(config.model)(params, router, tokens_BT) for tokens_BT in kinds]
    scores_LNE, chosen_LNK = (np.concatenate([_flat(part[n]) for part in routed], axis=1) for n in (0, 1))
    tokens_N = np.concatenate([tokens_BT.reshape(-1) for tokens_BT in kinds])
    text_N = np.repeat(np.arange(len(kinds)), [tokens_BT.size for tokens_BT in kinds])
    token_N = token_kinds(loader.tokenizer)[tokens_N]
    E, bias_LE = config.model.num_experts, np.asarray(router["bias"])
    found: dict[str, Any] = {
        "routing_entropy": entropy(scores_LNE),
        "text_bits": float(np.mean([information(chosen_NK, text_N, E) for chosen_NK in chosen_LNK])),
        "token_bits": float(np.mean([information(chosen_NK, token_N, E) for chosen_NK in chosen_LNK])),
        "bias_largest": float(np.abs(bias_LE).max(axis=-1).mean()), "bias_offset": float(bias_LE.mean()),
        "bias_spread": float((bias_LE.max(axis=-1) - bias_LE.min(axis=-1)).mean())}
    if final:
        found["token_over_text_bits"] = found["token_bits"] - found["text_bits"]
        kept = [_flat(np.asarray(part[1])[:, :COMPARED]) for part in routed]
        found["chosen"] = "".join(f"{expert:x}" for expert in np.concatenate(kept, axis=1).ravel())
    return found


def _flat(x_LBTX):
    """[L, B * T, X]"""
    x_LBTX = np.asarray(x_LBTX)
    return x_LBTX.reshape(x_LBTX.shape[0], -1, x_LBTX.shape[-1])


def entropy(scores_LNE: np.ndarray) -> float:
    """Mean entropy of scores as shares of their sum, as a fraction of the largest there can be."""
    share_LNE = scores_LNE / scores_LNE.sum(axis=-1, keepdims=True)
    terms_LNE = share_LNE * np.log(np.maximum(share_LNE, 1e-30))
    return float(-terms_LNE.sum(axis=-1).mean() / np.log(scores_LNE.shape[-1]))


def information(chosen_NK: np.ndarray, kind_N: np.ndarray, num_experts: int) -> float:
    """Mutual information of a choice's expert and its token's kind, in bits."""
    joint_EX = np.zeros((num_experts, int(kind_N.max()) + 1))
    np.add.at(joint_EX, (chosen_NK, kind_N[:, None]), 1.0)
    joint_EX /= joint_EX.sum()
    apart_EX = joint_EX.sum(axis=1, keepdims=True) * joint_EX.sum(axis=0, keepdims=True)
    there = joint_EX > 0
    return float((joint_EX[there] * np.log2(joint_EX[there] / apart_EX[there])).sum())


@functools.lru_cache(maxsize=1)
def token_kinds(tokenizer: Any) -> np.ndarray:
    """For each token id the index in TOKEN_KINDS, by its characters; spaces around others do not count."""
    return np.array([TOKEN_KINDS.index(kind_of(tokenizer.decode([token], specials=True)))
                     for token in range(tokenizer.vocab_size)])


def kind_of(text: str) -> str:
    """One of TOKEN_KINDS."""
    inner = text.strip()
    if not inner:
        return "space"
    if inner.replace("_", "a").isalpha():
        return "word"
    if inner.isdigit():
        return "number"
    return "mixed" if any(c.isalnum() for c in inner) else "punctuation"
