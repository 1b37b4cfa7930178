"""Makes `bfloat16.json`: the difference of transformers in bfloat16 from float32, on the cases of make_hf_vectors.py.

    {case: {"free": KL, "pinned": KL, "flipped": fraction}}  mean over tokens, in nats; pinned: with float32's experts

Weights are bfloat16 except for the routing biases, as transformers loads them. Made in the environment of the vectors:

    python -m tests.golden.make_bfloat16
"""

import itertools
import json
import pathlib

import numpy as np
import torch
import transformers

from tests.golden.make_hf_vectors import CASES, build, rounded

HERE = pathlib.Path(__file__).resolve().parent


def published(case, expected):
    """The float32 model that gave the results of the case: the first seed that gives its tokens."""
    for seed in itertools.count(1):
        draw = torch.Generator().manual_seed(1000 + seed)
        tokens_BT = torch.randint(0, CASES[case][1].get("vocab_size", 80), (2, 24), generator=draw)
        if np.array_equal(tokens_BT, expected["tokens_BT"]):
            model, _ = rounded(case, build(case, seed))
            return model, tokens_BT


def gates_of(config, logits_NE, chosen_NK):
    """The gates of given experts, computed like the model's router."""
    scores_NE = logits_NE.softmax(-1) if config.model_type == "deepseek_v2" else logits_NE.sigmoid()
    gates_NK = scores_NE.gather(-1, chosen_NK)
    if config.norm_topk_prob and config.model_type != "deepseek_v2":
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
    return gates_NK * config.routed_scaling_factor


def watch(model, forced=None):
    """Records the experts of each router call; with `forced`, uses the experts of that record instead."""
    calls = []

    def hook(gate, inputs, output):
        logits_NE, gates_NK, chosen_NK = output
        if model.dtype == torch.float32:
            torch.testing.assert_close(gates_of(model.config, logits_NE, chosen_NK), gates_NK)
        calls.append(chosen_NK)
        if forced is not None:
            taken_NK = forced[len(calls) - 1]
            return logits_NE, gates_of(model.config, logits_NE, taken_NK).to(gates_NK.dtype), taken_NK

    handles = [m.register_forward_hook(hook) for name, m in model.named_modules() if name.endswith("mlp.gate")]
    return calls, handles


@torch.no_grad()
def measure(case):
    expected = np.load(HERE / f"hf_{case}" / "expected.npz")
    model, tokens_BT = published(case, expected)

    def answer(forced=None):
        calls, handles = watch(model, forced)
        logits_BTW = model(input_ids=tokens_BT, use_cache=False).logits.double()
        for handle in handles:
            handle.remove()
        return logits_BTW.log_softmax(-1), calls

    reference_BTW, chosen = answer()
    np.testing.assert_allclose(reference_BTW, torch.tensor(expected["logits_BTW"]).double().log_softmax(-1), atol=1e-4)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    (free_BTW, own), (pinned_BTW, _) = answer(), answer(chosen)
    kl = lambda other_BTW: (reference_BTW.exp() * (reference_BTW - other_BTW)).sum(-1).mean().item()
    flipped = [(a.sort(-1).values != b.sort(-1).values).any(-1) for a, b in zip(own, chosen)]
    return {"free": kl(free_BTW), "pinned": kl(pinned_BTW), "flipped": torch.cat(flipped).float().mean().item()}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    found = {case: measure(case) for case in sorted(CASES)}
    (HERE / "bfloat16.json").write_text(json.dumps(found, indent=1) + "\n")
    for case, row in found.items():
        print(f"{case}: KL {row['free']:.1e}, pinned {row['pinned']:.1e}, {row['flipped']:.1%} flipped")
