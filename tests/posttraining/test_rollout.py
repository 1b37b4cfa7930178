"""Rollouts: the engine records what the trainer computes, and they are a function of weights, seed and step."""

import collections
import functools
import types

import jax
import numpy as np
import pytest

from deepseek_jax.chat.messages import Conventions
from deepseek_jax.config import ConfigError
from deepseek_jax.posttraining import rollout
from deepseek_jax.posttraining.rewards import majority
from deepseek_jax.posttraining.rollout import Answers, Problem, batch_of, disagreement, drawn, measures
from deepseek_jax.posttraining.tasks import find_task
from deepseek_jax.posttraining.update import view
from deepseek_jax.serving.sequence import Token
from tests.model import naive
from tests.posttraining import policies

CONFIG = policies.config_of()
TASK = find_task("reverse", 2)


def rolled(config, number=0, variables=None):
    problems = rollout.draw_problems(config, TASK, policies.tokenizer(), rollout.TRAINING, number, 2)
    problems = [problem for problem in problems for _ in range(4)]
    return rollout.answer(config, variables or naive.variables_of(config.model), TASK, policies.tokenizer(), problems,
                          number)


@functools.cache
def answers():
    return rolled(CONFIG)


def trainers_view(config, batch, variables):
    run = jax.jit(functools.partial(view, config))
    micros = [{name: batch[name][m] for name in ("tokens", "weights", "segment_ids")} for m in range(2)]
    views = [run(variables["params"], variables["router"], micro) for micro in micros]
    return np.stack([v.logprob_BT for v in views]), np.stack([v.chosen_LBTK for v in views])


def test_in_float32_sampler_and_trainer_agree_on_every_token_and_every_route():
    batch = batch_of(CONFIG, answers())
    found = disagreement(batch, *trainers_view(CONFIG, batch, naive.variables_of(CONFIG.model)))
    assert sum(s.accepted for s in answers().sequences) + sum(s.drafted for s in answers().sequences) > 0
    assert abs(found["ratio_least"] - 1) < 1e-5 and abs(found["ratio_largest"] - 1) < 1e-5, found
    assert found["tokens_rerouted"] == found["routers_rerouted"] == 0
    known = (batch["routes"][:, :, 0] >= 0).sum(axis=(1, 3))
    assert [int(n) for n in known.ravel()] == [len(s.request.prompt) + len(drawn(s)) - 1 for s in answers().sequences]


@pytest.mark.slow
def test_in_bfloat16_the_disagreement_is_measured():
    config = policies.config_of(model=dict(dtype="bfloat16"))
    batch = batch_of(config, rolled(config))
    found = disagreement(batch, *trainers_view(config, batch, naive.variables_of(config.model)))
    assert 0.3 < found["ratio_least"] <= found["ratio_low"] <= found["ratio_mean"] <= found["ratio_high"]
    assert 0 <= found["routers_rerouted"] <= found["tokens_rerouted"] < 1 and found["ratio_largest"] != 1


def test_a_rollout_is_a_function_of_seed_and_number():
    ids = lambda found: [[t.id for t in drawn(s)] for s in found.sequences]
    again, other = rolled(CONFIG), rolled(CONFIG, number=1)
    assert ids(again) == ids(answers()) and ids(other) != ids(again)
    assert [s.request.prompt for s in other.sequences] != [s.request.prompt for s in again.sequences]
    batches = batch_of(CONFIG, again), batch_of(CONFIG, answers())
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert len({tuple(made) for made in ids(again)[:4]}) > 1  # the answers of a group differ


def sequence(prompt, made, end=None, finish="stop", logprob=-1.0, routes=()):
    token = lambda i: Token(i, "none", logprob)
    return types.SimpleNamespace(request=types.SimpleNamespace(prompt=prompt), made=list(map(token, made)),
                                 finish=finish, end=None if end is None else token(end), routes=list(routes),
                                 drafted=4, accepted=1)


def test_a_batch_holds_prompt_answer_and_the_token_that_ended_it():
    route = lambda i: np.full((1, 3), i, np.int32)
    some = [sequence((1, 2), (3, 4), 5, routes=map(route, range(9))), sequence((1, 2), (6,), finish="length"),
            sequence((1, 2), (), 5), sequence((1, 2), (7, 8), finish="error")]
    config = policies.config_of(sequence_length=7)
    batch = batch_of(config, Answers([*some, *some], [1, 0, 0, 0, 0.5, 0.5, 0.5, 0.5], collections.Counter()))
    assert batch["tokens"].shape == (2, 4, 8) and batch["routes"].shape == (2, 1, 3, 4, 8) and batch["active"] == 2
    assert batch["tokens"][0].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3], [1, 2, 6, 1, 2, 6, 1, 2],
                                           [1, 2, 5, 1, 2, 5, 1, 2], [1, 2, 7, 8, 1, 2, 7, 8]]
    np.testing.assert_allclose(batch["weights"][0], np.float32([
        [0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0], [0, 0, 1] + [0] * 5, [0, 0, 1] + [0] * 5, [0] * 8]))
    assert batch["sampled"][0, 0].tolist() == [0, 0, -1, -1, -1, 0, 0, 0]
    assert batch["routes"][0, 0, 1, 0].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert (batch["routes"][:, 0, 0, 1] < 0).all()
    assert batch["advantages"][0, 0, 0] > 1.5 and not batch["advantages"][1].any()


def test_an_answer_ends_and_a_prompt_begins_as_the_checkpoint_says():
    text = Conventions(None, frozenset(range(2, 288)), begins=False)  # everything but two tokens ends an answer
    problems = rollout.draw_problems(CONFIG, TASK, policies.tokenizer(), rollout.TRAINING, 0, 4, text)
    assert all(problem.prompt[0] != policies.tokenizer().bos for problem in problems)
    found = rollout.answer(CONFIG, naive.variables_of(CONFIG.model), TASK, policies.tokenizer(), problems, 0, text)
    assert all(s.finish == "stop" and len(drawn(s)) < 6 for s in found.sequences)


def test_special_tokens_are_part_of_the_answer_that_is_scored(monkeypatch):
    tokenizer, scored = policies.tokenizer(), []
    made = sequence((1, 2), (tokenizer.fim_hole, *tokenizer.encode("b a")), tokenizer.eos)
    engine = types.SimpleNamespace(submit=lambda request: made, run=lambda: None)
    monkeypatch.setattr(rollout, "Engine", lambda *args: engine)
    task = TASK._replace(score=lambda answer, reference: scored.append(answer) or 1.0)
    rollout.answer(CONFIG, {}, task, tokenizer, [rollout.Problem((1, 2), " b a")], 0)
    assert scored == ["<|fim_hole|>b a"]


def test_what_a_rollout_measures():
    some = [sequence((1,), (3, 4), 5), sequence((1,), (6,), finish="length")] * 4
    found = measures(policies.config_of(), Answers(some, [1, 0, 0, 0, 0, 0, 0, 0], collections.Counter(ValueError=2)))
    assert found == {"reward": 0.125, "mixed_groups": 0.5, "answer_tokens": 2, "finished": 0.5, "entropy": 1,
                     "accepted": 0.25, "reward_faults": 2}


def test_a_prompt_without_room_for_an_answer_is_one_line():
    config = policies.config_of(sequence_length=8)
    with pytest.raises(ConfigError, match="leaves 3 next to rollout.max_new_tokens=6"):
        rollout.draw_problems(config, TASK, policies.tokenizer(), rollout.TRAINING, 0, 1)


def test_training_and_evaluation_draw_different_problems():
    draw = lambda use, number: rollout.draw_problems(CONFIG, TASK, policies.tokenizer(), use, number, 8)
    assert draw(rollout.TRAINING, 0) != draw(rollout.EVALUATION, 0) != draw(rollout.TRAINING, 1)
    assert draw(rollout.TRAINING, 3) == draw(rollout.TRAINING, 3)


def test_each_group_votes_by_itself_and_reads_no_reference():
    texts = ["a", "a", "b", "b", "b", "a"]
    scores = rollout.votes(3)(answers().sequences[:6], texts)
    assert scores.rewards == [1, 1, 0, 1, 1, 0] and not scores.faults
    unread = TASK._replace(score=None)
    problems = [Problem((5, 6, 7), None)] * 4
    voted = rollout.answer(CONFIG, naive.variables_of(CONFIG.model), unread, policies.tokenizer(), problems, 0,
                           reward=rollout.votes(4))
    assert voted.rewards == majority(list(voted.texts))
