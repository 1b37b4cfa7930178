"""Any error in a checkpoint or a destination gives one line that names it, and leaves nothing at the destination."""

import dataclasses
import errno
import json
import os
import pathlib

import numpy as np
import pytest

from deepseek_jax.checkpoint import arrays
from deepseek_jax.checkpoint.arrays import quantize
from deepseek_jax.config import Config, ConfigError, PreferenceConfig, as_dict, load_config
from deepseek_jax.config.training import InitConfig
from deepseek_jax.interop import load_hf, safetensors_io, save_hf
from deepseek_jax.interop.convert import from_hf, to_hf
from tests.interop import checkpoints

Q, HEAD = "model.layers.1.self_attn.q_a_proj.weight", "lm_head.weight"


def fails(folder, tmp_path) -> str:
    """The error message for a checkpoint, the same for both ways of loading; checks that no files are left."""
    with pytest.raises(ConfigError) as loading:
        load_hf(folder)
    with pytest.raises(ConfigError) as converting:
        from_hf(folder, str(tmp_path / "dst"))
    assert str(loading.value) == str(converting.value)
    assert "\n" not in str(loading.value) and len(str(loading.value)) < 700
    assert not list(tmp_path.glob("dst*"))
    return str(loading.value)


def with_change(tmp_path, change, case="plain", **how):
    return checkpoints.changed(tmp_path / "src", case, change, **how)


def test_a_missing_shard(tmp_path):
    folder = checkpoints.changed(tmp_path / "src", "plain", files=3)
    os.remove(f"{folder}/model-00002-of-00003.safetensors")

    assert "model-00002-of-00003.safetensors is missing" in fails(folder, tmp_path)


@pytest.mark.parametrize("left", [4, 100, -1])
def test_a_truncated_file(tmp_path, left):
    folder = checkpoints.changed(tmp_path / "src", "plain")
    path = f"{folder}/model.safetensors"
    os.truncate(path, left if left > 0 else os.path.getsize(path) - 1)

    assert "truncated" in fails(folder, tmp_path)


def test_an_index_that_lies(tmp_path):
    folder = checkpoints.changed(tmp_path / "src", "plain", files=2)
    path = pathlib.Path(folder, safetensors_io.INDEX)
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))

    assert "model.ghost.weight" in fails(folder, tmp_path)


@pytest.mark.parametrize("place", ["../model-00001-of-00002.safetensors", "/model.safetensors", "config.json", 3])
def test_an_index_that_points_elsewhere(tmp_path, place):
    folder = checkpoints.changed(tmp_path / "src", "plain", files=2)
    path = pathlib.Path(folder, safetensors_io.INDEX)
    index = json.loads(path.read_text())
    index["weight_map"][HEAD] = place
    path.write_text(json.dumps(index))

    assert f"puts {HEAD} into {place!r}" in fails(folder, tmp_path)


def test_a_shard_that_cannot_be_opened(tmp_path):
    folder = checkpoints.changed(tmp_path / "src", "plain", files=2)
    os.remove(f"{folder}/model-00002-of-00002.safetensors")
    os.mkdir(f"{folder}/model-00002-of-00002.safetensors")

    assert "model-00002-of-00002.safetensors cannot be read: Is a directory" in fails(folder, tmp_path)


def test_tensors_that_overlap(tmp_path):
    folder = checkpoints.changed(tmp_path / "src", "plain")
    path = pathlib.Path(folder, safetensors_io.SINGLE)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header[Q]["data_offsets"] = header[Q.replace("layers.1", "layers.2")]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])

    assert "overlaps what is before it, or leaves a gap" in fails(folder, tmp_path)


def test_a_tensor_of_another_shape(tmp_path):
    folder = with_change(tmp_path, lambda a: a.update({Q: a[Q][:-1]}))

    message = fails(folder, tmp_path)
    assert Q in message and "[11, 28]" in message and "[12, 28]" in message


def test_an_unknown_key(tmp_path):
    folder = with_change(tmp_path, lambda a: a.update({"model.layers.1.self_attn.q_proj.bias": np.zeros(3)}))

    assert "unknown tensors: model.layers.1.self_attn.q_proj.bias" in fails(folder, tmp_path)


def test_a_layer_far_behind_is_no_mtp_module(tmp_path):
    folder = with_change(tmp_path, lambda a: a.update({"model.layers.9.mystery": np.zeros(3)}), case="mtp")

    message = fails(folder, tmp_path)
    assert "unknown tensors: model.layers.9.mystery" in message and "missing" not in message


def test_missing_keys_are_listed_but_not_all_of_them(tmp_path):
    def without_experts(a):
        for name in [n for n in a if ".mlp.experts." in n]:
            del a[name]

    message = fails(with_change(tmp_path, without_experts), tmp_path)
    assert "missing: model.layers.1.mlp.experts.0.down_proj.weight" in message and "and 44 more" in message


def test_a_lost_expert_bias(tmp_path):
    folder = with_change(tmp_path, lambda a: a.pop("model.layers.1.mlp.gate.e_score_correction_bias"))

    assert "missing: model.layers.1.mlp.gate.e_score_correction_bias" in fails(folder, tmp_path)


def test_an_unsupported_config(tmp_path):
    folder = checkpoints.changed(tmp_path / "src", "plain", attention_bias=True, hidden_act="gelu")

    message = fails(folder, tmp_path)
    assert "attention_bias=True" in message and "hidden_act='gelu'" in message


def test_a_config_that_is_not_json(tmp_path):
    folder = checkpoints.changed(tmp_path / "src", "plain")
    pathlib.Path(folder, "config.json").write_text("{")

    assert "is not JSON" in fails(folder, tmp_path)


def fp8(arrays):
    arrays[Q], arrays[Q + "_scale_inv"] = quantize(arrays[Q])


@pytest.mark.parametrize(("change", "words"), [
    (lambda a: a.update({Q + "_scale_inv": np.ones((2, 1), np.float32)}), "1 x 128"),
    (lambda a: a.pop(Q + "_scale_inv"), f"FP8 weights without scales: {Q}"),
    (lambda a: a.update({HEAD + "_scale_inv": np.ones((1, 1), np.float32)}), "scales without an FP8 weight: lm_head"),
])
def test_scales_that_do_not_fit(tmp_path, change, words):
    folder = with_change(tmp_path, lambda a: (fp8(a), change(a)))

    message = fails(folder, tmp_path)
    assert words.replace("1 x 128", "128 x 128") in message


def test_fp8_without_rows_and_columns(tmp_path):
    norm = "model.norm.weight"
    in_fp8 = lambda a: a.update({norm: a[norm].astype(arrays.FP8), norm + "_scale_inv": np.ones(1)})
    folder = with_change(tmp_path, in_fp8)

    assert f"{norm} is in FP8, but no matrix" in fails(folder, tmp_path)


@pytest.mark.parametrize(("copy", "original"), [("embed_tokens.weight", "model.embed_tokens.weight"),
                                                ("shared_head.head.weight", "lm_head.weight")])
def test_a_copy_that_mtp_does_not_share(tmp_path, copy, original):
    name = f"model.layers.2.{copy}"
    folder = with_change(tmp_path, lambda a: a.update({name: a[name] + 1}), case="mtp")

    assert f"{name} differs from {original}" in fails(folder, tmp_path)


def test_an_empty_folder_and_an_absent_one(tmp_path):
    assert "holds no config.json" in fails(str(tmp_path / "nowhere"), tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/config.json").write_text(json.dumps(checkpoints.config(checkpoints.golden("plain"))))
    assert "neither model.safetensors nor" in fails(str(tmp_path / "src"), tmp_path)


def test_a_destination_that_exists_is_left_alone(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/mine").write_text("x")

    with pytest.raises(ConfigError, match="dst exists already"):
        from_hf(checkpoints.golden("plain"), str(tmp_path / "dst"))
    with pytest.raises(ConfigError, match="dst exists already"):
        save_hf(str(tmp_path / "dst"), *load_hf(checkpoints.golden("plain")))
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["mine"]


def test_a_destination_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    below = str(tmp_path / "file" / "dst")
    with pytest.raises(ConfigError, match=r"dst could not be written: .*; nothing is left there"):
        from_hf(checkpoints.golden("plain"), below)
    with pytest.raises(ConfigError, match=r"dst could not be written: .*; nothing is left there"):
        save_hf(below, *load_hf(checkpoints.golden("plain")))


@pytest.mark.parametrize("module", [arrays, safetensors_io])
def test_a_full_disk(tmp_path, monkeypatch, module):
    src = str(tmp_path / "src")
    from_hf(checkpoints.golden("plain"), src)
    calls = []

    class FullDisk:
        def __getattr__(self, name):
            return getattr(os, name)

        def fsync(self, descriptor):
            calls.append(descriptor)
            if module is safetensors_io or len(calls) > 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            os.fsync(descriptor)

    monkeypatch.setattr(module, "os", FullDisk())
    with pytest.raises(ConfigError, match="no space left on the disk"):
        if module is arrays:
            from_hf(checkpoints.golden("plain"), str(tmp_path / "dst"))
        else:
            to_hf(src, str(tmp_path / "dst"))
    assert not list(tmp_path.glob("dst*"))


@pytest.mark.parametrize("name", ["config.json", "hf_layout.json"])
def test_a_work_directory_with_a_damaged_file(tmp_path, name):
    from_hf(checkpoints.golden("plain"), str(tmp_path / "run"))
    (tmp_path / "run" / name).write_text("{")

    with pytest.raises(ConfigError, match=f"{name} is not JSON"):
        to_hf(str(tmp_path / "run"), str(tmp_path / "dst"))
    assert not list(tmp_path.glob("dst*"))


@pytest.mark.parametrize("dtype", ["int8", "float16", "nonsense"])
def test_a_dtype_that_the_model_does_not_compute_in(dtype):
    with pytest.raises(ConfigError, match=f"dtype={dtype!r}.*bfloat16 or float32"):
        load_hf(checkpoints.golden("plain"), dtype=dtype)


def test_a_work_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="holds no config.json"):
        to_hf(str(tmp_path), str(tmp_path / "dst"))
    assert not list(tmp_path.glob("dst*"))


def test_a_reward_model_is_not_exported(tmp_path):
    config = dataclasses.replace(load_config("tiny"), init=InitConfig("tuned"),
                                 preference=PreferenceConfig(objective="reward"))
    (tmp_path / "config.json").write_text(json.dumps(as_dict(config)))
    with pytest.raises(ConfigError, match="is a reward model, whose head no published format has.*began from, tuned"):
        to_hf(str(tmp_path), str(tmp_path / "dst"))


@pytest.mark.parametrize(("field", "value", "words"), [
    ("num_layers", 2, r"params/layers/\S+ is \[2, .*the config asks for \[1, "), ("mtp_depth", 1, "missing: .*mtp_1/")])
def test_weights_of_another_model_are_not_exported(tmp_path, field, value, words):
    """A config with fewer layers would otherwise truncate the model silently."""
    cfg, variables = load_hf(checkpoints.golden("plain"))
    other = dataclasses.replace(cfg, **{field: value})
    from_hf(checkpoints.golden("plain"), str(tmp_path / "run"))
    (tmp_path / "run/config.json").write_text(json.dumps(as_dict(Config(model=other))))

    with pytest.raises(ConfigError, match=words):
        save_hf(str(tmp_path / "dst"), other, variables)
    with pytest.raises(ConfigError, match=words):
        to_hf(str(tmp_path / "run"), str(tmp_path / "dst"))
    assert not list(tmp_path.glob("dst*"))
