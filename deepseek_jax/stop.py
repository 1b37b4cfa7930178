"""The end of a run: exit codes for schedulers, and the effect of signals while there is nothing to save.

    0 done    2 a mistake of the user's    75 stopped by a signal    76 a process of the run was lost, or hangs

A scheduler restarts a job by its code: the same command continues after 75 (EX_TEMPFAIL) and 76, and not after 2.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from deepseek_jax.config import ConfigError
from deepseek_jax.storage import StorageError
from deepseek_jax.working_files import remove_scratch

DONE, MISTAKE, STOPPED, PEER_LOST, INTERRUPTED = 0, 2, 75, 76, 130
# Signals of schedulers: SIGTERM (Slurm, Kubernetes), and SIGUSR1 if requested (sbatch --signal=USR1@300).
SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))

CODES = ("Exit codes: 0 done; 2 a mistake of yours; 75 stopped by a signal, and 76 a process of the run was lost: the "
         "same command continues.")

before_exit: list[Callable[[int], None]] = []  # called with the exit code before a process ends at once


class PeerLostError(ConfigError):
    """Another process of the run has ended, or did not start."""


def show_stacks() -> None:
    """From here on SIGQUIT prints the stacks of all threads to stderr, even if one hangs in C, without ending the
    process."""
    if hasattr(signal, "SIGQUIT"):
        faulthandler.register(signal.SIGQUIT, file=sys.__stderr__ or 2, all_threads=True)


def ignore_requests_for_traces() -> None:
    """Ignores SIGUSR2 from here on: only the training loop handles it (`training.watching`), and elsewhere it would end
    the process."""
    if hasattr(signal, "SIGUSR2") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with this exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, PeerLostError):
        return PEER_LOST
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return MISTAKE if isinstance(error, (ConfigError, StorageError, ModuleNotFoundError, MemoryError, OSError)) else 1


def leave(code: int) -> None:
    """Ends this process now, whatever its threads do."""
    for call in before_exit:
        call(code)
    end(code)


def end(code: int) -> None:
    """The same without telling other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    remove_scratch()
    os._exit(code)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGUSR1 end the process at once with `STOPPED`, until a loop that can save handles
    them.

    A thread ends it, since Python runs handlers only between its own instructions, and a single call may compile for
    minutes. Outside the main thread, which alone can handle signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    previous = {number: signal.signal(number, _left_to_the_thread) for number in SIGNALS}
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(ours,), daemon=True).start()
    _leave_children_alone()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in previous.items():
            signal.signal(number, handler)
        theirs.close()  # which ends the thread


def _left_to_the_thread(number, frame):
    pass


@functools.cache
def _leave_children_alone():
    """In a forked worker, restores the default handlers, so that signals to it end it and not this process."""
    def as_new():
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _left_to_the_thread:
                signal.signal(number, signal.SIG_DFL)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=as_new)


def _listen(numbers):
    with numbers:
        while number := numbers.recv(1):
            if signal.getsignal(number[0]) is _left_to_the_thread:
                print(f"\nStopped by {signal.Signals(number[0]).name} with nothing new to save; the same command "
                      "starts again.", file=sys.stderr)
                leave(STOPPED)
