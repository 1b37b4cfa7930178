"""The compile report and the benchmark: their inputs, errors and counts."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from benchmarks.machine import ROOT
from deepseek_jax.config import ConfigError
from deepseek_jax.scale.compile import targets
from kernels_pallas import api
from kernels_pallas.tools import benchmark, compile_report, peers, predict
from kernels_pallas.tools.compare import compare
from kernels_pallas.tools.shapes import SHAPES, Attention, Case, Decode
from kernels_pallas.tools.timing import summarize

PTX = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r1}, ...;\n" * 4
PTXAS = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
SASS = "        /*0b10*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], RZ, !UPT ;\n" * 4
RESOURCES = "Resources(smem_scratch_bytes=163840, barrier_counts=Counter({Barrier(num_barriers=4): 2}))"


def test_a_clean_kernel_is_read_off_ptxas():
    row = compile_report.read(PTX, PTXAS, RESOURCES)
    assert row == {"registers": 168, "spill_bytes": 0, "shared_bytes": 163840, "stages": 4, "wgmma_e4m3": 4,
                   "qgmma": None, "hgmma": None, "serialized": False, "nan_skipped": 0, "divisions": 0,
                   "multicasts": 0, "remote_arrives": 0,
                   "instructions": None, "loop_instructions": None, "inner_instructions": None}
    assert compile_report.faults("fp8_matmul", row) == []


def test_what_was_dumped_is_put_together_by_name(tmp_path):
    """Mosaic numbers resources in the order of tracing, and kernels in the order of compiling."""
    for stem, registers in (("forward_0", 168), ("dkv_1", 160), ("dq_2", 152)):
        (tmp_path / f"{stem}.ptx").write_text(PTX)
        (tmp_path / f"{stem}.ptxas").write_text(PTXAS.replace("168", str(registers)))
    for stem, size in (("forward_0", 1000), ("dq_1", 2000), ("dkv_2", 3000)):
        (tmp_path / f"{stem}.resources.txt").write_text(RESOURCES.replace("163840", str(size)))
    rows = compile_report.dumped(list(tmp_path.iterdir()))
    found = {name: (row["registers"], row["shared_bytes"]) for name, row in rows}
    assert found == {"forward": (168, 1000), "dkv": (160, 3000), "dq": (152, 2000)}


def test_where_there_is_machine_code_its_tensor_core_instructions_are_counted():
    row = compile_report.read(PTX, PTXAS, RESOURCES, SASS)
    assert (row["qgmma"], row["hgmma"]) == (4, 0) and compile_report.faults("fp8_matmul", row) == []
    row = compile_report.read(PTX, PTXAS, RESOURCES, SASS.replace("QGMMA", "HGMMA"))
    assert (row["qgmma"], row["hgmma"]) == (0, 4)
    assert compile_report.faults("fp8_matmul", row) == ["has no QGMMA in its machine code"]
    assert compile_report.faults("mla_decode", row) == []


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


MULTICAST = ("@%p1 cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
             "[%r44], [%rd20, {%r45,%r45,%r45,%r46} ], [%r47], %rs1;\n")
REMOTE = "mapa.shared::cluster.u32 mapped_addr, %r210, %r211;\nmbarrier.arrive.shared::cluster.b64 _, [mapped_addr];\n"
ALONE = ("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r78], [%rd20], [%r79];\n"
         "mbarrier.arrive.release.cta.shared::cta.b64 %rd1, [%r8];\n")  # as in a kernel without a cluster


@pytest.mark.parametrize(("ptx", "missing"), [
    (MULTICAST + REMOTE + ALONE, []), (REMOTE + ALONE, ["multicast::cluster"]),
    (MULTICAST + ALONE, ["mbarrier.arrive"]), (ALONE, ["multicast::cluster", "mbarrier.arrive"])])
def test_a_kernel_of_two_sms_loads_for_both_and_tells_the_other_what_it_has_read(ptx, missing):
    row = compile_report.read(PTX + ptx, PTXAS, RESOURCES)
    assert compile_report.faults("fp8_matmul", row) == []
    found = compile_report.faults("fp8_matmul", row, pair=True)
    assert len(found) == len(missing) and all(word in fault for word, fault in zip(missing, found))


def test_the_kernels_whose_tiles_are_paired_are_held_to_it(monkeypatch, tmp_path):
    from tests.kernels import interpreter  # noqa: F401 (skips where jax has none)

    (tmp_path / "fp8_products_0.ptx").write_text(PTX + ALONE)
    (tmp_path / "fp8_products_0.ptxas").write_text(PTXAS)
    compiler = object.__new__(compile_report.Compiler)
    monkeypatch.setattr(compiler, "_compile", lambda case: list(tmp_path.iterdir()), raising=False)
    for case in (case for case in SHAPES["tiny"] if case.operation.startswith("fp8")):
        row, = compiler.rows(case)
        assert len(row["faults"]) == (2 if case.groups else 0), case


@pytest.mark.parametrize(("operation", "version", "allowed"), [
    ("mla_decode", (0, 11, 2), True), ("mla_decode", (0, 12, 0, 1), False), ("mla_attention", (0, 11, 2), False)])
def test_a_spill_is_a_fault_but_where_an_older_jax_is_known_for_it(monkeypatch, tmp_path, operation, version, allowed):
    from tests.kernels import interpreter  # noqa: F401 (skips where jax has none)

    (tmp_path / "k_0.ptx").write_text(PTX)
    (tmp_path / "k_0.ptxas").write_text(PTXAS.replace("0 bytes spill stores", "16 bytes spill stores"))
    compiler = object.__new__(compile_report.Compiler)
    monkeypatch.setattr(compiler, "_compile", lambda case: list(tmp_path.iterdir()), raising=False)
    monkeypatch.setattr("jax.__version_info__", version)
    row, = compiler.rows(next(case for case in SHAPES["tiny"] if case.operation == operation))
    assert row["spill_bytes"] == 16 and [bool(row["faults"]), bool(row["notes"])] == [not allowed, allowed]


def test_the_report_names_what_compiled(monkeypatch, tmp_path):
    rows = [{"operation": "fp8_matmul", "faults": [], "notes": ["spills 4 bytes, as it does before jax 0.12"]}]
    monkeypatch.setattr(compile_report, "compile_kernels", lambda names: rows)
    monkeypatch.setattr("sys.argv", ["compile_report", "--json", str(tmp_path / "rows.json")])
    assert compile_report.main() == 0  # a note is not an error
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["rows"] == rows and found["jax"] == jax.__version__ and "ptxas" in found


def test_spills_are_counted_once_although_ptxas_warns_of_them_again():
    said = PTXAS.replace("0 bytes spill stores, 0 bytes", "116 bytes spill stores, 80 bytes") + (
        "ptxas warning : Registers are spilled to local memory in function 'k', 116 bytes spill stores, "
        "80 bytes spill loads\n")
    assert compile_report.read(PTX, said, RESOURCES)["spill_bytes"] == 196


def test_a_quantizer_that_divides_where_scales_are_powers_of_two_has_a_fault():
    row = compile_report.read("div.full.f32 %r1, %r2, %r3;\n", PTXAS, RESOURCES)
    assert row["divisions"] == 1 and compile_report.faults("quantize", row) == []
    assert compile_report.faults("quantize", row, "power_of_two") == ["divides where scales are powers of two"]


def test_a_kernel_that_does_not_compile_is_a_row_and_takes_no_other_with_it(monkeypatch, capsys):
    def compile_one(self, case):
        if case.operation == "fp8_matmul":
            raise NotImplementedError("Only optimized transfers\nare there")
        return ()

    devices = jax.devices()
    for name in ("MOSAIC_GPU_DUMP_TO", "MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_SASS"):
        monkeypatch.setenv(name, "")  # so that it is restored
    monkeypatch.setattr(compile_report, "described", lambda: devices[:1])
    monkeypatch.setattr(compile_report.Compiler, "_compile", compile_one)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    rows = compile_report.compile_kernels(["tiny"])
    assert [(row["operation"], row["faults"]) for row in rows] == 2 * [
        ("fp8_matmul", ["NotImplementedError: Only optimized transfers"])]


def test_a_quantizer_whose_maxima_skip_nan_has_a_fault():
    row = compile_report.read("max.NaN.f32 %r1, %r2, %r3;\nmax.f32 %r1, %r2, %r3;\n", PTXAS, RESOURCES)
    assert compile_report.faults("swiglu_quantize", row) == ["takes maxima that skip NaN"]
    assert compile_report.faults("mla_decode", row) == []  # it would be NaN anyway
    assert compile_report.faults("quantize", compile_report.read("max.NaN.f32 %r1;\n", PTXAS, RESOURCES)) == []


def test_every_tiny_kernel_compiles_for_every_tpu():
    pytest.importorskip("libtpu", reason="the TPU's compiler is not here; pip install 'jax[tpu]' brings it")
    done = subprocess.run([sys.executable, "-m", "kernels_pallas.tools.compile_tpu",
                           "--shapes", "tiny", "--chips", "v5p"],
                          capture_output=True, text=True)
    kernels = sum("tpu" in api.OPERATIONS[case.operation][1] for case in SHAPES["tiny"])
    assert done.returncode == 0, done.stderr
    assert f"{kernels} kernels compiled for v5p, 0 failed" in done.stdout


def test_without_libtpu_one_line_says_what_brings_it():
    code = ("import sys; sys.modules['libtpu'] = None; "
            "from kernels_pallas.tools.compile_tpu import compile_kernels; compile_kernels([], [])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "compiling for TPU needs libtpu; pip install 'jax[tpu]' brings the one that fits.\n"


TIMED = [case for case in SHAPES["tiny"] if case.operation in ("quantize", "fp8_matmul") and case.form == "blocks"]


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case.operation == "fp8_matmul" else ())
                                  for case in TIMED], ids=[case.operation for case in TIMED])
def test_a_first_run_on_a_gpu_goes_through_the_checks_and_the_clock(case):
    from tests.kernels import interpreter  # noqa: F401 (skips where jax has none)

    row = benchmark.measure(case, "interpreter", 2, 1.0)
    assert row["right"] and row["seconds"] > 0
    assert json.loads(json.dumps(row)) == row and "WRONG" not in benchmark.show(row)


@pytest.mark.slow
def test_the_benchmark_writes_a_row_for_every_tiny_shape(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.json"
    options = "--shapes tiny --implementation reference --calls 2 --out"
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
    row = benchmark.measure(Case("fp8_matmul", 128, 128, 128), "broken", 2, 1.0)
    assert not row["right"] and "seconds" not in row and "WRONG" in benchmark.show(row)


def test_a_kernel_that_fails_does_not_take_the_other_rows_with_it(monkeypatch, tmp_path, capsys):
    def measure(case, *_):
        if case.operation == "quantize":
            raise RuntimeError("out of memory\nand more")
        return {"operation": case.operation, "right": True, "seconds": 1.0, "peers": {}, "tflops": 1.0, "of_copy": 1.0}

    out = tmp_path / "rows.json"
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr("sys.argv", ["benchmark", "--shapes", "tiny", "--implementation", "reference", "--calls", "2",
                                     "--out", str(out)])
    assert benchmark.main() == 1
    first, second, *others = json.loads(out.read_text())["rows"]
    assert first["failed"] == second["failed"] == "RuntimeError: out of memory" and all(row["right"] for row in others)
    assert "FAILED: RuntimeError: out of memory" in capsys.readouterr().out


def quantized(values, scales):
    return api.Quantized(jnp.asarray(values, jnp.float8_e4m3fn), jnp.asarray(scales, jnp.float32))


ONES = np.ones((8, 128 * 100), np.float32)
SCALES = np.ones((8, 100), np.float32)


@pytest.mark.parametrize(("values", "scales", "right"), [
    ({}, 2, True),  # 2 ulp
    ({}, 3, False),
    ({(0, 0): 1.125}, 0, True),  # a step of E4M3, of one value in 100,000
    ({(0, 0): 1.25}, 0, False),  # two steps
    ({(0, n): 1.125 for n in range(20)}, 0, False),  # more than one in 10,000
    ({(0, 0): -1.0}, 0, False)])
def test_a_quantizer_may_round_otherwise_by_a_step_now_and_then(values, scales, right):
    x = ONES.copy()
    for place, value in values.items():
        x[place] = value
    off = (SCALES.view(np.int32) + scales).view(np.float32)
    assert compare(quantized(x, off), quantized(ONES, SCALES))["right"] is right


def test_a_result_with_nan_or_of_another_shape_is_wrong():
    ones = jnp.ones((4, 4), jnp.bfloat16)
    assert compare(ones, ones)["right"]
    assert not compare(ones.at[0, 0].set(jnp.nan), ones)["right"]
    assert not compare(ones[:1], ones)["right"]


def test_kernels_are_summed_by_name_without_the_one_that_flushes_the_cache():
    rounds = [[("wrapped_not", 9.0), ("quantizer", 2.0 + n), ("transpose", 1.0)] for n in (0, 1, 2)]
    timing = summarize(rounds)
    assert timing.clock == "cupti" and timing.kernels == pytest.approx({"quantizer": 3e-3, "transpose": 1e-3})
    assert timing.seconds == pytest.approx(4e-3) and timing.rounds == pytest.approx([3e-3, 4e-3, 5e-3])
    with pytest.raises(RuntimeError, match="kernels of a call flush the cache, not one"):
        summarize([pairs[1:] for pairs in rounds])


@pytest.mark.parametrize(("text", "name"), [
    ('custom_call_target="__cublas$lt$matmul$f8"', "cublaslt_fp8"), ('"__cublas$lt$matmul"', "cublaslt"),
    ('"__cublas$gemm"', "cublas"), ("kind=__triton_gemm", "triton"), ("fusion", "xla")])
def test_a_product_is_named_after_what_the_compiled_program_calls(text, name):
    assert peers.library(text) == name


def test_an_absent_peer_is_a_word_that_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = peers.peers(Case("fp8_matmul", 128, 128, 128), jax.random.key(0), 2)
    assert found["torch"] == "missing: torch is not installed"
    assert {type(value) for name, value in found.items() if name != "torch"} <= {float, str} and len(found) == 3


def test_products_are_compared_at_few_rows_and_timed_at_all():
    case = Case("fp8_grouped_matmul", 32768, 7168, 4096, groups=8)
    wgrad = Case("fp8_grouped_matmul", 4096, 32768, 7168, groups=8, form="tiles")
    assert (case.compared().M, case.compared().K, wgrad.compared().M, wgrad.compared().K) == (2048, 7168, 4096, 8192)
    assert all(case.compared() == case for case in SHAPES["tiny"])
    assert Attention(1, 4096, 128).compared() == Attention(1, 1024, 8)


def test_tiny_grouped_products_are_in_pairs_with_more_slices_of_a_group_than_are_on_the_way_at_once():
    from tests.kernels import interpreter  # noqa: F401, I001 (skips where jax has none)
    from kernels_pallas.hopper.fp8_matmul import TuningConfig

    cases = [case for case in SHAPES["tiny"] if case.operation == "fp8_grouped_matmul"]
    assert {case.form for case in cases} == {"blocks", "tiles"}
    for case in (*cases, *(one.compared() for one in cases)):
        config = TuningConfig.of_groups(case.N)
        slices = case.K // 128 // (case.groups if case.form == "tiles" else 1)
        assert config.pair and slices > config.stages_for(jnp.dtype(case.out_dtype)), case


def test_a_machine_without_the_gpu_is_told_what_runs_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark"])
    assert benchmark.main() == 2
    assert "--implementation reference runs here" in capsys.readouterr().err


def test_a_case_counts_its_flops_and_bytes():
    case = Case("fp8_matmul", 64, 256, 128)
    assert case.flops == 2 * 64 * 256 * 128
    assert case.bytes() == 64 * 256 + 64 * 2 * 4 + 128 * 256 + 2 * 4 + 64 * 128 * 2
    assert Case("quantize", 64, 256).bytes() == 64 * 256 * 3 + 64 * 2 * 4
    assert Decode(2, 4096, 16).flops == 2 * 2 * 16 * 4096 * (576 + 512)


def test_every_kernel_has_named_shapes():
    made = {case.operation for cases in SHAPES.values() for case in cases}
    assert made == set(api.OPERATIONS)


def test_without_the_compiler_for_gpus_both_reports_say_what_to_install(monkeypatch, capsys):
    def no_plugin(*_, **__):
        raise NotImplementedError("unknown platform cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", no_plugin)
    monkeypatch.setattr("sys.argv", ["compile_report", "--shapes", "tiny"])
    assert compile_report.main() == 2
    said = capsys.readouterr().err.strip()
    assert "pip install 'deepseek-jax[aot]'" in said and len(said.splitlines()) == 1
    with pytest.raises(ConfigError) as error:
        targets.devices_of("h100:8")
    assert str(error.value) == said


LOOPS = """
.L_x_0:
        /*0010*/   IADD3 R1, R1, R2 ;
.L_x_1:
        /*0020*/   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24 ;
        /*0030*/   FFMA R3, R24, R2, R3 ;
        /*0040*/   @P0 BRA `(.L_x_1) ;
        /*0050*/   @P1 BRA `(.L_x_0) ;
        /*0060*/   BRA `(.L_x_2) ;
.L_x_2:
"""


# One loop with two products: a wait that is repeated after the end, code that a condition skips, an inner loop.
WAITS = """
        /*0000*/   IADD3 R1, R1, R2 ;
.L_x_0:
        /*0010*/   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24 ;
        /*0020*/   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0030*/   @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0040*/   @P2 BRA `(.L_x_3) ;
        /*0050*/   FADD R1, R1, R2 ;
        /*0060*/   FADD R1, R1, R2 ;
        /*0070*/   FADD R1, R1, R2 ;
.L_x_3:
        /*0080*/   FMUL R1, R1, R2 ;
        /*0090*/   FMUL R1, R1, R2 ;
        /*00a0*/   FMUL R1, R1, R2 ;
        /*00b0*/   @P3 BRA `(.L_x_3) ;
        /*00c0*/   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24 ;
        /*00d0*/   @P1 BRA `(.L_x_0) ;
        /*00e0*/   EXIT ;
.L_x_9:
        /*00f0*/   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0100*/   @!P0 BRA `(.L_x_9) ;
        /*0110*/   BRA `(.L_x_1) ;
.L_x_8:
        /*0120*/   BRA `(.L_x_8);
"""


def test_the_machine_code_says_how_long_a_products_loop_is():
    row = compile_report.read("", PTXAS, RESOURCES, LOOPS)
    assert (row["instructions"], row["loop_instructions"], row["inner_instructions"]) == (6, 3, 0)
    assert compile_report.loops(LOOPS.replace("QGMMA", "FADD")) == (0, 0)


def test_a_wait_that_comes_back_to_the_middle_of_a_loop_is_no_loop_and_what_is_skipped_does_not_count():
    assert compile_report.loops(WAITS) == (10, 4)
    assert compile_report.loops(WAITS.replace("@P1 BRA `(.L_x_0)", "NOP")) == (0, 0)


def test_a_prediction_is_of_what_takes_longest():
    def clocks(tiles, instructions, sms=1):
        return predict.CLOCK * predict.product(tiles, (128, 128), 10, 128, 1, 2, instructions, sms)

    leaves = 128 * 128 * 2 / 32 + predict.LATENCY
    full = 256 * 128 / (5120 / 132)  # bytes of a slice, at an SM's share of the L2 bandwidth
    assert clocks(132, 100) == pytest.approx(10 * full + leaves)
    assert clocks(1, 10) == pytest.approx(10 * 512 + leaves)  # a single SM loads 64 bytes per clock
    assert clocks(1, 400) == pytest.approx(10 * 800 + leaves)  # issue slots of two warps
    assert clocks(133, 100) == pytest.approx(2 * clocks(132, 100))  # one more tile is one more wave
    # Each of two SMs requests half of the rows, and receives all of them.
    assert clocks(132, 100, 2) == pytest.approx(10 * 192 * 128 / (5120 / 132) + leaves)
    assert clocks(2, 10, 2) == clocks(2, 10)


def test_an_operand_in_shared_memory_is_read_at_128_bytes_a_clock():
    assert predict.wgmma(64, 256, 64) == 2 * 64 * 256 * 64 / 4096
    assert predict.wgmma(64, 32, 576) == 2 * 576 * (64 + 32) / 128 > 2 * 64 * 32 * 576 / 4096
    assert predict.wgmma(64, 32, 576, in_registers=True) == 2 * 64 * 32 * 576 / 4096


def test_decoding_is_predicted_in_series_and_attention_by_its_products():
    clocks = lambda seconds: (seconds - predict.LAUNCH) * predict.CLOCK
    row = {"loop_instructions": 476, "inner_instructions": 218}
    products = 2 * (864 + 512)  # both groups' scores, limited by shared memory, and outputs
    long, short = (clocks(predict.decoding(Decode(64, tokens, 128), row)) for tokens in (4096, 2048))
    assert (long - short) / 32 == pytest.approx(products + 4 * 60 + 2 * 476)
    long, short = (clocks(predict.decoding(Decode(64, tokens, 128, packed=True), row)) for tokens in (4096, 2048))
    assert (long - short) / 32 == pytest.approx(products + 4 * 60 + 2 * (476 + 3 * 218))
    case = Attention(1, 4096, 132)
    forward = clocks(predict.attention(case, {"attention_forward": {"loop_instructions": 500}}))
    kept = 128 * 192 * 2
    assert forward == pytest.approx(528 * (1536 + 1024) + 32 * (800 + kept / (5120 / 132) + kept / 32))
    slow = clocks(predict.attention(case, {"attention_forward": {"loop_instructions": 2000}}))
    assert slow - forward == pytest.approx(528 * (4000 - 2560))


def test_a_published_rate_is_held_against_the_unit_that_it_is_in():
    rows = [{"operation": "mla_decode", "shape": str(case), "kernel": "decode", "instructions": 2000,
             "loop_instructions": 476, "inner_instructions": 4} for case in SHAPES["v3-decode"]
            if isinstance(case, Decode)]
    found = {row["shape"]: row for row in predict.predict(["v3-decode"], rows)}
    memory, products = found["128x4096 H=16 pages of 64"], found["128x4096 H=128 pages of 64"]
    assert products["of_published"] == pytest.approx(products["tflops"] / 660)
    bytes_a_second = Decode(128, 4096, 16).bytes() / memory["seconds"]
    assert memory["of_published"] == pytest.approx(bytes_a_second / 3e12)


def test_gradients_take_the_forward_pass_as_well_which_is_compiled_once():
    named = lambda case, kernel: {"operation": "mla_attention", "shape": str(case), "kernel": kernel,
                                  "instructions": 2000, "loop_instructions": 300}
    forward, both = (Attention(1, 4096, 128, backward=backward) for backward in (False, True))
    rows = [named(forward, "attention_forward"), *(named(both, f"attention_{kernel}") for kernel in ("dq", "dkv"))]
    found = {row["shape"]: row["seconds"] for row in predict.predict(["v3-train"], rows)}
    alone = predict.attention(both, {row["kernel"]: row for row in rows[1:]})
    assert found[str(both)] == pytest.approx(found[str(forward)] + alone)


FP8 = ROOT / "experiments" / "studies" / "fp8"


def test_what_is_committed_is_predicted_from_what_is_committed():
    compiled = json.loads((FP8 / "compile_sm90a.json").read_text())["rows"]
    predicted = json.loads((FP8 / "predicted_h100.json").read_text())
    expected = predict.predict(["v3-train", "v3-decode"], compiled)
    cases = SHAPES["v3-train"] + SHAPES["v3-decode"]
    assert [row["shape"] for row in predicted] == [str(case) for case in cases]
    assert [row.keys() for row in predicted] == [row.keys() for row in expected]
    for row, other in zip(predicted, expected):
        assert row == {key: pytest.approx(value) if isinstance(value, float) else value for key, value in other.items()}


@pytest.mark.parametrize(("file", "version"), [("compile_sm90a", "0.12."), ("compile_sm90a_jax_0_11_2", "0.11.2")])
def test_the_committed_reports_are_of_all_kernels_and_without_a_fault(file, version):
    report = json.loads((FP8 / f"{file}.json").read_text())
    assert report["jax"].startswith(version) and report["ptxas"]
    assert not [row for row in report["rows"] if row["faults"]]
    assert {row["operation"] for row in report["rows"] if row["notes"]} <= {"mla_decode"}
    expected = {(case.operation, str(case)) for case in compile_report.cases(["v3-train", "v3-decode"])}
    assert {(row["operation"], row["shape"]) for row in report["rows"]} == expected
    # Two blocks of a quantizer's threads share an SM, and one computes while the other waits.
    assert all(row["registers"] <= 128 for row in report["rows"] if "quantize" in row["operation"])


def test_predictions_come_from_the_rows_of_compiled_kernels(tmp_path, capsys, monkeypatch):
    case = next(c for c in SHAPES["v3-train"] if c.operation == "fp8_matmul" and c.published == 1265)
    rows = [{"operation": "fp8_matmul", "shape": str(case), "kernel": "fp8_products", "instructions": 500,
             "loop_instructions": 128}]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr("sys.argv", ["predict", "--shapes", "v3-train", "--rows", str(tmp_path / "rows.json")])
    assert predict.main() == 0
    (found,) = predict.predict(["v3-train"], rows)
    assert found["tflops"] == pytest.approx(case.flops / found["seconds"] / 1e12)
    assert f"{found['tflops']:.0f} TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "[]", "{}"])
def test_a_file_that_is_no_report_is_refused_in_one_line(text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("sys.argv", ["predict", "--rows", str(path)])
    assert predict.main() == 2
    assert f"{path} is no report of compile_report --json" in capsys.readouterr().err
