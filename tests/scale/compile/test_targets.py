"""Targets and their commands: an error ends in one line that says what would be right."""

import json
import sys
from unittest import mock

import pytest

from deepseek_jax import compile as compile_command
from deepseek_jax import plan as plan_command
from deepseek_jax.config import ConfigError
from deepseek_jax.scale.compile import targets
from tests import runs

V3 = ["--model", "v3_671b", "--hardware", "h800", "--devices", "2048", "--pipe", "16", "--expert", "64"]


def run(name, *arguments):
    with mock.patch.dict(runs.COMMANDS, {"plan": plan_command, "compile": compile_command}):
        return runs.run(name, *arguments)


@pytest.mark.parametrize(("target", "devices"), [("h100:8", 8), ("h800:2048", 2048), ("v5p:8x16x16", 2048),
                                                 ("v6e:16x16", 256), ("7x:4x4x4", 128), ("h100:3", 3)])
def test_a_target_says_how_many_devices_it_has(target, devices):
    assert targets.count(target) == devices


@pytest.mark.parametrize(("target", "complaint"),
                         [("a100:8", "'a100:8' is unknown; take one of h100, h800, v5p"), ("h100", "lacks its size"),
                          ("h100:0", "lacks its size"), ("v5p:8y16", "say it as in v5p:8x16x16"),
                          ("h100:12", "not whole hosts of 8; take 8 or 16")])
def test_a_target_that_is_not_known_names_those_that_are(target, complaint):
    with pytest.raises(ConfigError, match=complaint):
        targets.count(target)


@pytest.mark.parametrize(("target", "gone", "complaint"),
                         [("h100:8", "jax_plugins.xla_cuda13", r"pip install 'deepseek-jax\[aot\]'"),
                          ("v5p:2x2x1", "libtpu", "pip install libtpu")])
def test_a_compiler_that_is_not_there_says_how_to_install_it(target, gone, complaint):
    from jax.experimental import topologies

    missing = mock.Mock(side_effect=NotImplementedError("cuda"))
    with (mock.patch.object(topologies, "get_topology_desc", missing), mock.patch.dict(sys.modules, {gone: None}),
          pytest.raises(ConfigError, match=complaint)):
        targets.devices_of(target)


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [("plan", [*V3[:2], "--hardware", "h900", *V3[4:]], "hardware 'h900' is unknown"),
     ("plan", ["--model", "v4", *V3[2:]], "unknown model 'v4'"),
     ("plan", [*V3, "--devices", "1000"], "does not divide 1000 devices"),
     ("plan", [*V3, "--remat", "some"], "model.remat='some' is unknown"),
     ("plan", [*V3, "--schedule", "2f2b"], "schedule '2f2b' is unknown"),
     ("plan", [*V3, "--capacity", "-1"], "mesh.capacity=-1.0 must be positive"),
     ("plan", V3[:4], "--devices"),
     ("compile", ["--model", "tiny", "--target", "cray:1"], "target 'cray:1' is unknown"),
     ("compile", ["--model", "tiny", "--target", "h100:8", "--expert", "3"], "does not divide 8 devices"),
     ("compile", ["--model", "tiny", "--target", "h100:8", "--sequences", "0"], "--sequences 0 must be positive"),
     ("compile", ["--model", "tiny", "--target", "h100:8", "--decode", "0"], "--decode 0 must be positive"),
     ("compile", ["--model", "tiny", "--target", "h100:1", "--lora-fp8"], "add --lora RANK"),
     ("compile", ["--model", "tiny", "--target", "h100:1", "--lora", "4", "--remat", "auto"], "with --lora name one"),
     ("compile", ["--model", "tiny", "--target", "h100:1", "--program", "sample", "--lora", "4"], "omit --lora and"),
     ("plan", ["--layout"], "argument --layout: expected one argument")])
def test_a_mistake_ends_in_one_line(name, arguments, complaint):
    run(name, *arguments).assert_error(complaint)


def test_the_plan_of_the_report_s_run_is_printed_beside_what_was_published(tmp_path):
    result = run("plan", *V3, "--ablations", "--decode", "--json", tmp_path / "plan.json", "--plot", tmp_path / "p.png")
    found = json.loads((tmp_path / "plan.json").read_text())

    assert result.code == (0 if found["plan"]["fits"] else 1) and not result.err
    assert found["conventions"]["main model"] == 671_026_419_200
    assert found["plan"]["bytes_per_device"] == pytest.approx(sum(found["plan"]["bytes"].values()))
    assert {row["what"] for row in found["published"]} >= {"step, s", "MFU, non-causal"}
    assert len(found["ablations"]) == 8 and len(found["decode"]) == 6 and found["measured"]["slowdown"] > 1
    assert "671,026,419,200" in result.out and "of 80:" in result.out
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_a_search_says_why_the_others_do_not_fit():
    result = run("plan", "--model", "v2_lite_16b", "--hardware", "v6e", "--devices", 4, "--search", "--sequences", 8)

    assert result.code == 1 and "none" in result.out
    assert "does not fit into memory; nearest: pipe" in result.out and "GB too much" in result.out


@pytest.mark.parametrize("name", ["plan", "compile"])
def test_help_shows_examples(name):
    assert f"python -m deepseek_jax.{name} --layout report" in run(name, "--help").out
