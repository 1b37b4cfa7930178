"""The watch over processes: a regular end disturbs nobody; if one fails, all others name it and exit with its code."""

import contextlib
import socket
import time

import pytest

from deepseek_jax import stop
from deepseek_jax.parallel import watch
from tests.parallel.groups import close, in_threads, watches


@pytest.fixture
def left(monkeypatch):
    """The exit codes with which processes would have ended."""
    codes = []
    monkeypatch.setattr(stop, "end", codes.append)
    monkeypatch.setattr(watch, "LINGER", 0.2)
    return codes


@pytest.fixture
def group():
    made = watches(4)
    yield made
    close(made)


def lines(capsys, left, count):
    """The lines on stderr until the given number of processes has ended."""
    deadline = time.monotonic() + 20
    while len(left) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return capsys.readouterr().err


def dies(one):
    for connection in one.connections.values():
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # like the kernel when a process ends


def test_processes_that_say_farewell_part_in_peace(left, group, capsys):
    assert in_threads([lambda each=each: each.part() or "parted" for each in group]) == ["parted"] * 4 and not left
    assert capsys.readouterr().err == ""


def test_all_others_name_the_one_that_is_gone_and_end_with_the_code_for_a_retry(left, group, capsys):
    group[2].leaving = True  # it is this process itself
    dies(group[2])
    said = lines(capsys, left, 3)
    for other in (0, 1, 3):
        assert f"error: process 2 of 4 has ended, so this one (process {other}) stops" in said
    assert "from its last checkpoint" in said and left == [stop.PEER_LOST] * 3


def test_when_the_first_one_is_gone_the_others_say_so(left, group, capsys):
    group[0].leaving = True
    dies(group[0])
    assert lines(capsys, left, 3).count("error: process 0 of 4 has ended, so") == 3 and left == [stop.PEER_LOST] * 3


@pytest.mark.parametrize(("code", "words"), [
    (stop.MISTAKE, "has ended with a mistake"), (stop.STOPPED, "was stopped by a signal"),
    (1, "has ended with exit code 1")])
@pytest.mark.parametrize("who", [0, 3])
def test_all_end_with_the_code_of_the_one_that_ends(left, group, capsys, code, words, who):
    group[who].leave(code)
    said = lines(capsys, left, 3)
    assert said.count(f"error: process {who} of 4 {words}") == 3 and left == [code] * 3
