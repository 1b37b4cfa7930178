"""Observing a run: its time budget, traces for XProf, the end of a hanging run, goodput, the log of a process."""

import json
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax import logs, stop, storage
from deepseek_jax.config import Config, ConfigError, MeshConfig, TrainConfig
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.training import goodput, loop, stall
from deepseek_jax.training.background import Background
from deepseek_jax.training.profiler import Profiler
from deepseek_jax.training.program import describe_machine, describe_program
from deepseek_jax.training.watching import Watching
from tests import runs
from tests.model import naive
from tests.training.test_loop_order import Bar, run_of


def watching(workdir=None, **train):
    return Watching(Config(model=naive.tiny(), train=TrainConfig(**train)), workdir)


def test_a_row_says_what_the_loop_waited_for_since_the_row_before():
    watch = watching()
    for _ in watch.fetched(iter([1])):
        with watch.spending("step"):
            time.sleep(0.03)
    with watch.spending("step"):
        time.sleep(0.01)
    row = watch.row()
    assert row["seconds_step"] >= 0.04 and row["seconds_write"] == 0
    assert row.keys() == {"seconds_data", "seconds_step", "seconds_write", "device_bytes_peak"}
    assert watch.row() == {"seconds_data": 0, "seconds_step": 0, "seconds_write": 0, "device_bytes_peak": None}


def test_waiting_for_a_batch_is_counted():
    watch = watching()
    assert list(watch.fetched(iter(lambda: time.sleep(0.02) or 1, 1))) == []
    assert watch.row()["seconds_data"] >= 0.02


def test_the_peak_of_memory_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(3), Device(7), Device(5)])
    assert watching().row()["device_bytes_peak"] == 7


def traced(folder, steps, ask=None, profile=""):
    """The messages of a profiler during steps, with a signal before one of them."""
    profiler, said = Profiler(str(folder), profile), []
    step, x = jax.jit(lambda x: jnp.tanh(x @ x)), jnp.ones((8, 8))
    for i in range(steps):
        if i == ask:
            profiler.ask(signal.SIGUSR2, None)
        said.append(profiler.before(i, x))
        with profiler.step(i + 1):
            x = step(x)
    return [*said, profiler.close(steps, x)]


def test_a_trace_of_two_steps_is_read_by_xprof(tmp_path):
    convert = pytest.importorskip("xprof.convert.raw_to_tool_data", reason="xprof is not installed")
    said = traced(tmp_path, 8, profile="3:5")
    assert [words for words in said if words] == [f"Profile of steps 4 to 5: xprof --logdir {tmp_path}/profile"]
    assert said[5]

    files = [str(p) for p in (tmp_path / "profile").rglob("*.xplane.pb")]
    data, _ = convert.xspace_to_tool_data(files, "trace_viewer", {})
    events = json.loads(data)["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name", "").startswith("train")}
    assert sorted(map(int, steps)) == [4, 5]
    assert any("tanh" in event.get("name", "") for event in events)


def test_a_signal_traces_the_next_five_steps_and_an_end_in_the_middle_ends_the_trace(tmp_path):
    assert [i for i, words in enumerate(traced(tmp_path / "a", 12, ask=4)) if words] == [9]
    assert traced(tmp_path / "b", 6, ask=4)[-1].startswith("Profile of steps 5 to 6")


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_is_said_and_steps_go_on(tmp_path, monkeypatch, broken):
    def fail(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, broken, fail)
    said = [words for words in traced(tmp_path, 8, profile="3:5") if words]
    assert len(said) == 1 and said[0].startswith("note: ") and said[0].endswith("no space left")


def test_sigusr2_asks_for_a_trace_while_a_run_goes(tmp_path):
    watch = watching(str(tmp_path))
    before = signal.getsignal(signal.SIGUSR2)
    with watch.running():
        signal.raise_signal(signal.SIGUSR2)
        assert watch.profiler.asked
    assert signal.getsignal(signal.SIGUSR2) == before


def test_sigusr2_ends_no_command_that_is_outside_its_loop():
    code = ("import signal; from deepseek_jax import cli\n"
            "def main(): signal.raise_signal(signal.SIGUSR2); print('alive')\n"
            "cli.run(main, resumes=True)")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "alive\n")


@pytest.mark.parametrize("words", ["5", "5:5", "a:b", "7:5"])
def test_a_profile_that_names_no_steps_is_refused(words):
    with pytest.raises(ConfigError, match=r"train\.profile=.* should be two numbers"):
        TrainConfig(profile=words)


HANG = """
import threading, time
from deepseek_jax.training.stall import StallWatch

def a_batch_that_never_comes():
    time.sleep(60)

threading.Thread(target=a_batch_that_never_comes, daemon=True).start()
with StallWatch(0.01) as watch:
    for _ in range(5):
        time.sleep(0.3)
        watch.beat()
    print("beaten", flush=True)
    time.sleep(60)
"""


def test_a_hang_shows_the_stacks_of_all_threads_and_ends_with_76_within_its_limit():
    ended = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60)
    assert ended.returncode == stop.PEER_LOST == 76
    assert ended.stdout == "beaten\n"  # longer than the limit in total, but every step ended
    assert "error: no step has ended for" in ended.stderr and "train.stall_minutes=0.01" in ended.stderr
    assert "in a_batch_that_never_comes" in ended.stderr and "<module>" in ended.stderr  # both threads


@pytest.mark.parametrize("slow", ["evaluate", "save", "wait", "compile", "step"])
def test_a_save_and_an_evaluation_that_take_longer_than_the_limit_are_no_hang(monkeypatch, slow):
    run, _ = run_of(monkeypatch, [3.0, 2.0, 1.0], eval_every=2, checkpoint_every=2, stall_minutes=0.005)
    left = []
    monkeypatch.setattr(stall.stop, "leave", left.append)
    monkeypatch.setattr(stall, "_show_stacks", lambda words: None)
    wait = lambda what: time.sleep(1.2 if what == slow else 0)  # the limit is 0.3
    monkeypatch.setattr(loop.Run, "_evaluate", lambda self, bar: wait("evaluate"))
    run.checkpoints.save, run.checkpoints.wait = lambda *_: wait("save"), lambda: wait("wait")
    runner = Runner(run.config)
    runner.compiling = run.watching.stall.suspended
    compiled = runner.jit(lambda x: x + 1, told=lambda *_: wait("compile"))
    step = run.step_fn
    run.step_fn = lambda *arguments: wait("step") or step(*arguments) if compiled(1.0) else None
    with run.watching.running():
        assert run._steps(Bar())
    assert bool(left) == (slow == "step")


def test_a_log_on_a_disk_that_hangs_keeps_no_hang_from_ending(monkeypatch, capfd):
    goes_on = threading.Event()

    def hang(words):
        goes_on.wait(60)
        raise OSError("the disk is gone")

    with open(2, "w", closefd=False) as terminal, monkeypatch.context() as patched:
        patched.setattr(stall, "OTHERS", 0.01)
        patched.setattr(sys, "stderr", types.SimpleNamespace(copy=types.SimpleNamespace(write=hang)))
        patched.setattr(sys, "__stderr__", terminal)
        stall._show_stacks("error: no step\n")
    goes_on.set()
    assert "error: no step\n" in (said := capfd.readouterr().err) and "in test_a_log_on_a_disk_that_hangs" in said


def test_sigquit_shows_stacks_and_ends_nothing():
    code = ("import os, signal; from deepseek_jax import stop; stop.show_stacks()\n"
            "def here(): signal.raise_signal(signal.SIGQUIT)\nhere(); print('alive')")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "alive\n") and "in here" in ended.stderr


@pytest.mark.slow
def test_a_run_that_hangs_ends_and_its_log_has_the_stacks(tmp_path):
    config = runs.write_config(tmp_path)
    with open(config, "a") as f:
        f.write("""
import time
from deepseek_jax.data.loader import Loader
batch = Loader.batch

def stuck(self, step):
    if step == 6:
        time.sleep(600)
    return batch(self, step)

Loader.batch = stuck
""")
    process = runs.start_training(config, tmp_path / "run", *runs.DENSE, "--config.train.stall_minutes=0.5")
    out, _ = process.communicate(timeout=580)
    assert process.returncode == stop.PEER_LOST, out
    log = (tmp_path / "run/logs/process_0000.log").read_text()
    for text in (out, log):
        assert "no step has ended for" in text and "in stuck" in text and "Traceback" not in text
    assert runs.checkpoints(tmp_path / "run") == [3, 6]


def test_a_thread_keeps_the_order_and_what_it_raises_comes_out():
    done, background = [], Background("test")
    for i in range(300):
        background.do(done.append, i)
    background.flush()
    assert done == list(range(300))
    background.do(lambda: background.do(done.append, "from within"))
    background.flush()
    assert done[-1] == "from within"

    background.do([].pop)
    background.do(done.append, "after")
    for call in (background.flush, lambda: background.do(done.append, 1), background.close):
        with pytest.raises(IndexError):
            call()
    assert done[-1] == "from within"
    assert not [thread for thread in threading.enumerate() if thread.name == "test"]


def test_goodput_is_the_share_of_seconds_that_count():
    starts = [{"start": 0, "restored": 10, "compiled": 30, "first_step": 40, "stopped": 100, "killed": 120},
              {"start": 200, "restored": 210, "compiled": 215, "first_step": 220, "stopped": 300}]
    assert goodput.summary(starts) == {"starting": 60, "compiling": 25, "steps": 140, "lost": 20, "total": 220,
                                       "goodput": 140 / 220}
    assert goodput.words(starts) == ("Goodput 63.6%: of 220 s in 2 starts 140 went into steps, 60 into starting (25 "
                                     "into compiling), 20 into steps that were lost.")
    assert goodput.summary([{"start": 5}])["total"] == 0


def test_a_start_that_was_killed_ends_with_its_last_row(tmp_path):
    first = goodput.Goodput(str(tmp_path), start=100.0)
    for what in ("restored", "compiled", "first_step", "stopped"):
        first.mark(what)
    (tmp_path / "metrics.jsonl").write_text("")
    again = goodput.Goodput(str(tmp_path), start=150.0)
    assert again.before[0]["killed"] >= again.before[0]["stopped"]
    assert again.now["start"] == again.before[0]["killed"]  # the same process
    again.mark("restored", begin=7)
    assert again.before[0]["stopped"] == first.now["stopped"]
    assert [sorted(start) for start in goodput.read(str(tmp_path))] == [
        ["compiled", "first_step", "killed", "restored", "start", "stopped"], ["begin", "restored", "start"]]


def killed_after(tmp_path, *marks, begin):
    """What the next start reads of a start that was killed after these marks, with checkpoints of 10, 20 ... steps."""
    first = goodput.Goodput(str(tmp_path), start=100.0)
    for number, what in enumerate(marks):
        first.mark(what, **({"saved": 10 * marks[:number + 1].count("saving")} if what == "saving" else {"begin": 0}))
    again = goodput.Goodput(str(tmp_path), start=time.time())
    again.mark("restored", begin=begin)
    return first.now, goodput.read(str(tmp_path))[0]


def test_a_checkpoint_counts_when_it_is_written(tmp_path):
    marks = "restored", "compiled", "first_step", "saving", "saving"
    for begin in (10, 20):
        folder = tmp_path / str(begin)
        folder.mkdir()
        first, found = killed_after(folder, *marks, begin=begin)
        assert first["stopped"] < first["saving"]  # the one of 10 steps was written: the next save waits for it
        assert found["stopped"] == (first["saving"] if begin == 20 else first["stopped"])
    (tmp_path / "none").mkdir()
    assert "stopped" not in killed_after(tmp_path / "none", *marks[:4], begin=0)[1]


def test_a_start_that_was_killed_before_its_first_step_counts_its_seconds():
    assert goodput.summary([{"start": 5, "restored": 10, "compiled": 30}]) | {"goodput": 0} == {
        "starting": 25, "compiling": 20, "steps": 0, "lost": 0, "total": 25, "goodput": 0}
    assert goodput.summary([{"start": 5, "restored": 10, "killed": 12}])["starting"] == 7


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"start": "now"}]', '[{"restored": 1}]'])
def test_a_record_that_cannot_be_read_is_said_and_begins_anew(tmp_path, capsys, text):
    (tmp_path / "goodput.json").write_text(text)
    goodput.Goodput(str(tmp_path)).mark("restored", begin=0)
    assert "goodput.json cannot be read" in capsys.readouterr().err
    assert len(goodput.read(str(tmp_path))) == 1


def test_a_store_that_does_not_answer_ends_no_run_for_its_goodput(monkeypatch, capsys):
    def refuse(path):
        raise storage.StorageError("no answer")

    for name in ("is_file", "changed"):
        monkeypatch.setattr(storage, name, refuse)
    assert goodput.Goodput("s3://bucket/run").before == [] and "no answer" in capsys.readouterr().err


def test_a_process_knows_when_it_started():
    assert 0 < time.time() - goodput.process_start() < 1e6


def test_a_log_begins_with_the_work_directory_and_has_no_bars_and_the_traceback(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), logs.kept(str(tmp_path / "run"), 3):
        print("before")
        assert not (tmp_path / "run").exists()
        (tmp_path / "run").mkdir()
        print("\r 5%|####", file=sys.stderr)
        print("after", file=sys.stderr)
        _ = 1 / 0
    log = (tmp_path / "run/logs/process_0003.log").read_text()
    assert "before\n" in log and "after\n" in log and "####" not in log and "ZeroDivisionError" in log
    assert log.startswith("--- 20")
    out, err = capsys.readouterr()
    assert out == "before\n" and "####" in err
    assert not hasattr(sys.stdout, "log")


def test_a_log_that_cannot_be_begun_hides_no_error_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "logs").write_text("no folder")
    with pytest.raises(ZeroDivisionError), logs.kept(str(tmp_path), 0):
        print("before")
        _ = 1 / 0
    with logs.kept(str(tmp_path), 0):
        print("after")
    assert capsys.readouterr().out == "before\nafter\n"


def test_a_disk_that_fills_hides_no_error_and_ends_nothing(tmp_path, monkeypatch):
    full = open("/dev/full", "a", buffering=1)  # noqa: SIM115 (the log closes it)
    with pytest.raises(ZeroDivisionError), logs.kept(str(tmp_path), 0):
        sys.stdout.log.file = full
        print("said")
        _ = 1 / 0
    assert full.closed


def test_what_is_printed_after_the_end_of_a_log_is_printed_alone(tmp_path, capsys):
    with logs.kept(str(tmp_path), 0):
        print("inside")
        kept = sys.stdout
    print("outside", file=kept)
    log = (tmp_path / "logs/process_0000.log").read_text()
    assert log.endswith("\ninside\n") and log.count("inside") == 1
    assert capsys.readouterr().out == "inside\noutside\n" and not kept.log.waiting


def test_a_process_that_prints_nothing_has_a_log_too(tmp_path):
    with logs.kept(str(tmp_path), 1):
        pass
    assert (tmp_path / "logs/process_0001.log").read_text().count("\n") == 1


def test_the_program_of_a_step_is_described_with_versions_flags_and_memory(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--of_mine=1")
    said = describe_machine(Config(model=naive.tiny()))
    assert f"jax {jax.__version__}" in said and "mesh: one device" in said
    assert "XLA_FLAGS: " in said and "LIBTPU_INIT_ARGS: --of_mine=1" in said
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((256, 256))).compile()
    assert describe_program(compiled, 1.25).startswith("The step was compiled in 1.2 s. Memory a device: 0.3 MB of")


@pytest.mark.parametrize("axis", MeshConfig().sizes)
def test_every_axis_of_the_mesh_is_named(axis):
    config = types.SimpleNamespace(mesh=MeshConfig(**{axis: 2}))
    assert f"mesh: {axis} 2\n" in describe_machine(config)
