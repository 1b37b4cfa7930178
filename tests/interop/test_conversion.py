"""Work directories made from checkpoints: exact in both directions, and usable to train, evaluate and generate."""

import filecmp
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.checkpoint import arrays
from deepseek_jax.checkpoint.manager import Checkpoints, restore_items
from deepseek_jax.config import Config, InitConfig, as_dict, freeze
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.interop import dequantized, load_hf, save_hf
from deepseek_jax.interop.convert import from_hf, to_hf
from deepseek_jax.training.loop import starting_state
from deepseek_jax.workdir import load_run, load_workdir_config
from tests.interop import checkpoints
from tests.model import naive

# Wider than a block of 128, and not a multiple of it: the last blocks are partial.
WIDE = naive.tiny(d_model=136, expert_ffn_dim=130, dense_ffn_dim=260, num_experts=2, num_groups=1, groups_kept=1,
                  experts_per_token=1, num_layers=2)


def assert_same_files(a, b):
    files = sorted(p.name for p in pathlib.Path(a).iterdir())
    assert sorted(p.name for p in pathlib.Path(b).iterdir()) == files
    for name in files:
        same = filecmp.cmp(f"{a}/{name}", f"{b}/{name}", shallow=False)
        assert same or (name == "config.json" and checkpoints.config(a) == checkpoints.config(b)), name


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory):
    """An FP8 checkpoint of three files, with power-of-two scales for one of its weights."""
    once = tmp_path_factory.mktemp("fp8") / "once"
    save_hf(str(once), WIDE, naive.variables_of(WIDE), fp8=True)
    tensors = checkpoints.tensors(once)
    scale = next(n for n in tensors if n.endswith("o_proj.weight_scale_inv"))
    tensors[scale] = np.exp2(np.ceil(np.log2(tensors[scale])))
    return checkpoints.write(once.parent / "src", tensors, checkpoints.config(once), files=3)


# Round trips


@pytest.mark.parametrize("case", ["mtp", "v2_softmax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("held", [None, "float32"])
def test_a_round_trip_is_exact_in_every_byte_of_every_file(tmp_path, case, dtype, held):
    stored = checkpoints.as_stored(checkpoints.tensors(checkpoints.golden(case)), np.dtype(dtype))
    src = checkpoints.write(tmp_path / "src", stored, checkpoints.config(checkpoints.golden(case)), files=3)

    from_hf(src, str(tmp_path / "run"), held)
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))

    assert_same_files(src, tmp_path / "back")


def test_a_round_trip_of_kept_fp8_is_exact_too(tmp_path, fp8_folder):
    from_hf(fp8_folder, str(tmp_path / "run"), keep_fp8=True)
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))

    assert_same_files(fp8_folder, tmp_path / "back")


def test_the_file_that_transformers_wrote_comes_back(tmp_path):
    from_hf(checkpoints.golden("plain"), str(tmp_path / "run"))
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))

    golden = f"{checkpoints.golden('plain')}/model.safetensors"
    assert filecmp.cmp(golden, tmp_path / "back/model.safetensors", shallow=False)


def test_stacked_experts_come_in_and_go_out_stacked(tmp_path):
    def stack(tensors):
        for layer in (1, 2):
            at = f"model.layers.{layer}.mlp.experts."
            gate, up, down = ([tensors.pop(f"{at}{e}.{part}_proj.weight") for e in range(8)]
                              for part in ("gate", "up", "down"))
            tensors[at + "gate_up_proj"] = np.concatenate([np.stack(gate), np.stack(up)], axis=1)
            tensors[at + "down_proj"] = np.stack(down)

    src = checkpoints.changed(tmp_path / "src", "plain", stack)

    assert_same_trees(load_hf(src)[1], load_hf(checkpoints.golden("plain"))[1])
    from_hf(src, str(tmp_path / "run"))
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))
    assert_same_files(src, tmp_path / "back")


# Dtypes other than those stored


def made_here(folder, cfg=None, start=None):
    """One of our own runs, in float32, that began from the run in `start`."""
    cfg = cfg or naive.tiny()
    saved = Checkpoints(folder)
    saved.save(7, naive.variables_of(cfg), {})
    saved.close()
    config = as_dict(Config(model=cfg, init=InitConfig(from_=start)))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def assert_in_bfloat16_but_for_biases(folder, exact):
    assert checkpoints.config(folder)["torch_dtype"] == "bfloat16"
    tensors = checkpoints.tensors(folder)
    assert tensors.keys() == exact.keys() and any(name.endswith("e_score_correction_bias") for name in tensors)
    for name, tensor in tensors.items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (np.float32 if bias else ml_dtypes.bfloat16), name
        np.testing.assert_array_equal(tensor, exact[name].astype(tensor.dtype), err_msg=name)


def test_a_run_of_ours_goes_out_in_bfloat16_where_that_is_asked_for(tmp_path):
    src = made_here(tmp_path / "run")
    to_hf(src, str(tmp_path / "wide"))
    (line,) = to_hf(src, str(tmp_path / "narrow"), dtype="bfloat16")

    assert checkpoints.config(tmp_path / "wide")["torch_dtype"] == "float32"
    assert_in_bfloat16_but_for_biases(tmp_path / "narrow", checkpoints.tensors(tmp_path / "wide"))
    size = sum(t.nbytes for t in checkpoints.tensors(tmp_path / "narrow").values())
    assert line.startswith(f"{tmp_path / 'narrow'} holds {size / 1e6:.2f} MB, mostly bfloat16. Next: ")
    assert line.endswith(f"serve --hf {tmp_path / 'narrow'}, once it holds a tokenizer.json.")


def test_the_tokenizer_of_a_run_says_which_tokens_begin_and_end_a_text(tmp_path):
    src = made_here(tmp_path / "run")
    train_tokenizer(["some text"], 262).save(str(tmp_path / "run" / "tokenizer.json"))
    to_hf(src, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found == {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}

    (tmp_path / "run" / "tokenizer_config.json").write_text("{}")
    to_hf(src, str(tmp_path / "again"))
    assert (tmp_path / "again" / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize("stated", [None, {"eos_token_id": [3, 4], "temperature": 0.6}])
def test_all_tokens_that_end_a_text_go_out_with_a_fine_tuned_run(tmp_path, stated):
    start = str(tmp_path / "start")
    from_hf(checkpoints.golden("glm_4_7_flash"), start)
    src = made_here(tmp_path / "run", load_workdir_config(start).model, start)
    train_tokenizer(["some text"], 262).save(f"{src}/tokenizer.json")
    if stated:
        pathlib.Path(src, "generation_config.json").write_text(json.dumps(stated))

    to_hf(src, str(tmp_path / "out"))

    ends = stated["eos_token_id"] if stated else [7, 9, 11]
    assert checkpoints.config(tmp_path / "out")["eos_token_id"] == ends
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == (stated or {"bos_token_id": 0, "eos_token_id": ends})


def test_a_converted_checkpoint_goes_out_in_the_type_that_is_asked_for(tmp_path):
    from_hf(checkpoints.golden("mtp"), str(tmp_path / "run"))
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"), dtype="bfloat16")

    raw = checkpoints.config(tmp_path / "back")
    assert raw == checkpoints.config(checkpoints.golden("mtp")) | {"dtype": "bfloat16"}  # as the original spells it
    for name, tensor in checkpoints.tensors(tmp_path / "back").items():
        assert tensor.dtype == (np.float32 if name.endswith("bias") else ml_dtypes.bfloat16), name


def test_kept_fp8_is_dequantized_where_another_type_is_asked_for(tmp_path, fp8_folder):
    from_hf(fp8_folder, str(tmp_path / "run"), keep_fp8=True)
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"), dtype="bfloat16")

    raw, tensors = checkpoints.config(tmp_path / "back"), checkpoints.tensors(tmp_path / "back")
    assert "quantization_config" not in raw and not any(name.endswith("_scale_inv") for name in tensors)
    narrow = lambda folder: jax.tree.map(lambda x: x.astype(jnp.bfloat16), load_hf(str(folder), dtype=jnp.bfloat16)[1])
    assert_same_trees(narrow(tmp_path / "back"), narrow(fp8_folder))


def test_fp8_and_bfloat16_together_are_the_released_form(tmp_path):
    to_hf(made_here(tmp_path / "run"), str(tmp_path / "out"), fp8=True, dtype="bfloat16")

    tensors = checkpoints.tensors(tmp_path / "out")
    assert {t.dtype.name for n, t in tensors.items() if not n.endswith(("_scale_inv", "_bias"))} == {
        "float8_e4m3fn", "bfloat16"}
    assert checkpoints.config(tmp_path / "out")["quantization_config"]["quant_method"] == "fp8"


def test_a_fine_tuned_run_goes_out_in_the_type_of_the_checkpoint_that_it_began_from(tmp_path):
    stored = checkpoints.as_stored(checkpoints.tensors(checkpoints.golden("mtp")), ml_dtypes.bfloat16)
    raw = checkpoints.config(checkpoints.golden("mtp")) | {"dtype": "bfloat16"}
    from_hf(checkpoints.write(tmp_path / "src", stored, raw), str(tmp_path / "start"))
    cfg = load_workdir_config(str(tmp_path / "start")).model
    first = made_here(tmp_path / "first", cfg, str(tmp_path / "start"))
    second = made_here(tmp_path / "second", cfg, first)

    for run in (first, second):
        to_hf(run, run + "_out")
        to_hf(run, run + "_wide", dtype="float32")
        assert_in_bfloat16_but_for_biases(run + "_out", checkpoints.tensors(run + "_wide"))


# FP8


def test_an_fp8_export_quantizes_what_the_released_files_do(fp8_folder):
    tensors = checkpoints.tensors(fp8_folder)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    quantized = {name for name, dtype in dtypes.items() if dtype == ml_dtypes.float8_e4m3fn}

    assert {n + "_scale_inv" for n in quantized} == {n for n in dtypes if n.endswith("_scale_inv")}
    assert {n.split(".")[-2] for n in quantized} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert tensors["model.layers.1.mlp.experts.1.down_proj.weight_scale_inv"].shape == (2, 2)  # [136, 130]
    assert checkpoints.config(fp8_folder)["quantization_config"]["weight_block_size"] == [128, 128]


def test_every_file_is_one_that_the_safetensors_library_reads(fp8_folder):
    found = {}
    for path in pathlib.Path(fp8_folder).glob("*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as f:
            names = f.keys()
            found |= {name: f.get_slice(name) for name in names}

    assert {name: tuple(part.get_shape()) for name, part in found.items()} == {
        name: tensor.shape for name, tensor in checkpoints.tensors(fp8_folder).items()}
    assert {part.get_dtype() for part in found.values()} == {"F32", "F8_E4M3"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kept_fp8_is_dequantized_to_what_the_files_say(tmp_path, fp8_folder, dtype):
    cfg, now = load_hf(fp8_folder, dtype=dtype)
    _, kept = load_hf(fp8_folder, keep_fp8=True)
    from_hf(fp8_folder, str(tmp_path / "run"), keep_fp8=True)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), now)
    later, _, _ = restore_items(str(tmp_path / "run"), abstract=shapes)

    assert kept["params"]["layers"]["ffn"]["up"]["values"].shape == (1, 2, 130, 136)  # [out, in], as stored
    plain = lambda tree: {k: v for k, v in tree["params"]["layers"]["ffn"].items() if k != "router"}
    at_once = jax.jit(lambda tree: dequantized(cfg, tree, dtype), compiler_options=naive.QUICKLY)(kept)
    assert_same_trees(plain(at_once), plain(now))
    assert_same_trees(later, now)


def test_power_of_two_scales(tmp_path, fp8_folder):
    """scale_fmt "ue8m0": float32 powers of two, or a dtype that has only exponents."""
    tensors = checkpoints.tensors(fp8_folder)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = np.exp2(np.ceil(np.log2(tensors[name])))
    raw = checkpoints.config(fp8_folder)
    raw["quantization_config"] |= {"scale_fmt": "ue8m0"}
    wide = checkpoints.write(tmp_path / "wide", tensors, raw)
    narrow = {n: a.astype(ml_dtypes.float8_e8m0fnu) if n.endswith("_scale_inv") else a for n, a in tensors.items()}
    narrow = checkpoints.write(tmp_path / "narrow", narrow, raw, files=2)

    assert_same_trees(load_hf(wide)[1], load_hf(narrow)[1])
    from_hf(narrow, str(tmp_path / "run"), keep_fp8=True)
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))
    assert_same_files(narrow, tmp_path / "back")


def test_routing_stays_in_float32(fp8_folder):
    _, variables = load_hf(fp8_folder, dtype=jnp.bfloat16)

    params = variables["params"]
    assert variables["router"]["bias"].dtype == params["layers"]["ffn"]["router"]["weight"].dtype == jnp.float32
    assert params["embedding"].dtype == params["layers"]["ffn"]["gate"].dtype == jnp.bfloat16


# Work directories


def test_a_converted_checkpoint_is_what_load_hf_gives(tmp_path):
    from_hf(checkpoints.golden("mtp"), str(tmp_path / "run"))

    config, variables, step = load_run(str(tmp_path / "run"))
    cfg, loaded = load_hf(checkpoints.golden("mtp"))
    assert (step, config.model) == (0, cfg)
    assert_same_trees(variables, loaded)


def test_training_starts_from_a_converted_checkpoint_in_float32(tmp_path, fp8_folder):
    from_hf(fp8_folder, str(tmp_path / "run"), keep_fp8=True)
    config = load_workdir_config(str(tmp_path / "run"))
    config = freeze(as_dict(config) | {"init": {"from": str(tmp_path / "run")}})

    state = starting_state(config)

    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    _, loaded = load_hf(fp8_folder, dtype=jnp.float32)
    assert_same_trees(state.params, loaded["params"])


def test_a_run_of_ours_is_exported_as_it_is(tmp_path):
    cfg = naive.tiny()
    variables = naive.variables_of(cfg)

    to_hf(made_here(tmp_path / "run"), str(tmp_path / "out"))

    back_cfg, back = load_hf(str(tmp_path / "out"))
    assert back_cfg.mtp_depth == cfg.mtp_depth
    assert_same_trees(back, variables)


@pytest.mark.parametrize("keep_fp8", [False, True])
def test_each_device_reads_its_part_alone(tmp_path, fp8_folder, monkeypatch, keep_fp8):
    mesh = jax.make_mesh((2,), ("node",), axis_types=(jax.sharding.AxisType.Auto,))
    by_expert = NamedSharding(mesh, PartitionSpec(None, "node"))
    by_column = NamedSharding(mesh, PartitionSpec(None, None, None, "node"))
    from_hf(fp8_folder, str(tmp_path / "run"), keep_fp8=keep_fp8)
    whole, _, _ = restore_items(str(tmp_path / "run"))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole)
    ffn = shapes["params"]["layers"]["ffn"]
    for name, sharding in (("gate", by_expert), ("up", by_column), ("down", by_column)):
        ffn[name] = jax.ShapeDtypeStruct(ffn[name].shape, ffn[name].dtype, sharding=sharding)
    seen = []
    read = arrays.Stored.__getitem__
    monkeypatch.setattr(arrays.Stored, "__getitem__", lambda self, index: seen.append(index) or read(self, index))

    parts, _, _ = restore_items(str(tmp_path / "run"), abstract=shapes)

    assert_same_trees(parts, whole)
    assert sum(index[1:2] == (slice(1, 2),) for index in seen) == 1  # the second expert, which one device requests
    assert parts["params"]["layers"]["ffn"]["gate"].sharding == by_expert


def test_load_hf_onto_a_mesh(fp8_folder):
    mesh = jax.make_mesh((2,), ("node",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = lambda path, shape: NamedSharding(mesh, PartitionSpec(
        *(["node"] if path.endswith("embedding") else [None, "node"] if "params/layers/ffn/gate" in path else [])))
    _, whole = load_hf(fp8_folder, keep_fp8=True)

    _, replicated = load_hf(fp8_folder, mesh=mesh, keep_fp8=True)
    _, sharded = load_hf(fp8_folder, mesh=mesh, keep_fp8=True, sharding=spread)

    assert_same_trees(replicated, whole)
    assert_same_trees(sharded, whole)
    assert replicated["params"]["head"].sharding.is_fully_replicated
    assert len(sharded["params"]["layers"]["ffn"]["gate"]["values"].addressable_shards[0].data[0]) == 1


def test_promised_mtp_modules_that_are_absent_are_reported_in_one_line(tmp_path, capsys):
    src = checkpoints.changed(tmp_path / "src", "plain", num_nextn_predict_layers=1)

    cfg, variables = load_hf(src)
    notes = from_hf(src, str(tmp_path / "run"))

    assert cfg.mtp_depth == 0 and "mtp_1" not in variables["params"]
    line = capsys.readouterr().out.strip()
    assert line in notes and "promises 1 MTP module(s), the files hold 0" in line


def test_the_modules_of_mtp_are_counted_in_the_files(tmp_path):
    src = checkpoints.changed(tmp_path / "src", "mtp", num_nextn_predict_layers=0)

    assert load_hf(src)[0].mtp_depth == 1


def test_tokenizer_and_chat_template_go_along_unchanged(tmp_path):
    src = checkpoints.changed(tmp_path / "src", "plain")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):  # whatever they say
        pathlib.Path(src, name).write_text("{{ messages }}")

    from_hf(src, str(tmp_path / "run"))
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))

    assert (tmp_path / "run/chat_template.jinja").read_text() == "{{ messages }}"
    assert_same_files(src, tmp_path / "back")
