"""Tasks: their own answers score, others do not, and a sampled problem is a function of its generator."""

import json
import sys
import types

import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.posttraining import __main__ as command
from deepseek_jax.posttraining.tasks import TASKS, Countdown, Task, find_task, reaches

OWN = Task(lambda rng: (f"say {rng.integers(9)}", "x"), lambda answer, reference: float(answer == reference))


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_of_a_task_scores_and_no_other_does(name):
    task = find_task(name, 3)
    rng = np.random.default_rng(0)
    drawn = [task.draw(rng) for _ in range(50)]
    assert all(task.score(task.solve(reference), reference) == 1 for _, reference in drawn)
    assert not any(task.score(wrong, reference) for _, reference in drawn for wrong in ("", "1 /", "(" * 10**5))
    assert len({prompt for prompt, _ in drawn}) > 40
    assert drawn == [task.draw(again) for again in [np.random.default_rng(0)] for _ in range(50)]


@pytest.mark.parametrize(("name", "prompt", "answer"), [
    ("reverse", "reverse a b c =", " c b a"), ("sort", "sort ko ba =", " ba ko"),
    ("addition", "add 4 7 + 0 5 =", " 5 2"),
])
def test_a_problem_reads_as_documented(name, prompt, answer):
    size = {"reverse": 3, "sort": 2, "addition": 2}[name]
    drawn, reference = find_task(name, size).draw(np.random.default_rng(1))
    shape = lambda text: "".join("x" if c.isalnum() else c for c in text)
    assert shape(drawn.split(" ", 1)[1]) == shape(prompt.split(" ", 1)[1])
    words = lambda text: [w for w in text.split() if w not in ("+", "=")]
    if name == "addition":
        a, b = (int(part.replace(" ", "")) for part in drawn[4:-2].split("+"))
        assert int(reference.replace(" ", "")) == a + b
    else:
        assert words(reference) == {"reverse": lambda w: w[::-1], "sort": sorted}[name](words(drawn)[1:])


@pytest.mark.parametrize(("answer", "right"), [
    ("2 * (3 + 4)", True), ("(4 + 3) * 2", True), ("2 * 3 + 4", False), ("14", False), ("2 * (3 + 4) + 0", False),
    ("2 ** 3 + 4", False), ("__import__('os').getpid()", False), ("2 * (3 + 4", False), ("28 / 2", False),
    ("(3 + 4) / (1 / 2)", False), ("-2 * (3 + 4)", False), ("True * (3 + 4) * 2", False), ("2 * (3 + 4 / 0)", False),
])
def test_countdown_takes_any_expression_of_its_numbers(answer, right):
    assert reaches(answer, Countdown((2, 3, 4), 14, "")) == right


@pytest.mark.parametrize(("name", "said"), [
    ("revers", "did you mean reverse?"), ("no.such.module:TASK", "cannot be imported"), ("json:dumps", "gave str"),
    ("json:loads", r"gave TypeError \(the JSON object must be"),
])
def test_a_task_that_is_not_there_is_one_line(name, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        find_task(name, 3)


def test_an_own_task_is_taken_by_name(monkeypatch):
    module = types.ModuleType("my_tasks")
    module.OWN, module.sized = OWN, lambda size: OWN._replace(solve=lambda reference: str(size))
    monkeypatch.setitem(sys.modules, "my_tasks", module)
    assert find_task("my_tasks:OWN", 3) is OWN
    assert find_task("my_tasks:sized", 3).solve("x") == "3"


class Dataset:
    """A dataset of reasoning-gym, with the attributes that tasks read."""

    def __init__(self, seed):
        self.seed = seed

    def __getitem__(self, index):
        return {"question": f"{self.seed} + 1?", "answer": str(self.seed + 1)}

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


class Gym(types.ModuleType):
    def create_dataset(self, name, seed, size):
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        return Dataset(seed)


def test_tasks_of_reasoning_gym_bring_their_own_verifier(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", Gym("reasoning_gym"))
    task = find_task("reasoning_gym:chain_sum", 3)
    prompt, reference = task.draw(np.random.default_rng(0))
    assert prompt.endswith("+ 1?") and task.score(task.solve(reference) + "\n", reference) == 1
    assert task.score("x", reference) == 0
    with pytest.raises(ConfigError, match="cannot make that task"):
        find_task("reasoning_gym:none", 3)


def test_without_reasoning_gym_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[rl\]'"):
        find_task("reasoning_gym:chain_sum", 3)


def test_examples_are_written_as_a_corpus(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["posttraining", "reverse", "--size", "2", "--examples", "3"])
    command.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 and all(row["answer"].split() == row["prompt"].split()[-2:0:-1] for row in rows)
    monkeypatch.setattr(sys, "argv", ["posttraining", "reverse", "--size", "0"])
    with pytest.raises(ConfigError, match="must be positive"):
        command.main()
