"""Runs a model's code against unit tests in a separate, restricted process.

The kernel limits processor time, memory, the size of files and, except for root, the number of processes; if it allows
a network namespace, the process gets one without a network. Inside, an audit hook refuses sockets, processes, signals,
native libraries and changes of files. The process starts in an empty folder without the environment, in a session
of its own, and the group is killed at the end. This contains accidents of a model in training. It does not stop an
attacker: run the trainer in a container for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile

from deepseek_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one run: seconds of wall and of processor time, bytes of memory."""

    seconds: int = 5
    memory: int = 1 << 30


# Runs in the new process. An answer can end it early with exit code 0, so success is a random word that is written
# after the tests. Tests, word and rules are locals of functions and the tests are compiled first, so that no answer
# finds them by name; an answer that searches the interpreter's frames can.
_LAUNCHER = """
import ctypes, json, os, resource, signal, sys, types


def limit(seconds, memory):
    try:
        ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET, where they are allowed
    except Exception:
        pass
    # At the first limit of its time a process is sent SIGXCPU, which tells the parent; at the second it is killed.
    limits = (("CPU", (seconds, seconds + 1)), ("AS", (memory, memory)), ("FSIZE", (0, 0)), ("NPROC", (0, 0)),
              ("CORE", (0, 0)), ("NOFILE", (64, 64)))
    for name, pair in limits:
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), pair)
        except (AttributeError, ValueError, OSError):
            pass
    # Of these no hook hears.
    for module, names in ((os, ("setpriority", "mkfifo", "mknod", "sched_setaffinity", "pidfd_open")),
                          (signal, ("pidfd_send_signal",))):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)


def guard():
    refused = (
        "socket.", "subprocess.", "ctypes.", "shutil.", "tempfile.", "os.fork", "os.forkpty", "os.exec", "os.spawn",
        "os.posix_spawn", "os.system", "os.startfile", "os.kill", "os.killpg", "os.remove", "os.rename", "os.rmdir",
        "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.putenv",
        "signal.pthread_kill", "pty.", "fcntl.", "winreg.", "resource.", "sys.setprofile", "sys.settrace")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event, arguments, refused=refused, writing=writing, isinstance=isinstance, str=str, int=int, set=set,
             error=PermissionError):
        writes = event == "open" and (
            isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            or isinstance(arguments[2], int) and arguments[2] & writing)
        if writes or event.startswith(refused):
            raise error(event)

    sys.addaudithook(hook)


def main():
    code, tests, word, seconds, memory = json.load(sys.stdin)
    answer, run, write = os.dup(1), exec, os.write
    os.dup2(2, 1)
    tests, word = compile(tests, "tests", "exec"), word.encode()
    module = sys.modules["answer"] = types.ModuleType("answer")
    limit(seconds, memory)
    guard()
    run(compile(code, "answer", "exec"), module.__dict__)
    run(tests, module.__dict__)
    write(answer, word)


main()
"""


def passes_tests(code: str, tests: str, limits: Limits = Limits()) -> bool:
    """Whether `tests`, run after `code` in the same module, end without an exception and within the limits.

    Raises:
      ConfigError: code cannot be run here: a system without limits for processes (Windows), or a Python that does not
        start without its environment.
      TimeoutError: it took longer than `limits.seconds` of wall or of processor time.
    """
    if os.name != "posix":
        raise ConfigError("the reward 'unit_tests' runs code under limits that this system lacks; take a POSIX system "
                          "such as Linux, or another rule.")
    if not _works():
        raise ConfigError(f"the reward 'unit_tests' cannot start {sys.executable} with an empty environment and a "
                          "limited memory; take a Python that does (no LD_LIBRARY_PATH), or another rule.")
    return _passes(code, tests, limits)


@functools.cache
def _works() -> bool:
    """Whether an empty answer passes empty tests: otherwise every answer would fail silently."""
    return _passes("", "", Limits(seconds=60))


def _passes(code: str, tests: str, limits: Limits) -> bool:
    word = secrets.token_hex(16)
    given = json.dumps([code, tests, word, limits.seconds, limits.memory])
    with tempfile.TemporaryDirectory(prefix="answer-") as folder:
        process = subprocess.Popen([sys.executable, "-I", "-B", "-c", _LAUNCHER], cwd=folder, env={},
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   start_new_session=True, text=True, errors="replace")
        try:
            said, _ = process.communicate(given, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
    if process.returncode == -signal.SIGXCPU:  # its processor time was used up before the wait ended
        raise TimeoutError
    return said == word
