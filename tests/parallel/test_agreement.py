"""All processes stop after the same step, whichever of them got the request, and however far apart they are."""

import os
import subprocess
import sys
import types

import pytest

from deepseek_jax.parallel import processes
from tests.parallel.groups import free_port

# Runs whose metrics all devices compute together, as in training: before step n + 2 each process fetches those of step
# n. Process `who` gets the request in step 3 of each run, and a slow one lags behind.
STEPS = """
import sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from deepseek_jax.parallel.processes import Group, StopAgreement, joined
me = int(sys.argv[2])
with joined(Group(sys.argv[1], 2, me)):
    mesh = jax.make_mesh((2,), ("all",))
    step = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    ones = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")), np.ones(1))
    for who, slow in ((0, 0), (0, 1), (1, 0), (1, 1), (None, 1)):
        agreement, pending, stopped = StopAgreement(), None, None
        for n in range(1, 30):
            metrics = step(ones)
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
            if me == slow:
                time.sleep(0.01)
            stopped = agreement.stopped_by(n, "SIGUSR1" if me == who and n >= 3 else None)
            if stopped:
                break
        agreement.close()
        print("run", who, slow, n, stopped, flush=True)
"""


def test_two_processes_stop_after_one_step_whoever_is_asked():
    address = f"localhost:{free_port()}"
    both = [subprocess.Popen([sys.executable, "-c", STEPS, address, str(i)], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env=os.environ | {"XLA_FLAGS": ""}) for i in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    runs = [[line for line in words.splitlines() if line.startswith("run")] for words in said]
    assert runs[0] == runs[1] and len(runs[0]) == 5, said
    steps = [int(line.split()[3]) for line in runs[0]]
    assert steps[:2] == [5, 5] and all(5 <= n < 29 for n in steps[2:4]) and steps[4] == 29, runs
    assert all(line.endswith("SIGUSR1") for line in runs[0][:4])


@pytest.fixture
def store(monkeypatch):
    """A store that records the order of its reads and writes."""
    kept = {}
    client = types.SimpleNamespace(
        kept=kept, key_value_set=lambda key, value, allow_overwrite=False: kept.__setitem__(key, value),
        key_value_dir_get=lambda under: [(key, value) for key, value in kept.items() if key.startswith(under + "/")])
    monkeypatch.setattr(processes, "store", lambda: client)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
    return client


class Three:
    """The agreements of three processes, which read messages when the test tells them to."""

    def __init__(self, monkeypatch):
        self.set, self.all = monkeypatch.setattr, [processes.StopAgreement() for _ in range(3)]
        self.waits, self.listening = 0, {0, 1, 2}
        for each in self.all:
            each.prefix = "x/"
        self.set(processes.StopAgreement, "_begin_to_listen", lambda self: None)
        self.set(processes.time, "sleep", self._others_listen)

    def _others_listen(self, seconds):
        self.waits += 1
        assert self.waits < 9, "process 0 waits for ever"
        for i in sorted(self.listening - {0}):
            self.listen(i)
        self.set(processes.jax, "process_index", lambda: 0)

    def listen(self, process):
        self.set(processes.jax, "process_index", lambda: process)
        self.all[process].listen()

    def ask(self, process, step, asked=None):
        self.set(processes.jax, "process_index", lambda: process)
        return self.all[process].stopped_by(step, asked)


def test_one_that_is_asked_stops_no_earlier_than_the_others(store, monkeypatch):
    three = Three(monkeypatch)

    assert [three.ask(1, 7, "SIGTERM"), three.ask(2, 7), three.ask(0, 7), three.ask(1, 8, "SIGTERM")] == [None] * 4
    three.listen(0)
    assert three.ask(0, 8) is None and three.waits == 1  # until all know that 10 is the last
    assert [three.ask(i, 9) for i in range(3)] == [None] * 3
    assert [three.ask(i, 10) for i in range(3)] == ["SIGTERM"] * 3
    assert three.ask(2, 11) == "SIGTERM"  # a run that saves only every second step


def test_process_0_waits_for_none_that_takes_no_more_steps(store, monkeypatch):
    three = Three(monkeypatch)
    three.listening = {0, 1}
    monkeypatch.setattr(processes.jax, "process_index", lambda: 2)
    three.all[2]._thread = types.SimpleNamespace(join=lambda: None)
    three.all[2].close()

    assert three.ask(0, 8, "SIGTERM") is None and three.ask(0, 10) == three.ask(1, 10) == "SIGTERM"


def test_a_process_alone_stops_at_once():
    assert processes.StopAgreement().stopped_by(1, "SIGTERM") == "SIGTERM"


def test_saves_by_the_clock_are_of_the_same_steps_in_all_processes(store, monkeypatch):
    timers, clock = [processes.SaveTimer(1) for _ in range(3)], [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    for i, each in enumerate(timers):
        each.prefix, each.last_save = "y/", -1000.0 * i  # by the others' clocks it was time long ago

    def due(process, step):
        monkeypatch.setattr(processes.jax, "process_index", lambda: process)
        return timers[process].is_due(step)

    assert not any(due(i, 5) for i in range(3))
    clock[0] = 60.0
    assert [due(1, 6), due(0, 6), due(2, 6)] == [False] * 3
    clock[0] = 61.0
    assert [due(i, 7) for i in (2, 1, 0)] == [False] * 3 and [due(i, 8) for i in (2, 1, 0)] == [True] * 3
    assert [due(i, 9) for i in range(3)] == [True] * 3  # a run that saves only every third step
    for each in timers:
        each.saved(9)
    assert not any(due(i, 10) for i in range(3))
    clock[0] = 121.0
    assert not any(due(i, 11) for i in range(3)) and [due(i, 13) for i in range(3)] == [True] * 3


@pytest.mark.parametrize("regular, hears", [(6, 6), (6, 7), (6, 8), (7, 7), (7, 8)])
def test_a_save_on_the_way_to_one_by_the_clock_is_that_one(store, monkeypatch, regular, hears):
    timers, clock = [processes.SaveTimer(1) for _ in range(2)], [60.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    for each in timers:
        each.prefix, each.last_save = "z/", 0.0
    due = []
    for step in range(6, 20):
        for process, timer in enumerate(timers):
            monkeypatch.setattr(processes.jax, "process_index", lambda process=process: process)
            heard = store.kept if process == 0 or step >= hears else {}
            monkeypatch.setattr(store, "key_value_dir_get", lambda under, heard=heard: [
                (key, value) for key, value in heard.items() if key.startswith(under + "/")])
            if timer.is_due(step):
                due.append((process, step))
            if step == regular or (process, step) in due:
                timer.saved(step)
        clock[0] += 60.0 * (step == 10)
    assert due == [(0, 13), (1, 13)]
    assert len(store.kept) == 2


def test_a_process_alone_saves_as_soon_as_the_time_is_over(monkeypatch):
    timer, never = processes.SaveTimer(0.5), processes.SaveTimer(None)
    begun = timer.last_save
    monkeypatch.setattr(processes.time, "monotonic", lambda: begun + 29)
    assert not timer.is_due(3)
    monkeypatch.setattr(processes.time, "monotonic", lambda: begun + 30)
    assert timer.is_due(4) and not never.is_due(4)
    timer.saved(4)
    assert not timer.is_due(5)
