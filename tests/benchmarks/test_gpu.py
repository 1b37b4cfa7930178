"""benchmarks.gpu without a GPU: a case that hangs, crashes, fails or is late affects only itself, and no row is lost.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import compiling, report, runner, stage, training
from benchmarks.gpu.stages import COMPILE, MACHINE, STAGES, Stage
from benchmarks.machine import ROOT
from deepseek_jax.config import model_config
from kernels_pallas.tools import compile_report

CASES = """
import os, pathlib, time

def log(name):
    with open("{log}", "a") as f:
        f.write(name + " ")

def good(name):
    def measure():
        log(name)
        return {{"seconds": 1.0, "nan": float("nan")}}
    return name, measure

def bad(name, action):
    def measure():
        log(name)
        action()
    return name, measure

def fail():
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS\\nand more")

def cases(rehearse):
    yield good("first")
    yield bad("raises", fail)
    yield "wrong", lambda: {{"right": False}}
    yield bad("dies", os.abort)
    yield bad("hangs", lambda: time.sleep(600))
    yield good("last")

def slow(rehearse):
    yield good("quick")
    yield bad("slow", lambda: time.sleep(600))

def wait(word):
    while word not in pathlib.Path("{log}").read_text().split():
        time.sleep(0.1)

def earlier(rehearse):  # ends only if what is needed later runs by now
    yield "met", lambda: wait("begun") or good("met")[1]()

def needed(rehearse):
    yield good("begun")
    yield "slow", lambda: wait("met") or time.sleep(1) or good("needed")[1]()

def later(rehearse):
    yield good("later")

def broken(rehearse):
    raise ImportError("no such wheel")
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Stages with made-up cases, and the file to which each case that ran appended its name."""
    log = tmp_path / "ran"
    log.touch()
    (tmp_path / "made_up_cases.py").write_text(CASES.format(log=log))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(runner, "LEAST", 0)
    return lambda name, limit=120, silence=10: Stage(name, f"made_up_cases:{name}", limit, silence), log


def states(folder, name):
    return {case: row["state"] for case, row in stage.read(str(folder / f"{name}.json")).items()}


def test_a_case_that_fails_dies_or_hangs_costs_that_case_alone(made, tmp_path):
    stage_of, log = made
    found = runner.run_stage(stage_of("cases"), tmp_path, time.monotonic() + 120, False)
    assert states(tmp_path, "cases") == {"first": "done", "raises": "failed", "wrong": "wrong", "dies": "crashed",
                                         "hangs": "hung", "last": "done"}
    assert found["state"] == "done" and found["cases"] == {"done": 2, "failed": 1, "wrong": 1, "crashed": 1, "hung": 1}
    rows = json.loads((tmp_path / "cases.json").read_text(), parse_constant=pytest.fail)
    assert rows["raises"]["why"] == "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS" and rows["first"]["nan"] == "NaN"
    runner.run_stage(stage_of("cases"), tmp_path, time.monotonic() + 120, False)
    assert log.read_text().split() == ["first", "raises", "dies", "hangs", "last"]  # a second run measures nothing


def test_what_the_clock_cuts_off_is_measured_by_the_next_run(made, tmp_path):
    stage_of, log = made
    late = stage_of("slow", silence=100)
    found = runner.run_stage(late, tmp_path, time.monotonic() + 8, False)
    assert found["state"] == "out of time" and states(tmp_path, "slow") == {"quick": "done"}
    (tmp_path / "made_up_cases.py").write_text(CASES.format(log=log).replace("sleep(600)", "sleep(0)"))
    runner.run_stage(late, tmp_path, time.monotonic() + 60, False)
    assert set(states(tmp_path, "slow")) == {"quick", "slow"} and log.read_text().split()[0::2] == ["quick", "slow"]


def test_a_stage_that_cannot_start_says_why_and_the_next_one_runs(made, tmp_path):
    stage_of, _ = made
    stages = [stage_of("broken"), stage_of("slow", silence=5)]
    assert not runner.run_all(stages, tmp_path, 1, False, {"date": "today"})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stages"]["broken"]["why"] == "ImportError: no such wheel" and summary["date"] == "today"
    assert summary["stages"]["slow"]["cases"] == {"done": 1, "hung": 1}


def test_what_a_stage_needs_is_made_while_earlier_ones_run_and_it_waits_for_it(made, tmp_path):
    stage_of, log = made
    needed = stage_of("needed")
    stages = [stage_of("earlier"), stage_of("later")._replace(beforehand=needed)]
    assert runner.run_all(stages, tmp_path, 5, False, {})
    assert log.read_text().split() == ["begun", "met", "needed", "later"]
    summary = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert list(summary) == ["earlier", "needed", "later"] and summary["needed"]["cases"] == {"done": 2}


def test_a_stage_whose_programs_are_still_compiled_lets_the_next_one_go_first_but_not_the_last(monkeypatch, tmp_path):
    needed, training, engine, sweep = (Stage(name, "", 1, 1) for name in ("needed", "training", "engine", "sweep"))
    compiled = threading.Event()
    (tmp_path / "needed.json").write_text('{"a step": {"state": "done"}}')  # from another machine, whose cache is gone

    def run_stage(stage, out, deadline, rehearse):
        if stage == needed:
            assert not (out / "needed.json").exists() and compiled.wait(30)
        if stage == engine:
            compiled.set()
        return {"state": "done", "seconds": 0.0, "cases": {"done": 1}}

    monkeypatch.setattr(runner, "run_stage", run_stage)
    assert runner.run_all([training._replace(beforehand=needed), engine, sweep], tmp_path, 1, False, {})
    summary = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert list(summary) == ["engine", "needed", "training", "sweep"] and summary["needed"]["state"] == "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_its_child_and_the_next_one_measures_what_it_did_not(number, made, tmp_path):
    stage_of, log = made
    code = ("import pathlib, signal, sys; from benchmarks.gpu import runner; from benchmarks.gpu.stages import Stage; "
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
            f"runner.run_stage(Stage(*{tuple(stage_of('slow', silence=100))!r}), pathlib.Path({str(tmp_path)!r}), "
            "float('inf'), False)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while "slow" not in states(tmp_path, "slow"):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(30) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    time.sleep(0.2)
    found = subprocess.run(["pgrep", "-f", str(tmp_path / "slow.json")], capture_output=True, text=True)
    assert found.stdout == ""
    (tmp_path / "made_up_cases.py").write_text(CASES.format(log=log).replace("sleep(600)", "sleep(0)"))
    runner.run_stage(stage_of("slow", silence=100), tmp_path, time.monotonic() + 60, False)
    assert log.read_text().split() == ["quick", "slow", "slow"]


def command(*words):
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return done.returncode, done.stdout, done.stderr


def test_without_a_gpu_one_line_says_what_runs_there(tmp_path):
    code, _, said = command("--out", tmp_path / "out")
    assert code == 2 and len(said.strip().splitlines()) == 1
    assert "needs a Hopper GPU" in said and "--rehearse runs the same stages anywhere" in said
    assert not (tmp_path / "out").exists()


def test_results_of_another_machine_are_not_mixed_with_these(tmp_path):
    (tmp_path / "machine.json").write_text(json.dumps({"machine": {"device": "NVIDIA H100", "rehearse": True}}))
    code, _, said = command("--out", tmp_path, "--rehearse", "--smoke")
    assert code == 2 and "--out" in said
    assert "has results of a run with another device" in said and len(said.strip().splitlines()) == 1


def test_a_time_that_is_none_is_refused(tmp_path):
    code, _, said = command("--out", tmp_path, "--minutes", "nan")
    assert code == 2 and "--minutes nan leaves no time" in said


def test_the_cheap_stages_are_rehearsed(tmp_path):
    cheap = [s for s in STAGES if s.name in ("quantize", "tests")]
    assert runner.run_all(cheap, tmp_path, 25, True, {})
    report.write(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| quantize 256x256 | done |" in page and "by the host's clock" in page and "skipped" in page


@pytest.mark.parametrize(("faults", "notes", "right"), [
    ([], [], True), ([], ["spills 88 bytes, as it does before jax 0.12"], True), (["spills 4 bytes"], [], False),
    (["its WGMMAs are serialized"], [], False), (None, [], False)])
def test_of_a_kernel_that_is_compiled_a_known_spill_is_said_and_all_else_is_wrong(faults, notes, right):
    kernels = [] if faults is None else [{"kernel": "k", "registers": 168, "spill_bytes": 0, "faults": faults,
                                          "notes": notes}]
    row = compiling.measure(types.SimpleNamespace(rows=lambda case: kernels), None)
    assert row["right"] == right and row["summary"] == "; ".join([*(faults or []), *notes])


def test_without_the_compiler_for_gpus_a_rehearsal_says_what_is_missing(monkeypatch):
    def missing():
        raise compile_report.NoCompiler("no plugin")

    monkeypatch.setattr(compile_report, "Compiler", missing)
    (name, said), = compiling.cases(True)
    assert name == "all" and said() == {"summary": "missing: no plugin"}


@pytest.mark.slow
def test_the_rehearsal_is_green_from_end_to_end(tmp_path):
    code, said, wrong = command("--out", tmp_path, "--rehearse")
    assert code == 0, said + wrong
    for one in (MACHINE, *STAGES, COMPILE):
        assert set(states(tmp_path, one.name).values()) == {"done"}, one.name
    compiled = json.loads((tmp_path / f"{COMPILE.name}.json").read_text())
    if importlib.util.find_spec("jax_cuda13_plugin") is None:  # the extra aot
        assert list(compiled) == ["all"] and compiled["all"]["summary"].startswith("missing: ")
    else:
        assert len(compiled) == len(compile_report.cases(compiling.SETS)) and "all" not in compiled
        assert all(row["right"] for row in compiled.values())


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_training_step_is_compiled_before_it_is_its_turn(rehearse):
    one, = (one for one in STAGES if one.name == "training")
    assert one.beforehand is not None and one.beforehand.cases == "benchmarks.gpu.training:compilations"
    names = [name for name, _ in training.cases(rehearse)]
    assert [name for name, _ in training.compilations(rehearse)] == names and len(names) == (2 if rehearse else 4)


class State(NamedTuple):
    params: jax.Array


class Metrics(NamedTuple):
    loss: jax.Array


def test_a_step_that_was_compiled_beforehand_comes_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("deepseek_jax.training.step.init_state", lambda config: State(jnp.ones(8)))
    monkeypatch.setattr("deepseek_jax.training.step.train_step", lambda config, state, batch: (
        State(state.params * 2), Metrics(state.params.sum() + batch["weights"].sum())))
    monkeypatch.setattr("deepseek_jax.runtime.prepare", lambda: None)
    options = {"jax_compilation_cache_dir": str(tmp_path), "jax_enable_compilation_cache": True,
               "jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in options}
    entries = lambda: {file.name for file in tmp_path.iterdir() if "train_step" in file.name or "lambda" in file.name
                       or "init_state" in file.name}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        (_, model), = training.models(True).items()
        assert training.compile_step(model, False, True)["compile_seconds"] > 0
        made = entries()
        row = training.measure(model, False, True)
        assert made and entries() == made and row["right"] and row["tokens"] == 256
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(("asked", "chosen", "said"), [
    ("auto", "hopper", "grouped_matmul, hopper"), ("auto", "reference", "lax.ragged_dot"),
    ("xla", "hopper", "lax.ragged_dot")])
def test_of_a_training_step_it_is_said_what_multiplied_the_experts(monkeypatch, asked, chosen, said):
    monkeypatch.setattr("kernels_pallas.api.chosen_here", lambda operation: chosen)
    monkeypatch.setattr("deepseek_jax.model.grouped_matmul.implementation_here",
                        lambda name: "ragged" if name == "auto" else name)
    assert training._experts(model_config("tiny", implementation=asked)) == said


def test_a_rehearsal_has_a_folder_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(main, "machine_here", lambda out, rehearse: chosen.append(str(out)) or {})
    monkeypatch.setattr(main, "run_all", lambda *_: True)
    monkeypatch.setattr(main.report, "write", lambda out: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for words in ([], ["--smoke"], ["--rehearse"], ["--smoke", "--rehearse"], ["--rehearse", "--out", "there"]):
        monkeypatch.setattr(sys, "argv", ["gpu", *words])
        assert main.main() == 0
    assert chosen == ["build/gpu"] * 2 + ["build/gpu-rehearsal"] * 2 + ["there"]


def test_paired_and_single_tiles_of_experts_in_fp8_are_timed():
    from tests.kernels import interpreter  # noqa: F401, I001 (skips where jax has none)
    from benchmarks.gpu import kernels

    names = [name for name, _ in kernels.sweep(False) if name.startswith("fp8_grouped_matmul")]
    assert sum("pair=False" in name for name in names) == sum("default" in name for name in names) == 3
    assert len({name for name, _ in kernels.sweep(False)}) == len(list(kernels.sweep(False)))
