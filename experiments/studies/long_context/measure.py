"""A model's use of distant context: loss of code by position, and finding a secret word among meaningless ones.

In the needle test the secret occurs once, at some depth, and is asked for at the end: "... = copper ... ... = ?". The
correct one has to be the likeliest of 24 words.
"""

import dataclasses
import functools
import itertools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config, ModelConfig, Yarn
from deepseek_jax.data.loader import Loader
from deepseek_jax.model import DeepSeekV3
from experiments.studies.framework.corpora import FILLING, SECRETS

LENGTHS, DEPTHS = (64, 128, 256, 512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 0.95)
ASKED = 12  # needles per length and depth
ENDS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048)  # of the ranges of positions


def far(config: Config, params: dict[str, Any], router: dict[str, Any], loader: Loader, final: bool) -> dict[str, Any]:
    """Loss by position and needles found; for a model without YaRN also with YaRN added but not trained."""
    variables = {"params": params, "router": router}
    by_position, found = loss_by_position(config.model, variables, loader), needles(config.model, variables, loader)
    found_at = dict(zip(LENGTHS, np.mean(found, axis=1)))
    code = lambda low, high: float(np.mean(by_position[low:high]))
    seen = {"loss_0_64": code(0, 64), "loss_64_512": code(64, 512), "loss_512_2048": code(512, 2048),
            "past_inside": code(64, 512) - code(32, 64),
            **{f"needle_{length}": float(found_at[length]) for length in (64, 512, 2048)},
            "by_position": [code(low, high) for low, high in itertools.pairwise(ENDS)], "needles": found.tolist()}
    if config.model.yarn is None:
        yarn = dataclasses.replace(config.model, yarn=Yarn(original_length=LENGTHS[0]))
        alone = needles(yarn, variables, loader)
        seen |= {"needles_with_yarn": alone.tolist(),
                 "yarn_gains": float(np.mean(alone[-1]) - found_at[LENGTHS[-1]])}
    return seen


@functools.lru_cache(maxsize=4)
def _model(cfg):
    return jax.jit(lambda variables, tokens_BT: DeepSeekV3(cfg).apply(variables, tokens_BT).logits_BTW)  # pyright: ignore[reportAttributeAccessIssue] (apply)


@functools.lru_cache(maxsize=4)
def _nats(cfg):
    def run(variables, tokens_BT):
        logits_BTW = DeepSeekV3(cfg).apply(variables, tokens_BT[:, :-1]).logits_BTW  # pyright: ignore[reportAttributeAccessIssue] (apply)
        right_BT1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BTW), tokens_BT[:, 1:, None], axis=-1)
        return -right_BT1[..., 0].mean(axis=0)

    return jax.jit(run)


def documents(loader: Loader) -> np.ndarray:
    """int32 [documents, 2049]: the beginnings of held-out code files that are long enough."""
    shard, length = loader.validation.shards[0], LENGTHS[-1] + 1
    starts = shard.offsets_N[:-1][shard.lengths_N >= length]
    return np.stack([np.asarray(shard.tokens[start:start + length], np.int32) for start in starts])


def loss_by_position(cfg: ModelConfig, variables: dict[str, Any], loader: Loader) -> np.ndarray:
    """float64 [2048]: nats at each position, mean over the documents."""
    rows = [np.asarray(_nats(cfg)(variables, row[None]), np.float64) for row in documents(loader)]
    return np.mean(rows, axis=0)


@functools.lru_cache(maxsize=1)
def haystacks(tokenizer: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{length: (tokens [depths * ASKED, length], the secrets' tokens)}: the same for every model."""
    rng, word = random.Random(1), lambda text: tokenizer.encode(" " + text)
    made = {}
    for length in LENGTHS:
        rows, answers = [], []
        for depth in DEPTHS:
            for _ in range(ASKED):
                secret = rng.choice(SECRETS)
                told, asked = word("= " + secret), word("=")
                words = []
                while len(words) < length:
                    words += word(rng.choice(FILLING))
                room = length - len(told) - len(asked)
                at = int(depth * room)
                rows.append([*words[:at], *told, *words[at:room], *asked])
                answers.append(word("= " + secret)[len(asked)])
        made[length] = np.array(rows, np.int32), np.array(answers)
    return made


def needles(cfg: ModelConfig, variables: dict[str, Any], loader: Loader,
            lengths: tuple[int, ...] = LENGTHS) -> np.ndarray:
    """float64 [lengths, depths]: how often the right secret is the likeliest of all secrets (by their first tokens)."""
    asked = len(loader.tokenizer.encode(" ="))
    candidates = np.array(sorted({loader.tokenizer.encode(f" = {secret}")[asked] for secret in SECRETS}))
    found = []
    for tokens_NT, answer_N in (haystacks(loader.tokenizer)[length] for length in lengths):
        rows = max(1, 4096 // tokens_NT.shape[1])
        best = [candidates[np.asarray(_model(cfg)(variables, tokens_NT[i:i + rows]))[:, -1][:, candidates].argmax(-1)]
                for i in range(0, len(tokens_NT), rows)]
        found.append((np.concatenate(best) == answer_N).reshape(len(DEPTHS), ASKED).mean(axis=1))
    return np.array(found)
