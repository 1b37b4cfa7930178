"""How a run ends: its exit codes, and signals while there is nothing to save."""

import signal
import subprocess
import sys
import time

import pytest

from deepseek_jax import stop
from deepseek_jax.config import ConfigError


@pytest.mark.parametrize(("error", "code"), [
    (ConfigError("x"), 2), (stop.PeerLostError("x"), 76), (KeyboardInterrupt(), 130), (FileNotFoundError("x"), 2),
    (MemoryError(), 2), (ValueError("x"), 1), (SystemExit(75), 75), (SystemExit(), 0), (SystemExit("x"), 1)])
def test_an_exit_code_tells_a_mistake_from_what_a_retry_mends(error, code):
    assert stop.exit_code(error) == code


# Like a compiler, a sort keeps the main thread inside one call, for longer than a test waits.
BUSY = """
import numpy as np
from deepseek_jax import cli
def main():
    x = np.random.rand(1 << 22)
    print("busy", flush=True)
    for _ in range(1000):
        np.sort(np.concatenate([x] * 4))
cli.run(main, resumes=True)
"""


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_with_nothing_to_save_ends_a_command_at_once_in_one_line(number):
    with subprocess.Popen([sys.executable, "-c", BUSY], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == "busy\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=20)  # the sorts take minutes
        finally:
            process.kill()
    assert process.returncode == stop.STOPPED
    assert err.strip().splitlines()[-1].startswith(f"Stopped by {number.name} with nothing new to save")
    assert "Traceback" not in err


FORKS = """
import os, signal, time
from deepseek_jax import cli
def main():
    if not (child := os.fork()):
        time.sleep(60)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    time.sleep(0.3)
cli.run(main, resumes=True)
"""


def test_a_signal_to_a_forked_worker_ends_the_worker_alone():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0 and done.stdout == f"{-signal.SIGTERM}\n", done


def test_what_caught_signals_before_catches_them_again():
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with stop.ended_by_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_loop_that_saves_catches_signals_itself(monkeypatch):
    asked, left = [], []
    monkeypatch.setattr(stop, "leave", left.append)
    with stop.ended_by_signals():
        previous = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)  # for the thread, which would otherwise end this process
        signal.signal(signal.SIGTERM, previous)
    assert asked == [signal.SIGTERM] and left == []
