"""Reward models: equal to an oracle in float64, read at one token, resumed to the bit, and used to train a policy."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.chat.messages import PLAIN
from deepseek_jax.checkpoint.manager import restore_items
from deepseek_jax.config import ConfigError, LoraConfig, MeshConfig, PreferenceConfig, RolloutConfig, load_config
from deepseek_jax.config.training import DataConfig, InitConfig
from deepseek_jax.data.prepare import Source
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.posttraining.dpo import bradley_terry
from deepseek_jax.posttraining.loop import reinforce
from deepseek_jax.posttraining.pairs import PairLoader, hold
from deepseek_jax.posttraining.preferences import (
    DpoRun,
    RewardRun,
    check_preferences,
    reward_loss,
    train_on_pairs,
)
from deepseek_jax.posttraining.reward_model import RewardModel, last_of, reward_config, rewards_at, row_rewards
from deepseek_jax.serving.sequence import Request, Sequence, Token
from deepseek_jax.training.loop import check_start
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.step import Inputs
from deepseek_jax.training.types import Normalizers
from deepseek_jax.workdir import load_run
from tests.model import naive
from tests.posttraining import policies
from tests.posttraining.test_pairs import many, written
from tests.precision import float64

P, T, D = 3, 5, 4
WEIGHTS = np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1],
                    [0, 1, 1, 1, 0]], np.float32)
LAST = (2, 4, 1, 2, 4, 3)  # of each row


def case():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2 * P, T, D)), rng.standard_normal(D)


def loss_of(hidden, head):
    return bradley_terry(rewards_at(hidden, head, last_of(jnp.asarray(WEIGHTS))).reshape(-1, 2))[0].mean()


def test_loss_and_gradient_are_those_of_the_oracle():
    hidden, head = case()
    rewards = [hidden[row, t] @ head for row, t in enumerate(LAST)]
    loss, d_hidden, d_head = 0.0, np.zeros_like(hidden), np.zeros_like(head)
    for chosen in range(0, 2 * P, 2):
        margin = rewards[chosen] - rewards[chosen + 1]
        loss += np.log1p(np.exp(-margin)) / P
        for row, sign in ((chosen, 1), (chosen + 1, -1)):
            by_reward = -sign / (1 + np.exp(margin)) / P
            d_hidden[row, LAST[row]] = by_reward * head
            d_head += by_reward * hidden[row, LAST[row]]
    with float64():
        value, grads = jax.value_and_grad(loss_of, argnums=(0, 1))(jnp.asarray(hidden), jnp.asarray(head))
    for found, wanted in zip((value, *grads), (loss, d_hidden, d_head)):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_reward_is_read_at_the_end_of_an_answer_whatever_the_rest_holds():
    hidden, head = case()
    elsewhere = np.arange(T) != np.array(LAST)[:, None]
    hidden[elsewhere] = np.nan
    d_hidden, d_head = jax.grad(loss_of, argnums=(0, 1))(jnp.asarray(hidden), jnp.asarray(head))
    np.testing.assert_array_equal(np.asarray(d_hidden).any(axis=-1), ~elsewhere)
    assert np.isfinite(d_hidden).all() and np.isfinite(d_head).all()
    assert not last_of(jnp.zeros((1, T))).any()


def of_pairs(config, path):
    return dataclasses.replace(config, preference=PreferenceConfig("reward"),
                               data=DataConfig(sources=((str(path), 1.0),), validation_fraction=0.3))


@pytest.fixture(scope="module")
def start(small_run, tmp_path_factory):
    """Pairs that prefer one letter to all digits."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    many(path, 16)
    return of_pairs(small_run, path)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train_on_pairs(start, str(workdir)).finished
    return workdir


def test_a_run_begins_at_log_2_and_learns_the_preference(start, whole):
    rows = read_metrics(whole)
    trained, scored = ([row for row in rows if name in row] for name in ("loss", "eval_loss"))
    assert [row["step"] for row in trained] == [1, 2, 3, 4] and [row["step"] for row in scored] == [0, 4]
    np.testing.assert_allclose([trained[0]["loss"], scored[0]["eval_loss"]], np.log(2), rtol=1e-6)
    assert trained[0]["accuracy"] == trained[0]["margin"] == 0 < trained[0]["grad_norm"]
    assert scored[1]["eval_loss"] < scored[0]["eval_loss"] and scored[1]["eval_accuracy"] == 1
    before, after = (restore_items(folder)[0] for folder in (start.init.from_, whole))
    for name, bias in before["router"].items():
        assert np.asarray(bias).tobytes() == np.asarray(after["router"][name]).tobytes()
    assert np.array_equal(before["params"]["head"], after["params"]["head"])  # it generates no text
    assert not np.array_equal(before["params"]["embedding"], after["params"]["embedding"])


def test_a_run_that_was_stopped_continues_to_the_bit(start, whole, tmp_path):
    policies.assert_continues(train_on_pairs, start, tmp_path / "run", whole)


def sequence_of(turn, ended=True):
    """An answer in the form that the engine returns."""
    made = [Token(token, 0.0, ()) for token in turn.ids[turn.start:turn.stop]]
    sequence = Sequence(Request(tuple(turn.ids[:turn.start]), 8), None)
    sequence.made, sequence.end = (made[:-1], made[-1]) if ended else (made, None)
    return sequence


@pytest.fixture(scope="module")
def rewarded(small_run, whole):
    """A policy whose answers the reward model scores."""
    return dataclasses.replace(small_run, rollout=dataclasses.replace(
        policies.config_of().rollout, task="tests.posttraining.policies:EVEN", reward=f"model:{whole}"))


def test_answers_that_were_drawn_get_the_rewards_that_were_trained(start, whole, rewarded):
    held = hold(Source(start.data.sources[0][0], 0.3), policies.tokenizer(), lambda: PLAIN, 24)
    turns = [turn for pair in held.train[:3] for turn in (pair.chosen, pair.rejected)]
    scores = RewardModel(rewarded, Runner(rewarded), policies.tokenizer(), None)(
        [sequence_of(turn) for turn in turns], [""] * len(turns))
    params = restore_items(whole)[0]
    rows = PairLoader(start, [held], policies.tokenizer()).rows_of(held.train[:2])
    wanted = row_rewards(start, params["params"], params["router"], rows)[0]
    np.testing.assert_allclose(scores.rewards[:4], wanted, rtol=1e-5, atol=1e-6)
    assert len(scores.rewards) == 6 and not scores.faults
    assert all(a > b for a, b in zip(scores.rewards[::2], scores.rewards[1::2]))


def test_an_answer_without_a_token_is_a_fault(rewarded):
    score = RewardModel(rewarded, Runner(rewarded), policies.tokenizer(), None)
    empty = Sequence(Request((5, 6), 8), None)
    empty.finish = "error"
    assert score([empty], [""]) == ([0.0], {"no finite number": 1})


def test_a_policy_learns_from_a_reward_model_which_stays_the_same(rewarded, whole, tmp_path):
    moved = shutil.copytree(whole, tmp_path / "rewards")
    config = dataclasses.replace(rewarded, rollout=dataclasses.replace(rewarded.rollout, reward=f"model:{moved}"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    assert reinforce(config, str(tmp_path / "rl"))
    rows = [row for row in read_metrics(tmp_path / "rl") if "reward" in row]
    assert len(rows) == 2 and rows[0]["mixed_groups"] == 1 and rows[0]["reward_faults"] == 0
    assert rows[0]["reward"] not in (0, 1)
    shutil.rmtree(moved / "checkpoints" / "4")
    with pytest.raises(ConfigError, match=r"the reward model, rollout\.reward=\S+, cannot be read"):
        reinforce(config, str(tmp_path / "rl"))


def test_what_is_no_reward_model_and_what_a_reward_model_is_not_is_one_line(rewarded, small_run, whole, start):
    other = lambda reward: dataclasses.replace(rewarded, rollout=dataclasses.replace(rewarded.rollout, reward=reward))
    with pytest.raises(ConfigError, match="is no reward model; train one with"):
        reward_config(other(f"model:{small_run.init.from_}"))
    with pytest.raises(ConfigError, match="take 'task', 'majority' or 'model:RUN'"):
        RolloutConfig(reward="model:")
    with pytest.raises(ConfigError, match="is a reward model, which scores answers and writes none"):
        load_run(str(whole))
    with pytest.raises(ConfigError, match="is a reward model, which scores answers and writes none"):
        check_start(dataclasses.replace(small_run, init=InitConfig(str(whole))))
    check_start(dataclasses.replace(start, init=InitConfig(str(whole))))  # a reward model may start from it
    with pytest.raises(ConfigError, match=r"take lora\.rank=None"):
        check_preferences(dataclasses.replace(start, lora=LoraConfig(rank=2)))


def test_a_reward_model_reads_the_last_token_of_the_longest_answer(start):
    longest, row = RewardRun.longest(start), start.train.sequence_length + 1
    ends = np.arange(row) == longest - 1
    assert longest == start.train.sequence_length and last_of(jnp.asarray(ends[None, :-1])).any()
    assert DpoRun.longest(start) == row


def test_rows_without_a_pair_and_what_stands_behind_an_answer_have_no_loss(tmp_path):
    config = policies.config_of(model=policies.SMALL)
    variables = naive.variables_of(config.model)
    head = np.random.default_rng(0).standard_normal(config.model.d_model).astype(np.float32)
    params = variables["params"] | {"reward_head": head}
    source = many(tmp_path / "a.jsonl")
    held = hold(source, policies.tokenizer(), lambda: PLAIN, config.train.sequence_length)
    micro = PairLoader(of_pairs(config, source.path), [held], policies.tokenizer()).rows_of(held.train[:1])
    normalizers = Normalizers(jnp.float32(1), jnp.ones(0), 0.0, 1.0)
    value = jax.jit(jax.value_and_grad(lambda params, micro: reward_loss(
        config, params, Inputs(variables["router"], micro, normalizers, jnp.int32(0))), has_aux=True))
    (_, sums), grads = value(params, micro)
    assert sums.losses.weight == 1 and float(sums.own["margin"]) != 0
    last = (np.arange(25) * micro["weights"]).max(axis=1)
    behind = np.where(np.arange(25) > last[:, None], 9, micro["tokens"])
    (_, same), after = value(params, micro | {"tokens": behind})
    np.testing.assert_allclose(sums.losses.nats, same.losses.nats, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1e-6 + np.abs(a).max())), grads, after)
    (_, none), zero = value(params, micro | {"weights": 0 * micro["weights"]})
    assert none.losses.weight == 0 and not any(np.asarray(g).any() for g in jax.tree.leaves(zero))


@pytest.mark.slow
def test_a_mesh_learns_as_one_device_does(start, tmp_path):
    once = dataclasses.replace(start, train=dataclasses.replace(start.train, batch_size=16, accumulation_steps=1))
    assert train_on_pairs(once, str(tmp_path / "one")).finished
    assert train_on_pairs(dataclasses.replace(once, mesh=MeshConfig(node=2, local=4)), str(tmp_path / "8")).finished
    policies.assert_alike(tmp_path / "one", tmp_path / "8", ("loss", "margin", "grad_norm"))


@pytest.mark.slow
def test_accuracy_rises_on_pairs_that_prefer_what_is_sorted(small_run, tmp_path):
    rng, rows = np.random.default_rng(0), []
    for _ in range(400):
        letters = list(rng.permutation(list("abcd"))[:3])
        if letters != sorted(letters):
            rows.append({"prompt": "say ", "chosen": " ".join(sorted(letters)), "rejected": " ".join(letters)})
    written(tmp_path / "pairs.jsonl", *rows)
    config = of_pairs(small_run, tmp_path / "pairs.jsonl")
    config = dataclasses.replace(config, train=dataclasses.replace(
        config.train, steps=60, batch_size=32, eval_every=60, checkpoint_every=60, accumulation_steps=1))
    assert train_on_pairs(config, str(tmp_path / "run")).finished
    scored = [row for row in read_metrics(tmp_path / "run") if "eval_accuracy" in row]
    assert scored[0]["eval_accuracy"] == 0 and scored[-1]["eval_accuracy"] > 0.9


def test_the_named_config_freezes_the_biases(start):
    config = load_config("reward", [f"--config.init.from={start.init.from_}"])
    assert config.preference.objective == "reward" and config.balance.bias_speed == 0
    assert config.optimizer.weight_decay == 0 and pathlib.Path(str(config.init.from_)).is_dir()
