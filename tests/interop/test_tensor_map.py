"""The table of names: no tensor twice, none omitted, and the transforms are inverses of each other."""

import math

import numpy as np
import pytest

from deepseek_jax.checkpoint.arrays import dequantize, quantize
from deepseek_jax.config import PRESETS, model_config
from deepseek_jax.interop import load_hf, tensor_map
from tests.interop import checkpoints


@pytest.mark.parametrize("preset", PRESETS)
def test_every_number_of_every_parameter_has_one_place(preset):
    cfg = model_config(preset)
    entries = [e for e in tensor_map.entries(cfg).values() if e.copy_of is None]

    assert len({(e.path, e.index) for e in entries}) == len(entries)
    assert sum(math.prod(e.shape) for e in entries) == sum(map(math.prod, tensor_map.leaves(cfg).values()))


def test_v3_has_the_published_number_of_parameters_with_mtp_and_its_copies():
    total = sum(math.prod(e.shape) for e in tensor_map.entries(model_config("v3_671b")).values())

    assert round(total / 1e9, 2) == 684.49


def test_published_names():
    v3 = tensor_map.entries(model_config("v3_671b"))

    assert v3["model.layers.61.eh_proj.weight"].shape == (7168, 14336)
    assert v3["model.layers.60.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert v3["model.layers.3.mlp.gate.e_score_correction_bias"].shape == (256,)
    assert v3["model.layers.61.shared_head.head.weight"].copy_of == "lm_head.weight"
    assert not any("e_score" in name for name in tensor_map.entries(model_config("v2_236b")))


@pytest.mark.parametrize("halves", [0, 4])
@pytest.mark.parametrize(("transform", "shape"), [
    (tensor_map.SAME, (6,)), (tensor_map.LINEAR, (6, 4)), (tensor_map.LINEAR, (6, 2, 4)),
    (tensor_map.HEADS_IN, (3, 2, 5)),
    (tensor_map.QUERY, (6, 2, 7)), (tensor_map.KEY, (6, 9))])
def test_a_transform_and_its_inverse(transform, shape, halves):
    theirs = np.arange(math.prod(shape), dtype=np.float32).reshape(transform.their_shape(shape))

    ours = transform.to_ours(theirs, shape, halves)

    assert ours.shape == shape
    np.testing.assert_array_equal(transform.to_theirs(ours, shape, halves), theirs)


def test_half_split_rope_rows_come_in_as_pairs(tmp_path):
    """rope_interleave=false: the first members of all pairs, then the second ones."""
    raw = checkpoints.config(checkpoints.golden("plain"))
    R, nope, heads = raw["qk_rope_head_dim"], raw["qk_nope_head_dim"], raw["num_attention_heads"]
    split = [*range(0, R, 2), *range(1, R, 2)]

    def halve(arrays):
        for name, a in arrays.items():
            if name.endswith("q_b_proj.weight"):
                per_head = a.reshape(heads, nope + R, -1).copy()
                per_head[:, nope:] = per_head[:, [nope + i for i in split]]
                arrays[name] = per_head.reshape(a.shape)
            elif name.endswith("kv_a_proj_with_mqa.weight"):
                arrays[name] = np.concatenate([a[:-R], a[-R:][split]])

    folder = checkpoints.changed(tmp_path / "halves", "plain", halve, rope_interleave=False)

    for path, leaf in leaves_of(load_hf(checkpoints.golden("plain"))[1]).items():
        np.testing.assert_array_equal(leaves_of(load_hf(folder)[1])[path], leaf, err_msg=path)


def leaves_of(tree, path=""):
    if not hasattr(tree, "items"):
        return {path: np.asarray(tree)}
    return {p: leaf for name, child in tree.items() for p, leaf in leaves_of(child, f"{path}/{name}").items()}


@pytest.mark.parametrize("scale_dtype", ["float32", "float8_e8m0fnu"])
def test_ragged_blocks_are_quantized_and_dequantized_by_the_book(scale_dtype):
    w = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    w[128:, 256:] = 0  # a corner of zeros: its scale is that of the smallest amax

    values, scales = quantize(w)
    if scale_dtype != "float32":
        scales = np.exp2(np.ceil(np.log2(scales))).astype(np.dtype(scale_dtype))

    assert scales.shape == (2, 3)
    if scale_dtype == "float32":
        np.testing.assert_array_equal(scales[0, 0], np.float32(np.abs(w[:128, :128]).max()) / np.float32(448))
        assert scales[1, 2] == np.float32(1e-4) / np.float32(448)
        assert np.abs(dequantize(values, scales, np.float32) - w).max() <= np.abs(w).max() / 16
    expected = np.zeros_like(w)
    for r, c in np.ndindex(*w.shape):
        expected[r, c] = np.float32(values[r, c]) * np.float32(scales[r // 128, c // 128])
    np.testing.assert_array_equal(dequantize(values, scales, np.float32), expected)
    # A part that begins at any position.
    np.testing.assert_array_equal(dequantize(values[100:, 150:290], scales, np.float32, 100, 150),
                                  expected[100:, 150:290])
