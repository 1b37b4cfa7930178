"""A second DeepSeek-V3: NumPy, float64, loops over tokens, heads and experts. Slow, and written only from the report.

The oracle of the model's tests, and the tiny model that it is compared with. It takes the model's own parameter trees.
"""

import functools
import math

import jax
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import DeepSeekV3

TINY = dict(vocab_size=64, d_model=32, num_layers=3, num_dense_layers=1, num_heads=2, q_rank=12, kv_rank=16,
            nope_head_dim=8, rope_head_dim=4, v_head_dim=6, dense_ffn_dim=24, expert_ffn_dim=10, num_experts=8,
            experts_per_token=3, num_groups=4, groups_kept=2, mtp_depth=1, dtype="float32", remat="none",
            attention_block=4)
V2 = dict(score="softmax", router_bias="none", normalize_gates=False, num_shared_experts=2, route_scale=16.0)


def tiny(**overrides) -> ModelConfig:
    return ModelConfig(**{**TINY, **overrides})


def fill(shapes, dtype=np.float32, seed=0):
    """Weights large enough for routing, masks and norms to matter; norm scales are not one, biases not zero."""
    rng = np.random.default_rng(seed)

    def leaf(path, s):
        names = [p.key for p in path]
        if names[-2:] == ["k_norm", "bias"]:
            return (0.3 * rng.standard_normal(s.shape)).astype(dtype)
        if names[-1] == "scale":
            return (1 + 0.3 * rng.standard_normal(s.shape)).astype(dtype)
        if names[0] == "router":
            return (0.3 * rng.standard_normal(s.shape) - 1.0).astype(dtype)
        return (0.25 * rng.standard_normal(s.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def variables_of(cfg, seed=0):
    """Random variables of the complete model; nothing is compiled to make them."""
    shapes = jax.eval_shape(lambda: DeepSeekV3(cfg).init(jax.random.key(0), np.zeros((1, 4), np.int32)))
    dtype = np.float64 if cfg.dtype == "float64" else np.float32
    variables = fill(shapes, dtype, seed)
    if cfg.router_bias == "multiplicative":
        variables["router"] = jax.tree.map(lambda b: b + 2, variables["router"])
    return variables


QUICKLY = {"xla_backend_optimization_level": 0}  # halves the compile time of programs that run once


@functools.cache
def forward(cfg, capture=()):
    """The jitted model: (variables, tokens, positions or None, segments or None) -> Output."""
    return jax.jit(lambda variables, tokens, positions=None, segments=None: DeepSeekV3(cfg).apply(
        variables, tokens, positions, segments, capture=capture), compiler_options=QUICKLY)


def norm(x, p, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"]


def silu(x):
    return x / (1 + np.exp(-x))


def ffn(p, x):
    return (silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def frequencies(cfg):
    """Frequency of each pair: plain, or YaRN's, whose ramp is between the pairs that turn beta_fast and beta_slow times
    within the original length."""
    R, y = cfg.rope_head_dim, cfg.yarn
    plain = [cfg.rope_theta ** (-2 * i / R) for i in range(R // 2)]
    if y is None:
        return np.array(plain)
    # Pair i turns original_length * theta^(-2i/R) / 2 pi times; this is solved for i.
    first, last = (R / 2 * math.log(y.original_length / (2 * math.pi * turns), cfg.rope_theta)
                   for turns in (y.beta_fast, y.beta_slow))
    first, last = max(math.floor(first), 0), min(math.ceil(last), R - 1)
    out = []
    for i, f in enumerate(plain):
        share = min(max((i - first) / (last - first), 0), 1)  # the share of interpolation
        out.append(f * (1 - share) + f / y.factor * share)
    return np.array(out)


def rotate(cfg, x_R, position):
    """One vector, as complex numbers."""
    z = (x_R[0::2] + 1j * x_R[1::2]) * np.exp(1j * position * frequencies(cfg))
    return np.stack([z.real, z.imag], -1).reshape(-1)


def scale_of(cfg):
    m = 1.0 if cfg.yarn is None else 0.1 * cfg.yarn.mscale_all_dim * math.log(cfg.yarn.factor) + 1
    return m * m / math.sqrt(cfg.nope_head_dim + cfg.rope_head_dim)


def amplitude(cfg):
    """YaRN's factor for cos and sin."""
    if cfg.yarn is None:
        return 1.0
    m, n = (0.1 * x * math.log(cfg.yarn.factor) + 1 for x in (cfg.yarn.mscale, cfg.yarn.mscale_all_dim))
    return m / n


def mla(cfg, p, x_TD, positions_T, segments_T):
    T, N, C, V = len(x_TD), cfg.nope_head_dim, cfg.kv_rank, cfg.v_head_dim
    kv_TX = x_TD @ p["kv_a"]
    c_TC = norm(kv_TX[:, :C], p["kv_norm"], cfg.latent_norm_eps)
    turn = lambda x_TR: amplitude(cfg) * np.stack([rotate(cfg, x, t) for x, t in zip(x_TR, positions_T)])
    k_pe_TR = turn(kv_TX[:, C:])
    latent = x_TD if cfg.q_rank is None else norm(x_TD @ p["q_a"], p["q_norm"], cfg.latent_norm_eps)
    w_q = p["q"] if cfg.q_rank is None else p["q_b"]
    seen_T = [[s for s in range(t + 1) if segments_T[s] == segments_T[t]] for t in range(T)]
    if cfg.index_topk is not None:
        score_TS = index_scores(cfg, p["indexer"], x_TD, latent, positions_T)
        seen_T = [sorted(sorted(seen, key=lambda s: -score_TS[t, s])[:cfg.index_topk])
                  for t, seen in enumerate(seen_T)]
    y_TD = np.zeros_like(x_TD)
    for h in range(cfg.num_heads):
        q_TA, kv_TY = latent @ w_q[:, h], c_TC @ p["kv_b"][:, h]
        q_pe_TR = turn(q_TA[:, N:])
        for t in range(T):
            seen = seen_T[t]
            score = np.array([q_TA[t, :N] @ kv_TY[s, :N] + q_pe_TR[t] @ k_pe_TR[s] for s in seen]) * scale_of(cfg)
            share = np.exp(score - score.max())
            share /= share.sum()
            o_V = sum(a * kv_TY[s, N:] for a, s in zip(share, seen))
            assert o_V.shape == (V,)
            y_TD[t] += o_V @ p["o"][h]
    return y_TD


def index_scores(cfg, p, x_TD, latent_TQ, positions_T):
    """V3.2's score of every earlier token for every token, [T, S]; RoPE's pairs are split, first members first."""
    R, T = cfg.rope_head_dim, len(x_TD)
    in_halves = np.r_[0:R:2, 1:R:2]

    def turn(v_I, t):
        pairs_R = np.empty(R)
        pairs_R[in_halves] = v_I[:R]
        return np.concatenate([amplitude(cfg) * rotate(cfg, pairs_R, t)[in_halves], v_I[R:]])

    def normed(v_I):
        return (v_I - v_I.mean()) / np.sqrt(v_I.var() + 1e-6) * p["k_norm"]["scale"] + p["k_norm"]["bias"]

    k_TI = np.stack([turn(normed(x @ p["wk"]), t) for x, t in zip(x_TD, positions_T)])
    score_TS = np.zeros((T, T))
    for t, s in np.ndindex(T, T):
        for j in range(cfg.index_heads):
            product = turn(latent_TQ[t] @ p["wq_b"][:, j], positions_T[t]) @ k_TI[s] / math.sqrt(cfg.index_head_dim)
            score_TS[t, s] += x_TD[t] @ p["weights_proj"][:, j] / math.sqrt(cfg.index_heads) * max(product, 0)
    return score_TS


def route(cfg, scores_E, bias_E):
    """The chosen experts of one token, best first, and their gates."""
    choice = dict(enumerate(scores_E))
    if cfg.router_bias == "additive":
        choice = {e: s + bias_E[e] for e, s in choice.items()}
    elif cfg.router_bias == "multiplicative":
        choice = {e: s * bias_E[e] for e, s in choice.items()}
    size = cfg.num_experts // cfg.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(cfg.num_groups)]
    if cfg.num_groups > 1:
        best = 2 if cfg.score == "sigmoid" else 1
        groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:best]))
        groups = groups[:cfg.groups_kept]
    candidates = sorted((e for group in groups for e in group), key=lambda e: -choice[e])
    chosen = candidates[:cfg.experts_per_token]
    gates = np.array([scores_E[e] for e in chosen])
    if cfg.normalize_gates:
        gates = gates / gates.sum()
    return chosen, gates * cfg.route_scale


def affinities(cfg, logits_NE):
    if cfg.score == "sigmoid":
        return 1 / (1 + np.exp(-logits_NE))
    e = np.exp(logits_NE - logits_NE.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sequence_loss(cfg, scores_BTE):
    """sum_i f_i P_i of each sequence (report, equations 17 to 20), averaged."""
    total = 0.0
    for scores_TE in scores_BTE:
        T, E = scores_TE.shape
        f, P = np.zeros(E), np.zeros(E)
        for s_E in scores_TE:
            f[np.argsort(-s_E, kind="stable")[:cfg.experts_per_token]] += E / (cfg.experts_per_token * T)
            P += s_E / s_E.sum() / T
        total += f @ P
    return total / len(scores_BTE)


def auxiliary_loss(cfg, scores_NE, chosen_NK):
    """sum_i f_i P_i over all tokens of the batch, with f from the actual choices."""
    N, E = scores_NE.shape
    f = np.array([(np.asarray(chosen_NK) == e).sum() for e in range(E)]) * E / (cfg.experts_per_token * N)
    return f @ (scores_NE / scores_NE.sum(-1, keepdims=True)).mean(0)


def moe(cfg, p, x_BTD, bias_E):
    scores_BTE = affinities(cfg, x_BTD @ p["router"]["weight"])
    y_BTD = ffn(p["shared"], x_BTD) if cfg.num_shared_experts else np.zeros_like(x_BTD)
    counts_E, chosen_NK = np.zeros(cfg.num_experts, int), []
    for b, t in np.ndindex(x_BTD.shape[:2]):
        chosen, gates = route(cfg, scores_BTE[b, t], bias_E)
        chosen_NK.append(chosen)
        for e, g in zip(chosen, gates):
            counts_E[e] += 1
            y_BTD[b, t] += g * ffn({name: p[name][e] for name in ("gate", "up", "down")}, x_BTD[b, t])
    scores_NE = scores_BTE.reshape(-1, cfg.num_experts)
    return y_BTD, dict(counts_E=counts_E, sequence_loss=sequence_loss(cfg, scores_BTE),
                       auxiliary_loss=auxiliary_loss(cfg, scores_NE, chosen_NK))


def block(cfg, p, x_BTD, bias_E, positions, segments, is_moe):
    h_BTD = norm(x_BTD, p["attention_norm"], cfg.norm_eps)
    x_BTD = x_BTD + np.stack([mla(cfg, p["attention"], *row) for row in zip(h_BTD, positions, segments)])
    h_BTD = norm(x_BTD, p["ffn_norm"], cfg.norm_eps)
    if not is_moe:
        return x_BTD + ffn(p["ffn"], h_BTD), None
    y_BTD, stats = moe(cfg, p["ffn"], h_BTD, bias_E)
    return x_BTD + y_BTD, stats


def model(cfg, variables, tokens_BT, positions=None, segments=None):
    """dict of logits, hidden, mtp_logits, mtp_hidden, counts, sequence_loss, auxiliary_loss."""
    p, router = variables["params"], variables.get("router", {})
    positions = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape) if positions is None else positions
    segments = np.zeros_like(tokens_BT) if segments is None else segments
    no_bias = np.zeros((max(cfg.num_moe_layers, cfg.mtp_depth), cfg.num_experts))
    x, stats = p["embedding"][tokens_BT], {"bias": [], "mtp_bias": []}
    for layer in range(cfg.num_layers):
        is_moe = layer >= cfg.num_dense_layers
        name, index = ("layers", layer - cfg.num_dense_layers) if is_moe else ("dense_layers", layer)
        own = jax.tree.map(lambda w: w[index], p[name])  # noqa: B023
        bias_E = router.get("bias", no_bias)[index] if is_moe else None
        x, seen = block(cfg, own, x, bias_E, positions, segments, is_moe)
        stats["bias"] += [seen] if is_moe else []
    h = hidden = norm(x, p["norm"], cfg.norm_eps)
    mtp_hidden = []
    for k in range(1, cfg.mtp_depth + 1):
        m = p[f"mtp_{k}"]
        ahead = p["embedding"][np.roll(tokens_BT, -k, axis=1)]
        both = np.concatenate([norm(ahead, m["embedding_norm"], cfg.norm_eps),
                               norm(h, m["hidden_norm"], cfg.norm_eps)], -1)
        y, seen = block(cfg, m["block"], both @ m["projection"], router.get("mtp_bias", no_bias)[k - 1], positions,
                        segments, True)
        stats["mtp_bias"].append(seen)
        h = norm(y, m["norm"], cfg.norm_eps)
        mtp_hidden.append(h)
    every = stats["bias"] + stats["mtp_bias"]
    return dict(logits=hidden @ p["head"], hidden=hidden, mtp_hidden=mtp_hidden,
                mtp_logits=[h @ p["head"] for h in mtp_hidden],
                counts={name: np.stack([s["counts_E"] for s in seen]) for name, seen in stats.items() if seen},
                sequence_loss=np.mean([s["sequence_loss"] for s in every]) if every else 0.0,
                auxiliary_loss=np.mean([s["auxiliary_loss"] for s in every]) if every else 0.0)
