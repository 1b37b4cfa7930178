"""A teacher's answers are kept if the task's rule finds them right, and a student can be tuned on them."""

import json
import sys

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.posttraining import __main__ as command
from deepseek_jax.posttraining.distill import Asking, teacher_answers
from deepseek_jax.posttraining.tasks import Task
from tests.posttraining import policies

SMALL = dict(num_layers=1, num_dense_layers=0, mtp_depth=0)
ASKING = Asking(attempts=2, max_new_tokens=8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run with random weights and many end tokens: some answers end early, some late, some do not end."""
    folder = tmp_path_factory.mktemp("teacher")
    policies.start_run(folder, policies.config_of(SMALL))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, *range(10, 288, 8)]}))
    return str(folder)


def scored(good):
    """A task whose rule records its inputs."""
    seen = []

    def score(answer, reference):
        seen.append((answer, reference))
        return float(good(answer))

    return Task(lambda rng: (f"say {rng.integers(9)}", int(rng.integers(9))), score), seen


def test_right_answers_that_ended_are_kept_and_no_others(teacher):
    even = lambda answer: len(answer) % 2 == 0
    task, seen = scored(even)
    rows = list(teacher_answers(teacher, task, 16, ASKING))

    assert len(rows) == 16 and len(seen) == 32 and all(row.prompt.startswith("say ") for row in rows)
    for i, row in enumerate(rows):
        assert row.answer is None or row.answer in [answer for answer, _ in seen[2 * i:2 * i + 2] if even(answer)]
    kept = sum(row.answer is not None for row in rows)
    right = sum(any(even(answer) for answer, _ in seen[2 * i:2 * i + 2]) for i in range(16))
    assert 0 < kept < right  # some right answers did not end: a student should not learn from those
    assert rows == list(teacher_answers(teacher, scored(even)[0], 16, ASKING))
    rejected = scored(lambda answer: False)[0]
    assert kept and all(row.answer is None for row in teacher_answers(teacher, rejected, 16, ASKING))


def test_the_command_writes_rows_and_says_how_many(teacher, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["posttraining", "addition", "--size", "1", "--examples", "16", "--attempts", "2",
                                      "--teacher", teacher, "--max-new-tokens", "8", "--least", "0"])
    command.main()
    out, err = capsys.readouterr()
    assert all(json.loads(line).keys() == {"prompt", "answer"} for line in out.splitlines())
    assert f"{len(out.splitlines())} of 16 problems have an answer that was rewarded with at least 0." in err


def test_answers_without_room_are_one_line(teacher):
    with pytest.raises(ConfigError, match="a prompt has 6 tokens, and train.sequence_length=24 leaves 1 next to"):
        list(teacher_answers(teacher, scored(lambda answer: True)[0], 1, Asking(max_new_tokens=24)))
