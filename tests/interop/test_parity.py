"""Checkpoints of transformers 5 give the logits of transformers 5, which were made by the scripts of tests/golden."""

import numpy as np
import pytest

from deepseek_jax.interop import load_hf, save_hf
from tests.interop.checkpoints import CASES, golden, tensors
from tests.interop.parity_table import answers, measure
from tests.model import naive


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case):
    row = measure(case)

    assert row["logits"] <= 1e-5
    assert row["tokens"] == 32
    assert row["mtp"] is None or row["mtp"] <= 1e-5
    assert row["drafts"] is None or row["drafts"][0] == row["drafts"][1] >= 30


def test_there_are_cases_with_mtp_and_with_the_drafts_of_transformers():
    row = measure("mtp")

    assert row["mtp"] is not None and row["drafts"] is not None


def test_a_model_made_here_has_the_same_mtp_loss_after_export(tmp_path):
    cfg = load_hf(golden("mtp"))[0]
    variables = naive.variables_of(cfg, seed=3)
    tokens_BT = np.arange(2 * 20).reshape(2, 20) * 7 % cfg.vocab_size

    save_hf(str(tmp_path / "out"), cfg, variables)
    back_cfg, back = load_hf(str(tmp_path / "out"))

    assert back_cfg.mtp_depth == 1
    assert mtp_loss(cfg, back, tokens_BT) == mtp_loss(cfg, variables, tokens_BT) > 0


def mtp_loss(cfg, variables, tokens_BT):
    logits_BTW = answers(cfg, variables, tokens_BT)[1][0][:, :-2].astype(np.float64)
    log_p_BTW = logits_BTW - np.log(np.exp(logits_BTW).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p_BTW, tokens_BT[:, 2:, None], axis=-1).mean()


@pytest.mark.parametrize("case", sorted(set(CASES) - {"kimi_k2_5", "kimi_k2_thinking", "moonlight", "v3_1"}))
def test_an_export_has_the_names_shapes_and_values_of_transformers(tmp_path, case):
    cfg, variables = load_hf(golden(case))

    save_hf(str(tmp_path / "out"), cfg, variables)

    theirs, ours = tensors(golden(case)), tensors(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
