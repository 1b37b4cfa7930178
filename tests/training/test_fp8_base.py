"""Adapters of a base in FP8: it equals an FP8 checkpoint, and readers merge the adapters with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import fp8
from deepseek_jax.checkpoint.adapters import stored
from deepseek_jax.checkpoint.blocks import InBlocks, in_blocks
from deepseek_jax.checkpoint.manager import Checkpoints, find_checkpoint, restore_items
from deepseek_jax.config import Config, ConfigError, InitConfig, LoraConfig
from deepseek_jax.interop import load_hf
from deepseek_jax.interop.convert import from_hf, to_hf
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.posttraining.fp8_sampler import as_fp8
from deepseek_jax.training.base import in_full, load_base
from deepseek_jax.training.evaluate import evaluate_workdir
from deepseek_jax.training.loop import train
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.step import init_state
from deepseek_jax.workdir import load, load_workdir_config
from tests.interop import checkpoints
from tests.model import naive
from tests.training.test_base import start  # noqa: F401 (a fixture)

IN_FP8 = LoraConfig(rank=2, alpha=8.0, fp8=True)


def is_blocks(x):
    return isinstance(x, fp8.Blocks)


def matrices_of(params):
    """{path: Blocks} of a base."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_blocks)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves if is_blocks(x)}


@pytest.fixture
def begun(start):  # noqa: F811
    return dataclasses.replace(start, lora=IN_FP8)


def test_the_base_is_that_of_an_fp8_checkpoint_to_the_bit_and_takes_a_byte_a_weight(begun):
    frozen, base = load_base(begun, Runner(begun))
    saved = restore_items(begun.init.from_)[0]

    jax.tree.map(np.testing.assert_array_equal, in_full(begun, frozen["params"]), as_fp8(saved)["params"])
    held = matrices_of(frozen["params"])
    assert base.fp8 and {path.split("/")[-1] for path in held} >= {"q_a", "kv_b", "o", "gate", "up", "down"}
    for x in held.values():
        assert x.values.nbytes == x.values.size and x.scales.nbytes <= 4 * (x.values.size / 128**2 + x.scales.size)


@pytest.mark.parametrize("scales", [np.float32, jnp.float8_e8m0fnu])
def test_what_a_checkpoint_keeps_in_fp8_keeps_its_bytes_and_its_scales(tmp_path, scales):
    tensors = checkpoints.tensors(folder := checkpoints.golden("v3_1"))
    tensors = {name: a.astype(scales) if name.endswith("_scale_inv") else a for name, a in tensors.items()}
    hf = checkpoints.write(tmp_path / "hf", tensors, checkpoints.config(folder))
    from_hf(hf, str(tmp_path / "run"), keep_fp8=True)
    config = Config(model=load_workdir_config(str(tmp_path / "run")).model, lora=IN_FP8,
                    init=InitConfig(from_=str(tmp_path / "run")))

    held = matrices_of(load_base(config, Runner(config))[0]["params"])
    kept = load_hf(str(tmp_path / "hf"), keep_fp8=True)[1]["params"]
    for path, x in held.items():
        node = kept
        for name in path.split("/"):
            node = node[name]
        turned = {name: np.swapaxes(np.asarray(a), -1, -2) for name, a in node.items()}
        np.testing.assert_array_equal(np.asarray(x.scales), turned["scales"].astype(np.float32))
        np.testing.assert_array_equal(np.asarray(x.values).reshape(turned["values"].shape).view(np.uint8),
                                      turned["values"].view(np.uint8))


def test_readers_merge_with_the_rounded_base(begun, tmp_path):
    """Validation during training and of the run's merged weights: the same, and different from the unquantized base."""
    done = train(dataclasses.replace(begun, train=dataclasses.replace(begun.train, sample_tokens=4)),
                 str(tmp_path / "run"))
    assert done.finished and done.variables is None

    trained = [row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    assert evaluate_workdir(str(tmp_path / "run"))["loss"] == pytest.approx(trained[-1], abs=1e-6)
    params = load(str(tmp_path / "run")).variables["params"]
    to_hf(str(tmp_path / "run"), str(tmp_path / "hf"), merge=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), load_hf(str(tmp_path / "hf"))[1]["params"],
                 params)

    tuned = dataclasses.replace(begun, lora=LoraConfig(rank=1), init=InitConfig(from_=str(tmp_path / "run")))
    jax.tree.map(np.testing.assert_array_equal, load_base(tuned, Runner(tuned))[0]["params"], params)
    leaf = stored(find_checkpoint(tmp_path / "run"))["params/layers/ffn/gate"]
    part = (slice(0, 1), slice(1, 3), slice(2, 9), slice(0, 4))
    np.testing.assert_allclose(leaf[part], params["layers"]["ffn"]["gate"][part], atol=1e-6)


def test_a_base_in_fp8_of_a_base_in_fp8_is_rounded_once(begun, tmp_path):
    """And the tensors that its checkpoint has in FP8 are exported unchanged."""
    hf = checkpoints.golden("v3_1")
    from_hf(hf, str(tmp_path / "run"), keep_fp8=True)
    config = Config(model=load_workdir_config(str(tmp_path / "run")).model, lora=IN_FP8,
                    init=InitConfig(from_=str(tmp_path / "run")))
    _, base = load_base(config, Runner(config))
    attention = dataclasses.replace(config, lora=dataclasses.replace(IN_FP8, targets="attention"))
    state = init_state(attention)
    checkpoint = Checkpoints(tmp_path / "tuned")
    checkpoint.save(1, {"params": state.params, "router": state.router}, {"lora": base._asdict()})
    checkpoint.close()

    leaves = stored(find_checkpoint(tmp_path / "tuned"))
    kept, twice = leaves["params/layers/ffn/gate"], in_blocks(in_blocks(leaves))
    assert kept.scales is not None
    place = (0, 0)
    for name in ("params/layers/ffn/gate", "params/dense_layers/ffn/gate"):
        values, scales = twice[name].matrix(place[:len(leaves[name].shape) - 2])
        assert (np.log2(scales) % 1 == 0).all()  # ue8m0, as they were
    assert isinstance(twice["params/layers/attention/o"], InBlocks)


@pytest.mark.parametrize(("change", "said"), [
    (dict(lora=LoraConfig(fp8=True)), "lora.rank=None trains none; add --config.lora.rank=16"),
    (dict(model=dict(attention="a.b:C"), lora=dataclasses.replace(IN_FP8, targets="experts")), "take lora.fp8=False")])
def test_what_it_cannot_be_is_one_line(change, said):
    model = dataclasses.replace(naive.tiny(), **change.pop("model", {}))
    with pytest.raises(ConfigError, match=said):
        Config(model=model, **change)
