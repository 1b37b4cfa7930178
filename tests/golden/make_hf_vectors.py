"""Makes the parity vectors `hf_<case>/`: tiny random models of transformers, and what they answer.

Each case holds `model.safetensors` and `config.json` as save_pretrained writes them, and `expected.npz`:

    tokens_BT        int32 [2, 24]                     logits_BTW       float32 [2, 24, W]
    hidden_BTD       float32 [2, 24, D], after the final norm
    chosen_LBTK      int32, the experts of each MoE layer, ascending
    prompt, greedy   int32 [8] and [32]: the prompt and its greedy continuation
    mtp_logits_BTW   float32 [2, 23, W] (case `mtp` only): row t has seen tokens 0..t+1 and predicts token t+2

Weights are large enough for routing, masks and norms to matter, norms are not ones, and no two candidates for a
choice of the router or of greedy decoding lie closer than MARGIN, so that float32 noise cannot change the answer.

Made in a Python 3.11 environment with benchmarks/peer.txt:  python tests/golden/make_hf_vectors.py [case ...]
"""

import itertools
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

HERE = pathlib.Path(__file__).resolve().parent
MARGIN = 1e-4

TINY = dict(
    vocab_size=80, hidden_size=28, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=24,
    num_attention_heads=2, num_key_value_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10, q_lora_rank=12,
    kv_lora_rank=16, n_routed_experts=8, moe_intermediate_size=8, num_experts_per_tok=3, n_shared_experts=1, n_group=4,
    topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, max_position_embeddings=2048, bos_token_id=None,
    eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


def yarn(mscale):
    # theta 100: of the four frequencies one is kept, one lies half way up the ramp, two are interpolated
    return {"rope_type": "yarn", "rope_theta": 100.0, "factor": 40.0, "original_max_position_embeddings": 32,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": mscale}


# case -> (model, what differs from TINY)
CASES = {
    "plain": ("v3", {}),
    "one_group": ("v3", dict(n_group=1, topk_group=1, num_attention_heads=3, num_key_value_heads=3)),
    "no_q_rank": ("v3", dict(q_lora_rank=None)),
    "yarn_1.0": ("v3", dict(qk_rope_head_dim=8, rope_parameters=yarn(1.0), max_position_embeddings=1280)),
    "yarn_0.707": ("v3", dict(qk_rope_head_dim=8, rope_parameters=yarn(0.707), max_position_embeddings=1280)),
    "v2_softmax": ("v2", dict(topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0,
                              n_shared_experts=2)),
    "no_norm_topk": ("v3", dict(norm_topk_prob=False)),
    "two_dense_two_shared": ("v3", dict(first_k_dense_replace=2, n_shared_experts=2)),
    "mtp": ("v3", dict(num_mtp_layers=1, num_hidden_layers=2, vocab_size=64, n_routed_experts=4, n_group=2,
                       topk_group=1, num_experts_per_tok=2)),
}


def randomize(module, draw):
    """Fills all of a model's weights, and the routing biases: strongly negative, with a spread that matters."""

    def normal(like, mean, std):
        return mean + std * torch.randn(like.shape, generator=draw)

    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" in name:
                p.copy_(normal(p, 1.0, 0.2))
            elif name.endswith("gate.weight"):
                p.copy_(normal(p, 0.0, 0.3))
            elif "embed" in name:
                p.copy_(normal(p, 0.0, 1.0))
            else:
                p.copy_(normal(p, 0.0, 1.5 * p.shape[-1] ** -0.5))
        for name, b in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(normal(b, -3.0, 0.15))


def build(case, seed):
    family, changes = CASES[case]
    classes = {"v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
               "v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM)}
    make_config, make_model = classes[family]
    numbers = TINY | ({"num_mtp_layers": 0} if family == "v3" else {}) | changes
    config = make_config(**numbers, attn_implementation="eager", experts_implementation="eager")
    model = make_model(config).float().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    return model


def watch_routers(model):
    """Records every router call: the chosen experts, ascending, and how clear the choices were."""
    calls = []

    def record(gate, inputs, output):
        logits_NE, _, chosen_NK = output
        if hasattr(gate, "e_score_correction_bias"):
            scores_NE, best = logits_NE.sigmoid() + gate.e_score_correction_bias, 2
        else:
            scores_NE, best = logits_NE.softmax(-1), 1
        groups_NGE = scores_NE.unflatten(-1, (gate.num_group, -1))
        group_NG = groups_NGE.topk(best, -1).values.sum(-1).sort(-1, descending=True).values
        margin = float("inf")
        if gate.topk_group < gate.num_group:
            margin = (group_NG[:, gate.topk_group - 1] - group_NG[:, gate.topk_group]).min().item()
            kept_NG = groups_NGE.topk(best, -1).values.sum(-1) >= group_NG[:, gate.topk_group - 1, None]
            scores_NE = groups_NGE.masked_fill(~kept_NG[..., None], -torch.inf).flatten(-2)
        ranked_NE = scores_NE.sort(-1, descending=True).values
        margin = min(margin, (ranked_NE[:, gate.top_k - 1] - ranked_NE[:, gate.top_k]).min().item())
        calls.append((chosen_NK.sort(-1).values, margin))

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(record)
    return calls


def greedy(model, prompt, count):
    """Continues `prompt` without a cache; the smallest lead of a chosen token over the next best comes along."""
    ids, margin = torch.tensor(prompt)[None], float("inf")
    for _ in range(count):
        best = model(input_ids=ids, use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    return ids[0, len(prompt):].numpy(), margin


def add_mtp(model, folder, tokens_BT, hidden_BTD, seed):
    """Appends one MTP module to the checkpoint in the released layout, and answers with its logits."""
    mtp = MtpModel(model, 1).float().eval()
    block = mtp.layers[0]
    randomize(block, torch.Generator().manual_seed(seed + 1))
    calls = watch_routers(mtp)
    positions_BT = torch.arange(1, tokens_BT.shape[1])[None]
    cache = transformers.cache_utils.MtpCache(config=model.config.get_mtp_config())
    out_BTD = mtp.forward_layer(0, hidden_BTD[:, :-1], positions_BT, cache, input_ids=tokens_BT[:, 1:])

    # Released checkpoints keep the module as one more layer, with its own copies of embedding and head.
    experts = block.mtp_block.mlp.experts
    weights, at = load_file(folder / "model.safetensors"), f"model.layers.{model.config.num_hidden_layers}."
    for name, value in block.state_dict().items():
        if name.startswith("mtp_block.mlp.experts."):
            continue
        weights[at + name.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")] = value.clone()
    for e in range(experts.num_experts):
        gate, up = experts.gate_up_proj[e].detach().chunk(2, dim=0)
        for part, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down_proj[e].detach())):
            weights[f"{at}mlp.experts.{e}.{part}.weight"] = value.clone()
    weights[at + "embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights[at + "shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {"mtp_logits_BTW": model.lm_head(out_BTD).numpy(), "mtp_chosen_BTK": calls[0][0].numpy()}, calls[0][1]


@torch.no_grad()
def make(case):
    """Writes one case, at the first seed whose choices are all clear."""
    folder = HERE / f"hf_{case}"
    for seed in itertools.count(1):
        model, draw = build(case, seed), torch.Generator().manual_seed(1000 + seed)
        calls = watch_routers(model)
        tokens_BT = torch.randint(0, model.config.vocab_size, (2, 24), generator=draw)
        prompt = torch.randint(0, model.config.vocab_size, (8,), generator=draw).tolist()
        out = model(input_ids=tokens_BT, output_hidden_states=True, use_cache=False)
        hidden_BTD = out.hidden_states[-1]  # after the final norm; what an MTP module of transformers is given too
        torch.testing.assert_close(model.lm_head(hidden_BTD), out.logits)
        layers = model.config.num_hidden_layers - model.config.first_k_dense_replace
        chosen_LBTK = torch.stack([chosen for chosen, _ in calls[:layers]]).unflatten(1, tokens_BT.shape)
        continuation, token_margin = greedy(model, prompt, 32)
        if min(token_margin, *(margin for _, margin in calls)) < MARGIN:
            continue
        model.save_pretrained(folder)
        expected = {"tokens_BT": tokens_BT.numpy(), "logits_BTW": out.logits.numpy(), "hidden_BTD": hidden_BTD.numpy(),
                    "chosen_LBTK": chosen_LBTK.numpy(), "prompt": np.array(prompt), "greedy": continuation}
        if getattr(model.config, "num_mtp_layers", 0):
            extra, margin = add_mtp(model, folder, tokens_BT, hidden_BTD, seed)
            expected |= extra
            if margin < MARGIN:
                continue
        np.savez_compressed(folder / "expected.npz",
                            **{k: v.astype(np.int32) if v.dtype.kind == "i" else v for k, v in expected.items()})
        (folder / "generation_config.json").unlink(missing_ok=True)
        used = len(np.unique(expected["chosen_LBTK"][0]))  # a router that always says the same would prove little
        size = sum(f.stat().st_size for f in folder.iterdir())
        return print(f"{case}: seed {seed}, {size / 1000:.0f} kB, {used} experts used, "
                     f"{len(set(continuation.tolist()))} different tokens of 32")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    for name in sys.argv[1:] or CASES:
        make(name)
