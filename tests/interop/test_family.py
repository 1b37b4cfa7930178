"""What published checkpoints have in addition to V3: it is omitted and counted, unpacked, widened or refused."""

import json
import pathlib
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.checkpoint.arrays import quantize
from deepseek_jax.config import ConfigError
from deepseek_jax.interop import hf_config, int4, load_hf, safetensors_io
from deepseek_jax.interop.convert import from_hf, to_hf
from deepseek_jax.workdir import load_workdir_config
from tests.interop import checkpoints

EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
HEAD = "model.layers.2.shared_head.head.weight"


def through(src, tmp_path, held=None, **how):
    """The export of a checkpoint that was converted to a run, and the messages of that conversion."""
    notes = from_hf(src, str(tmp_path / "run"), held, **how)
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))
    return tmp_path / "back", notes


def test_rotary_frequencies_are_left_out_and_counted_and_bfloat16_biases_come_back(tmp_path):
    back, notes = through(checkpoints.golden("moonlight"), tmp_path)

    said = "left out 3 tensors rotary_emb.inv_freq, which config.json gives."
    assert f"{checkpoints.golden('moonlight')}: {said}" in notes
    theirs, ours = checkpoints.tensors(checkpoints.golden("moonlight")), checkpoints.tensors(back)
    assert ours.keys() == {name for name in theirs if not name.endswith("inv_freq")}
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and np.array_equal(value, theirs[name]), name
    assert ours["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == ml_dtypes.bfloat16
    bias = load_hf(checkpoints.golden("moonlight"))[1]["router"]["bias"]
    assert bias.dtype == np.float32


def test_a_vision_model_is_left_out_and_the_rest_goes_out_as_deepseek_v3(tmp_path):
    back, notes = through(checkpoints.golden("kimi_k2_5"), tmp_path)

    assert any("left out 2 tensors of the vision model." in note for note in notes)
    raw = checkpoints.config(back)
    assert (raw["model_type"], raw["architectures"]) == ("deepseek_v3", ["DeepseekV3ForCausalLM"])
    assert raw["eos_token_id"] == 5 and "vision_config" not in raw and "quantization_config" not in raw
    assert not any(name.startswith(("language_model.", "vision_tower.")) for name in checkpoints.tensors(back))


def test_four_bit_experts_are_value_times_scale_in_bfloat16(tmp_path):
    theirs = checkpoints.tensors(checkpoints.golden("kimi_k2_thinking"))
    words, scales = theirs[EXPERT + "_packed"], theirs[EXPERT + "_scale"]
    expected = np.array([[((int(words[r, c // 8]) >> 4 * (c % 8)) & 15) - 8 for c in range(64)] for r in range(32)])
    expected = (expected * scales.astype(np.float32).repeat(32, axis=1)).astype(ml_dtypes.bfloat16)

    back, _ = through(checkpoints.golden("kimi_k2_thinking"), tmp_path)

    np.testing.assert_array_equal(checkpoints.tensors(back)[EXPERT], expected)
    params = load_hf(checkpoints.golden("kimi_k2_thinking"))[1]["params"]
    np.testing.assert_array_equal(params["layers"]["ffn"]["up"][0, 0], expected.T)
    assert not any(name.endswith(("_packed", "_scale", "_shape")) for name in checkpoints.tensors(back))


def test_rows_of_four_bit_weights_are_read_from_anywhere(tmp_path):
    words = np.arange(-40, 40, dtype=np.int32).reshape(5, 16) * 123_456_789 // 7
    scales = np.linspace(0.5, 2, 20, dtype=np.float32).reshape(5, 4)
    whole = int4.unpack(words, scales, np.float32)

    assert whole.shape == (5, 128) and whole.min() < 0 < whole.max()
    np.testing.assert_array_equal(int4.unpack(words[2:4], scales[2:4], np.float32), whole[2:4])


@pytest.mark.parametrize(("change", "words"), [
    (lambda a: a.pop(EXPERT + "_scale"), f"{EXPERT}_packed is without {EXPERT}_scale"),
    (lambda a: a.pop(EXPERT + "_shape"), f"{EXPERT}_packed is without {EXPERT}_shape"),
    (lambda a: a.pop(EXPERT + "_packed"), f"unknown tensors: {EXPERT}_scale, {EXPERT}_shape; missing: {EXPERT}"),
    (lambda a: a.update({EXPERT + "_shape": np.array([32, 63], np.int32)}), f"{EXPERT}_shape does not say [32, 64]"),
    (lambda a: a.update({EXPERT + "_shape": np.array([32.0, 64.0])}), f"{EXPERT}_shape does not say [32, 64]"),
    (lambda a: a.update({EXPERT + "_scale": a[EXPERT + "_scale"][:-1]}), f"{EXPERT}_scale is [31, 2]"),
    (lambda a: a.update({EXPERT + "_packed": a[EXPERT + "_packed"][:, :-1]}), "in a multiple of 32"),
    (lambda a: a.update({EXPERT + "_packed": a[EXPERT + "_packed"].astype(np.int64)}), "in int64, and int4 is packed"),
    (lambda a: a.update({EXPERT: np.ones((32, 64), np.float32)}), f"holds {EXPERT} twice, also as {EXPERT}_packed"),
    (lambda a: a.update({"model.norm.weight": np.ones(64, np.int32)}), "model.norm.weight is in int32, which no"),
])
def test_four_bit_weights_that_do_not_fit_are_one_line(tmp_path, change, words):
    src = checkpoints.changed(tmp_path / "src", "kimi_k2_thinking", change)

    with pytest.raises(ConfigError) as error:
        from_hf(src, str(tmp_path / "run"))

    assert words in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.glob("run*"))


def test_a_tensor_under_two_names_is_refused(tmp_path):
    twice = lambda arrays: arrays.update({"language_model.lm_head.weight": arrays["lm_head.weight"]})

    with pytest.raises(ConfigError, match=r"holds lm_head.weight twice, once as language_model.lm_head.weight"):
        load_hf(checkpoints.changed(tmp_path / "src", "plain", twice))


def test_float16_comes_in_as_bfloat16_with_a_line_or_exactly_as_float32(tmp_path):
    stored = checkpoints.as_stored(checkpoints.tensors(checkpoints.golden("mtp")), np.float16)
    stored["lm_head.weight"][0, 0] = 65504  # bfloat16 rounds it to 65536, which float16 cannot represent
    stored["model.layers.2.shared_head.head.weight"][0, 0] = 65504
    raw = checkpoints.config(checkpoints.golden("mtp")) | {"dtype": "float16"}
    src = checkpoints.write(tmp_path / "src", stored, raw)
    (tmp_path / "wide").mkdir()

    narrow, notes = through(src, tmp_path)
    wide, wide_notes = through(src, tmp_path / "wide", held="float32")

    count = sum(a.dtype == np.float16 for a in stored.values())
    assert any(f"{count:,} tensors in float16" in note and "--dtype float32" in note for note in notes)
    assert not any("tensors in float16" in note for note in wide_notes)
    assert checkpoints.config(narrow)["dtype"] == "bfloat16" and checkpoints.config(wide)["dtype"] == "float16"
    for name, value in checkpoints.tensors(narrow).items():
        expected = stored[name] if stored[name].dtype == np.float32 else stored[name].astype(ml_dtypes.bfloat16)
        expected = stored[name].astype(np.float32) if name.endswith("gate.weight") else expected
        np.testing.assert_array_equal(value.astype(np.float32), expected.astype(np.float32), err_msg=name)
    for name, value in checkpoints.tensors(wide).items():
        assert value.dtype == stored[name].dtype and np.array_equal(value, stored[name]), name


def test_a_stale_copy_names_the_way_out_which_leaves_the_module_out(tmp_path):
    src = checkpoints.changed(tmp_path / "src", "mtp", lambda a: a.update({HEAD: a[HEAD] + 1}),
                              num_nextn_predict_layers=1)
    with pytest.raises(ConfigError, match="--without-mtp"):
        from_hf(src, str(tmp_path / "run"))

    back, notes = through(src, tmp_path, without_mtp=True)

    assert any(re.search(r": left out \d\d tensors of the MTP module\.", note) for note in notes)
    assert load_workdir_config(str(tmp_path / "run")).model.mtp_depth == 0
    assert checkpoints.config(back)["num_nextn_predict_layers"] == 0
    assert not any(name.startswith("model.layers.2.") for name in checkpoints.tensors(back))
    assert load_hf(src, without_mtp=True)[0].mtp_depth == 0


@pytest.fixture
def two(tmp_path):
    """A folder with one checkpoint in a single file, and another one in two files with an index."""
    folder = pathlib.Path(checkpoints.changed(tmp_path / "two", "plain", files=2))
    shutil.copyfile(f"{checkpoints.golden('no_norm_topk')}/model.safetensors", folder / "model.safetensors")
    return folder


def test_a_folder_with_two_checkpoints_asks_which(two):
    with pytest.raises(ConfigError) as error:
        load_hf(str(two))

    assert str(error.value) == (
        f"{two} holds two checkpoints, model.safetensors and the 2 files of model.safetensors.index.json; convert "
        "from-hf takes one of them with --files model.safetensors or --files model.safetensors.index.json.")


@pytest.mark.parametrize(("files", "case"), [("model.safetensors", "no_norm_topk"), (safetensors_io.INDEX, "plain")])
def test_files_decides_which_checkpoint_of_two_is_read(tmp_path, two, files, case):
    back, _ = through(str(two), tmp_path, files=files)

    expected = checkpoints.tensors(checkpoints.golden(case))
    found = checkpoints.tensors(back)
    assert found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


def test_an_index_of_the_single_file_is_one_checkpoint(tmp_path):
    src = checkpoints.changed(tmp_path / "src", "plain")
    where = dict.fromkeys(checkpoints.tensors(src), "model.safetensors")
    pathlib.Path(src, safetensors_io.INDEX).write_text(json.dumps({"weight_map": where}))

    assert load_hf(src)[0].num_layers == 3


@pytest.mark.parametrize(("files", "words"), [
    ("../model.safetensors", "no file name that ends in"), ("config.json", "no file name that ends in"),
    ("other.safetensors", "holds no other.safetensors"), ("other.index.json", "holds no other.index.json")])
def test_files_that_are_none_are_one_line(tmp_path, two, files, words):
    with pytest.raises(ConfigError, match=words):
        from_hf(str(two), str(tmp_path / "run"), files=files)
    assert not list(tmp_path.glob("run*"))


def test_an_fp8_export_of_a_power_of_two_checkpoint_has_powers_of_two_again(tmp_path):
    from_hf(checkpoints.golden("v3_1"), str(tmp_path / "run"))
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"), fp8=True)

    scales = [a for n, a in checkpoints.tensors(tmp_path / "back").items() if n.endswith("_scale_inv")]
    assert checkpoints.config(tmp_path / "back")["quantization_config"]["scale_fmt"] == "ue8m0"
    assert scales and all(np.array_equal(np.frexp(s)[0], np.full(s.shape, 0.5)) for s in scales)
    theirs = checkpoints.tensors(checkpoints.golden("v3_1"))
    for name in checkpoints.tensors(tmp_path / "back"):  # the same numbers, so the same bytes
        if theirs[name].dtype == ml_dtypes.float8_e4m3fn:
            exact = lambda t, n=name: t[n].astype(np.float32) * t[n + "_scale_inv"].repeat(128, 0).repeat(
                128, 1)[:t[n].shape[0], :t[n].shape[1]]
            np.testing.assert_array_equal(exact(checkpoints.tensors(tmp_path / "back")), exact(theirs), err_msg=name)


@pytest.mark.parametrize("amax", [448.0, 449.0, 0.3, 2.0**-20])
def test_the_power_of_two_of_a_scale_is_the_next_one_up(amax):
    _, exact = quantize(np.full((2, 2), amax, np.float32))
    _, scale = quantize(np.full((2, 2), amax, np.float32), power_of_two=True)

    assert exact[0, 0] <= scale[0, 0] < 2 * exact[0, 0] and np.log2(scale[0, 0]) % 1 == 0


def test_a_list_of_eos_ids_comes_back_as_a_list(tmp_path):
    back, _ = through(checkpoints.golden("glm_4_7_flash"), tmp_path)

    assert checkpoints.config(back) == checkpoints.config(checkpoints.golden("glm_4_7_flash"))
    assert checkpoints.config(back)["eos_token_id"] == [7, 9, 11]


def test_an_indexer_in_fp8_is_dequantized_exactly_and_goes_out_byte_for_byte(tmp_path):
    def released(arrays):  # wq_b and wk as in the files of V3.2; weights_proj and k_norm are unchanged
        for name in [n for n in arrays if n.endswith(("indexer.wq_b.weight", "indexer.wk.weight"))]:
            arrays[name], arrays[name + "_scale_inv"] = quantize(arrays[name])

    src = checkpoints.changed(tmp_path / "src", "v3_2", released, quantization_config=hf_config.QUANTIZATION)
    theirs, name = checkpoints.tensors(src), "model.layers.1.self_attn.indexer.{}.weight"
    assert theirs[name.format("wk")].dtype == theirs[name.format("wq_b")].dtype == ml_dtypes.float8_e4m3fn

    cfg, variables = load_hf(src, dtype="float32")
    held = variables["params"]["layers"]["attention"]["indexer"]
    for which in ("wk", "wq_b"):
        values, scales = theirs[name.format(which)], theirs[name.format(which) + "_scale_inv"]
        exact = values.astype(np.float32) * scales.repeat(128, 0).repeat(128, 1)[:values.shape[0], :values.shape[1]]
        np.testing.assert_array_equal(np.asarray(held[which])[0].reshape(len(exact.T), -1), exact.T)

    from_hf(src, str(tmp_path / "run"), keep_fp8=True)
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))
    ours = checkpoints.tensors(tmp_path / "back")
    assert ours.keys() == theirs.keys()
    assert all(ours[n].tobytes() == theirs[n].tobytes() and ours[n].dtype == theirs[n].dtype for n in theirs)
