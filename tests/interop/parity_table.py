"""Our results compared with those of transformers 5 in tests/golden, float32 on a CPU.

    python -m tests.interop.parity_table                prints a table for the README
"""

import dataclasses
import json
import pathlib
from unittest import mock

import jax
import numpy as np

from deepseek_jax.interop import load_hf
from deepseek_jax.interop.agreement import Agreement, agreement, divergence
from deepseek_jax.model import DeepSeekV3, sparse_attention
from tests.interop.checkpoints import CASES, GOLDEN, golden
from tests.model import naive

LENGTH = 40  # one compiled program per case: the prompt of 8 and its 32 tokens; shorter rows are padded


def relative_error(ours, theirs) -> float:
    """Largest absolute error over the largest absolute value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def answers(cfg, variables, tokens_BT):
    """Logits [2, T, W] and MTP logits of two rows of at most LENGTH tokens."""
    padded_BT = np.zeros((2, LENGTH), np.int32)
    padded_BT[:, :tokens_BT.shape[1]] = tokens_BT
    output = naive.forward(cfg)(variables, padded_BT)
    cut = lambda logits: np.asarray(logits)[:, :tokens_BT.shape[1]]
    return cut(output.logits_BTW), [cut(logits) for logits in output.mtp_logits]


def greedy(cfg, variables, prompt, count) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits_BTW, _ = answers(cfg, variables, np.array([tokens]))
        tokens.append(int(logits_BTW[0, -1].argmax()))
    return tokens[len(prompt):]


def measure(case) -> dict:
    """{"logits": relative error, "mtp": that of the MTP logits or None, "tokens": how many of 32 agree, "drafts": None
    or (how many agree with those of transformers' `generate(use_mtp=True)`, their number)}."""
    cfg, variables = load_hf(golden(case))
    expected = np.load(f"{golden(case)}/expected.npz")
    logits_BTW, mtp = answers(cfg, variables, expected["tokens_BT"])
    tokens = greedy(cfg, variables, expected["prompt"].tolist(), len(expected["greedy"]))
    # A row sees one token more than the main model, so the last one has no token left.
    mtp_error = relative_error(mtp[0][:, :-1], expected["mtp_logits_BTW"]) if mtp else None
    drafts = None
    if "drafts" in expected:
        known = np.concatenate([expected["prompt"], expected["greedy"]])[None]
        best_T = answers(cfg, variables, known)[1][0][0].argmax(-1)
        drafts = sum(best_T[count - 2] == token for count, token in expected["drafts"]), len(expected["drafts"])
    return {"logits": relative_error(logits_BTW, expected["logits_BTW"]), "mtp": mtp_error,
            "tokens": int((np.array(tokens) == expected["greedy"]).sum()), "drafts": drafts}


def in_bfloat16(case) -> Agreement:
    """The model computing in bfloat16, compared with transformers in float32."""
    cfg, variables = load_hf(golden(case))
    expected = np.load(f"{golden(case)}/expected.npz")
    return agreement(dataclasses.replace(cfg, dtype="bfloat16"), variables, *(
        expected[name] for name in ("tokens_BT", "logits_BTW", "chosen_LBTK")))


def tokens_pinned() -> float:
    """The same for V3.2 with the reference's experts and the tokens that its indexer chooses in float32."""
    cfg, variables = load_hf(golden("v3_2"))
    expected = np.load(f"{golden('v3_2')}/expected.npz")
    chosen_mask = sparse_attention.chosen_mask

    def answer(cfg, masks=None):
        """Logits, and the mask of each layer; if `masks` are given, attention uses them."""
        found = []

        def replace(mask_BTS):
            found.append(np.array(mask_BTS))
            return found[-1] if masks is None else masks[len(found) - 1]

        def watched(score_BTS, topk):
            mask_BTS = chosen_mask(score_BTS, topk)
            return jax.pure_callback(replace, jax.ShapeDtypeStruct(mask_BTS.shape, mask_BTS.dtype), mask_BTS)

        # Without rematerialization, which does not support callbacks; a layer waits for the one before it.
        with mock.patch.object(jax, "checkpoint", lambda f: f), \
                mock.patch.object(sparse_attention, "chosen_mask", watched):
            model = DeepSeekV3(dataclasses.replace(cfg, remat="none"))
            run = jax.jit(lambda variables, *given: model.apply(variables, given[0], chosen=given[1]).logits_BTW)
            return np.asarray(run(variables, expected["tokens_BT"], expected["chosen_LBTK"])), found

    reference_BTW, masks = answer(cfg)
    assert relative_error(reference_BTW, expected["logits_BTW"]) < 1e-5 and len(masks) == cfg.num_layers
    low_BTW, _ = answer(dataclasses.replace(cfg, dtype="bfloat16"), masks)
    return float(divergence(expected["logits_BTW"], low_BTW).mean())


def of_transformers() -> dict[str, dict[str, float]]:
    """The same figures for transformers in bfloat16 itself, from tests/golden/make_bfloat16.py."""
    return json.loads(pathlib.Path(GOLDEN, "bfloat16.json").read_text())


def main():
    jax.config.update("jax_platforms", "cpu")
    print("| model | logits, max relative error | MTP logits | greedy tokens equal | drafts equal | bfloat16: KL | KL, "
          "routes pinned | that of transformers | choices flipped |\n|---|---|---|---|---|---|---|---|---|")
    theirs = of_transformers()
    for case in CASES:
        row, low = measure(case), in_bfloat16(case)
        mtp = "" if row["mtp"] is None else f"{row['mtp']:.1e}"
        drafts = "" if row["drafts"] is None else "{} of {}".format(*row["drafts"])
        print(f"| {case} | {row['logits']:.1e} | {mtp} | {row['tokens']} of 32 | {drafts} | {low.free:.1e} | "
              f"{low.pinned:.1e} | {theirs[case]['pinned']:.1e} | {low.flipped:.1%} |", flush=True)
    print(f"\nv3_2 with the indexer's tokens pinned too: {tokens_pinned():.1e}")


if __name__ == "__main__":
    main()
