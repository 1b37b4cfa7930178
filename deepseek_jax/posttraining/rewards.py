"""Rule-based rewards (report section 5.2.1): functions of prompt, answer and reference.

Rules read a model's text, which can be anything, so they never evaluate it. If a rule fails on an answer, only that
answer loses its reward: `score_all` counts the failures.
"""

from __future__ import annotations

import collections
import contextlib
import math
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from deepseek_jax.config import ConfigError
from deepseek_jax.posttraining.sandbox import passes_tests

Rule = Callable[[str, str, Any], float]  # prompt, answer, reference -> reward

# A sign belongs to a number only if no number ends right before it: 10-3 has the numbers 10 and 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+|\d{1,400})(?:\.\d{1,400})?|\.\d{1,400})"
                     r"(?:[eE][-+]?\d{1,3}|/\d{1,400})?")
_LONGEST = 400  # maximum characters of a number: 1e999999999 would be written out


def exact(prompt: str, answer: str, reference: str) -> float:
    """1 if the answer equals the reference, ignoring white space around it."""
    return float(answer.strip() == reference.strip())


def numeric(prompt: str, answer: str, reference: str | int | float) -> float:
    """1 if the last number in the answer equals the reference: 1,000 is 1000, 0.5 is 1/2.

    Raises ValueError for a reference that is not a number.
    """
    wanted = _number(str(reference))
    if wanted is None:
        raise ValueError(f"the reference {reference!r} is no number")
    found = _NUMBER.findall(answer)
    return float(bool(found) and _number(found[-1]) == wanted)


def _number(text: str) -> Fraction | None:
    if len(text) > _LONGEST * 3 or re.search(r"[eE][-+]?\d{4}", text):
        return None
    with contextlib.suppress(ValueError, ZeroDivisionError):
        over, _, under = text.replace(",", "").strip().partition("/")
        return Fraction(over) / Fraction(under or 1)
    return None


def boxed(prompt: str, answer: str, reference: str) -> float:
    r"""1 if the content of the last \boxed{...} is the reference, as text without white space or as a number."""
    content = last_box(answer)
    if content is None:
        return 0.0
    if "".join(content.split()) == "".join(str(reference).split()):
        return 1.0
    return float(_number(content) is not None and _number(content) == _number(str(reference)))


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{...}, with its inner braces; None without a closed one."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for at, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if found and depth == 0:
            return rest[:at]
    return None


def thinks_first(prompt: str, answer: str, reference: Any) -> float:
    """1 for the form `<think>...</think>...` with one thought, and something before and after its end."""
    before, opened, rest = answer.partition("<think>")
    thought, closed, said = rest.partition("</think>")
    once = "<think>" not in thought + said and "</think>" not in said
    return float(bool(not before.strip() and opened and closed and once and thought.strip() and said.strip()))


def unit_tests(prompt: str, answer: str, reference: str) -> float:
    """1 if the code in the answer passes the tests in the reference; see `sandbox`."""
    return float(passes_tests(code_of(answer), reference))


def code_of(answer: str) -> str:
    """The last block between ``` lines, or all of an answer without one."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", answer, re.DOTALL | re.MULTILINE)
    return blocks[-1] if blocks else answer


def majority(answers: list[str]) -> list[float]:
    """1 for each answer of a group whose `final_value` is the most common one; 0 for all if two values tie.

    The model's own votes as its reward (arXiv 2504.16084): no reference is read. An empty answer has no vote.
    """
    values = [final_value(answer) for answer in answers]
    ranked = collections.Counter(value for value in values if value is not None).most_common(2)
    tied = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
    return [float(not tied and bool(ranked) and value == ranked[0][0]) for value in values]


def final_value(answer: str) -> str | Fraction | None:
    r"""The final value of an answer: the content of its last \boxed{...}, or all of it after a thought.

    White space is ignored, and numbers are compared by value: 1,000 is 1000. None: empty.
    """
    box = last_box(answer)
    text = "".join((answer.rpartition("</think>")[2] if box is None else box).split())
    number = _number(text)
    return (text or None) if number is None else number


RULES: dict[str, Rule] = {"exact": exact, "numeric": numeric, "boxed": boxed, "format": thinks_first,
                          "unit_tests": unit_tests}


class Scores(NamedTuple):
    """Rewards, and counts of failures by kind, each of which gave a reward of 0: {"TimeoutError": 2, "no number":
    1}."""

    rewards: list[float]
    faults: collections.Counter[str]


def score_all(scorers: Iterable[Callable[[], float]], seconds: float = 10.0) -> Scores:
    """Calls each scorer. If it takes longer, raises or returns no finite number, that is a fault, with reward 0.

    Raises ConfigError if a scorer does: then no answer can be scored here.
    """
    rewards, faults = [], collections.Counter()
    for scorer in scorers:
        reward = 0.0
        try:
            with _limited(seconds):
                reward = float(scorer())
            if not math.isfinite(reward):
                faults["no finite number"] += 1
                reward = 0.0
        except ConfigError:  # from a rule that cannot run here at all
            raise
        except (Exception, SystemExit) as error:  # a rule may raise anything on a model's text
            faults[type(error).__name__] += 1
            reward = 0.0
        rewards.append(reward)
    return Scores(rewards, faults)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """A context that raises TimeoutError after `seconds`, if alarms exist: in the main thread, not on Windows."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number, frame):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
