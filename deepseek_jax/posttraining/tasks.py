"""Tasks that a rule can check, made from random numbers: nothing is downloaded.

A `Task` is two functions: `draw` makes a (prompt, reference) from a NumPy generator, `score` gives an answer its reward
in [0, 1]. `size` is the number of letters, words, digits or numbers in a problem. Letters and digits are separated by
spaces, so that with any vocabulary each one is a token.

A config names a task as rollout.task: one of TASKS, reasoning_gym:NAME of the package reasoning-gym, or your own
function of the size as package.module:NAME.
"""

from __future__ import annotations

import ast
import importlib
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config import ConfigError, did_you_mean
from deepseek_jax.plugin import load_object
from deepseek_jax.posttraining.rewards import exact

LETTERS, CONSONANTS, VOWELS = "abcdefghijklmnopqrstuvwxyz", "bdfgklmnprst", "aeiou"
GYM = "reasoning_gym:"


class Task(NamedTuple):
    """draw: rng -> (prompt, reference). score: (answer, reference) -> reward in [0, 1].

    solve: reference -> an answer that scores 1, to fine-tune on; None if the task has none.
    """

    draw: Callable[[np.random.Generator], tuple[str, Any]]
    score: Callable[[str, Any], float]
    solve: Callable[[Any], str] | None = None


def _exactly(draw: Callable[[np.random.Generator], tuple[str, str]]) -> Task:
    """A task whose reference is the only right answer."""
    return Task(draw, lambda answer, reference: exact("", answer, reference), lambda reference: reference)


def reverse(size: int) -> Task:
    """reverse a b c = -> c b a"""
    def draw(rng):
        letters = [LETTERS[i] for i in rng.integers(len(LETTERS), size=size)]
        return f"reverse {' '.join(letters)} =", " " + " ".join(reversed(letters))

    return _exactly(draw)


def sort(size: int) -> Task:
    """sort ko ba = -> ba ko"""
    def draw(rng):
        words = [CONSONANTS[i] + VOWELS[j] for i, j in zip(rng.integers(len(CONSONANTS), size=size),
                                                           rng.integers(len(VOWELS), size=size))]
        return f"sort {' '.join(words)} =", " " + " ".join(sorted(words))

    return _exactly(draw)


def addition(size: int) -> Task:
    """add 4 7 + 0 5 = -> 5 2: two numbers of `size` digits; leading zeros of the sum are left out."""
    spaced = lambda digits: " ".join(digits)

    def draw(rng):
        a, b = ("".join(map(str, rng.integers(10, size=size))) for _ in range(2))
        return f"add {spaced(a)} + {spaced(b)} =", " " + spaced(str(int(a) + int(b)))

    return _exactly(draw)


class Countdown(NamedTuple):
    """The numbers to use, each once, the value to reach, and an expression that reaches it."""

    numbers: tuple[int, ...]
    target: int
    expression: str


def countdown(size: int) -> Task:
    """reach 10 from 4 , 6 = -> 4 + 6: any expression of + - * / and brackets that uses each number once."""
    def draw(rng):
        numbers = tuple(int(n) for n in rng.integers(1, 10, size=size))
        value, expression = numbers[0], str(numbers[0])
        for n in numbers[1:]:
            sign = "+-*"[rng.integers(3)]
            value, expression = SIGNS[sign](value, n), f"({expression} {sign} {n})"
        reference = Countdown(numbers, int(value), expression)
        return f"reach {value} from {' , '.join(map(str, numbers))} =", reference

    return Task(draw, lambda answer, reference: float(reaches(answer, reference)),
                lambda reference: f" {reference.expression}")


SIGNS: dict[str, Callable[[Any, Any], Any]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def reaches(answer: str, reference: Countdown) -> bool:
    """Whether an answer is an expression of exactly these numbers with this value. It is parsed, never evaluated."""
    used: list[int] = []

    def value(node) -> Fraction:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if not isinstance(node, ast.Constant) or type(node.value) is not int:
            raise ValueError
        used.append(node.value)
        return Fraction(node.value)

    if len(answer) > 40 * len(reference.numbers):  # deeply nested brackets would overflow the parser's stack
        return False
    try:
        found = value(ast.parse(answer.strip(), mode="eval").body)
    except (ValueError, KeyError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return found == reference.target and sorted(used) == sorted(reference.numbers)


def _gym(name: str) -> Task:
    """A task of reasoning-gym, with its own verifier; problems have its default sizes."""
    try:
        gym = importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise ConfigError(f"rollout.task='{GYM}{name}' needs the package reasoning-gym; pip install -e '.[rl]', or "
                          f"take one of {', '.join(TASKS)}.") from error

    def of_seed(seed):
        return gym.create_dataset(name, seed=seed, size=1)

    try:
        scorer = of_seed(0)
    except Exception as error:  # for an unknown name, or a task with missing dependencies
        raise ConfigError(f"rollout.task='{GYM}{name}': reasoning-gym cannot make that task "
                          f"({type(error).__name__}: {error}).") from error

    def draw(rng):
        entry = of_seed(int(rng.integers(2**31)))[0]
        return entry["question"], entry

    return Task(draw, lambda answer, entry: scorer.score_answer(answer=answer.strip(), entry=entry),
                lambda entry: str(entry["answer"]))


TASKS: dict[str, Callable[[int], Task]] = {"reverse": reverse, "sort": sort, "addition": addition,
                                           "countdown": countdown}


def find_task(name: str, size: int) -> Task:
    """The task of rollout.task. Raises ConfigError if there is none."""
    if name in TASKS:
        return TASKS[name](size)
    if name.startswith(GYM):
        return _gym(name.removeprefix(GYM))
    if ":" not in name:
        raise ConfigError(f"rollout.task={name!r} is unknown; {did_you_mean(name, TASKS)} Others are named as "
                          f"{GYM}NAME, or your own as package.module:NAME.")
    made = load_object("rollout.task", name)
    try:
        task = made(size) if callable(made) else made
        found = type(task).__name__
    except Exception as error:  # the function may be anything
        task, found = None, f"{type(error).__name__} ({error})"
    if not isinstance(task, Task):
        raise ConfigError(f"rollout.task={name!r} gave {found}; name a function of the size that returns "
                          "a deepseek_jax.posttraining.tasks.Task(draw, score).")
    return task
