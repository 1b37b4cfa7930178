"""Checks that transformers loads the exports of `save_hf` and `to_hf` and gives our logits, in two environments:

    python -m tests.golden.check_export write DIR     in ours: exports models with random weights and their logits, and
                                                      the golden checkpoints after a conversion to a work directory
    python tests/golden/check_export.py check DIR     in the environment of benchmarks/peer.txt

Tests do not use torch, so this is run by hand. Prints one line per model; exits with 1 if an error exceeds 1e-5, or a
weight is missing or unexpected. transformers reads MTP modules as `generate(use_mtp=True)` does.
"""

import pathlib
import sys
import tempfile

import numpy as np

TOLERANCE = 1e-5


def write(folder):
    import jax

    from deepseek_jax.interop import load_hf, save_hf
    from deepseek_jax.interop.convert import from_hf, to_hf
    from deepseek_jax.model import DeepSeekV3
    from tests.interop.checkpoints import CASES, golden
    from tests.model import naive

    tokens_BT = np.random.default_rng(0).integers(0, 48, (2, 24))
    for seed, case in enumerate(CASES):
        cfg = load_hf(golden(case))[0]
        variables = naive.variables_of(cfg, seed)
        output = jax.jit(lambda v, cfg=cfg: DeepSeekV3(cfg).apply(v, tokens_BT))(variables)
        save_hf(str(folder / case), cfg, variables)
        ours = {"tokens_BT": tokens_BT, "logits_BTW": np.asarray(output.logits_BTW)}
        if output.mtp_logits:
            ours["mtp_logits_BTW"] = np.asarray(output.mtp_logits[0])[:, :-1]
        np.savez(folder / case / "ours.npz", **ours)
        with tempfile.TemporaryDirectory() as run:
            from_hf(golden(case), f"{run}/run")
            to_hf(f"{run}/run", str(folder / f"{case}_again"))
        expected = np.load(f"{golden(case)}/expected.npz")
        kept = {name: expected[name] for name in ("tokens_BT", "logits_BTW", "mtp_logits_BTW") if name in expected}
        np.savez(folder / f"{case}_again" / "ours.npz", **kept)


def check(folder) -> bool:
    import torch
    import transformers
    from make_hf_vectors import drafting, mtp_logits

    good = True
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        ours = np.load(path / "ours.npz")
        model, about = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, attn_implementation="eager")
        with torch.no_grad():
            theirs_BTW = model.eval()(input_ids=torch.tensor(ours["tokens_BT"]), use_cache=False).logits.numpy()
        error = np.abs(ours["logits_BTW"] - theirs_BTW).max() / np.abs(theirs_BTW).max()
        # transformers loads MTP modules only to draft with them: otherwise their layer is unexpected by design.
        layer = f"model.layers.{model.config.num_hidden_layers}."
        left = [name for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in about[what]
                if not str(name).startswith(layer)]
        good &= bool(error <= TOLERANCE and not left)
        line = f"{path.name:22s} {type(model).__name__:24s} max relative error {error:.1e}  left or missing: {left}"
        if "mtp_logits_BTW" in ours and getattr(model.config, "num_mtp_layers", 0):
            with torch.no_grad():
                theirs_BTW = mtp_logits(*drafting(path), torch.tensor(ours["tokens_BT"].astype(np.int64))).numpy()
            error = np.abs(ours["mtp_logits_BTW"] - theirs_BTW).max() / np.abs(theirs_BTW).max()
            good &= bool(error <= TOLERANCE)
            line += f"  MTP {error:.1e}"
        print(line)
    return good


if __name__ == "__main__":
    where = pathlib.Path(sys.argv[2])
    if sys.argv[1] == "write":
        where.mkdir(parents=True)
        write(where)
    else:
        sys.exit(0 if check(where) else 1)
