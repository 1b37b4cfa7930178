"""Groups of answers, drawn by the engine from the present policy, and the trainer's batch of them.

A rollout is a function of the weights, train.seed and its number: the prompts come from a generator seeded by the
latter two, and each answer has its own random stream. An engine is used for one rollout only, so that its cache holds
no pages of an earlier policy.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.chat.messages import PLAIN, Conventions
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.posttraining.fp8_sampler import as_fp8
from deepseek_jax.posttraining.grpo import advantages, token_weights
from deepseek_jax.posttraining.rewards import Scores, majority, score_all
from deepseek_jax.posttraining.tasks import Task
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.sequence import Request, Sequence

MOST_SEQUENCES = 64  # answers drawn at once; the others wait
TRAINING, EVALUATION = range(2)  # uses of random numbers: training and evaluation share no problem by design


class Problem(NamedTuple):
    """A prompt as token ids, from the beginning of a text, and the reference for scoring its answers."""

    prompt: tuple[int, ...]
    reference: Any


def draw_problems(config: Config, task: Task, tokenizer: Tokenizer, use: int, number: int, count: int,
                  conventions: Conventions = PLAIN) -> list[Problem]:
    """The `count` problems of rollout `number`. Raises ConfigError for a prompt that leaves no room for an answer."""
    rng = np.random.default_rng([config.train.seed, use, number])
    return [problem_of(config, tokenizer, conventions, *task.draw(rng)) for _ in range(count)]


def problem_of(config: Config, tokenizer: Tokenizer, conventions: Conventions, text: str, reference: Any) -> Problem:
    """The token ids of a task's prompt. Raises ConfigError for a prompt that leaves no room for an answer."""
    room = config.train.sequence_length + 1 - config.rollout.max_new_tokens
    prompt = (*([tokenizer.bos] if conventions.begins else []), *tokenizer.encode(text))
    if len(prompt) > room:
        raise ConfigError(f"a prompt has {len(prompt)} tokens, and train.sequence_length="
                          f"{config.train.sequence_length} leaves {max(0, room)} next to rollout.max_new_tokens="
                          f"{config.rollout.max_new_tokens}; raise the first or lower the second.")
    return Problem(prompt, reference)


class Answers(NamedTuple):
    """Answers to problems, in order, with their rewards.

    faults: failures of the reward by kind (`rewards.score_all`). texts: the scored texts.
    """

    sequences: list[Sequence]
    rewards: list[float]
    faults: collections.Counter[str]
    texts: tuple[str, ...] = ()


Reward = Callable[[list[Sequence], list[str]], Scores]  # scores all answers of a rollout at once, groups in order


def votes(group_size: int) -> Reward:
    """The reward "majority": the most common final value of a group counts as right."""
    return lambda sequences, texts: Scores([reward for at in range(0, len(texts), group_size)
                                            for reward in majority(texts[at:at + group_size])], collections.Counter())


def answer(config: Config, variables: dict[str, Any], task: Task, tokenizer: Tokenizer, problems: list[Problem],
           number: int | None = None, conventions: Conventions = PLAIN, reward: Reward | None = None) -> Answers:
    """One answer to each problem, drawn at temperature 1, seeded by `number` and train.seed; None: greedy.

    An answer ends at the checkpoint's end tokens (`conventions`), or with EOS. reward: None: the task's rule.
    Greedy answers measure the policy, so rollout.fp8 is not for them.
    """
    cfg, in_fp8 = config.model, config.rollout.fp8 and number is not None
    engine = Engine(cfg, as_fp8(variables) if in_fp8 else variables, EngineConfig(
        max_sequences=min(len(problems), MOST_SEQUENCES), max_length=config.train.sequence_length + 1,
        depth=cfg.mtp_depth if config.rollout.draft else 0, cache="fp8" if in_fp8 else None,
        routes=cfg.num_moe_layers > 0))
    seed = 0 if number is None else int(np.random.SeedSequence([config.train.seed, number]).generate_state(1)[0])
    how: dict[str, Any] = dict(temperature=0.0 if number is None else 1.0, seed=seed, logprobs=number is not None,
                               stop_tokens=conventions.ends | {tokenizer.eos})
    sequences = [engine.submit(Request(problem.prompt, config.rollout.max_new_tokens, stream=i, **how))
                 for i, problem in enumerate(problems)]
    engine.run()
    # Special tokens are part of the text: in many tokenizers <think> is one.
    texts = ["" if s.finish == "error" else tokenizer.decode([token.id for token in s.made], specials=True)
             for s in sequences]
    scores = reward(sequences, texts) if reward else score_all(
        lambda text=text, reference=problem.reference: task.score(text, reference)
        for text, problem in zip(texts, problems))
    return Answers(sequences, scores.rewards, scores.faults, tuple(texts))


def batch_of(config: Config, answers: Answers) -> dict[str, Any]:
    """The batch of `update`, without reference log-probabilities: [M, rows, T + 1] of each, answers in order.

    Rows are a prompt, its answer with the token that ended it, and padding, which repeats the same tokens, since
    routers count it. A sequence whose logits were not finite counts as an empty answer.
    """
    model, T = config.model, config.train.sequence_length
    rewards_PG: Any = np.asarray(answers.rewards, np.float32).reshape(-1, config.rollout.group_size)
    advantages_B1 = np.asarray(advantages(config.grpo, rewards_PG)).reshape(-1, 1)
    B = len(answers.sequences)
    tokens_BT = np.zeros((B, T + 1), np.int32)
    counted_BT: Any = np.zeros((B, T + 1), np.float32)
    sampled_BT = np.zeros((B, T + 1), np.float32)
    routes_LKBT = np.full((model.num_moe_layers, model.experts_per_token, B, T + 1), -1, np.int32)
    for b, sequence in enumerate(answers.sequences):
        made = drawn(sequence)
        first, end = len(sequence.request.prompt), len(sequence.request.prompt) + len(made)
        tokens_BT[b] = np.resize([*sequence.request.prompt, *(token.id for token in made)], T + 1)
        counted_BT[b, first:end] = sequence.finish != "error"
        sampled_BT[b, first:end] = [token.logprob for token in made]
        fed = sequence.routes[:end - 1]  # the last token is never fed
        if fed:
            routes_LKBT[:, :, b, :len(fed)] = np.moveaxis(np.stack(fed), 0, -1)
    batch = {"tokens": tokens_BT, "weights": np.asarray(token_weights(config.grpo, counted_BT), np.float32),
             "segment_ids": np.ones_like(tokens_BT), "sampled": sampled_BT,
             "advantages": np.broadcast_to(advantages_B1, tokens_BT.shape).astype(np.float32)}
    if model.num_moe_layers:
        batch["routes"] = routes_LKBT
    M = config.train.accumulation_steps
    apart = lambda x: np.moveaxis(x.reshape(*x.shape[:-2], M, B // M, T + 1), -3, 0)
    return {name: np.ascontiguousarray(apart(x)) for name, x in batch.items()} | {"active": np.int32(M)}


def drawn(sequence: Sequence) -> list:
    """The tokens that the policy drew, including the one that ended the answer."""
    return sequence.made + ([sequence.end] if sequence.end is not None else [])


def measures(config: Config, answers: Answers) -> dict[str, float]:
    """The metrics of a rollout, for its row.

    reward: mean. mixed_groups: share of the groups whose rewards differ; the others have no gradient. answer_tokens:
    mean length. finished: share that ended by themselves. entropy: estimate in nats per token. accepted: share of
    drafts.
    reward_faults: answers whose reward failed.
    """
    rewards_PG = np.asarray(answers.rewards).reshape(-1, config.rollout.group_size)
    tokens = [drawn(s) for s in answers.sequences]
    count = max(1, sum(map(len, tokens)))
    drafted = sum(s.drafted for s in answers.sequences)
    return {"reward": float(rewards_PG.mean()), "mixed_groups": float((np.ptp(rewards_PG, axis=1) > 0).mean()),
            "answer_tokens": count / len(tokens),
            "finished": float(np.mean([s.end is not None for s in answers.sequences])),
            "entropy": -sum(token.logprob for made in tokens for token in made) / count,
            "accepted": sum(s.accepted for s in answers.sequences) / max(1, drafted),
            "reward_faults": sum(answers.faults.values())}


def disagreement(batch: dict[str, np.ndarray], logprob_MBT: np.ndarray, chosen_MLBTK: np.ndarray | None
                 ) -> dict[str, float]:
    """The difference between sampler and trainer, with the same weights, on the same tokens.

    ratio_*: of the trainer's probability to the sampler's, over the tokens of answers: minimum, 1st percentile, mean,
    99th percentile, maximum. tokens_rerouted: share of the tokens whose experts differ in any layer; routers_rerouted:
    share of the routing decisions (per token and layer) that differ.

    Args:
      logprob_MBT, chosen_MLBTK: the trainer's own, without replay; None for a dense model.
    """
    counts_MBT = batch["weights"][..., 1:] > 0
    log_ratio = (np.asarray(logprob_MBT, np.float64) - batch["sampled"][..., 1:])[counts_MBT]
    found = {}
    if log_ratio.size:
        ratio = np.exp(log_ratio)
        low, high = np.quantile(ratio, [0.01, 0.99])
        found = {"ratio_least": float(ratio.min()), "ratio_low": float(low), "ratio_mean": float(ratio.mean()),
                 "ratio_high": float(high), "ratio_largest": float(ratio.max())}
    if chosen_MLBTK is not None:
        sampled_MLBTK = np.moveaxis(batch["routes"][..., :-1], 2, -1)
        known_MLBT = (sampled_MLBTK >= 0).all(axis=-1)
        differ_MLBT = (np.sort(sampled_MLBTK, axis=-1) != np.sort(chosen_MLBTK, axis=-1)).any(axis=-1) & known_MLBT
        known_MBT = known_MLBT.all(axis=1)
        found["tokens_rerouted"] = float(differ_MLBT.any(axis=1).sum() / max(1, known_MBT.sum()))
        found["routers_rerouted"] = float(differ_MLBT.sum() / max(1, known_MLBT.sum()))
    return found
