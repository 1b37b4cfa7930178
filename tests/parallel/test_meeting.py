"""How processes connect: none is mistaken for another, missing ones are named, and silent connections delay nobody."""

import resource
import socket
import subprocess
import sys
import threading
import time

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel import meeting
from deepseek_jax.parallel.meeting import HELLO, MAGIC, MESSAGE, Group, check, meet
from deepseek_jax.stop import PeerLostError
from tests.parallel.groups import free_port, in_threads


def connect(port, seconds=10):
    """A connection to a port that will listen soon."""
    ends = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.01)


def close(*groups):
    for connections in groups:
        for connection in connections.values():
            connection.close()


def met(address, told, timeout=20):
    """The result of each process of `told`, (number, count), when all of them connect."""
    return in_threads([lambda g=g: meet(Group(address, g[1], g[0]), timeout) for g in told])


@pytest.mark.parametrize(
    ("group", "complaint"),
    [(("localhost", 2, 0), "should be HOST:PORT"), (("localhost:x", 2, 0), "should be HOST:PORT"),
     (("localhost:9900", 2, 2), r"--process=2 must lie in \[0, 2\)"), (("localhost:9900", 0, 0), "must lie in")])
def test_a_bad_group_is_one_line(group, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check(Group(*group))


def test_who_does_not_come_in_time_is_named(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "REPORT_EVERY", 0.2)
    address = f"localhost:{free_port()}"
    first, second = met(address, [(0, 4), (2, 4)], timeout=2)
    assert isinstance(first, PeerLostError) and "processes 1, 3 of 4 did not come to localhost:" in str(first)
    assert isinstance(second, PeerLostError) and "process 1 of 4 did not come in time" in str(second)
    assert "waiting for processes 1, 3 of 4\n" in capsys.readouterr().err


def test_a_process_that_finds_no_first_one_says_where_it_looks(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "REPORT_EVERY", 0.2)
    address = f"localhost:{free_port()}"
    [error] = met(address, [(1, 2)], timeout=1)
    assert isinstance(error, PeerLostError) and f"process 1 could not reach process 0 of 2 at {address}" in str(error)
    assert f"process 1 waits for process 0 of 2 at {address} (Connection refused)" in capsys.readouterr().err


def test_processes_that_were_told_different_counts_end_with_both_of_them():
    first, second = met(f"localhost:{free_port()}", [(0, 3), (1, 4)])
    assert "process 1 was told --processes=4, and process 0 --processes=3" in str(first)
    assert isinstance(second, ConfigError) and not isinstance(second, PeerLostError)
    assert "process 0 of 4 has refused this one (process 1)" in str(second)


def test_two_processes_with_one_number_are_refused():
    first, *others = met(f"localhost:{free_port()}", [(0, 3), (1, 3), (1, 3)])
    assert "two processes are --process=1 of 3" in str(first)
    assert all("has refused this one" in str(error) for error in others)


def test_a_process_that_was_started_again_takes_the_place_of_the_one_before():
    address, gone = f"localhost:{free_port()}", threading.Event()

    def ends_and_comes_again():
        with connect(int(address[10:]) + 1) as before:
            before.sendall(HELLO.pack(MAGIC, 1, 3))
        gone.set()
        return meet(Group(address, 3, 1), 20)

    def comes_later():  # so that not all are connected before the one has ended
        gone.wait()
        return meet(Group(address, 3, 2), 20)

    first, second, third = in_threads([lambda: meet(Group(address, 3, 0), 20), ends_and_comes_again, comes_later])
    assert sorted(first) == [1, 2] and list(second) == list(third) == [0]
    close(first, second, third)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", MAGIC, b"", MESSAGE.pack(0, 1)])
def test_whoever_else_connects_is_not_taken_for_a_process_and_delays_none(said):
    address = f"localhost:{free_port()}"
    others = []

    def comes_last():
        for _ in range(60):
            others.append(connect(int(address[10:]) + 1))
            others[-1].sendall(said)
        return meet(Group(address, 2, 1), 20)

    # One after the other, each would take meeting.SILENCE, ten minutes in total.
    first, second = in_threads([lambda: meet(Group(address, 2, 0), 20), comes_last])
    assert list(first) == [1] and list(second) == [0]
    close(first, second, dict(enumerate(others)))


@pytest.mark.parametrize("which", [0, 1])
def test_a_port_that_is_taken_is_one_line(which):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1] - which
        with pytest.raises(ConfigError, match="in use.*two ports that are free"):
            meet(Group(f"localhost:{port}", 2, 0), 5)


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from deepseek_jax.parallel.meeting import Group, meet
print(len(meet(Group(sys.argv[1], 2048, 0), 60)), flush=True)
"""


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 6000, reason="too few open files are allowed here")
def test_2048_processes_meet_with_the_usual_limit_of_open_files():
    port, before = free_port(), resource.getrlimit(resource.RLIMIT_NOFILE)
    first = subprocess.Popen([sys.executable, "-c", MANY, f"localhost:{port}"], stdout=subprocess.PIPE, text=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (6000, before[1]))
    others = []
    try:
        for i in range(1, 2048):
            others.append(connect(port + 1))
            others[-1].sendall(HELLO.pack(MAGIC, i, 2048))
        assert first.communicate(timeout=60)[0] == "2047\n"
    finally:
        close(dict(enumerate(others)))
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
