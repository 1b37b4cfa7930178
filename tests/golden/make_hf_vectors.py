"""Makes the parity vectors `hf_<case>/`: tiny random models of transformers, and their outputs.

Each case has `model.safetensors` and `config.json` as save_pretrained writes them, and `expected.npz`:

    tokens_BT        int32 [2, 24]                     logits_BTW       float32 [2, 24, W]
    hidden_BTD       float32 [2, 24, D], after the final norm
    chosen_LBTK      int32, the experts of each MoE layer, ascending
    prompt, greedy   int32 [8] and [32]: the prompt and its greedy continuation
    mtp_logits_BTW   float32 [2, 23, W] (with an MTP module): row t has seen tokens 0..t+1 and predicts token t+2
    drafts           int32 [n, 2] (with an MTP module that transformers drafts with): number of known tokens, and the
                     token after next that `generate(use_mtp=True)` drafted while it continued `prompt` to `greedy`

Weights are large enough for routing, masks and norms to matter, norms are not ones, and no two candidates for a
choice of the router or of greedy decoding are closer than MARGIN, so that float32 noise cannot change the result.

Cases named after a published checkpoint have its names, dtypes and keys that differ from V3's (FORMATS).

Made in a Python 3.11 environment with benchmarks/peer.txt and, for `kimi_k2_thinking` and `kimi_k2_5`,
compressed-tensors:  python tests/golden/make_hf_vectors.py [case ...]
"""

import itertools
import json
import pathlib
import re
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.generation.candidate_generator import MTPCandidateGenerator
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
    # theta 100: of the four frequencies one is kept, one is halfway up the ramp, two are interpolated
    return {"rope_type": "yarn", "rope_theta": 100.0, "factor": 40.0, "original_max_position_embeddings": 32,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": mscale}


ONE_GROUP = dict(n_group=1, topk_group=1)
INT4_SIZES = dict(ONE_GROUP, num_hidden_layers=2, hidden_size=64, moe_intermediate_size=32, n_routed_experts=4,
                  num_experts_per_tok=2, vocab_size=48)

# case -> (model, differences from TINY)
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
    "v3_1": ("v3", dict(num_hidden_layers=2, hidden_size=132, n_routed_experts=4, n_group=2, num_experts_per_tok=2,
                        intermediate_size=130, vocab_size=48)),
    "moonlight": ("v3", dict(ONE_GROUP, q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=2.446,
                             rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 50000.0})),
    "kimi_k2": ("v3", dict(ONE_GROUP, routed_scaling_factor=2.827, qk_rope_head_dim=8, max_position_embeddings=1024,
                           rope_parameters=yarn(1.0) | {"beta_fast": 1.0, "factor": 32.0})),
    "glm_4_7_flash": ("glm", dict(ONE_GROUP, num_hidden_layers=2, v_head_dim=16, qk_nope_head_dim=12,
                                  routed_scaling_factor=1.8, rms_norm_eps=1e-5, eos_token_id=[7, 9, 11], vocab_size=64,
                                  rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "joyai_llm_flash": ("v3", dict(ONE_GROUP, num_hidden_layers=2, vocab_size=64, num_mtp_layers=1,
                                   rope_parameters={"rope_type": "default", "rope_theta": 32e6})),
    "gigachat3": ("v3", dict(ONE_GROUP, num_hidden_layers=2, vocab_size=64, num_mtp_layers=1, q_lora_rank=None,
                             v_head_dim=12)),
    "v3_2": ("v32", dict(num_hidden_layers=2, vocab_size=64, qk_rope_head_dim=8, rope_parameters=yarn(1.0),
                         max_position_embeddings=1280, index_topk=5, index_n_heads=16, index_head_dim=12)),
    "kimi_k2_thinking": ("v3", INT4_SIZES),
    "kimi_k2_5": ("v3", INT4_SIZES),
}


def randomize(module, draw):
    """Fills all weights of a model, and the routing biases: strongly negative, with a spread that affects routing."""

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
               "glm": (transformers.Glm4MoeLiteConfig, transformers.Glm4MoeLiteForCausalLM),
               "v32": (transformers.DeepseekV32Config, transformers.DeepseekV32ForCausalLM),
               "v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM)}
    make_config, make_model = classes[family]
    numbers = TINY | ({"num_mtp_layers": 0} if family == "v3" else {}) | changes
    config = make_config(**numbers, attn_implementation="eager", experts_implementation="eager")
    model = make_model(config).float().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    if config.rms_norm_eps != 1e-6:  # small inputs and latents: the eps of either norm shows in the logits
        for name, p in model.named_parameters():
            if re.search(r"embed_tokens|q_a_proj|kv_a_proj", name):
                p.data *= 0.03
    return model


def watch_routers(model):
    """Records every router call: the chosen experts, ascending, and the margins of the choices."""
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
    """Continues `prompt` without a cache. Also returns the smallest lead of a chosen token over the next best."""
    ids, margin = torch.tensor(prompt)[None], float("inf")
    for _ in range(count):
        best = model(input_ids=ids, use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    return ids[0, len(prompt):].numpy(), margin


def chooses_clearly(model, tokens_BT):
    """Whether indexers, if there are any, would choose the same tokens with slightly perturbed weights."""
    before = model(input_ids=tokens_BT, use_cache=False).logits
    noise, kept = torch.Generator().manual_seed(0), {}
    for name, p in model.named_parameters():
        if "indexer" in name:
            kept[name] = p.detach().clone()
            p.mul_(1 + MARGIN / 10 * torch.randn(p.shape, generator=noise))
    off = model(input_ids=tokens_BT, use_cache=False).logits
    model.load_state_dict(kept, strict=False)
    return (off - before).abs().max().item() < MARGIN


def with_mtp(model):
    """A model for which transformers has MTP modules: itself, or a V3 of the same sizes and weights."""
    if isinstance(model, transformers.DeepseekV3ForCausalLM):
        return model
    numbers = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "mlp_layer_types")}
    config = transformers.DeepseekV3Config(**numbers | {"first_k_dense_replace": 1, "num_mtp_layers": 1},
                                           attn_implementation="eager", experts_implementation="eager")
    twin = transformers.DeepseekV3ForCausalLM(config).float().eval()
    twin.load_state_dict(model.state_dict())
    return twin


def add_mtp(model, folder, tokens_BT, hidden_BTD, seed):
    """Appends one MTP module to the checkpoint in the released layout, and returns its logits."""
    mtp = MtpModel(with_mtp(model), 1).float().eval()
    block = mtp.layers[0]
    randomize(block, torch.Generator().manual_seed(seed + 1))
    calls = watch_routers(mtp)
    positions_BT = torch.arange(1, tokens_BT.shape[1])[None]
    cache = transformers.cache_utils.MtpCache(config=mtp.config)
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


def drafting(folder):
    """The model of a folder, and its MTP module as transformers itself reads it.

    transformers looks for the module only at V3's layer 61; here it looks after the last layer.
    """
    how = dict(attn_implementation="eager", experts_implementation="eager", dtype=torch.float32)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, **how).eval()
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]
    return model, MtpModel.from_pretrained(model).eval()


def mtp_logits(model, mtp, tokens_BT):
    """Row t has seen tokens 0..t+1."""
    hidden_BTD = model(input_ids=tokens_BT, output_hidden_states=True, use_cache=False).hidden_states[-1]
    positions_BT = torch.arange(1, tokens_BT.shape[1])[None]
    cache = transformers.cache_utils.MtpCache(config=mtp.config)
    return model.lm_head(mtp.forward_layer(0, hidden_BTD[:, :-1], positions_BT, cache, input_ids=tokens_BT[:, 1:]))


def drafts(folder, expected):
    """The drafts of `generate(use_mtp=True)`, in the format of `expected`, and the smallest lead of a draft.

    Checks that logits and continuation equal those of `expected`.
    """
    model, mtp = drafting(folder)
    found = mtp_logits(model, mtp, torch.tensor(expected["tokens_BT"].astype(np.int64)))
    np.testing.assert_allclose(found.numpy(), expected["mtp_logits_BTW"], atol=1e-5)
    seen, margin, ask = [], float("inf"), MTPCandidateGenerator.get_candidates

    def watched(self, input_ids, *rest, **named):
        nonlocal margin
        candidates, logits = answer = ask(self, input_ids, *rest, **named)
        if logits is not None:
            seen.append((input_ids.shape[1], candidates[0, -1].item()))
            best = logits[0, -1].topk(2).values
            margin = min(margin, (best[0] - best[1]).item())
        return answer

    MTPCandidateGenerator.get_candidates = watched
    try:
        prompt = torch.tensor(expected["prompt"].astype(np.int64))[None]
        said = model.generate(prompt, max_new_tokens=len(expected["greedy"]), do_sample=False, use_mtp=True,
                              eos_token_id=None, pad_token_id=0)
    finally:
        MTPCandidateGenerator.get_candidates = ask
    np.testing.assert_array_equal(said[0, len(expected["prompt"]):].numpy(), expected["greedy"])
    return np.array(seen), margin


def fp8(name, weight):
    """A weight in FP8 with power-of-two scales, as V3.1 stores it -> (its tensors, their dequantized value)."""
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
    blocks = blocks.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2)
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((2, 3)) / 448)))
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:weight.shape[0], :weight.shape[1]]
    values = (weight / spread).to(torch.float8_e4m3fn)
    return {name: values, name + "_scale_inv": scale}, values.float() * spread


def int4(name, weight):
    """A weight in four bits as compressed-tensors packs it -> (its tensors, the value that the library reads)."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Packer
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**WEIGHTS))
    scale = (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7).bfloat16()
    packed = Packer.compress({"weight": weight.bfloat16(), "weight_scale": scale}, scheme)
    packed["weight_shape"] = packed["weight_shape"].to(torch.int32)
    said = Packer.decompress(packed, scheme)["weight"].float()
    return {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in packed.items()}, said


WEIGHTS = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
ROUNDED = {"v3_1": (fp8, r"(self_attn|mlp)\..*proj.*\.weight"),
           "kimi_k2_thinking": (int4, r"mlp\.experts\.\d+\..*\.weight"),
           "kimi_k2_5": (int4, r"mlp\.experts\.\d+\..*\.weight")}


def rounded(case, model):
    """The model with its weights rounded to its format, and all tensors in that format, or None."""
    if case == "moonlight":
        for bias in (b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")):
            bias.copy_(bias.bfloat16().float())
    if case not in ROUNDED:
        return model, None
    store, names = ROUNDED[case]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        model.save_pretrained(folder)
        weights, tensors = load_file(path), {}
        for name, weight in weights.items():
            if re.search(names, name):
                held, weights[name] = store(name, weight)
                tensors |= held
            else:
                tensors[name] = weight
        save_file(weights, path, metadata={"format": "pt"})
        again = type(model).from_pretrained(folder, attn_implementation="eager", experts_implementation="eager",
                                            dtype=torch.float32)
    return again.eval(), tensors


def as_published(folder, change):
    """Rewrites a checkpoint in place: change(tensors, config) makes the differences of its publisher."""
    tensors, path = load_file(folder / "model.safetensors"), folder / "config.json"
    raw = json.loads(path.read_text())
    raw = change(tensors, raw) or raw
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(raw, indent=2) + "\n")


def moonlight(tensors, raw):
    for layer in range(raw["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.arange(2.0)
    for name in [n for n in tensors if n.endswith("e_score_correction_bias")]:
        tensors[name] = tensors[name].bfloat16()


def kimi_k2(tensors, raw):
    rope = raw.pop("rope_parameters")
    raw |= {"model_type": "kimi_k2", "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}


def glm(tensors, raw):
    raw["num_nextn_predict_layers"] = 1


def kimi_k2_thinking(tensors, raw):
    raw |= {"model_type": "kimi_k2", "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}}}}


def kimi_k2_5(tensors, raw):
    kimi_k2_thinking(tensors, raw)
    for name in list(tensors):
        tensors["language_model." + name] = tensors.pop(name)
    tensors |= {"vision_tower.patch_embed.proj.weight": torch.ones(4, 3, 2, 2),
                "mm_projector.proj.0.bias": torch.ones(6)}
    return {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": raw,
            "vision_config": {"hidden_size": 4}, "eos_token_id": 5, "tie_word_embeddings": False}


FORMATS = {"v3_1": lambda tensors, raw: raw | {"quantization_config": {
               "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
               "weight_block_size": [128, 128]}},
           "moonlight": moonlight, "kimi_k2": kimi_k2, "glm_4_7_flash": glm, "kimi_k2_5": kimi_k2_5,
           "joyai_llm_flash": lambda tensors, raw: raw | {"model_type": "joyai_llm_flash"},
           "kimi_k2_thinking": kimi_k2_thinking}


@torch.no_grad()
def make(case):
    """Writes one case, at the first seed whose choices are all clear."""
    folder = HERE / f"hf_{case}"
    for seed in itertools.count(1):
        model, draw = build(case, seed), torch.Generator().manual_seed(1000 + seed)
        model, stored = rounded(case, model)
        calls = watch_routers(model)
        tokens_BT = torch.randint(0, model.config.vocab_size, (2, 24), generator=draw)
        prompt = torch.randint(0, model.config.vocab_size, (8,), generator=draw).tolist()
        out = model(input_ids=tokens_BT, output_hidden_states=True, use_cache=False)
        hidden_BTD = out.hidden_states[-1]  # after the final norm; also the input of transformers' MTP modules
        torch.testing.assert_close(model.lm_head(hidden_BTD), out.logits)
        layers = model.config.num_hidden_layers - getattr(model.config, "first_k_dense_replace", 1)
        chosen_LBTK = torch.stack([chosen for chosen, _ in calls[:layers]]).unflatten(1, tokens_BT.shape)
        continuation, token_margin = greedy(model, prompt, 32)
        if min(token_margin, *(margin for _, margin in calls)) < MARGIN:
            continue
        answered = torch.tensor([prompt + continuation.tolist()])
        if not all(chooses_clearly(model, read_BT) for read_BT in (tokens_BT, answered)):
            continue
        model.save_pretrained(folder)
        if stored:
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        expected = {"tokens_BT": tokens_BT.numpy(), "logits_BTW": out.logits.numpy(), "hidden_BTD": hidden_BTD.numpy(),
                    "chosen_LBTK": chosen_LBTK.numpy(), "prompt": np.array(prompt), "greedy": continuation}
        if getattr(model.config, "num_mtp_layers", 0) or case == "glm_4_7_flash":
            extra, margin = add_mtp(model, folder, tokens_BT, hidden_BTD, seed)
            expected |= extra
            if margin < MARGIN:
                continue
        if getattr(model.config, "num_mtp_layers", 0):
            expected["drafts"], margin = drafts(folder, expected)
            if margin < MARGIN:
                continue
        np.savez_compressed(folder / "expected.npz",
                            **{k: v.astype(np.int32) if v.dtype.kind == "i" else v for k, v in expected.items()})
        if case in FORMATS:
            as_published(folder, FORMATS[case])
        (folder / "generation_config.json").unlink(missing_ok=True)
        used = len(np.unique(expected["chosen_LBTK"][0]))  # a router that never varies would prove little
        size = sum(f.stat().st_size for f in folder.iterdir())
        return print(f"{case}: seed {seed}, {size / 1000:.0f} kB, {used} experts used, "
                     f"{len(set(continuation.tolist()))} different tokens of 32")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    for name in sys.argv[1:] or CASES:
        make(name)
