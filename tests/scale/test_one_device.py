"""`plan --serve` and `plan --finetune`: what they print, write and refuse, and which models they accept."""

import json
from unittest import mock

import pytest

from deepseek_jax import plan as plan_command
from deepseek_jax.config import Config, as_dict, model_config
from deepseek_jax.interop import hf_config
from tests import runs

LITE = ["--model", "v2_lite_16b", "--hardware", "a100"]


def run(*arguments):
    with mock.patch.dict(runs.COMMANDS, {"plan": plan_command}):
        return runs.run("plan", *arguments)


def test_serving_says_bytes_users_and_that_its_rates_are_bounds(tmp_path):
    result = run(*LITE, "--serve", "--json", tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())

    assert result.code == 0 and not result.err and found["fits"]
    assert "31.42 GB" in result.out and "31,104 bytes" in result.out and "8.00 GB" in result.out
    assert f"fits: {found['serve']['users']} users of 4,096 tokens" in result.out
    assert "upper bounds from data sheet and counts, not measurements" in result.out
    assert "a100, fp8: sheet: no FP8 units; bfloat16 is used" in result.out
    assert [b["batch"] for b in found["serve"]["bounds"]] == [1, found["serve"]["users"]]


def test_a_model_that_cannot_be_served_is_one_line_and_exit_code_1():
    result = run("--model", "v3_671b", "--hardware", "h200", "--serve")

    last = result.out.strip().splitlines()[-1]
    assert result.code == 1 and "DOES NOT FIT" in last and "devices that share the experts" in last


def test_weights_in_fp8_are_said_to_be_no_plan_of_this_program_s_server():
    result = run("--model", "v2_lite_16b", "--hardware", "rtx4090", "--serve", "--fp8")

    assert result.code == 0 and "deepseek_jax.serve does not do this" in result.out
    assert "weights in fp8" in result.out


def test_finetuning_has_a_column_for_every_policy(tmp_path):
    result = run("--model", "small", "--hardware", "t4", "--finetune", "--sequences", 8, "--context", 2048,
                 "--json", tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())["finetune"]

    assert result.code == 0 and [row["remat"] for row in found["remat"]] == ["none", "report", "full"]
    assert found["step"] == {"sequences": 8, "rows": 8, "context": 2048, "moments": "float32"}
    assert "longest context that fits" in result.out and "t4, bf16: sheet: no bfloat16 units" in result.out


def test_finetuning_begins_with_one_sequence_in_the_trainer_s_types():
    result = run(*LITE, "--finetune")

    assert result.code == 1 and "1 x 4,096 tokens a step, 1 at once, moments in float32" in result.out
    assert "DOES NOT FIT: lacks" in result.out.splitlines()[-2]


def test_what_finetuning_names_instead_fits():
    words = run(*LITE, "--finetune").out.split("(instead of --finetune: ")[1].split(")")[0].split()

    assert run(*LITE, *words).code == 0


@pytest.mark.parametrize(("arguments", "complaint"), [
    (LITE, "--devices is missing"), ([*LITE, "--devices", "0"], "--devices 0 must be positive"),
    ([*LITE, "--serve", "--finetune"], "not allowed with"),
    ([*LITE, "--serve", "--devices", "4"], "leave out --devices 4"),
    ([*LITE, "--finetune", "--search"], "--finetune plans one device and does not read --search"),
    ([*LITE, "--finetune", "--remat", "full"], "does not read --remat full"),
    ([*LITE, "--serve", "--pipe", "2"], "does not read --pipe 2"),
    ([*LITE, "--serve", "--price", "2"], "does not read --price"),
    ([*LITE, "--serve", "--moments", "bfloat16"], "does not read --moments bfloat16"),
    ([*LITE, "--devices", "8", "--cache", "fp8"], "--cache fp8 goes with --serve; add --serve"),
    ([*LITE, "--devices", "8", "--moments", "bfloat16"], "goes with --finetune"),
    ([*LITE, "--serve", "--fp8"], "a100 has no FP8 units: products run in bfloat16"),
    ([*LITE, "--devices", "8", "--fp8"], "a100 has no FP8 units"),
    ([*LITE, "--serve", "--context", "0"], "--context 0 must be positive"),
    ([*LITE, "--finetune", "--sequences", "0"], "--sequences 0 must be positive"),
    ([*LITE, "--devices", "8", "--expert", "-8"], "--expert -8 must be positive"),
    ([*LITE, "--devices", "1", "--decode"], "for one device of yours take --serve"),
    (["--model", "moonlight", *LITE[2:], "--serve"], "did you mean moonlight_16b? A fol")])
def test_a_mistake_ends_in_one_line(arguments, complaint):
    run(*arguments).assert_error(complaint)


def test_one_device_trains_one_sequence_a_step_unless_told_otherwise():
    assert "no pipeline, 1 x 1 sequences" in run("--model", "small", *LITE[2:], "--devices", 1).out


def test_training_is_in_bfloat16_where_there_is_no_fp8(tmp_path):
    result = run(*LITE, "--devices", 8, "--expert", 8, "--remat", "full", "--json", tmp_path / "plan.json")

    assert result.code == 0
    assert json.loads((tmp_path / "plan.json").read_text())["plan"]["bytes"]["experts' products"] > 0


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file"])
def test_a_config_json_is_as_good_as_a_name(tmp_path, kind):
    c = model_config("v2_lite_16b")
    raw = hf_config.write(c, "bfloat16") if kind == "checkpoint" else as_dict(Config(model=c))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    path = tmp_path / "config.json" if kind == "file" else tmp_path
    after = lambda out: out.split("parameters", 1)[1]

    assert after(run("--model", path, *LITE[2:], "--serve").out) == after(run(*LITE, "--serve").out)


def test_a_broken_config_json_ends_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")

    run("--model", tmp_path, *LITE[2:], "--serve").assert_error("is not JSON")
