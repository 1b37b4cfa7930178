"""The compile report and the benchmark: what they read, what they refuse, what they count."""

import json

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import api, benchmark, compile_report
from kernels_pallas.shapes import SHAPES, Case

PTX = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r1}, ...;\n" * 4
PTXAS = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
RESOURCES = "Resources(smem_scratch_bytes=163840, barrier_counts=Counter({Barrier(num_barriers=4): 2}))"


def test_a_clean_kernel_is_read_off_ptxas():
    row = compile_report.read(PTX, PTXAS, RESOURCES)
    assert row == {"registers": 168, "spill_bytes": 0, "shared_bytes": 163840, "stages": 4, "wgmma_e4m3": 4,
                   "serialized": False}
    assert compile_report.faults("fp8_matmul", row) == []


@pytest.mark.parametrize(
    ("ptx", "ptxas", "fault"),
    [
        (PTX, PTXAS.replace("0 bytes spill stores", "16 bytes spill stores"), "spills 16 bytes"),
        (PTX, PTXAS + "Potential Performance Loss: wgmma.mma_async instructions are serialized", "serialized"),
        (PTX.replace("e4m3", "bf16"), PTXAS, "no wgmma e4m3.e4m3"),
    ],
)
def test_a_kernel_that_is_not_what_was_meant_has_a_fault(ptx, ptxas, fault):
    found = compile_report.faults("fp8_matmul", compile_report.read(ptx, ptxas, RESOURCES))
    assert len(found) == 1 and fault in found[0]


def test_the_benchmark_writes_a_row_for_every_tiny_shape(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.json"
    options = "--shapes tiny --implementation reference --rounds 1 --calls 1 --out"
    monkeypatch.setattr("sys.argv", ["benchmark", *options.split(), str(out)])
    assert benchmark.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["operation"] for row in rows] == [case.operation for case in SHAPES["tiny"]]
    assert all(row["right"] and row["seconds"] > 0 for row in rows)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = Case.call
    spoil = lambda f: lambda *args: jax.tree.map(lambda x: x * jnp.ones((), x.dtype) * 1.5, f(*args))
    monkeypatch.setattr(Case, "call", lambda self, name: (spoil if name == "broken" else lambda f: f)(
        right(self, "reference")))
    row = benchmark.measure(Case("fp8_matmul", 128, 128, 128), "broken", 1, 1, 1.0)
    assert not row["right"] and "seconds" not in row and "WRONG" in benchmark.show(row)


def test_a_machine_without_the_gpu_is_told_what_runs_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark"])
    assert benchmark.main() == 2
    assert "--implementation reference runs here" in capsys.readouterr().err


def test_a_case_counts_its_flops_and_bytes():
    case = Case("fp8_matmul", 64, 256, 128)
    assert case.flops == 2 * 64 * 256 * 128
    assert case.bytes() == 64 * 256 + 64 * 2 * 4 + 128 * 256 + 2 * 4 + 64 * 128 * 2
    assert Case("quantize", 64, 256).bytes() == 64 * 256 * 3 + 64 * 2 * 4


def test_every_kernel_has_named_shapes():
    made = {case.operation for cases in SHAPES.values() for case in cases}
    assert made == {name for name, (_, folders) in api.OPERATIONS.items() if "hopper" in folders}
