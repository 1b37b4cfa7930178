"""Rewards: the answers that each rule accepts; a rule that fails on one answer affects only its reward."""

import socket
import time
from fractions import Fraction

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.posttraining import sandbox
from deepseek_jax.posttraining.rewards import RULES, final_value, last_box, majority, score_all

ADD = "assert add(2, 3) == 5\n"


@pytest.mark.parametrize(("rule", "answer", "reference", "reward"), [
    ("exact", " c b a\n", "c b a", 1), ("exact", "c b a d", "c b a", 0), ("exact", "", "a", 0),
    ("numeric", "so 3 + 4 = 7.", "7", 1), ("numeric", "it is 1,000.50", "1000.5", 1), ("numeric", "7, no: 8", "7", 0),
    ("numeric", "-3", -3, 1), ("numeric", "1/3", "2/6", 1), ("numeric", "1/0", "1", 0), ("numeric", "none", "0", 0),
    ("numeric", "9" * 5000, "9", 0), ("numeric", "it is .5", "1/2", 1), ("numeric", "it is .5", "5", 0),
    ("numeric", "-.5", "-0.5", 1), ("numeric", "1e3", "1000", 1), ("numeric", "1e3", "3", 0),
    ("numeric", "10-3", "3", 1), ("numeric", "10-3", "-3", 0), ("numeric", "5.0e-3", "0.005", 1),
    ("boxed", r"\boxed{1e999999999}", "7", 0),
    ("boxed", r"so \boxed{7}", "7", 1), ("boxed", r"\boxed{1} or \boxed{2}", "2", 1), ("boxed", "7", "7", 0),
    ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1} {2}", 1), ("boxed", r"\boxed{7", "7", 0),
    ("boxed", r"\boxed{0.50}", "1/2", 1), ("boxed", r"\boxed{8}", "7", 0),
    ("format", "<think>a</think>b", None, 1), ("format", "b", None, 0), ("format", "<think>a</think> ", None, 0),
    ("format", "x<think>a</think>b", None, 0), ("format", "<think> </think>b", None, 0),
    ("format", "<think>a</think>b</think>c", None, 0), ("format", "<think><think>a</think>b", None, 0),
])
def test_a_rule_gives_its_reward_to_what_is_right_alone(rule, answer, reference, reward):
    assert RULES[rule]("prompt", answer, reference) == reward


def test_a_reference_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="'seven' is no number"):
        RULES["numeric"]("", "7", "seven")


def test_the_last_closed_box_counts():
    assert last_box(r"\boxed{a{b}c}d}") == "a{b}c" and last_box("x}") is None


@pytest.mark.parametrize(("code", "reward"), [
    ("def add(a, b):\n    return a + b", 1),
    ("Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1),
    ("def add(a, b):\n    return a - b", 0),
    ("def add(a, b) return", 0),
    ("import sys; sys.exit(0)", 0),
    ("import os; os._exit(0)", 0),
    ("print('passed')", 0),
    ("import __main__; __main__.tests = ''", 0),
    ("__builtins__['exec'] = print", 0),
    ("import builtins; builtins.exec = builtins.compile = print", 0),
    ("import __main__ as m, os; os.write(m.answer, m.word.encode()); os._exit(0)", 0),
    ("import sys; sys._getframe(1).f_globals['tests'] = ''", 0),
    ("import __main__, os; __main__.refused = (); os.system('true')\ndef add(a, b):\n    return a + b", 0),
    ("from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 2\n"
     "def add(a, b):\n    return A(a).x + b", 1),
    ("import math, re, collections\ndef add(a, b):\n    return int(math.fsum([a, b]))", 1),
])
def test_code_is_rewarded_for_passing_its_tests(code, reward):
    assert RULES["unit_tests"]("", code, ADD) == reward


@pytest.mark.parametrize("harm", [
    "import os; os.fork()",
    "import subprocess; subprocess.run(['true'])",
    "import os; os.system('true')",
    "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "import socket; socket.socket()",
    "import os; os.mkfifo('FOLDER/new')",
    "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
    "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "open('FOLDER/new', 'w')",
    "open('FOLDER/old', 'a')",
    "import os; os.open('FOLDER/new', os.O_CREAT | os.O_WRONLY)",
    "import os; os.remove('FOLDER/old')",
    "import os; os.rename('FOLDER/old', 'FOLDER/new')",
    "import os; os.mkdir('FOLDER/new')",
    "import os; os.kill(os.getppid(), 9)",
    "import ctypes; ctypes.CDLL(None)",
    "x = bytearray(1 << 32)",
])
def test_code_that_forks_writes_or_connects_is_stopped_there(harm, tmp_path):
    (tmp_path / "old").write_text("kept")
    code = f"def add(a, b):\n    return a + b\n{harm}".replace("FOLDER", str(tmp_path))
    assert RULES["unit_tests"]("", code, ADD) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "kept"


def test_what_code_prints_is_dropped_and_its_environment_is_empty():
    code = "import os\nprint('x' * 10**6)\nassert not set(os.environ) - {'LC_CTYPE'}\ndef add(a, b):\n    return a + b"
    assert RULES["unit_tests"]("", code, ADD) == 1


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)",
                                  "import signal; signal.raise_signal(signal.SIGXCPU)"])
def test_code_out_of_wall_or_processor_time_is_killed_and_reported(code):
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        sandbox.passes_tests(code, "", sandbox.Limits(seconds=1))
    assert time.monotonic() - start < 5


def test_code_that_connects_reaches_nobody():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))\nadd = int.__add__"
        assert RULES["unit_tests"]("", code, ADD) == 0
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_python_that_does_not_start_there_is_an_error_and_no_reward(monkeypatch):
    monkeypatch.setattr(sandbox, "_works", lambda: False)
    with pytest.raises(ConfigError, match="with an empty environment"):
        score_all([lambda: RULES["unit_tests"]("", "", "")])


def test_a_system_without_limits_refuses_to_run_code(monkeypatch):
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(ConfigError, match="take a POSIX system"):
        score_all([lambda: RULES["unit_tests"]("", "", "")])


def test_a_reward_that_misbehaves_costs_its_own_answer_and_is_counted():
    def forever():
        while True:
            pass

    def leaves():
        raise SystemExit

    scores = score_all([lambda: 1.0, forever, lambda: 1 / 0, lambda: float("nan"), leaves, lambda: "x", lambda: 0.5,
                        lambda: float("inf")], seconds=0.1)
    assert scores.rewards == [1, 0, 0, 0, 0, 0, 0.5, 0]
    assert scores.faults == {"TimeoutError": 1, "ZeroDivisionError": 1, "no finite number": 2, "SystemExit": 1,
                             "ValueError": 1}


@pytest.mark.parametrize(("answers", "rewards"), [
    (["a b", "c", "ab "], [1, 0, 1]),
    ([r"so \boxed{1,000}", "1000.0", "it is 1000", "2"], [1, 1, 0, 0]),
    (["<think>2, or 3?</think> 2", "2", "3"], [1, 1, 0]),
    (["1", "2"], [0, 0]),  # a tie says nothing
    (["1", "1", "2", "2", "3"], [0, 0, 0, 0, 0]),
    (["", " ", "5"], [0, 0, 1]),  # an empty answer has no vote
    (["", ""], [0, 0]),
])
def test_the_votes_of_a_group_reward_what_most_answers_come_to(answers, rewards):
    assert majority(answers) == rewards


@pytest.mark.parametrize(("answer", "value"), [
    (r"\boxed{1/2} then \boxed{ 0.5 }", Fraction(1, 2)), (" c b a ", "cba"), ("5 2", 52), ("<think>7</think>", None),
    (r"\boxed{}", None),
])
def test_an_answer_comes_to_its_box_or_to_all_of_it(answer, value):
    assert final_value(answer) == value
