"""Programs compiled for absent hardware: what is compiled, and (slow) the compiler's figures for it."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from deepseek_jax.config import ConfigError, FP8Config, MeshConfig, model_config
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.scale.compile import aot, hlo, report
from deepseek_jax.scale.compile.aot import config_of, described, kernels_in
from deepseek_jax.scale.compile.aot_forward import PROGRAMS, lowered_program
from deepseek_jax.scale.costs import training_flops_per_token
from deepseek_jax.scale.layout import Layout, Split, make_layout
from deepseek_jax.training.step import init_state

REPORT = {"model": "tiny", "target": "h100:8", "layout": "8", "compiler_gigabytes": 1.0, "bytes": {}, "memory": 8e10,
          "seconds": {"lowering": 1.0, "compiling": 1.0, "cpu": 1.0}, "bytes_per_device": 1, "fits": True,
          "kernels": []}


def test_the_program_of_a_layout_is_the_training_run_that_it_describes():
    c = model_config("v3_671b", fp8=FP8Config(enabled=True))
    layout = make_layout(c, Split(2048, 16, 64), 15360, dispatch_fp8=True, buffers="ragged", capacity=1.25)
    config = config_of(c, layout)

    assert (config.train.batch_size, config.train.accumulation_steps, config.train.sequence_length) == (15360, 1, 4096)
    assert dataclasses.astuple(config.pipeline) == ("dualpipe", 120, None)
    assert config.mesh == layout.mesh and config.optimizer.moment_dtype == "bfloat16"


def test_without_a_pipeline_micro_batches_accumulate():
    config = config_of(model_config("tiny"), Layout(MeshConfig(local=8), microbatches=4, rows=2, sequence_length=256))

    assert (config.train.batch_size, config.train.accumulation_steps) == (64, 4)


def test_a_report_is_not_lost_for_groups_in_a_form_that_is_not_known(capsys):
    program = """HloModule m

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  ROOT %r = f32[16]{0} all-reduce(%x), replica_groups=<new>, to_apply=%add
}
"""
    c = model_config("v3_671b")
    found = described(c, make_layout(c, Split(2048, 16, 64), 15360), "h100", program, {"arguments": 5})
    assert (found["collectives"], found["exposed"], found["bytes_per_device"]) == ([], None, 5)
    assert "could not be read, and are left out: replica_groups=<new>, is no known form" in capsys.readouterr().err


def test_a_layout_that_training_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="does not divide"):
        config_of(model_config("tiny", num_heads=3), Layout(MeshConfig(pipe=2), "1f1b", 4, 1, 256))


def test_kernels_of_a_program_are_counted_with_the_most_that_one_of_them_takes(tmp_path):
    for n, registers in enumerate((168, 254)):
        (tmp_path / f"kernel_{n}.ptx").write_text("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {};")
        (tmp_path / f"kernel_{n}.ptxas").write_text(f"0 bytes spill stores\nUsed {registers} registers")
    (tmp_path / "kernel_0.resources.txt").write_text("smem_scratch_bytes=1024 num_barriers=3")  # the equal one has none

    row, = kernels_in(tmp_path)

    assert (row["kernel"], row["count"], row["registers"], row["spill_bytes"]) == ("kernel", 2, 254, 0)
    assert row["shared_bytes"] == 1024


@pytest.mark.parametrize(("mesh", "share"), [({}, 1), ({"tensor": 2}, 2), ({"context": 2}, 2),
                                             ({"context": 2, "tensor": 2}, 4)])
@pytest.mark.parametrize("frozen", [False, True])
def test_products_that_a_device_needs_are_those_of_its_share_of_the_tokens(monkeypatch, mesh, share, frozen):
    c, layout = model_config("tiny"), Layout(MeshConfig(**mesh), microbatches=3, rows=2, sequence_length=256)
    rows = 2 * 256 // share * c.experts_per_token
    monkeypatch.setattr(hlo, "work", lambda text, reach: hlo.Work(9, *(4e12 * x * (reach == rows)
                                                                        for x in (25, 7.5, 5, 2.5))))
    found = aot._products(c, layout, "", "h100:8", frozen)
    # The text of the program has two micro-batches, the first and the loop's; a step has three.
    assert found == {"attention": 30e12, "experts": 15e12, "fp8": 45e12, "others": 60e12,
                     "useful": training_flops_per_token(c, 256, frozen=frozen) * 3 * 2 * 256 / share}
    lines = report.table(REPORT | {"products": found | {"useful": 7e12}}).splitlines()
    line, = (one for one in lines if "TFLOP" in one)
    assert " ".join(line.split()) == ("TFLOP of products 150.0 kernels of attention 30.0, of experts in bfloat16 15.0, "
                                      "in FP8 45.0; useful 7.0")


def test_what_the_state_holds_besides_parameters_counts_between_steps():
    layout = Layout(MeshConfig(local=4, node=2), microbatches=4, rows=2, sequence_length=256, ema=True)
    config = config_of(model_config("tiny"), layout)
    state = jax.eval_shape(functools.partial(init_state, config))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    for program in PROGRAMS:
        lower, held = lowered_program(config, make_mesh(config.mesh), program)
        with jax.set_mesh(make_mesh(config.mesh)):
            given = lower().in_avals
        assert size(state.opt_state) / 8 <= held["moments"] < 1.1 * size(state.opt_state) / 8
        assert held["averages"] == pytest.approx(held["moments"], rel=0.1)  # one of four bytes, two of two
        assert size(given) < 1.1 * size((state.params, state.router))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra aot")
def test_a_step_compiles_for_eight_gpus_that_are_not_here(tmp_path):
    command = [sys.executable, "-m", "deepseek_jax.compile", "--model", "tiny", "--target", "h100:8", "--expert", "8",
               "--remat", "report", "--sequences", "16", "--sequence-length", "1024", "--json", tmp_path / "r.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "r.json").read_text())
    rows = {row["kind"]: row for row in found["collectives"]}

    assert found["fits"] and found["bytes_per_device"] > 1e8
    assert rows["ragged-all-to-all"]["axes"] == ["local"]
    assert rows["ragged-all-to-all"]["asynchronous"] == rows["ragged-all-to-all"]["count"] > 0
    multiplied = found["products"]
    useful = multiplied.pop("useful")
    assert multiplied["experts"] > 0.1 * useful
    assert useful < sum(multiplied.values()) < 1.1 * useful
